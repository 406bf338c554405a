"""Oracle: slices of a real checkpoint that bitsandbytes quantized and dequantized, and its published map in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jq4
from jq4.double_quant import pack_scales
from jq4.formats import get_format
from jq4.qarray import QArray, codes_of, validate
from pallas_kernels import packing

pytestmark = pytest.mark.arithmetic


def read_slice(path):
    """A slice's header, offset and blobs (see the data's SOURCE.txt): f32 but for the codes and a nested absmax."""
    raw = path.read_bytes()
    kind, count, block, *lengths = np.frombuffer(raw, "<u4", 9)
    start = 36 + 4
    blobs = []
    for length in lengths:
        blobs.append(raw[start : start + length])
        start += length
    assert start == len(raw)
    return int(kind), int(count), int(block), np.frombuffer(raw, "<f4", 1, 36)[0], blobs


def nibbles(blob):
    """bitsandbytes' codes in flat order: the high nibble comes first."""
    packed = np.frombuffer(blob, np.uint8)
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)


def qarray_of(codes, scale, columns):
    """Flat codes of torch's [N, K] as our [K, N]."""
    return QArray(packing.pack(jnp.asarray(codes.reshape(columns, -1).T), 4, -2), scale, format="nf4", group_size=64)


@pytest.fixture
def nested(shared_data):
    return read_slice(shared_data / "quant_slices" / "bnb" / "llama_1b_nf4_double_quant.bin")


@pytest.fixture
def plain(shared_data):
    return read_slice(shared_data / "quant_slices" / "bnb" / "llama_1b_nf4.bin")


def bits(values):
    return np.asarray(values.astype(jnp.bfloat16)).view(np.uint16)


def test_the_levels_are_those_of_bitsandbytes(nested):
    *_, blobs = nested
    np.testing.assert_array_equal(np.asarray(get_format("nf4").levels, np.float32), np.frombuffer(blobs[2], "<f4"))
    np.testing.assert_array_equal(np.asarray(get_format("dynamic8").levels, np.float32), np.frombuffer(blobs[4], "<f4"))


@pytest.mark.parametrize("columns", [4, 8])
def test_plain_nf4_decodes_to_the_same_bits(plain, columns):
    _, _, block, _, blobs = plain
    scale = np.frombuffer(blobs[1], "<f4").reshape(columns, -1).T
    weight = qarray_of(nibbles(blobs[0]), jnp.asarray(scale), columns).dequantize()
    assert block == 64
    np.testing.assert_array_equal(bits(weight.T).reshape(-1), np.frombuffer(blobs[5], "<u2"))


@pytest.mark.parametrize("columns", [1, 4, 8])
def test_nested_nf4_decodes_to_the_same_bits(nested, columns):
    _, count, _, offset, blobs = nested
    codes, absmax = np.frombuffer(blobs[1], np.uint8), np.frombuffer(blobs[3], "<f4")
    groups = count // 64 // columns
    scale = QArray(
        jnp.asarray(codes.reshape(columns, groups).T),
        jnp.asarray(absmax.reshape(1, -1)),
        offset=jnp.full((1, 1), offset, jnp.float32),
        format="dynamic8",
        group_size=256 // groups,
        axis=-1,
    )
    weight = validate(qarray_of(nibbles(blobs[0]), scale, columns))
    np.testing.assert_array_equal(bits(weight.dequantize().T).reshape(-1), np.frombuffer(blobs[5], "<u2"))


def test_what_bitsandbytes_dequantized_gets_its_codes_back(plain):
    *_, blobs = plain
    codes, scale = nibbles(blobs[0]), np.frombuffer(blobs[1], "<f4")
    weight = np.asarray(get_format("nf4").levels, np.float32)[codes] * np.repeat(scale, 64)
    columns = 4
    rule = jq4.Rule(("w",), type="nf", group_size=64, scale_dtype="float32", axis=-2)
    q = jq4.quantize({"w": jnp.asarray(weight.reshape(columns, -1).T)}, rule)["w"]
    np.testing.assert_array_equal(np.asarray(codes_of(q)).T.reshape(-1), codes)
    np.testing.assert_array_equal(np.asarray(q.scale).T.reshape(-1), scale)


def blockwise_by_the_book(absmax):
    """bitsandbytes' quantize_blockwise of flat values less their mean: codes u8, absmax of blocks of 256, mean."""
    levels = np.asarray(get_format("dynamic8").levels, np.float32)
    mean = absmax.mean(dtype=np.float64).astype(np.float32)
    codes, peaks = [], []
    for start in range(0, absmax.size, 256):
        block = absmax[start : start + 256] - mean
        peaks.append(np.abs(block).max())
        codes.append(np.abs(block[:, None] / peaks[-1] - levels).argmin(axis=1))
    return np.concatenate(codes), np.asarray(peaks), mean


@pytest.mark.parametrize(("groups", "columns"), [(64, 20), (8, 96), (1, 300), (256, 3), (512, 3)])
def test_scales_are_packed_as_bitsandbytes_packs_them(groups, columns):
    """Where groups divide 256 or are a multiple of it."""
    scale = np.abs(np.random.default_rng(0).normal(size=(columns, groups))).astype(np.float32) + 1
    codes, peaks, mean = blockwise_by_the_book(scale.reshape(-1))
    for axis, mine in ((-2, scale.T), (-1, scale)):
        packed = jax.jit(pack_scales, static_argnums=1)(jnp.asarray(mine), axis)
        found = np.asarray(packed.codes).T if axis == -2 else np.asarray(packed.codes)
        assert np.mean(found.reshape(-1) != codes) < 0.001  # a tie, where the mean's last bit differs
        peaks_found = np.asarray(packed.scale).T if axis == -2 else np.asarray(packed.scale)
        np.testing.assert_allclose(peaks_found.reshape(-1), peaks, rtol=1e-5)
        np.testing.assert_allclose(packed.offset, mean, rtol=1e-6)


def stacked_weight(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("shape", [(3, 256, 40), (2, 192, 7), (100, 24)])
def test_packed_scales_are_near_and_small(shape):
    weight = stacked_weight(*shape)
    q = jq4.quantize({"kernel": weight}, "nf4-dq")["kernel"]
    single = jq4.quantize(
        {"kernel": weight}, dataclasses.replace(jq4.Recipe.preset("nf4").rules[0], scale_dtype="float32")
    )["kernel"]
    np.testing.assert_array_equal(q.codes, single.codes)
    assert isinstance(q.scale, QArray) and q.scale.shape == single.scale.shape
    spread = float(jnp.max(jnp.abs(single.scale - jnp.mean(single.scale))))
    np.testing.assert_allclose(q.scale.dequantize(), single.scale, atol=spread / 64)


def test_it_takes_what_bitsandbytes_takes_a_weight():
    q = jax.eval_shape(lambda w: jq4.quantize({"kernel": w}, "nf4-dq"), jax.ShapeDtypeStruct((4096, 4096), jnp.float32))
    assert q["kernel"].bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


def test_a_slice_of_a_stack_is_the_slice_packed_alone():
    weight = stacked_weight(3, 256, 40)
    stack = jq4.quantize({"kernel": weight}, "nf4-dq")["kernel"]
    alone = jq4.quantize({"kernel": weight[1]}, "nf4-dq")["kernel"]
    for mine, other in zip(
        jax.tree.leaves(jax.tree.map(lambda part: part[1], stack)), jax.tree.leaves(alone), strict=True
    ):
        np.testing.assert_array_equal(mine, other)


def test_it_stays_packed_in_a_product_and_a_scan():
    params, x = {"kernel": stacked_weight(3, 64, 64)}, stacked_weight(5, 64)

    def model(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["kernel"])[0]

    packed = jq4.quantize(params, "nf4-dq")
    found = jax.jit(jq4.quantized(model, strict=True))(packed, x)
    np.testing.assert_allclose(found, model(jq4.dequantize(packed), x), rtol=1e-4, atol=1e-4)


def test_it_is_saved_and_restored(tmp_path):
    packed = jq4.quantize({"kernel": stacked_weight(2, 256, 40)}, "nf4-dq")
    jq4.save(tmp_path / "m", packed)
    restored = jq4.restore(tmp_path / "m")
    assert jax.tree.structure(restored) == jax.tree.structure(packed)
    jax.tree.map(np.testing.assert_array_equal, restored, packed)


def test_zeros_stay_zero_and_recipes_round_trip():
    weight = stacked_weight(128, 8).at[:64, 3].set(0)
    q = jq4.quantize({"kernel": weight}, "nf4-dq")["kernel"]
    np.testing.assert_array_equal(q.dequantize()[:64, 3], 0)
    recipe = jq4.Recipe.preset("nf4-dq")
    assert recipe.rules[0].double_quant and jq4.Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(jq4.JQ4Error, match="double_quant with strategy tensor"):
        jq4.Rule(("w",), strategy="tensor", double_quant=True)
