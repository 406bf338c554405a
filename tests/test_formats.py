"""Oracles: ml_dtypes' own e2m1, the normal quantiles that NF4 is defined by, a bit string of Python integers, bnb."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jq4 import JQ4Error
from jq4.formats import FORMATS, get_format
from jq4.rounding import nearest_level, quantize_weight

pytestmark = pytest.mark.arithmetic


def test_fp4_is_the_e2m1_of_ml_dtypes():
    theirs = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(get_format("fp4").levels, np.float32), theirs)


def test_nf4_is_quantiles_of_a_normal_distribution():
    # Dettmers et al. 2023, as bitsandbytes' create_normal_map: 8 quantiles above zero, 7 below, and zero
    stats = pytest.importorskip("scipy.stats")
    last = 0.9677083
    above = stats.norm.ppf(np.linspace(last, 0.5, 9)[:-1])
    below = -stats.norm.ppf(np.linspace(last, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0], below])) / max(above)
    np.testing.assert_allclose(np.asarray(get_format("nf4").levels), levels, atol=2e-7)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_levels_are_two_complements_range(bits):
    form = get_format(f"int{bits}")
    assert (form.center, form.max_code, form.max_level) == (2 ** (bits - 1), 2**bits - 1, 2 ** (bits - 1) - 1)


def test_unknown_format_lists_the_known():
    with pytest.raises(JQ4Error, match="unknown format 'int9': wanted one of int2, int3, int4, int5, int6, int7"):
        get_format("int9")


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_nearest_level_and_ties_to_the_lower(name):
    form = FORMATS[name]
    levels = np.asarray(form.levels, np.float32)
    ordered = np.unique(levels)
    ties = (ordered[1:] + ordered[:-1]) / 2
    values = np.concatenate([np.random.default_rng(0).uniform(-1.2, 1.2, 500) * ordered[-1], levels])
    codes = np.asarray(nearest_level(jnp.asarray(values, jnp.float32), form))
    distance = np.abs(values.astype(np.float32)[:, None] - levels)
    np.testing.assert_allclose(distance[np.arange(len(values)), codes], distance.min(axis=1), rtol=1e-6)
    of_ties = levels[np.asarray(nearest_level(jnp.asarray(ties), form))]
    np.testing.assert_array_equal(of_ties, ordered[:-1])
    assert int(nearest_level(jnp.float32(0.0), form)) == form.levels.index(0.0)


def _bytes_of_bit_string(codes, bits):
    """Codes of one column as a little-endian bit string, in Python integers; the last unit filled with zeros."""
    unit = {2: 4, 3: 8, 4: 2, 8: 1}[bits]
    codes = list(codes) + [0] * (-len(codes) % unit)
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    return list(number.to_bytes(len(codes) * bits // 8, "little"))


def _fixed_matrix(length=11, columns=3):
    return np.sin(np.arange(1, length * columns + 1, dtype=np.float32) ** 2).reshape(length, columns)


def _packed_by_hand(weight, name, bits, group, scale_dtype):
    columns = []
    for column in weight.T:
        codes = []
        for start in range(0, len(column), group):
            values = column[start : start + group]
            levels = FORMATS[name].levels
            scale = np.abs(values).max() / np.float32(max(levels) if levels else 2 ** (bits - 1) - 1)
            ratios = values / scale.astype(scale_dtype).astype(np.float32)
            if levels is None:
                codes += [min(int(c), 2**bits - 1) for c in np.round(ratios) + 2 ** (bits - 1)]
            else:
                codes += [int(np.argmin(np.abs(r - np.asarray(levels)))) for r in ratios]
        columns.append(_bytes_of_bit_string(codes, bits))
    return np.asarray(columns, np.uint8).T


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "bits"), [("int2", 2), ("int3", 3), ("int4", 4), ("int8", 8), ("nf4", 4), ("fp4", 4)])
def test_packed_bytes_equal_an_independent_bit_string(name, bits, scale_dtype):
    weight = _fixed_matrix()
    q = quantize_weight(jnp.asarray(weight), name, group_size=4, scale_dtype=scale_dtype)
    np.testing.assert_array_equal(np.asarray(q.codes), _packed_by_hand(weight, name, bits, 4, scale_dtype))


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("int4", "6e731b41fe54148f519af21f1913f906070e"),
        ("nf4", "4f610c20ff21027f309af00f0901f904050f"),
    ],
)
def test_golden_bytes(name, golden):
    weight = _fixed_matrix()
    assert _packed_by_hand(weight, name, 4, 4, "bfloat16").tobytes().hex() == golden
    assert np.asarray(quantize_weight(jnp.asarray(weight), name, group_size=4).codes).tobytes().hex() == golden


@pytest.mark.parametrize("name", ["llama_1b_nf4", "llama_1b_nf4_double_quant"])
def test_nf4_codes_equal_bitsandbytes_on_a_real_checkpoint(shared_data, name):
    """What bitsandbytes dequantized, quantized again, gives the codes that it came from."""
    file = shared_data / "quant_slices" / "bnb" / f"{name}.bin"
    header = np.frombuffer(file.read_bytes()[:36], "<u4")  # then an f32, and the blobs
    kind, count, block = (int(v) for v in header[:3])
    assert (kind, block) == (2 if "double" in name else 0, 64)
    lengths = [int(v) for v in header[3:]]
    blobs = np.split(np.frombuffer(file.read_bytes()[40:], np.uint8), np.cumsum(lengths)[:-1])
    packed, expected = blobs[0], blobs[-1][: 2 * count].view(ml_dtypes.bfloat16).astype(np.float32)
    theirs = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1, block)  # the high nibble comes first
    blocks = expected.reshape(-1, block)
    q = quantize_weight(jnp.asarray(blocks), "nf4", group_size=block, axis=-1, scale_dtype="float32")
    ours = np.asarray(jax.device_get(q.codes))
    ours = np.stack([ours & 15, ours >> 4], axis=-1).reshape(-1, block)
    assert np.isin(theirs, (0, 15)).any(axis=1).all()  # the largest weight of each block is at -1 or 1
    np.testing.assert_array_equal(ours, theirs)
