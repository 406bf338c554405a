"""Oracle: numpy in float64 over an independent bit string; ml_dtypes for small floats."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

import jq4
from jq4 import JQ4Error, QArray
from tests.foreign_folder import assert_same_tensors, convert, dense64, opened, read_weight, weight_of
from tests.packed_oracle import FP4, unpack_bits, words_along

P = "model.layers.0.mlp.up_proj"


def padded_words(codes, bits, axis):
    """The packing before 0.18: floor(32 / bits) codes a word."""
    moved = np.moveaxis(codes, axis, -1).astype(np.uint32)
    per = 32 // bits
    moved = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, -moved.shape[-1] % per)])
    words = (moved.reshape(*moved.shape[:-1], -1, per) << (bits * np.arange(per, dtype=np.uint32))).sum(-1)
    return np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis)


def make(bits, shape, group=None, symmetric=True, *, dtype=np.float16, pack=words_along, seed=0):
    """(tensors, dense weight float64 [*E, N, K])."""
    rng = np.random.default_rng(seed)
    groups = 1 if group is None else -(-shape[-1] // group)
    centre = 2 ** (bits - 1)
    codes = rng.integers(0, 2**bits, shape, dtype=np.uint8)
    scale = (rng.normal(size=(*shape[:-1], groups)) * 0.1).astype(dtype)
    zeros = rng.integers(0, 2**bits, scale.shape).astype(np.uint8)
    tensors = {
        f"{P}.weight_packed": pack(codes, bits, -1),
        f"{P}.weight_scale": scale,
        f"{P}.weight_shape": np.array(shape, np.int64),
    }
    if not symmetric:
        tensors[f"{P}.weight_zero_point"] = pack(zeros, bits, -2)
    index = np.arange(shape[-1]) // (group or shape[-1])
    zero = centre if symmetric else zeros[..., index].astype(np.float64)
    return tensors, scale[..., index].astype(np.float64) * (codes.astype(np.float64) - zero)


def config(bits=4, group=32, symmetric=True, targets=("Linear",), **more):
    strategy = "channel" if group is None else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": list(targets), "weights": weights}},
        "ignore": ["lm_head"],
        **more,
    }


def parts_of(made):
    return {name.removeprefix(f"{P}."): array for name, array in made.items()}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group, inputs", [(None, 100), (None, 96), (32, 96), (-1, 27)])
def test_integers_are_exact_and_come_back_byte_for_byte(bits, group, inputs, tmp_path):
    group = group if group != -1 else None
    for symmetric in (True, False):
        made, dense = make(bits, (20, inputs), group, symmetric, dtype=ml_dtypes.bfloat16)
        checkpoint = opened(tmp_path, made, config(bits, group, symmetric))
        assert checkpoint.format == "compressed-tensors" and checkpoint.notes == ()
        q = read_weight(checkpoint, f"{P}.weight")
        assert (q.format, q.shape, q.zero_point is None) == (f"int{bits}", (20, inputs), symmetric)
        np.testing.assert_allclose(dense64(q), dense, rtol=1e-12)
        tensors, written = convert("compressed_tensors", checkpoint.weights)
        assert_same_tensors(tensors, made)
        weights = written["config_groups"]["group_0"]["weights"]
        assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (bits, group, symmetric)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_words_of_whole_codes_as_before_release_0_18(bits, tmp_path):
    for inputs, version in ((96, None), (132, "0.19.0"), (2 * (32 // bits), "0.17.1")):  # the last fits both packings
        made, dense = make(bits, (20, inputs), None, False, pack=padded_words)
        q = read_weight(opened(tmp_path, made, config(bits, None, False, version=version)), f"{P}.weight")
        np.testing.assert_allclose(dense64(q), dense, rtol=1e-12)


def test_a_weight_that_needs_no_repacking_is_a_view_of_the_file(tmp_path):
    made, _ = make(4, (16, 64), 32)
    codes = opened(tmp_path, made, config()).weights[f"{P}.weight"].read().codes
    while codes.base is not None and not isinstance(codes, np.memmap):
        codes = codes.base
    assert isinstance(codes, np.memmap)


def test_stacks_of_experts(tmp_path):
    for symmetric in (True, False):
        made, dense = make(4, (3, 16, 64), 32, symmetric)
        checkpoint = opened(tmp_path, made, config(symmetric=symmetric))
        np.testing.assert_allclose(dense64(read_weight(checkpoint, f"{P}.weight")), dense, rtol=1e-12)
        assert_same_tensors(convert("compressed_tensors", checkpoint.weights)[0], made)


@pytest.mark.parametrize("shape", [None, np.zeros(0, np.int64), np.array([64, 64]), np.array([16, 64], np.int32)])
def test_weight_shape_may_be_missing_empty_or_of_the_uncut_weight(shape, tmp_path):
    made, dense = make(4, (16, 64), 32)
    del made[f"{P}.weight_shape"]
    if shape is not None:
        made[f"{P}.weight_shape"] = shape
    q = read_weight(opened(tmp_path, made, config()), f"{P}.weight")
    np.testing.assert_allclose(dense64(q), dense, rtol=1e-12)


def test_one_scale_and_zero_point_for_a_whole_tensor(tmp_path):
    made, _ = make(4, (16, 64), None)
    scale, codes = np.float16(0.25), unpack_bits(made[f"{P}.weight_packed"].view(np.uint8), 4, -1, 64)
    made |= {f"{P}.weight_scale": np.array([scale]), f"{P}.weight_zero_point": np.array([-3], np.int8)}
    label = config(4, None, False)
    label["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    q = read_weight(opened(tmp_path, made, label), f"{P}.weight")
    np.testing.assert_allclose(dense64(q), 0.25 * (codes - 5.0), rtol=1e-12)
    again, _ = convert("compressed_tensors", [weight_of(q)])
    assert again["m.weight_scale"].shape == (16, 1) and again["m.weight_zero_point"].shape == (2, 1)


def test_group_indices_of_old_files(tmp_path):
    made, _ = make(4, (16, 96), 32)
    checkpoint = opened(tmp_path, made | {f"{P}.weight_g_idx": np.full(96, -1, np.int32)}, config())  # never set
    assert_same_tensors(convert("compressed_tensors", checkpoint.weights)[0], made)
    g_idx = np.random.default_rng(1).permutation(np.arange(96) // 32).astype(np.int32)
    q = read_weight(opened(tmp_path, made | {f"{P}.weight_g_idx": g_idx}, config()), f"{P}.weight")
    codes = unpack_bits(made[f"{P}.weight_packed"].view(np.uint8), 4, -1, 96)
    scale = made[f"{P}.weight_scale"].astype(np.float64)
    np.testing.assert_allclose(dense64(q), scale[:, g_idx] * (codes - 8.0), rtol=1e-12)


def test_labels_give_way_to_contents_with_a_note(tmp_path):
    made, dense = make(4, (16, 64), 32, False)
    checkpoint = opened(tmp_path, made, config(8, 64, True))
    np.testing.assert_allclose(dense64(read_weight(checkpoint, f"{P}.weight")), dense, rtol=1e-12)
    notes = "\n".join(checkpoint.notes)
    assert "labelled 8 bits, and its shapes say 4" in notes
    assert "labelled group_size 64, and its scales are of groups of 32" in notes
    assert "labelled symmetric, and has zero points that are not 0" in notes
    made, dense = make(4, (16, 64), 32)
    assert "labelled asymmetric, and has no" in opened(tmp_path, made, config(symmetric=False)).notes[0]
    zero = {f"{P}.weight_zero_point": np.zeros((16, 2), np.int8)}
    assert read_weight(opened(tmp_path, made | zero, config()), f"{P}.weight").zero_point is None


def test_targets_presets_and_mixed_precision(tmp_path):
    made, dense = make(4, (16, 384), 128)
    wide, wide_dense = make(8, (16, 48), None)
    head = {name.replace("up_proj", "down_proj"): array for name, array in wide.items()}
    label = config() | {"format": "mixed-precision"}
    label["config_groups"] = {
        "W4A16": ["Linear"],
        "group_1": {
            "targets": [r"re:.*down_proj$"],
            "weights": {"num_bits": 8, "strategy": "channel", "symmetric": True},
            "input_activations": {"num_bits": 8, "dynamic": True},
        },
    }
    bare = {name: array for name, array in made.items() if not name.endswith("weight_shape")}
    checkpoint = opened(tmp_path, bare | head, label)
    np.testing.assert_allclose(dense64(read_weight(checkpoint, f"{P}.weight")), dense, rtol=1e-12)
    down = read_weight(checkpoint, "model.layers.0.mlp.down_proj.weight")
    np.testing.assert_allclose(dense64(down), wide_dense, rtol=1e-12)
    made_for = "was made for quantized inputs; the weight alone is read, and inputs stay floats."
    assert checkpoint.notes == (f"model.layers.0.mlp.down_proj: {made_for}",)


def test_the_config_names_exactly_what_is_packed_and_how():
    q = QArray(codes=np.zeros((8, 32), np.uint8), scale=np.ones((8, 2), np.float16), group_size=32, axis=-1)
    channel = dataclasses.replace(q, scale=np.ones((8, 1), np.float16), group_size=64)
    dense = np.zeros((8, 64), np.float16)
    weights = {f"model.layers.{i}.up.weight": q for i in range(3)}
    weights |= {f"model.layers.{i}.down.weight": channel for i in range(2)}
    weights |= {f"model.layers.{i}.gate.weight": dense for i in range(2)}
    weights |= {"model.layers.2.down.weight": dense, "model.norm.weight": dense[0]}
    _, written = convert("compressed_tensors", [weight_of(value, name) for name, value in weights.items()])
    second, first = written["config_groups"].values()
    assert first["targets"] == ["Linear"] and first["weights"]["group_size"] == 32
    assert second["weights"]["strategy"] == "channel" and second["targets"] == [r"re:^model\.layers\.\d+\.down$"]
    assert written["ignore"] == [r"re:^model\.layers\.\d+\.gate$", "model.layers.2.down", "lm_head"]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_byte_a_code(bits, tmp_path):
    rng = np.random.default_rng(2)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (16, 48)).astype(np.int8)
    scale = rng.normal(size=(16, 1)).astype(np.float32)
    zero = rng.integers(-7, 8, (16, 1)).astype(np.int8)
    made = {f"{P}.weight": codes, f"{P}.weight_scale": scale, f"{P}.weight_zero_point": zero}
    label = config(bits, None, False, format="naive-quantized")
    q = read_weight(opened(tmp_path, made, label), f"{P}.weight")
    np.testing.assert_allclose(dense64(q), scale.astype(np.float64) * (codes - zero.astype(np.float64)), rtol=1e-12)
    made[f"{P}.weight_zero_point"][:] = 0
    assert read_weight(opened(tmp_path, made, label), f"{P}.weight").zero_point is None
    if bits == 4:
        made[f"{P}.weight"][3, 4] = 8
        with pytest.raises(JQ4Error, match=r"weight' holds values outside -8..7, wanted 4 bits.*Mend num_bits"):
            opened(tmp_path, made, label).weights[f"{P}.weight"].read()


def fp4_tensors(group, seed=3):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (16, 64), dtype=np.uint8)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return {f"{P}.weight_packed": packed}, np.asarray(FP4)[codes], np.arange(64) // group, rng


@pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.float8_e8m0fnu])
def test_mxfp4_is_exact_saved_with_one_byte_a_scale_and_comes_back_byte_for_byte(dtype, tmp_path):
    made, levels, index, rng = fp4_tensors(32)
    exponents = rng.integers(0, 255, (16, 2), dtype=np.uint8)
    made[f"{P}.weight_scale"] = exponents.view(dtype)
    checkpoint = opened(tmp_path / "ct", made, {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"})
    q = read_weight(checkpoint, f"{P}.weight")
    np.testing.assert_array_equal(dense64(q), levels * 2.0 ** (exponents.astype(np.float64) - 127)[:, index])
    assert q.nbytes == 16 * 32 + 16 * 2 and q.dtype == "bfloat16"
    for writer in ("mxfp4", "compressed_tensors"):
        tensors, written = convert(writer, checkpoint.weights)
        assert_same_tensors(tensors, made | {f"{P}.weight_scale": exponents})
        assert written["format"] == "mxfp4-pack-quantized"
    jq4.save(tmp_path / "ours", {"w": q})
    restored = jq4.restore(tmp_path / "ours")["w"]
    assert restored.scale.dtype == ml_dtypes.float8_e8m0fnu
    np.testing.assert_array_equal(np.asarray(restored.scale).view(np.uint8), exponents)
    wide = dataclasses.replace(q, scale=np.asarray(q.scale).astype(np.float32))
    assert_same_tensors(convert("mxfp4", [weight_of(wide, f"{P}.weight")])[0], tensors)
    with pytest.raises(JQ4Error, match=r"1 of 32 scales are not powers of two"):
        wide.scale[2, 1] = 0.3
        convert("mxfp4", [weight_of(wide)])


def test_nvfp4_keeps_its_scales_packed(tmp_path):
    made, levels, index, rng = fp4_tensors(16)
    scale = rng.uniform(1, 448, (16, 4)).astype(ml_dtypes.float8_e4m3fn)
    scale[0, 0] = -0.001953125  # subnormal, and negative
    made |= {f"{P}.weight_scale": scale, f"{P}.weight_global_scale": np.array([1234.5], np.float32)}
    made[f"{P}.input_global_scale"] = np.array([3.0], np.float32)
    checkpoint = opened(tmp_path / "ct", made, {"quant_method": "compressed-tensors"}, torch_dtype="float32")
    assert list(checkpoint.weights) == [f"{P}.weight"] and "made for quantized inputs" in checkpoint.notes[0]
    q = read_weight(checkpoint, f"{P}.weight")
    assert q.nbytes == 16 * 32 + 16 * 4 + 4
    wanted = levels * scale.astype(np.float64)[:, index] / 1234.5
    np.testing.assert_allclose(dense64(q), wanted, rtol=1e-7)
    jq4.save(tmp_path / "ours", {"w": q})
    np.testing.assert_allclose(np.asarray(jq4.restore(tmp_path / "ours")["w"].dequantize()), wanted, rtol=3e-7)


@pytest.mark.parametrize(
    "byte, dtype", [(255, np.uint8), (0x7F, ml_dtypes.float8_e4m3fn), (0xFF, ml_dtypes.float8_e4m3fn)]
)
def test_small_scales_that_are_nan_are_an_error_when_read(byte, dtype, tmp_path):
    group = 32 if dtype == np.uint8 else 16
    made, *_ = fp4_tensors(group)
    scales = np.full((16, 64 // group), 120, np.uint8)
    scales[1, 1] = byte
    made |= {f"{P}.weight_scale": scales.view(dtype), f"{P}.weight_global_scale": np.ones(1, np.float32)}
    with pytest.raises(JQ4Error, match=r"weight_scale' holds 1 scales (of 255,|that are) NaN"):
        opened(tmp_path, made, {}).weights[f"{P}.weight"].read()


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda t: t.pop("weight_scale"), r"weight_scale' is missing or empty, wanted beside weight_packed"),
        (
            lambda t: t.update(weight_scale=t["weight_scale"][:8]),
            r"weight_scale' is F16\[8, 2\], wanted \[16, 'groups'\]",
        ),
        (lambda t: t.update(weight_packed=t["weight_packed"][:, :7]), r"wanted as many words as 64 inputs of 4 bits"),
        (
            lambda t: t.update(weight_zero_point=t["weight_zero_point"][:1]),
            r"zero_point' is I32\[1, 2\], wanted \[2, 2\]",
        ),
        (lambda t: t.update(weight_shape=np.array([16.0, 64.0])), r"weight_shape' is F64\[2\], wanted I64\[2\]"),
        (lambda t: t.update(weight_g_idx=np.zeros(8, np.int32)), r"weight_g_idx' is I32\[8\], wanted I32\[64\]"),
        (lambda t: t.update(weight_scale=np.ones((16, 3), np.float16)), r"wanted groups of 32 for 64 inputs"),
        (lambda t: t.update(weight_packed=t["weight_packed"].view(np.int16)), r"wanted dtype I32 or U8"),
    ],
)
def test_contradictions_are_named_before_anything_is_read(damage, text, tmp_path):
    held = parts_of(make(4, (16, 64), 32, False)[0])
    damage(held)
    with pytest.raises(JQ4Error, match=text):
        opened(tmp_path, {f"{P}.{name}": array for name, array in held.items()}, config(symmetric=False))


@pytest.mark.parametrize(
    "more, text",
    [
        ({"format": "marlin-24"}, r"format is 'marlin-24', 2:4 sparse codes"),
        ({"format": "float-quantized"}, r"format is 'float-quantized', 8-bit floats; wanted pack-quantized"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparse weights.*Decompress it"),
        (
            {"transform_config": {"config_groups": {"u": {"type": "hadamard", "apply": [{"location": "input"}]}}}},
            r"transform_config rotates 'input' while the model runs",
        ),
    ],
)
def test_what_is_not_read_is_refused_with_a_remedy(more, text, tmp_path):
    made, _ = make(4, (16, 64), 32)
    with pytest.raises(JQ4Error, match=text):
        opened(tmp_path, made, config(**more))
    folded = {"config_groups": {"v": {"type": "hadamard", "apply": [{"location": "weight_output"}]}}}
    opened(tmp_path, made, config(transform_config=folded, sparsity_config={"format": "dense"}))


def test_floats_of_8_bits_and_blocks_of_rows_are_refused(tmp_path):
    weight = np.ones((16, 32), ml_dtypes.float8_e4m3fn)
    made = {f"{P}.weight": weight, f"{P}.weight_scale": np.ones((16, 1), np.float16)}
    with pytest.raises(JQ4Error, match=r"weight' is F8_E4M3\[16, 32\], wanted I8 beside weight_scale.*save it dense"):
        opened(tmp_path, made, config(format="naive-quantized"))
    made = {f"{P}.weight": weight.view(np.int8), f"{P}.weight_scale": np.ones((2, 2), np.float16)}
    with pytest.raises(JQ4Error, match=r"Scales of blocks of several rows are not read"):
        opened(tmp_path, made, config(format="int-quantized"))


def test_a_short_last_group_is_refused_as_the_peer_refuses_it():
    q = QArray(codes=np.zeros((8, 32), np.uint8), scale=np.ones((8, 2), np.float16), group_size=48, axis=-1)
    with pytest.raises(
        JQ4Error, match=r"a short last group \(64 inputs in groups of 48\); compressed-tensors holds whole"
    ):
        convert("compressed_tensors", [weight_of(q)])
