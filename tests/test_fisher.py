"""Fisher. Oracles: numpy's exact expectation over every token that could be drawn, and the KLD that is predicted."""

import jax.numpy as jnp
import numpy as np
import pytest

import jq4
from jq4.errors import JQ4Error
from jq4.fisher import fisher_diagonal, fisher_loss
from jq4.statistics import WeightStatistics
from jq4.trials import kld_of_params

INPUTS, VOCABULARY = 16, 5


def apply(params, tokens):
    return params["table"][tokens] @ params["head"]["kernel"]


@pytest.fixture(scope="module")
def small():
    """(params, rows, the inputs of every token that predicts another, f64[tokens, INPUTS])."""
    random = np.random.default_rng(0)
    table = random.normal(size=(VOCABULARY, INPUTS)) @ random.normal(size=(INPUTS, INPUTS)) / 4  # correlated inputs
    params = {
        "table": jnp.asarray(table, jnp.float32),
        "head": {"kernel": jnp.asarray(random.normal(size=(INPUTS, VOCABULARY)) / 4, jnp.float32)},
    }
    rows = random.integers(0, VOCABULARY, (400, 9), np.int32)
    return params, rows, np.asarray(params["table"], np.float64)[rows[:, :-1]].reshape(-1, INPUTS)


def probabilities(params, inputs):
    logits = inputs @ np.asarray(params["head"]["kernel"], np.float64)
    exact = np.exp(logits - logits.max(-1, keepdims=True))
    return exact / exact.sum(-1, keepdims=True)


def test_the_diagonal_is_the_expectation_over_all_draws(small):
    """Of log softmax(x W)[y] the gradient is x (onehot(y) - p), so that E[G**2] = E[x**2 p (1 - p)]."""
    params, rows, inputs = small
    p = probabilities(params, inputs)
    wanted = np.einsum("tk,tn->kn", inputs**2, p * (1 - p)) / len(inputs)
    found = fisher_diagonal(apply, params, rows, ["head/kernel"])
    assert list(found) == ["head/kernel"]
    np.testing.assert_allclose(found["head/kernel"], wanted, rtol=0.35)  # 400 draws of a square
    assert np.asarray(found["head/kernel"]).sum() == pytest.approx(wanted.sum(), rel=0.05)


def test_a_loss_sees_errors_that_cancel(small):
    """Errors along the inputs' least direction cost little: with the Hessian told, and by the KLD itself."""
    params, rows, inputs = small
    stats = _statistics(params, rows)
    _, directions = np.linalg.eigh(inputs.T @ inputs)
    weight, fisher = params["head"]["kernel"], fisher_diagonal(apply, params, rows, ["head/kernel"])["head/kernel"]
    measure = kld_of_params(apply, params, rows, batch_size=100)
    outputs = np.random.default_rng(1).normal(size=VOCABULARY) * 0.1
    losses = {}
    for place in (0, -1):
        near = weight - jnp.asarray(np.outer(directions[:, place], outputs), jnp.float32)
        kld = measure({**params, "head": {"kernel": near}})
        losses[place] = (
            kld,
            fisher_loss(weight, near, fisher, stats, axis=-2),
            fisher_loss(weight, near, fisher, axis=-2),
        )
    assert losses[-1][1] == pytest.approx(losses[-1][0], rel=0.35)
    assert losses[0][1] < 0.1 * losses[-1][1] and losses[0][0] < 0.1 * losses[-1][0]
    assert losses[0][2] > 0.2 * losses[-1][2]  # the diagonal alone cannot tell them


def _statistics(params, rows):
    return jq4.observe(apply, params, [rows], collect=("hessian",))["head/kernel"]


def test_a_loss_is_the_quadratic_form_by_numpy(small):
    random = np.random.default_rng(2)
    weight, near = random.normal(size=(2, 2, 4, 3)).astype(np.float32)
    fisher = random.exponential(size=(2, 4, 3)).astype(np.float32)
    x = random.normal(size=(2, 10, 4)).astype(np.float32)
    x[1, :, 2] = 0  # an input that calibration did not see
    hessian = np.einsum("btk,btl->bkl", x, x)
    stats = WeightStatistics(count=jnp.full(2, 10), outer_total=jnp.asarray(hessian))
    v = np.sqrt(fisher.astype(np.float64)) * (weight - near)
    rms = np.sqrt(np.einsum("bkk->bk", hessian))
    with np.errstate(invalid="ignore"):
        correlation = hessian / (rms[:, :, None] * rms[:, None])
    correlation[1, 2], correlation[1, :, 2] = 0, 0
    correlation[1, 2, 2] = 1
    wanted = np.einsum("bkn,bkl,bln->", v, correlation, v) / 2
    assert fisher_loss(weight, near, jnp.asarray(fisher), stats, axis=-2) == pytest.approx(wanted, rel=1e-4)
    assert fisher_loss(weight, near, jnp.asarray(fisher), axis=-2) == pytest.approx((v**2).sum() / 2, rel=1e-4)
    turned, turned_near, turned_fisher = (np.swapaxes(each, -1, -2) for each in (weight, near, fisher))
    found = fisher_loss(turned, turned_near, jnp.asarray(turned_fisher), stats, axis=-1)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_the_same_seed_draws_the_same(small):
    params, rows, _ = small
    first, again, other = (
        fisher_diagonal(apply, params, rows[:3], ["table"], seed=seed)["table"] for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_what_cannot_be_is_told(small):
    params, rows, _ = small
    with pytest.raises(JQ4Error, match=r"rows of shape \(400, 1\), wanted \[rows, tokens\], two tokens or more"):
        fisher_diagonal(apply, params, rows[:, :1], ["table"])
    with pytest.raises(JQ4Error, match="head/kernel: its gradient is not finite on the rows given"):
        fisher_diagonal(lambda tree, t: apply(tree, t) * jnp.float32(np.inf), params, rows[:2], ["head/kernel"])
    with pytest.raises(JQ4Error, match=r"fisher_loss: shape \(2, 3\), wanted \(3, 2\), the weight's"):
        fisher_loss(np.ones((3, 2)), np.ones((2, 3)), jnp.ones((3, 2)), axis=-2)
