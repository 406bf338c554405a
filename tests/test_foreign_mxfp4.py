"""Oracles: transformers' dequantizer of gpt-oss, ml_dtypes' own e2m1 and e8m0, and the OCP rule written out."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jq4
from jq4.checkpoint.foreign import mx_blocks, mxfp4, open_checkpoint
from jq4.checkpoint.foreign.model_dtype import model_dtype
from jq4.checkpoint.foreign.weights import LazyWeight
from jq4.errors import JQ4Error
from jq4.qarray import QArray
from tests.foreign_folder import as_folder, dense, read_weight, weight_of, write_checkpoint

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def gpt_oss(experts=2, rows=6, groups=3, seed=0):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (experts, rows, groups, 16), dtype=np.uint8)
    scales = rng.integers(100, 140, (experts, rows, groups), dtype=np.uint8)
    bias = rng.normal(size=(experts, rows)).astype(np.float32)
    return {f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales, f"{EXPERTS}_bias": bias}


def test_gpt_oss_is_read_as_transformers_reads_it(tmp_path):
    torch = pytest.importorskip("torch")
    mxfp4_of_transformers = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = gpt_oss()
    q = read_weight(write_checkpoint(tmp_path / "m", tensors, {"dtype": "bfloat16"}), EXPERTS, "gpt-oss")
    blocks, scales = (torch.tensor(tensors[f"{EXPERTS}_{name}"]) for name in ("blocks", "scales"))
    theirs = mxfp4_of_transformers.convert_moe_packed_tensors(blocks, scales)  # bf16[E, H, 2I]
    assert q.shape == (2, 6, 96) and q.dtype == "bfloat16"
    found = np.asarray(q.dequantize()).astype(np.float32)
    np.testing.assert_array_equal(found, theirs.transpose(1, 2).float().numpy(), strict=True)
    assert set(open_checkpoint(tmp_path / "m").weights) == {EXPERTS, f"{EXPERTS}_bias"}


def test_openais_own_names_and_every_scale(tmp_path):
    every = np.arange(255, dtype=np.uint8).reshape(1, 5, 51)
    blocks = np.random.default_rng(0).integers(0, 256, (1, 5, 51, 16), dtype=np.uint8)
    tensors = {"block.0.mlp.mlp1_weight.blocks": blocks, "block.0.mlp.mlp1_weight.scales": every}
    q = read_weight(write_checkpoint(tmp_path / "m", tensors), "block.0.mlp.mlp1_weight")
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(1, 5, 51, 32)
    levels = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * 2.0 ** (every.astype(float) - 127)[..., None]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(dense(q, np.float32), levels.reshape(1, 5, -1).astype(np.float32))


@pytest.mark.parametrize(("change", "message"), [
    ({f"{EXPERTS}_scales": None}, r"gate_up_proj_blocks' comes without '.*gate_up_proj_scales'"),
    ({f"{EXPERTS}_scales": np.ones((2, 6, 4), np.uint8)}, r"gate_up_proj_scales' has shape \[2, 6, 4\], wanted"),
    ({f"{EXPERTS}_scales": np.ones((2, 6, 3), np.float32)}, "gate_up_proj_scales' has dtype F32, wanted U8 or F8_E8M0"),
    ({"a_blocks": np.ones((6, 16), np.uint8)}, r"'a_blocks' has shape \[6, 16\], wanted \[..., rows, columns / 32, 16"),
])  # fmt: skip
def test_what_contradicts_itself_is_refused_when_opened(change, message, tmp_path):
    tensors = {name: array for name, array in (gpt_oss() | change).items() if array is not None}
    with pytest.raises(JQ4Error, match=message):
        open_checkpoint(write_checkpoint(tmp_path / "m", tensors))


def test_a_scale_of_nan_is_refused_when_read(tmp_path):
    tensors = gpt_oss()
    tensors[f"{EXPERTS}_scales"][1, 2, 0] = 255
    with pytest.raises(JQ4Error, match="gate_up_proj_scales' holds 1 scales of 255, NaN, wanted finite scales"):
        open_checkpoint(write_checkpoint(tmp_path / "m", tensors)).weights[EXPERTS].read()


def test_what_config_json_says_of_the_dtype(tmp_path):
    assert model_dtype({"dtype": "auto", "text_config": {"torch_dtype": "float16"}}) == np.float16
    assert model_dtype({"torch_dtype": None}) == ml_dtypes.bfloat16
    with pytest.raises(JQ4Error, match="has dtype 'int8', wanted bfloat16"):
        open_checkpoint(write_checkpoint(tmp_path / "n", gpt_oss(), {"dtype": "int8"}))


def test_what_was_read_is_written_back_byte_for_byte(tmp_path):
    tensors = gpt_oss() | {"lm_head.weight": np.ones((4, 32), np.float32)}
    source = open_checkpoint(write_checkpoint(tmp_path / "a", tensors))
    planned = as_folder(tmp_path / "b", source.weights.values(), mxfp4)
    assert [one.loss for one in planned] == [""] * 3
    again = open_checkpoint(tmp_path / "b")
    assert again.quantization == {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    for one in planned:
        for name, array in one.encode(one.weight.read()).items():
            np.testing.assert_array_equal(array, tensors[name], strict=True)


def by_the_book(values):
    """f32[N, K] as the specification has it: the dense values of the blocks."""
    blocks = values.reshape(-1, 32).astype(np.float64)
    result = np.zeros_like(blocks)
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for i, block in enumerate(blocks):
        largest = np.abs(block).max()
        if largest == 0:
            continue
        scale = 2.0 ** max(np.floor(np.log2(largest)) - 2, -127)
        distance = np.abs(np.abs(block / scale)[:, None] - levels)
        even_first = np.lexsort((np.arange(8) % 2,))  # of two nearest, the one whose mantissa is even
        nearest = even_first[distance[:, even_first].argmin(axis=1)]
        result[i] = np.sign(block) * levels[nearest] * scale
    return result.reshape(values.shape)


@pytest.mark.parametrize("kind", ["normal", "ties", "tiny"])
def test_dense_weights_are_quantized_as_ocp_says(kind):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 96)).astype(np.float32)
    if kind == "ties":
        values = (rng.integers(-31, 32, (20, 96)) / 4).astype(np.float32)
        values[:, 0] = 7.75
    if kind == "tiny":
        values, values[3, :32] = values * np.float32(1e-38), 0
    weight = weight_of(values, "a.weight")
    planned = mxfp4.plan(weight, {})
    assert planned.loss == "float32 rounded to MXFP4"
    encoded = planned.encode(values)
    q = QArray(
        encoded["a.weight_blocks"].reshape(20, 48), encoded["a.weight_scales"].view(mx_blocks.SCALE_DTYPE),
        format="fp4", group_size=32, axis=-1,
    )  # fmt: skip
    np.testing.assert_array_equal(dense(q), by_the_book(values).astype(np.float32))


def test_a_single_number_stays_as_it_is():
    planned = mxfp4.plan(weight_of(np.float32(3), "model.layers.0.mlp.up_proj.input_scale"), {})
    assert planned.tensors == {"model.layers.0.mlp.up_proj.input_scale": ("F32", ())}


def test_nearest_codes_are_those_of_ml_dtypes():
    values = np.concatenate([np.arange(-28, 29) / 4, np.random.default_rng(0).normal(size=500) * 4, [0.0, -0.0, 1e30]])
    values = values.astype(np.float32)
    theirs = np.clip(values, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    np.testing.assert_array_equal(mx_blocks.nearest_code(values), theirs)


def test_other_packed_weights_are_rounded_and_told():
    rng = np.random.default_rng(0)
    scale = np.float32(2.0) ** rng.integers(-3, 3, (4, 2))
    q = QArray(rng.integers(0, 256, (4, 32), dtype=np.uint8), scale, format="fp4", group_size=32, axis=-1)
    planned = mxfp4.plan(weight_of(q, "experts.up"), {})
    assert planned.loss == "fp4 in groups of 32 rounded to MXFP4"
    encoded = planned.encode(q)
    again = QArray(
        encoded["experts.up_blocks"].reshape(4, 32), encoded["experts.up_scales"].view(mx_blocks.SCALE_DTYPE),
        format="fp4", group_size=32, axis=-1,
    )  # fmt: skip
    np.testing.assert_array_equal(dense(again), dense(q))  # powers of two lose nothing
    with pytest.raises(JQ4Error, match=r"a: has shape \[4, 33\], and MXFP4 holds rows of whole blocks of 32"):
        mxfp4.plan(LazyWeight("a", QArray(np.zeros((4, 17), np.uint8), scale, padding=1, axis=-1), lambda: None), {})


def test_a_byte_of_scale_is_saved_restored_and_multiplied(tmp_path):
    rng = np.random.default_rng(0)
    scale = rng.integers(120, 130, (8, 2), dtype=np.uint8).view(mx_blocks.SCALE_DTYPE)
    q = QArray(rng.integers(0, 256, (8, 32), dtype=np.uint8), scale, format="fp4", group_size=32, axis=-1)
    jq4.save(tmp_path / "m", {"w": q})
    restored = jq4.restore(tmp_path / "m")
    assert restored["w"].scale.dtype == mx_blocks.SCALE_DTYPE
    np.testing.assert_array_equal(np.asarray(restored["w"].scale).view(np.uint8), scale.view(np.uint8))
    x = jnp.asarray(rng.normal(size=(3, 64)), jnp.float32)
    product = jax.jit(jq4.quantized(lambda tree: x @ tree["w"].T, strict=True))(restored)
    np.testing.assert_allclose(product, np.asarray(x) @ dense(q).T, rtol=1e-5, atol=1e-4)
