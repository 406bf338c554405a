"""Oracles: LSQ's and LSQ+'s formulas in float64 numpy, finite differences of the surrogate, and what is dequantized."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import jit

import jq4
from jq4.rounding import Encoding
from jq4.train.lsq import hardened, rounded, slowed
from jq4.train.quantizer import Quantizer

pytestmark = pytest.mark.arithmetic

RANDOM = np.random.default_rng(5)
K, N, GROUP = 12, 3, 4
W = jnp.asarray(RANDOM.normal(size=(K, N)), jnp.float32)
DY = jnp.asarray(RANDOM.normal(size=(K, N)), jnp.float32)


def quantizer(bits, *, offset=False, zeros=False, margin=0.0):
    """Learned float32 steps in groups of 4, so coarse that some weights lie outside the levels."""
    zero_point = "float" if offset else "integer"
    encoding = Encoding(f"int{bits}", -2, GROUP, symmetric=not (offset or zeros), zero_point=zero_point,
                        observer="minmax", scale_dtype="float32")  # fmt: skip
    shape = (K // GROUP, N)
    return Quantizer(
        encoding,
        scale=jnp.asarray(RANDOM.uniform(0.5, 0.8, shape) * 2.0 ** (1 - bits), jnp.float32),
        zero_point=jnp.asarray(RANDOM.uniform(0.3, 0.7, shape) * 2**bits, jnp.float32) if zeros else None,
        offset=jnp.asarray(RANDOM.normal(size=shape) / 8, jnp.float32) if offset else None,
        margin=margin,
    )


@jit
def with_gradients(w, q):
    """(rounded, its gradients by the weight and by the quantizer) for the gradient DY of what is rounded."""
    out, pullback = jax.vjp(rounded, w, q)
    return out, *pullback(DY)


def by_formula(q, w, dy):
    """(rounded, dw, ds, dz, do), float64 numpy, straight from the papers."""
    s, z, o = (np.repeat(np.asarray(0 if part is None else part, np.float64) + np.zeros((K // GROUP, N)), GROUP, 0)
               for part in (q.scale, q.zero_point, q.offset))  # fmt: skip
    top, center = q.number_format.max_code, q.number_format.center
    z = np.round(z) if q.zero_point is not None else z + center
    qp = top if q.zero_point is not None else top - center
    w, dy = np.asarray(w, np.float64), np.asarray(dy, np.float64)
    v = (w - o) / s
    level = np.clip(np.round(v), -z, top - z)
    inside = (-z - q.margin < v) & (v < top - z + q.margin)
    assert 0.1 < inside.mean() < 1
    g = 1 / np.sqrt(GROUP * qp)

    def total(values):
        return g * values.reshape(K // GROUP, GROUP, N).sum(1)

    of_scale = total(dy * np.where(inside, level - v, level))
    outside = np.where(inside, 0, dy)
    return level * s + o, dy - outside, of_scale, total(-s * outside), total(outside)


@pytest.mark.parametrize("form", ["symmetric", "offset", "zeros"])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_are_the_papers(bits, form):
    q = quantizer(bits, offset=form == "offset", zeros=form == "zeros", margin=0.5 if bits == 2 else 0.0)
    out, dw, dq = with_gradients(W, q)
    wanted = by_formula(q, W, DY)
    for name, found, formula in zip(
        ("out", "weight", "scale", "zero_point", "offset"),
        (out, dw, dq.scale, dq.zero_point, dq.offset), wanted, strict=True,
    ):  # fmt: skip
        if found is not None:
            np.testing.assert_allclose(found, formula, rtol=2e-5, atol=2e-6, err_msg=name)


def test_gradients_are_finite_differences_of_the_surrogate():
    """What rounding leaves off is held, as a straight-through estimator takes it; the rest is differentiated."""
    q = quantizer(3, offset=True, margin=0.25)
    w, dy = np.asarray(W, np.float64), np.asarray(DY, np.float64)
    wide = lambda part: np.repeat(part, GROUP, 0)  # noqa: E731
    first = (w - wide(np.asarray(q.offset, np.float64))) / wide(np.asarray(q.scale, np.float64))
    held = np.clip(np.round(first), -4, 3) - np.clip(first, -4.25, 3.25)

    def surrogate(w, scale, offset):
        level = np.clip((w - wide(offset)) / wide(scale), -4.25, 3.25) + held
        return np.sum(dy * (level * wide(scale) + wide(offset)))

    at = [w, np.asarray(q.scale, np.float64), np.asarray(q.offset, np.float64)]
    _, dw, dq = with_gradients(W, q)
    slow = np.sqrt(GROUP * 3)
    for place, found in enumerate((dw, slow * dq.scale, slow * dq.offset)):
        for index in np.ndindex(*at[place].shape):
            near = [[np.array(part) for part in at] for _ in range(2)]
            near[0][place][index] += 1e-6
            near[1][place][index] -= 1e-6
            difference = (surrogate(*near[0]) - surrogate(*near[1])) / 2e-6
            np.testing.assert_allclose(found[index], difference, rtol=1e-3, atol=1e-4)


def test_the_factor_slows_gradients_alone():
    value = jnp.asarray([0.1, 3.0])
    np.testing.assert_array_equal(slowed(value, 32, 7.0), value)
    np.testing.assert_allclose(jax.grad(lambda v: slowed(v, 32, 7.0)[0])(value), [(32 * 7) ** -0.5, 0], rtol=1e-6)


FORMS = [
    (2, {"group_size": 8}),
    (2, {"group_size": 8, "symmetric": False}),
    (3, {"group_size": 5, "symmetric": False}),  # a short last group, and codes that straddle bytes
    (4, {"group_size": 8, "symmetric": False, "zero_point": "float"}),
    (4, {"strategy": "tensor", "symmetric": False}),
    (4, {"group_size": 8, "type": "nf"}),
    (4, {"group_size": 8, "type": "float", "scale_dtype": "float16"}),
    (8, {"strategy": "tensor"}),
    (8, {"strategy": "channel", "symmetric": False, "scale_dtype": "float32"}),
]


@pytest.mark.parametrize(
    ("learned", "bits", "form"), [(True, *each) for each in FORMS] + [(False, *each) for each in FORMS[:2]]
)
def test_hardening_dequantizes_to_what_was_trained(learned, bits, form):
    weight = jnp.asarray(RANDOM.standard_t(3, (2, 24, 6)), jnp.float32)
    recipe = jq4.Recipe((jq4.Rule(("kernel",), num_bits=bits, **form),))
    params = {"kernel": weight}
    beside = jq4.quantizers(params, recipe) if learned else None
    if learned:
        beside = jax.tree.map(lambda part: part * RANDOM.uniform(0.8, 1.2, part.shape).astype(np.float32), beside)
    packed = jq4.harden(params, beside, recipe)
    tree = (params, beside) if learned else params
    trained = jit(jq4.fake_quantized(lambda tree: tree["kernel"], recipe, strict=True))(tree)
    found = np.asarray(packed["kernel"].dequantize())
    if form.get("zero_point") == "float":  # a multiplication and an addition, that XLA may fuse
        np.testing.assert_allclose(found, trained, rtol=0, atol=1e-6)
    else:
        np.testing.assert_array_equal(found, np.asarray(trained))
    assert np.unique(found).size > 4
    if not learned:
        wanted = jq4.quantize(params, recipe)
        for mine, theirs in zip(jax.tree.leaves(packed), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


def test_scales_are_never_zero_and_may_be_negative():
    q = quantizer(4)
    q = dataclasses.replace(q, scale=q.scale.at[0].set(0.0).at[1].multiply(-1))
    out, *gradients = with_gradients(W, q)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradients)))
    packed = jit(hardened)(W, q)
    np.testing.assert_array_equal(np.asarray(packed.dequantize()), np.asarray(out))
    assert np.asarray(packed.scale)[1].max() < 0
