"""Oracle: real slices with GPTQModel's own dequantized weights; numpy in float64 over an independent bit string."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from jq4 import JQ4Error, QArray
from jq4.checkpoint.foreign import open_checkpoint
from tests.foreign_folder import assert_same_tensors, convert, dense64, opened, read_weight, save, weight_of
from tests.packed_oracle import unpack_bits, words_along

P = "model.layers.0.mlp.up_proj"


def make(bits, inputs, outputs, group, *, version=1, zeros=None, g_idx=None, seed=0):
    """(tensors, dense weight float64 [N, K]); zeros None for symmetric ones."""
    rng = np.random.default_rng(seed)
    groups = -(-inputs // group)
    codes = rng.integers(0, 2**bits, (inputs, outputs), dtype=np.uint8)
    scales = (rng.normal(size=(groups, outputs)) * 0.1).astype(np.float16)  # of both signs
    zeros = np.full((groups, outputs), 2 ** (bits - 1), np.uint8) if zeros is None else zeros
    index = np.arange(inputs) // group if g_idx is None else g_idx % groups
    stored = (zeros - np.uint8(1)) % np.uint8(2**bits) if version == 1 and bits < 8 else zeros - np.uint8(version == 1)
    tensors = {
        f"{P}.qweight": words_along(codes, bits, 0),
        f"{P}.qzeros": words_along(stored, bits, 1),
        f"{P}.scales": scales,
        f"{P}.g_idx": (np.arange(inputs) // group if g_idx is None else g_idx).astype(np.int32),
    }
    dense = scales[index].astype(np.float64) * (codes.astype(np.float64) - zeros[index])
    return tensors, dense.T


def config(bits, group, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": True, "desc_act": False, **more}


@pytest.mark.parametrize("slice_name", ["llama_3_2_1b_int4", "llama_3_2_1b_gptqmodel_int8"])
def test_real_slices_are_exact_and_come_back_byte_for_byte(slice_name, shared_data, tmp_path):
    raw = (shared_data / "quant_slices" / "gptq" / f"{slice_name}.bin").read_bytes()
    bits, group, inputs, outputs, _, has_index, *lengths = np.frombuffer(raw, "<u4", 11).tolist()
    blobs = np.split(np.frombuffer(raw, np.uint8, offset=44), np.cumsum(lengths))
    shapes = ((inputs * bits // 32, outputs), (-1, outputs), (-1, outputs * bits // 32), (inputs,))
    names = ("qweight", "scales", "qzeros", "g_idx")
    dtypes = (np.int32, np.float16, np.int32, np.int32)
    made = {
        f"{P}.{name}": blob.view(dtype).reshape(shape)
        for name, dtype, shape, blob in zip(names, dtypes, shapes, blobs[:4], strict=True)
    }
    assert has_index == 1
    checkpoint = opened(tmp_path, made, config(bits, group, checkpoint_format="gptq"))
    assert checkpoint.format == "gptq" and checkpoint.notes == ()
    q = read_weight(checkpoint, f"{P}.weight")
    assert q.zero_point is None
    expected = blobs[4].view(ml_dtypes.bfloat16).reshape(inputs, outputs)
    np.testing.assert_array_equal(np.asarray(q.dequantize(ml_dtypes.bfloat16)), expected.T)
    tensors, written = convert("gptq", checkpoint.weights)
    assert_same_tensors(tensors, made)
    assert (written["bits"], written["group_size"], written["sym"]) == (bits, group, True)
    assert written["checkpoint_format"] == "gptq"


def test_the_layout_of_a_real_file(shared_data):
    checkpoint = open_checkpoint(shared_data / "quant_slices" / "safetensors" / "gptq.safetensors")
    weight = checkpoint.weights["model.layers.0.weight"]
    assert (checkpoint.format, weight.shape, weight.format) == ("gptq", (32, 64), "int4")
    assert (weight.abstract.group_size, checkpoint.weights["model.norm.weight"].format) == (32, "float16")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_codes_zeros_and_scales_are_exact(bits, version, tmp_path):
    low, high = (1, 2**bits)
    zeros = np.random.default_rng(1).integers(low, high, (3, 32)).astype(np.uint8)
    made, dense = make(bits, 96, 32, 32, version=version, zeros=zeros)
    label = config(bits, 32, sym=False, checkpoint_format="gptq" if version == 1 else "gptq_v2")
    checkpoint = opened(tmp_path, made, label)
    q = read_weight(checkpoint, f"{P}.weight")
    np.testing.assert_array_equal(q.zero_point, zeros.T)
    np.testing.assert_allclose(dense64(q), dense, rtol=1e-12)
    if bits in (2, 3, 4, 8):
        tensors, written = convert("gptq", checkpoint.weights, checkpoint_format=label["checkpoint_format"])
        assert_same_tensors(tensors, made)
        assert written["checkpoint_format"] == label["checkpoint_format"] and not written["sym"]


@pytest.mark.parametrize("group", [-1, 32, 128])  # one group, whole groups, a short last one
def test_groups_of_any_size(group, tmp_path):
    size = 160 if group == -1 else group
    made, dense = make(4, 160, 40, size)
    checkpoint = opened(tmp_path, made, config(4, group))
    q = read_weight(checkpoint, f"{P}.weight")
    assert (q.group_size, q.zero_point) == (size, None)
    np.testing.assert_allclose(dense64(q), dense, rtol=1e-12)
    tensors, written = convert("gptq", checkpoint.weights)
    assert_same_tensors(tensors, made)
    assert written["group_size"] == group


@pytest.mark.parametrize("bits", [3, 4])
def test_act_order_is_kept_by_a_permutation(bits, tmp_path):
    g_idx = np.random.default_rng(2).permutation(np.arange(160) // 64)
    made, dense = make(bits, 160, 32, 64, g_idx=g_idx)
    checkpoint = opened(tmp_path, made, config(bits, 64, desc_act=True))
    q = read_weight(checkpoint, f"{P}.weight")
    np.testing.assert_allclose(dense64(q), dense, rtol=1e-12)
    tensors, written = convert("gptq", checkpoint.weights)
    assert_same_tensors(tensors, made)
    assert written["desc_act"]
    assert "its g_idx is not sorted" in opened(tmp_path, made, config(bits, 64)).notes[0]
    with pytest.raises(JQ4Error, match=r"permuted \(act-order\).*Write gptq"):
        convert("compressed_tensors", checkpoint.weights)


def test_negative_group_indices_count_from_the_end(tmp_path):
    g_idx = np.random.default_rng(3).permutation(np.arange(128) // 32)
    made, dense = make(4, 128, 32, 32, g_idx=g_idx)
    made[f"{P}.g_idx"] = np.where(g_idx > 1, g_idx - 4, g_idx).astype(np.int32)
    q = read_weight(opened(tmp_path, made, config(4, 32, desc_act=True)), f"{P}.weight")
    np.testing.assert_allclose(dense64(q), dense, rtol=1e-12)


def test_groups_of_unequal_sizes_are_refused(tmp_path):
    made, _ = make(4, 128, 32, 32)
    made[f"{P}.g_idx"] = np.zeros(128, np.int32)
    with pytest.raises(
        JQ4Error, match=r"g_idx' is I32\[128\], wanted 4 groups 0 to 3 of 32 inputs each.*dequantize it"
    ):
        opened(tmp_path, made, config(4, 32))


def test_labels_give_way_to_contents_with_a_note(tmp_path):
    made, dense = make(4, 128, 32, 32, version=2)  # 0x88888888 under the label of v1
    checkpoint = opened(tmp_path, made, config(4, 32, checkpoint_format="gptq"))
    q = read_weight(checkpoint, f"{P}.weight")
    np.testing.assert_allclose(dense64(q), dense, rtol=1e-12)
    assert "all zero points are stored as 8, which is 'gptq_v2'" in checkpoint.notes[0]
    made, dense = make(8, 128, 32, 32)  # 0x7f7f7f7f under the label of v2, of other bits and groups
    checkpoint = opened(tmp_path, made, config(4, 64, checkpoint_format="gptq_v2"))
    np.testing.assert_allclose(dense64(read_weight(checkpoint, f"{P}.weight")), dense, rtol=1e-12)
    notes = "\n".join(checkpoint.notes)
    assert (
        "stored as 127, which is 'gptq'" in notes and "labelled 4 bits" in notes and "labelled group_size 64" in notes
    )
    zeros = np.full((4, 32), 8, np.uint8)
    zeros[2, 5] = 9
    made, dense = make(4, 128, 32, 32, zeros=zeros)
    checkpoint = opened(tmp_path, made, config(4, 32))
    np.testing.assert_allclose(dense64(read_weight(checkpoint, f"{P}.weight")), dense, rtol=1e-12)
    assert "labelled symmetric, and not all zero points are 8; read with zero points" in checkpoint.notes[0]


def test_zero_points_of_0_in_v1_are_what_gptqmodel_wrote(tmp_path):
    zeros = np.full((4, 32), 5, np.uint8)
    zeros[:, ::8] = 0
    zeros[1, 7] = 15
    made, dense = make(4, 128, 32, 32, version=2, zeros=zeros)
    made[f"{P}.qzeros"] = (made[f"{P}.qzeros"].view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    assert np.uint32(made[f"{P}.qzeros"][0, 0]) == 0x4444443F
    checkpoint = opened(tmp_path, made, config(4, 32, sym=False))
    q = read_weight(checkpoint, f"{P}.weight")
    np.testing.assert_array_equal(q.zero_point, zeros.T)
    np.testing.assert_allclose(dense64(q), dense, rtol=1e-12)
    assert "holds zero points stored as 15 in v1" in checkpoint.notes[0]
    assert convert("gptq", checkpoint.weights)[1]["checkpoint_format"] == "gptq_v2"
    with pytest.raises(JQ4Error, match=r"16 of 128 zero points are 0.*Write checkpoint_format 'gptq_v2'"):
        convert("gptq", checkpoint.weights, checkpoint_format="gptq")


def test_dynamic_overrides_and_the_ways_of_auto_round(tmp_path):
    made, dense = make(8, 128, 32, 128)
    made = {name.replace("layers.0", "layers.7"): array for name, array in made.items()}
    plain, _ = make(4, 128, 32, 32)
    plain |= {name.replace("layers.0", "layers.1"): array for name, array in plain.items()}
    dynamic = {"-:.*gate": {}, r"+:model\.layers\.7\.": {"bits": 8, "group_size": -1}}
    checkpoint = opened(tmp_path, made | plain, config(4, 32, dynamic=dynamic))
    assert checkpoint.notes == ()
    q = read_weight(checkpoint, "model.layers.7.mlp.up_proj.weight")
    np.testing.assert_allclose(dense64(q), dense, rtol=1e-12)
    _, written = convert("gptq", checkpoint.weights)
    assert written["bits"] == 4
    assert written["dynamic"] == {
        r"+:^model\.layers\.7\.mlp\.up_proj$": {"bits": 8, "group_size": -1, "sym": True},
    }
    zeros = np.random.default_rng(4).integers(0, 16, (4, 32)).astype(np.uint8)
    for packing, version in (("auto_round:auto_gptq", 1), ("auto_round", 2), ("auto_round:gptqmodel", 2)):
        made, dense = make(4, 128, 32, 32, version=version, zeros=np.maximum(zeros, 1) if version == 1 else zeros)
        del made[f"{P}.g_idx"]
        extra = {P: {"bits": 4, "group_size": 32, "sym": False}}
        label = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "packing_format": packing}
        q = read_weight(opened(tmp_path, made, label | {"extra_config": extra}), f"{P}.weight")
        np.testing.assert_allclose(dense64(q), dense, rtol=1e-12)


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda t: t.pop("qzeros"), r"qzeros' is missing or empty, wanted beside g_idx, qweight, scales"),
        (lambda t: t.update(scales=t["scales"][:, :24]), r"scales' is F16\[4, 24\], wanted \[groups, 32\]"),
        (lambda t: t.update(scales=t["scales"][:3]), r"qzeros' is I32\[4, 4\], wanted \[3, 32 \* bits / 32\]"),
        (lambda t: t.update(qzeros=t["qzeros"][:, :1]), r"which gives 1 bits here"),
        (lambda t: t.update(qzeros=t["qzeros"][0]), r"qzeros' is I32\[4\], wanted two axes"),
        (lambda t: t.update(g_idx=t["g_idx"][:64]), r"g_idx' is I32\[64\], wanted I32\[128\]"),
        (lambda t: t.update(scales=t["scales"][:3], qzeros=t["qzeros"][:3]), r"wanted 4 groups of 32 for 128 inputs"),
        (lambda t: t.update(scales=t["scales"].astype(np.int32)), r"wanted dtype F16 or BF16 or F32"),
        (lambda t: t.update(qweight=t["qweight"].astype(np.int64)), r"wanted dtype I32"),
    ],
)
def test_contradictions_are_named_before_anything_is_read(damage, text, tmp_path):
    parts = {name.removeprefix(f"{P}."): array for name, array in make(4, 128, 32, 32)[0].items()}
    damage(parts)
    with pytest.raises(JQ4Error, match=text):
        opened(tmp_path, {f"{P}.{name}": array for name, array in parts.items()}, config(4, 32))


@pytest.mark.parametrize("label", [{"checkpoint_format": "marlin"}, {"is_marlin_format": True}, {"format": "gptq_p"}])
def test_layouts_of_one_kernel_are_refused(label, tmp_path):
    with pytest.raises(JQ4Error, match=r"checkpoint_format is '(marlin|gptq_p)'.*Save it again with GPTQModel"):
        opened(tmp_path, make(4, 128, 32, 32)[0], config(4, 32, **label))


def test_scales_that_are_not_finite_are_an_error_when_read(tmp_path):
    made, _ = make(4, 128, 32, 32)
    made[f"{P}.scales"][1, 2] = np.inf
    with pytest.raises(JQ4Error, match=r"scales' holds 1 values that are NaN or infinite"):
        opened(tmp_path, made, config(4, 32)).weights[f"{P}.weight"].read()


def packed(scale_dtype=np.float16, scale=0.125, **changes):
    codes = np.random.default_rng(5).integers(0, 256, (32, 64), dtype=np.uint8)
    whole = np.full((32, 4), scale, np.float64).astype(scale_dtype)
    return dataclasses.replace(QArray(codes=codes, scale=whole, group_size=32, axis=-1, dtype="float16"), **changes)


def test_scales_are_cast_only_where_nothing_is_lost_or_the_loss_is_stated():
    from jq4.checkpoint.foreign.gptq_writing import plan

    exact = plan(weight_of(packed(ml_dtypes.bfloat16)), {})
    assert (exact.loss, exact.doubt) == ("", "bfloat16 scales must be exact in float16")
    assert exact.encode(exact.weight.read())["m.scales"].dtype == np.float16
    with pytest.raises(
        JQ4Error, match=r"m.weight: 128 of 128 scales of bfloat16 .* not exact in float16.*--scale-dtype bfloat16"
    ):
        convert("gptq", [weight_of(packed(ml_dtypes.bfloat16, 1e-9))])
    assert plan(weight_of(packed(np.float32, 0.1)), {}).loss == "scales float32 to float16"
    kept = plan(weight_of(packed(np.float32, 0.1)), {"scale_dtype": "float32"})
    assert (kept.loss, kept.tensors["m.scales"][0]) == ("", "F32")


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"format": "nf4"}, r"codes of format nf4; GPTQ holds integers of 2, 3, 4, 8 bits"),
        ({"offset": np.zeros((32, 4), np.float16)}, r"a float offset for each group"),
        ({"zero_point": np.zeros((32, 4), np.float32)}, r"zero points between codes \(HQQ\)"),
        ({"axis": -2}, r"grouped along axis -2"),
        ({"activations": "int8-token"}, r"inputs that a product rotates or rounds"),
        ({"codes": np.zeros((30, 64), np.uint8)}, r"axes of whole 32-bit words"),
    ],
)
def test_what_gptq_cannot_hold_is_refused_when_planned(changes, text):
    from jq4.checkpoint.foreign.gptq_writing import plan

    with pytest.raises(JQ4Error, match=text):
        plan(weight_of(packed(**changes)), {})


def test_one_checkpoint_has_one_format():
    asymmetric = packed(zero_point=np.full((32, 4), 7, np.uint8))
    both = [weight_of(packed(), "a.weight"), weight_of(asymmetric, "b.weight")]
    with pytest.raises(JQ4Error, match=r"Give checkpoint_format 'gptq_v2' for all"):
        convert("gptq", both)
    tensors, written = convert("gptq", both, checkpoint_format="gptq_v2")
    assert written["dynamic"] == {"+:^b$": {"bits": 4, "group_size": 32, "sym": False}}
    assert (unpack_bits(tensors["a.qzeros"].view(np.uint8), 4, -1, 32) == 8).all()


def test_the_command_line_takes_the_writers_options(tmp_path, capsys):
    from jq4.cli import main

    asymmetric = packed(zero_point=np.full((32, 4), 7, np.uint8))
    tensors, settings = convert(
        "compressed_tensors", [weight_of(packed(), "a.weight"), weight_of(asymmetric, "b.weight")]
    )
    source = str(save(tmp_path / "source", tensors, settings))
    assert main(["convert", source, str(tmp_path / "v"), "--to", "gptq"]) != 0
    assert "--checkpoint-format gptq_v2" in " ".join(capsys.readouterr().err.split())
    room = ["--memory", "64GB"]  # the process of the tests holds more than the default
    options = [*room, "--to", "gptq", "--checkpoint-format", "gptq_v2", "--scale-dtype", "float32", "--verify"]
    assert main(["convert", source, str(tmp_path / "made"), *options]) == 0
    checkpoint = open_checkpoint(tmp_path / "made")
    assert checkpoint.quantization["checkpoint_format"] == "gptq_v2"
    assert read_weight(checkpoint, "a.weight").scale.dtype == np.float32
    assert main(["convert", source, str(tmp_path / "w"), "--to", "awq", "--checkpoint-format", "gptq"]) != 0
    assert "--checkpoint-format is for --to gptq, and this is --to awq" in " ".join(capsys.readouterr().err.split())
