"""Oracles: numpy group by group, torch's fake quantization, llama.cpp's own quantized bytes, and brute force."""

import itertools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (names bfloat16 to numpy)
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jq4 import JQ4Error
from jq4.formats import FORMATS
from jq4.qarray import codes_of, spread_groups, validate
from jq4.rounding import quantize_weight, storable

pytestmark = pytest.mark.arithmetic

jitted_storable = jax.jit(storable, static_argnums=1)
SYMMETRIC = ["int2", "int3", "int4", "int8", "nf4", "fp4"]


def _weight(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _stored(value, dtype):
    return np.asarray(value, np.float32).astype(dtype).astype(np.float32)


def _scale_and_zero(values, bits, symmetric, dtype):
    """(scale, zero point or None) of one group in numpy, as the module's text defines them."""
    if symmetric:
        return _stored(np.abs(values).max() / np.float32(2 ** (bits - 1) - 1), dtype), None
    low, high = min(values.min(), 0), max(values.max(), 0)
    scale = _stored((high - low) / np.float32(2**bits - 1), dtype)
    return scale, np.clip(np.round(-low / scale), 0, 2**bits - 1)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("symmetric", "scale_dtype"), [(True, "bfloat16"), (False, "float16"), (False, "float32")])
def test_integers_against_numpy_with_a_short_last_group_and_odd_length(bits, symmetric, scale_dtype):
    weight = _weight((75, 5))
    q = quantize_weight(jnp.asarray(weight), f"int{bits}", group_size=32, symmetric=symmetric, scale_dtype=scale_dtype)
    validate(q)
    assert q.scale.dtype == jnp.dtype(scale_dtype) and q.scale.shape == (3, 5)
    expected = np.zeros_like(weight)
    for column, start in itertools.product(range(5), (0, 32, 64)):
        values = weight[start : start + 32, column]
        scale, zero = _scale_and_zero(values, bits, symmetric, scale_dtype)
        center = 2 ** (bits - 1) if zero is None else zero
        codes = np.clip(np.round(values / scale) + center, 0, 2**bits - 1)
        expected[start : start + 32, column] = (codes - center) * scale
    np.testing.assert_allclose(np.asarray(q.dequantize()), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "zero_point", "observer"),
    [
        *((name, None, "absmax") for name in SYMMETRIC),
        *((name, None, "mse") for name in ("int4", "nf4", "fp4")),
        *(("int4", zero_point, observer) for zero_point in ("integer", "float") for observer in ("minmax", "mse")),
        ("int3", None, "percentile"),
        ("int3", "float", "percentile"),
    ],
)
def test_no_other_code_is_nearer(name, zero_point, observer):
    form = FORMATS[name]
    weight = _weight((40, 3))
    q = quantize_weight(
        jnp.asarray(weight),
        name,
        group_size=16,
        symmetric=not zero_point,
        zero_point=zero_point or "integer",
        observer=observer,
    )
    scale = np.asarray(spread_groups(q.scale.astype(jnp.float32), 16, -2, 40))
    levels = np.arange(2**form.bits) - form.center if form.is_integer else np.asarray(form.levels, np.float32)
    candidates = levels * scale[..., None]  # [40, 3, levels]
    if q.zero_point is not None:
        zero = np.asarray(spread_groups(q.zero_point, 16, -2, 40)).astype(np.float32)
        candidates = candidates + ((form.center - zero) * scale)[..., None]
    if q.offset is not None:
        candidates = candidates + np.asarray(spread_groups(q.offset.astype(jnp.float32), 16, -2, 40))[..., None]
    nearest = np.abs(candidates - weight[..., None]).min(axis=-1)
    np.testing.assert_allclose(np.abs(np.asarray(q.dequantize()) - weight), nearest, atol=1e-5)


@pytest.mark.parametrize("axis", [-2, -3])
@pytest.mark.parametrize(("name", "group_size"), [("int4", 8), ("int3", None), ("nf4", 8)])
def test_any_axis_is_the_moved_axis(name, axis, group_size):
    weight = jnp.asarray(_weight((21, 10, 13)))
    q = quantize_weight(weight, name, group_size=group_size, axis=axis)
    moved = quantize_weight(jnp.moveaxis(weight, axis, -1), name, group_size=group_size, axis=-1)
    validate(q)
    chex.assert_trees_all_equal(jnp.moveaxis(codes_of(q), axis, -1), codes_of(moved))
    chex.assert_trees_all_equal(jnp.moveaxis(q.scale, axis, -1), moved.scale)
    chex.assert_trees_all_equal(q.dequantize(), jnp.moveaxis(moved.dequantize(), -1, axis))


@pytest.mark.parametrize(
    ("settings", "observer"),
    [({"group_size": 16}, "mse"), ({"group_size": None}, "percentile"), ({"per_tensor": True}, "absmax")],
)
def test_stacked_leaves_are_their_slices(settings, observer):
    weight = jnp.asarray(_weight((2, 3, 24, 6)) * np.arange(1, 7).reshape(2, 3, 1, 1))
    q = quantize_weight(weight, "int4", observer=observer, **settings)
    for index in itertools.product(range(2), range(3)):
        alone = quantize_weight(weight[index], "int4", observer=observer, **settings)
        chex.assert_trees_all_equal(jax.tree.map(lambda part, i=index: part[i], q), alone)


def test_per_tensor_has_one_scale_for_the_last_two_axes():
    weight = _weight((4, 12, 6))
    for axis in (-1, -2):
        q = quantize_weight(jnp.asarray(weight), "int8", per_tensor=True, axis=axis, scale_dtype="float32")
        validate(q)
        np.testing.assert_allclose(np.asarray(q.scale)[:, 0, 0], np.abs(weight).max(axis=(1, 2)) / np.float32(127))


def test_percentile_against_numpy():
    weight = _weight((64, 4))
    q = quantize_weight(
        jnp.asarray(weight), group_size=64, observer="percentile", percentile=90.0, scale_dtype="float32"
    )
    wanted = np.quantile(np.abs(weight), 0.9, axis=0) / 7
    np.testing.assert_allclose(np.asarray(q.scale)[0], wanted, rtol=1e-5)


@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4])
def test_mse_search_against_brute_force(norm):
    weight = _weight((32, 6))
    q = quantize_weight(
        jnp.asarray(weight), group_size=32, observer="mse", norm=norm, steps=40, max_shrink=0.6, scale_dtype="float32"
    )
    best = np.full(6, np.inf)
    for shrink in np.linspace(0, 0.6, 41):
        scale = np.abs(weight).max(axis=0) * (1 - shrink) / 7
        error = np.abs(np.clip(np.round(weight / scale), -8, 7) * scale - weight) ** norm
        best = np.minimum(best, error.sum(axis=0))
    ours = (np.abs(np.asarray(q.dequantize()) - weight) ** norm).sum(axis=0)
    np.testing.assert_allclose(ours, best, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "scale_dtype", "zero_point"),
    [
        *((name, "bfloat16", None) for name in SYMMETRIC),
        *(("int4", dtype, zero_point) for dtype in ("float16", "float32") for zero_point in ("integer", "float")),
    ],
)
def test_all_zero_groups_dequantize_to_exact_zeros(name, scale_dtype, zero_point):
    weight = _weight((16, 2))
    weight[:8, 0] = 0
    q = quantize_weight(
        jnp.asarray(weight),
        name,
        group_size=8,
        symmetric=not zero_point,
        zero_point=zero_point or "integer",
        scale_dtype=scale_dtype,
    )
    dense = np.asarray(q.dequantize())
    assert (dense[:8, 0] == 0).all() and np.isfinite(dense).all() and np.isfinite(np.asarray(q.scale)).all()


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-9, 1e-6, 1e5, 1e30])
@pytest.mark.parametrize("zero_point", [None, "integer", "float"])
def test_scales_neither_vanish_nor_overflow(scale_dtype, magnitude, zero_point):
    weight = _weight((16, 3)) * np.float32(magnitude)
    q = quantize_weight(
        jnp.asarray(weight),
        group_size=16,
        symmetric=not zero_point,
        zero_point=zero_point or "integer",
        scale_dtype=scale_dtype,
    )
    scale, dense = np.asarray(q.scale).astype(np.float32), np.asarray(q.dequantize())
    assert (scale > 0).all() and np.isfinite(scale).all() and np.isfinite(dense).all()
    within_range = {"bfloat16": 1e-30, "float32": 1e-30, "float16": 1e-6}[scale_dtype]
    if within_range <= magnitude <= (1e30 if scale_dtype != "float16" else 1e5):
        assert np.abs(dense - weight).max() < 0.25 * np.abs(weight).max()
    else:
        assert np.abs(dense).max() <= 8 * max(np.abs(weight).max(), float(jnp.finfo(scale_dtype).tiny))


@given(st.lists(st.floats(-70000, 70000, width=32), min_size=20, max_size=20), st.sampled_from(["float16", "bfloat16"]))
@settings(max_examples=60, deadline=None)
def test_storable_is_the_cast_and_back(values, dtype):
    values = np.asarray(values, np.float32)
    limit = float(jnp.finfo(dtype).max)
    wanted = _stored(np.clip(values, -limit, limit), dtype)
    if dtype == "bfloat16":
        wanted = np.where(np.abs(values) < float(jnp.finfo(dtype).tiny), 0, wanted)
    np.testing.assert_array_equal(np.asarray(jitted_storable(jnp.asarray(values), dtype)), wanted)


@pytest.mark.parametrize(
    ("length", "group_size", "bits", "zero_point"),
    [(1, 1, 4, None), (7, 3, 3, "integer"), (9, 16, 2, "float"), (33, 32, 4, "integer"), (65, 13, 3, "float")],
)
def test_any_length_and_group_keeps_the_error_within_a_step(length, group_size, bits, zero_point):
    weight = _weight((length, 2), seed=length)
    q = quantize_weight(
        jnp.asarray(weight),
        f"int{bits}",
        group_size=group_size,
        symmetric=not zero_point,
        zero_point=zero_point or "integer",
        scale_dtype="float32",
    )
    validate(q)
    step = np.asarray(spread_groups(q.scale, q.group_size, -2, length))
    assert (np.abs(np.asarray(q.dequantize()) - weight) <= step * 1.001 + 1e-6).all()


def test_what_is_on_the_grid_comes_back_exactly():
    levels = np.random.default_rng(1).integers(-7, 8, (64, 8)).astype(np.float32)
    levels[::16] = 7
    weight = levels * _stored(np.random.default_rng(2).uniform(0.01, 0.1, (1, 8)), "bfloat16")
    q = quantize_weight(jnp.asarray(weight), group_size=16)
    np.testing.assert_array_equal(np.asarray(q.dequantize()), weight)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_weights_dtype_is_kept_and_jit_changes_nothing(dtype):
    weight = jnp.asarray(_weight((48, 4)), dtype)
    q = quantize_weight(weight, "int4", group_size=16)
    assert q.dequantize().dtype == jnp.dtype(dtype) and q.dtype == dtype
    chex.assert_trees_all_equal(jax.jit(lambda w: quantize_weight(w, "int4", group_size=16))(weight), q)
    shapes = jax.eval_shape(lambda w: quantize_weight(w, "int4", group_size=16), weight)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, q)


@pytest.mark.parametrize("symmetric", [True, False])
def test_channels_against_torch(symmetric):
    torch = pytest.importorskip("torch")
    weight = _weight((33, 7))
    q = quantize_weight(jnp.asarray(weight), "int4", group_size=None, symmetric=symmetric, scale_dtype="float32")
    zero = torch.full((7,), 8, dtype=torch.int32)
    if q.zero_point is not None:
        zero = torch.tensor(np.asarray(q.zero_point)[0].astype(np.int32))
    theirs = torch.fake_quantize_per_channel_affine(
        torch.tensor(weight), torch.tensor(np.asarray(q.scale)[0].copy()), zero, 1, 0, 15
    )
    np.testing.assert_allclose(np.asarray(q.dequantize()), theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize(("kind", "bits", "block_bytes"), [("q8_0", 8, 34), ("q4_1", 4, 20)])
def test_scales_equal_llama_cpp_and_errors_are_no_larger(shared_data, kind, bits, block_bytes):
    folder = shared_data / "ggml_quant_golden"
    weight = np.fromfile(folder / f"{kind}_64_noim_input.bin", "<f4").reshape(-1, 32)
    blocks = np.fromfile(folder / f"{kind}_64_noim_expected.bin", np.uint8).reshape(-1, block_bytes)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if kind == "q8_0":
        theirs = blocks[:, 2:].view(np.int8) * scale
    else:  # d * q + m, elements 0..15 in low nibbles and 16..31 in high ones
        nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        theirs = nibbles * scale + blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    q = quantize_weight(
        jnp.asarray(weight),
        f"int{bits}",
        group_size=32,
        axis=-1,
        symmetric=kind == "q8_0",
        zero_point="float",
        scale_dtype="float16",
    )
    np.testing.assert_array_equal(np.asarray(q.scale).astype(np.float32), scale)
    ours = np.asarray(q.dequantize())
    assert np.abs(ours - weight).sum() <= np.abs(theirs - weight).sum() * 1.001
    assert np.abs(ours - theirs).max() <= scale.max() * 1.001


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"axis": -3}, "axis -3 is not a negative axis of a 2-d weight"),
        ({"axis": 2}, "axis 0 is not a negative axis"),
        ({"format": "nf4", "symmetric": False}, "format nf4 is a codebook, which is symmetric"),
        ({"zero_point": "half"}, "zero_point is 'half', wanted one of integer, float"),
        ({"observer": "entropy"}, "observer is 'entropy', wanted one of absmax, minmax, percentile, mse"),
        ({"observer": "absmax", "symmetric": False}, "observer 'absmax' is for symmetric encodings"),
        ({"scale_dtype": "int8"}, "scale_dtype is 'int8', wanted one of bfloat16, float16, float32"),
        ({"group_size": 0}, "group_size is 0, wanted 1 or more"),
        ({"observer": "percentile", "percentile": 20}, "percentile is 20, wanted above 50"),
        ({"observer": "mse", "steps": 0}, "the mse search has steps=0"),
        ({"format": "int9"}, "unknown format 'int9'"),
    ],
)
def test_errors(settings, text):
    with pytest.raises(JQ4Error, match=text):
        quantize_weight(jnp.ones((4, 4)), **settings)
