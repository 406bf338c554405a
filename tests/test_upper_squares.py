"""Oracle: numpy's own x^T x in float64; GPTQ's codes from the whole Hessian."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jq4
from jq4.observe_pair import observe_pair
from jq4.outer_rows import OuterRows
from jq4.statistics import WeightStatistics, check_finite, merge
from jq4.upper_squares import UpperSquares, diagonal, entries, whole

pytestmark = pytest.mark.arithmetic


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("features", [512, 700])
def test_squares_of_the_upper_half_are_the_whole_matrix(features):
    rows = [normal(count, features, seed=count) for count in (9, 5)]
    upper = UpperSquares.zeros(features)
    for x in rows:
        upper = upper.added(x)
    wanted = sum(np.asarray(x, np.float64).T @ np.asarray(x, np.float64) for x in rows)
    assert upper.shape == (features, features)
    np.testing.assert_allclose(upper.whole(), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(diagonal(upper), np.diagonal(upper.whole()))
    some, others = jnp.array([3, features - 1, 300]), jnp.array([511, 0])
    np.testing.assert_array_equal(entries(upper, some, others), upper.whole()[some][:, others])
    np.testing.assert_array_equal(entries(upper.whole(), some, others), upper.whole()[some][:, others])


def test_every_form_of_a_sum_merges_with_every_other():
    x, y = normal(4, 512), normal(3, 512, seed=1)
    wanted = np.asarray(x).T @ np.asarray(x) + np.asarray(y).T @ np.asarray(y)
    mine = UpperSquares.zeros(512).added(x)
    for theirs in (UpperSquares.zeros(512).added(y), OuterRows(y), y.T @ y):
        one, other = (WeightStatistics(jnp.int32(4), outer_total=part) for part in (mine, theirs))
        for total in (merge(one, other), merge(other, one)):
            np.testing.assert_allclose(whole(total.outer_total), wanted, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(total.hessian, wanted / 8, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def pair():
    """Statistics of a weight of many inputs, with those inputs to itself and as one of many."""
    dense = {"w": normal(512, 24) / 16}
    pairs = [(normal(96, 512, seed=seed), normal(96, 512, seed=seed) + 0.1) for seed in (1, 2)]
    return dense, *(
        observe_pair(lambda tree, x: x @ tree["w"], dense, dense, pairs, alone=alone) for alone in (["w"], [])
    )


def test_a_weight_whose_statistics_serve_no_other_has_half_a_hessian_and_the_same_codes(pair):
    dense, mine, whole_one = pair
    assert isinstance(mine["w"].outer_total, UpperSquares)
    assert 4 * mine["w"].outer_total.squares.size == 3 * 512**2  # of n = 2; half of it for many
    np.testing.assert_allclose(mine["w"].hessian, whole_one["w"].hessian, rtol=1e-5, atol=1e-5)
    found = [
        jq4.quantize(dense, "gptq-w4g128", {"w": each}, axes={"w": -2})["w"] for each in (mine["w"], _whole(mine["w"]))
    ]
    np.testing.assert_array_equal(found[0].codes, found[1].codes)


def _whole(statistics):
    return dataclasses.replace(statistics, outer_total=statistics.outer_total.whole())


def test_one_observed_function_keeps_half_a_hessian_where_told():
    tree, x = {"w": normal(512, 8)}, normal(40, 512)
    found = jq4.observe(lambda tree, x: x @ tree["w"], tree, [x], collect=("hessian",), alone=["w"])["w"]
    assert isinstance(found.outer_total, UpperSquares)
    np.testing.assert_allclose(found.hessian, np.asarray(x).T @ np.asarray(x) / 40, rtol=1e-4, atol=1e-5)
    small = jq4.observe(
        lambda tree, x: x @ tree["w"], {"w": normal(64, 8)}, [x[:, :64]], collect=("hessian",), alone=["w"]
    )
    assert isinstance(small["w"].outer_total, jax.Array)  # whose half would take more


def test_half_a_hessian_is_checked_and_given_up_like_a_whole_one(pair):
    dense, mine, _ = pair
    poisoned = UpperSquares(mine["w"].outer_total.squares.at[1, 2, 3].set(jnp.nan), 512)
    with pytest.raises(jq4.JQ4Error, match="w: its statistics are not finite \\(outer_total\\)"):
        check_finite("w", WeightStatistics(jnp.int32(1), outer_total=poisoned))
    copied = jax.tree.map(jnp.copy, mine)
    jq4.quantize(dense, "gptq-w4g128", copied, axes={"w": -2}, donate_stats=True)
    assert copied["w"].outer_total.squares.is_deleted()
