"""AdaRound. Oracles: torch's autograd of the paper's formulas, all roundings tried, dequantizing, and the start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_block import error_of, heavy_tailed, linear, problem, small_layer

import jq4
from jq4.qarray import codes_of
from jq4.tuning import tune_block
from jq4.tuning.rectified import (
    MARGIN,
    Rectified,
    begin,
    beta_at,
    harden,
    inverse_of_soft,
    penalty,
    soft,
    soft_weight_of,
    weight_of,
)

FORMS = ("rtn-w4g32", "rtn-w3g32-asym", "hqq-w4g32-asym", "nf4-g32", "fp4")


def test_soft_rounding_and_its_penalty_are_the_papers():
    """Nagel et al. 2020, equations 22 to 24, and their gradients."""
    torch = pytest.importorskip("torch")
    v = np.linspace(-6, 6, 97, dtype=np.float32)
    theirs = torch.tensor(v, requires_grad=True)
    h = torch.clamp(torch.sigmoid(theirs) * (1.1 + 0.1) - 0.1, 0, 1)
    for beta in (20.0, 7.5, 2.0):
        wanted = (1 - (2 * h - 1).abs().pow(beta)).sum()
        (gradient,) = torch.autograd.grad(wanted, theirs, retain_graph=True)
        found, mine = jax.value_and_grad(penalty)(jnp.asarray(v), jnp.float32(beta))
        assert float(found) == pytest.approx(float(wanted.detach()), rel=1e-5)
        np.testing.assert_allclose(np.asarray(mine), gradient.numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.asarray(soft(jnp.asarray(v))), h.detach().numpy(), atol=1e-6)
    assert soft(jnp.float32(3)) == 1 and soft(jnp.float32(-3)) == 0
    np.testing.assert_allclose(soft(inverse_of_soft(jnp.linspace(0, 1, 21))), np.linspace(0, 1, 21), atol=1e-6)


def test_beta_anneals_after_the_warm_up():
    shares = np.asarray([0, 0.2, 0.6, 1.0], np.float32)
    np.testing.assert_allclose(beta_at(jnp.asarray(shares), 0.2), [20, 20, 11, 2], rtol=1e-5)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("drawn", [False, True])
def test_a_start_is_its_packed_leaf_whatever_its_codes(name, drawn):
    weight = heavy_tailed(2, 72, 24)
    q = jq4.quantize({"kernel": weight}, name)["kernel"]
    if drawn:
        codes = jnp.asarray(np.random.default_rng(2).integers(0, 256, q.codes.shape), jnp.uint8)
        q = dataclasses.replace(q, codes=codes)
    start = begin(q, weight)
    again = harden(start, q, weight)
    for wanted, found in zip(jax.tree.leaves(q), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
    assert jax.tree.structure(again) == jax.tree.structure(q)
    np.testing.assert_array_equal(np.asarray(weight_of(start, q, weight)), np.asarray(q.dequantize()))


@pytest.mark.parametrize("name", FORMS)
def test_soft_weights_begin_near_the_dense_ones_and_end_as_what_is_stored(name):
    weight = heavy_tailed(2, 72, 24)
    q = jq4.quantize({"kernel": weight}, name)["kernel"]
    start = begin(q, weight)
    away = np.abs(np.asarray(soft_weight_of(start, q, weight)) - weight)
    rounded = np.abs(np.asarray(q.dequantize()) - weight)
    assert away.max() <= rounded.max() + 1e-6
    assert np.quantile(away / np.maximum(rounded, 1e-9), 0.9) < 3 * MARGIN or name.startswith("hqq")
    random = np.random.default_rng(3)
    sides = np.where(random.random(weight.shape) < 0.5, -4.0, 4.0).astype(np.float32)
    ended = Rectified(jnp.asarray(sides), 0.1 * jnp.ones_like(start.log_scale), start.shift)
    near = np.asarray(soft_weight_of(ended, q, weight))
    np.testing.assert_allclose(near, np.asarray(weight_of(ended, q, weight)), rtol=1e-6, atol=1e-7)
    hardened = harden(ended, q, weight)
    np.testing.assert_array_equal(np.asarray(hardened.dequantize()), np.asarray(weight_of(ended, q, weight)))
    moved = np.asarray(codes_of(hardened)).astype(int) - np.asarray(codes_of(q))
    assert (moved != 0).mean() > 0.3
    if q.number_format.is_integer:
        assert np.abs(moved).max() == 1


@pytest.mark.parametrize("seed", [5, 6, 7])
def test_the_best_rounding_of_a_small_layer_is_nearly_found(seed):
    """Of all 2**8 roundings up or down of 8 weights: among the best three, where the nearest is far behind."""
    layer = small_layer(seed)
    options = {"iterations": 400, "batch_size": 16, "rate": 0.05, "scale_rate": 0.0, "held_out": 0.0}
    tuned = tune_block(linear, *layer[:4], index=0, step="adaround", options=options)
    found = layer.error(tuned)
    start = layer.error(layer.packed)
    assert found <= layer.errors[2] * 1.001 and layer.errors[2] < 0.8 * start


@pytest.mark.parametrize("name", ["hqq-w3g32-asym", "nf4-g32-dq"])
def test_a_block_is_better_than_its_start(name):
    dense, packed, inputs, targets = problem(name)
    before = error_of(packed, inputs, targets)
    options = {"iterations": 150, "batch_size": 4, "held_out": 0.0}
    tuned = tune_block(linear, dense, packed, inputs, targets, index=0, step="adaround", options=options)
    assert error_of(tuned, inputs, targets) < 0.7 * before
    assert jax.tree.structure(tuned) == jax.tree.structure(packed)


def test_a_block_is_never_worse_than_its_start_on_the_rows_held_out():
    dense, packed, inputs, targets = problem("rtn-w4g32")
    noisy = targets + np.random.default_rng(8).normal(size=targets.shape).astype(np.float32)
    noisy[0] = targets[0]  # the row that is held out, of 12 rows a twelfth
    for options in (
        {"iterations": 40, "batch_size": 4, "held_out": 1 / 12},
        {"iterations": 3, "rate": 50.0, "held_out": 1 / 12},  # flings every code about
        {"iterations": 0},
    ):
        tuned = tune_block(linear, dense, packed, inputs, noisy, index=0, step="adaround", options=options)
        assert error_of(tuned, inputs[:1], targets[:1]) <= error_of(packed, inputs[:1], targets[:1])


def test_scales_are_learned_with_it_or_alone():
    dense, packed, inputs, targets = problem("rtn-w4g32")
    for options, same_codes in (({"rate": 0.0, "scale_rate": 0.002}, True), ({"scale_rate": 0.002}, False)):
        more = {"iterations": 60, "batch_size": 4, "held_out": 0.0}
        tuned = tune_block(linear, dense, packed, inputs, targets, index=0, step="adaround", options=options | more)
        new, old = tuned["layers"]["kernel"], packed["layers"]["kernel"]
        assert bool(jnp.array_equal(new.codes, old.codes)) == same_codes
        assert bool(jnp.any(new.scale != old.scale)) and error_of(tuned, inputs, targets) < error_of(
            packed, inputs, targets
        )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"regularization": -1.0}, "block 3: regularization is -1.0, wanted a number, zero or more"),
        ({"warmup": 1.0}, "block 3: warmup is 1.0, wanted a share of the steps, from 0 to below 1"),
        ({"held_out": 0.7}, "block 3: held_out is 0.7, wanted a share of the rows from 0 to 0.5"),
        ({"iters": 5}, "block 3: unknown option 'iters' of step adaround, wanted one of iterations, batch_size"),
    ],
)
def test_bad_options_are_told(options, text):
    dense, packed, inputs, targets = problem("rtn-w4g32")
    with pytest.raises(jq4.JQ4Error, match=text):
        tune_block(linear, dense, packed, inputs, targets, index=3, step="adaround", options=options)


def test_the_preset_starts_from_the_closed_form():
    recipe = jq4.Recipe.preset("adaround-w3g128-asym")
    assert [step.step for step in recipe.after] == ["adaround"]
    assert recipe.rules == jq4.Recipe.preset("gptq-w3g128-asym").rules
