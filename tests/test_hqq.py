"""HQQ. Oracles: the published iteration in numpy, figures of the hqq package itself, and round-to-nearest."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import jq4
from jq4.methods.hqq import shrink

pytestmark = pytest.mark.arithmetic


def _weight():
    """[K, N], with the heavy tails that weights have."""
    return np.random.default_rng(0).standard_t(4, (256, 96)).astype(np.float32) * np.float32(0.05)


def _error(weight, q):
    """Relative l2 error, and mean |error|**p, p = .7: the norm that HQQ minimises."""
    residual = np.asarray(q.dequantize()) - weight
    return np.linalg.norm(residual) / np.linalg.norm(weight), (np.abs(residual) ** 0.7).mean()


# hqq 0.2.8.post1 on the same matrix: Quantizer.quantize(weight.T, nbits, group_size=..., axis=1, compute_dtype=float32)
PACKAGE = {
    (4, 64): (0.112713, 0.0275422),
    (4, 32): (0.088994, 0.0229553),
    (3, 32): (0.189511, 0.0389633),
    (2, 32): (0.427491, 0.0694387),
    (4, 256): (0.168814, 0.0376587),
}


@pytest.mark.parametrize(("bits", "group"), PACKAGE)
def test_errors_are_below_the_hqq_packages(bits, group):
    q = jq4.quantize({"kernel": _weight()}, f"hqq-w{bits}g{group}-asym")["kernel"]
    assert q.offset is not None and q.zero_point is None
    l2, lp = _error(_weight(), q)
    assert l2 < PACKAGE[bits, group][0] and lp < PACKAGE[bits, group][1]


def _published(weight, bits, group, beta=10.0, kappa=1.01, p=0.7, iterations=20):
    """Badri & Shaji's iteration: the scale of the extremes, and a zero that is updated; float32 throughout."""
    w = weight.reshape(-1, group, weight.shape[1])
    low, high = w.min(axis=1, keepdims=True), w.max(axis=1, keepdims=True)
    inverse = (2**bits - 1) / (high - low)
    zero, best, out = -low * inverse, np.inf, None
    for _ in range(iterations):
        codes = np.clip(np.round(w * inverse + zero), 0, 2**bits - 1)
        dequantized = (codes - zero) / inverse
        error = np.abs(w - dequantized).mean()
        if error >= best:
            break
        best, out = error, dequantized
        size = np.abs(w - dequantized)
        with np.errstate(divide="ignore"):
            outliers = np.sign(w - dequantized) * np.maximum(size - size ** (p - 1) / beta, 0)
        zero = (codes - (w - outliers) * inverse).mean(axis=1, keepdims=True)
        beta *= kappa
    return out.reshape(weight.shape)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_errors_are_below_the_published_iteration_whatever_the_weights_unit(scale):
    weight = _weight() * np.float32(scale)
    theirs = np.linalg.norm(_published(weight, 4, 64) - weight) / np.linalg.norm(weight)
    assert _error(weight, jq4.quantize({"kernel": weight}, "hqq-w4g64-asym")["kernel"])[0] < theirs


@pytest.mark.parametrize("name", ["w4g32", "w4g32-asym", "w8gc", "w4gt", "nf4"])
def test_no_group_is_worse_than_rounded_to_nearest(name):
    weight, bits = _weight(), jq4.Recipe.preset(f"rtn-{name}").rules[0].num_bits
    group = 256 if name in ("w8gc", "w4gt") else jq4.Recipe.preset(f"rtn-{name}").rules[0].group_size

    def errors(method, zero_point=None):
        rule = jq4.Recipe.preset(f"{method}-{name}").rules[0].to_dict() | (
            {"zero_point": zero_point} if zero_point else {}
        )
        q = jq4.quantize({"kernel": weight}, jq4.Rule.from_dict(rule))["kernel"]
        squared = (np.asarray(q.dequantize(), np.float64) - weight) ** 2
        return squared.sum() if name == "w4gt" else squared.reshape(-1, group, weight.shape[1]).sum(axis=1)

    for zero_point in ("integer", "float") if name.endswith("asym") else (None,):
        ours, rounded = errors("hqq", zero_point), errors("rtn", zero_point)
        assert (ours <= rounded * (1 + 1e-5)).all() and ours.sum() < (0.999 if bits == 8 else 0.99) * rounded.sum()


def test_the_shrinkage_solves_its_problem():
    """prox of |e|**p: minimise |e|**p / (p beta) + (e - r)**2 / 2 over e; by brute force the error is no smaller."""
    residual = np.linspace(-2, 2, 41).astype(np.float32)
    ours = np.asarray(shrink(jnp.asarray(residual), 3.0, 0.7))
    assert (ours[np.abs(residual) < 3.0 ** (-1 / 1.3)] == 0).all()
    assert (np.abs(ours) <= np.abs(residual)).all() and (ours * residual >= 0).all()
    large = np.abs(residual) > 1.5
    grid = np.linspace(-2, 2, 40001)
    cost = np.abs(grid) ** 0.7 / (0.7 * 3) + (grid - residual[large][:, None]) ** 2 / 2
    np.testing.assert_allclose(ours[large], grid[cost.argmin(axis=1)], atol=0.02)  # one step of its fixed point


def test_symmetric_scales_take_the_sign_that_serves():
    weight = np.asarray([[8, 3, -2, 1], [-8, -3, 2, -1]], np.float32).T * np.float32(0.125)
    q = jq4.quantize({"kernel": weight}, "hqq-w4g4")["kernel"]
    np.testing.assert_array_equal(np.sign(np.asarray(q.scale, np.float32)), [[-1, 1]])
    np.testing.assert_array_equal(np.asarray(q.dequantize()), weight)


@pytest.mark.parametrize("name", ["hqq-w4g8-asym", "hqq-w4g8", "hqq-nf4-g8"])
def test_zero_constant_and_tiny_groups(name):
    weight = np.zeros((32, 3), np.float32)
    weight[8:16] = 0.3
    weight[16:24] = 1e-37 * np.random.default_rng(0).standard_normal((8, 3))
    dense = np.asarray(jq4.quantize({"kernel": weight}, name)["kernel"].dequantize())
    assert (dense[:8] == 0).all() and (dense[24:] == 0).all()
    np.testing.assert_allclose(dense[8:16], 0.3, rtol=0.01)
    assert (np.abs(dense[16:24]) < 1e-36).all()


def test_golden_quality_of_every_kind_of_preset():
    """Relative l2 errors of this very matrix: a change here is a change of every checkpoint to come."""
    golden = {
        "rtn-w8gc": 0.012609,
        "rtn-w4g32": 0.131292,
        "rtn-w4g32-asym": 0.096208,
        "rtn-w4g128": 0.191183,
        "rtn-w3g32": 0.295103,
        "rtn-w2g32-asym": 0.448968,
        "rtn-w4gt": 0.470577,
        "nf4": 0.111037,
        "fp4": 0.102966,
        "hqq-w4g32": 0.110759,
        "hqq-w4g32-asym": 0.084406,
        "hqq-w4g64-asym": 0.106823,
        "hqq-w3g32-asym": 0.173324,
        "hqq-nf4": 0.104994,
    }
    found = {name: float(_error(_weight(), jq4.quantize({"kernel": _weight()}, name)["kernel"])[0]) for name in golden}
    chex.assert_trees_all_close(found, golden, rtol=2e-4)
