"""Oracle: a real slice with AutoAWQ's own dequantized weights; each layout written nibble by nibble by its formula."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from jq4 import JQ4Error, QArray
from tests.foreign_folder import assert_same_tensors, convert, dense64, opened, read_weight, weight_of
from tests.packed_oracle import words_along

P = "model.layers.0.mlp.up_proj"
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
K, N, GROUP = 192, 24, 32


def parts(seed=0, zeros=None, inputs=K, group=GROUP):
    """(codes [K, N], zeros [G, N], scales [G, N], the dense weight float64 [N, K])."""
    rng = np.random.default_rng(seed)
    groups = inputs // group
    codes = rng.integers(0, 16, (inputs, N), dtype=np.uint8)
    zeros = rng.integers(0, 16, (groups, N), dtype=np.uint8) if zeros is None else np.full((groups, N), zeros, np.uint8)
    scales = (rng.normal(size=(groups, N)) * 0.1).astype(np.float16)
    index = np.arange(inputs) // group
    return codes, zeros, scales, (scales[index].astype(np.float64) * (codes - zeros[index].astype(np.float64))).T


def interleaved(codes):
    """gemm's words: nibble i of word c is column 8c + ORDER[i]."""
    columns = [8 * c + ORDER[i] for c in range(codes.shape[1] // 8) for i in range(8)]
    return words_along(codes[:, columns], 4, 1)


def gemm(codes, zeros, scales):
    return {f"{P}.qweight": interleaved(codes), f"{P}.qzeros": interleaved(zeros), f"{P}.scales": scales}


def gemv(codes, zeros, scales, fill):
    groups = scales.shape[0]
    behind = ((0, -groups % fill), (0, 0))
    return {
        f"{P}.qweight": words_along(codes.T, 4, 1),
        f"{P}.qzeros": words_along(np.pad(zeros, behind).T, 4, 1),
        f"{P}.scales": np.ascontiguousarray(np.pad(scales, behind).T),
    }


def fast(codes, zeros, scales, fill, third="qzeros"):
    words = np.zeros((N // 4, codes.shape[0]), np.uint16)
    for k in range(codes.shape[0]):
        for n in range(N):
            column = k // 64 * 64 + n % 4 * 16 + k % 64 // 32 * 8 + k % 8
            words[n // 4, column] |= np.uint16(codes[k, n]) << (4 * (k % 32 // 8))
    behind = ((0, -scales.shape[0] % fill), (0, 0))
    scaled = -(scales.astype(np.float32) * zeros).astype(np.float16)
    held = {"qweight": words.view(np.int16), "scales": np.pad(scales, behind), third: np.pad(scaled, behind)}
    return {f"{P}.{name}": array for name, array in held.items()}


def config(version="gemm", group=GROUP, **more):
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": version, **more}


def test_a_real_slice_is_exact_and_comes_back_byte_for_byte(shared_data, tmp_path):
    raw = (shared_data / "quant_slices" / "awq" / "llama_3_2_1b_awq.bin").read_bytes()
    _, group, inputs, outputs, _, *lengths = np.frombuffer(raw, "<u4", 9).tolist()
    weight, scales, zeros, expected = np.split(np.frombuffer(raw, np.uint8, offset=36), np.cumsum(lengths[:3]))
    made = {
        f"{P}.qweight": weight.view(np.int32).reshape(inputs, outputs // 8),
        f"{P}.qzeros": zeros.view(np.int32).reshape(-1, outputs // 8),
        f"{P}.scales": scales.view(np.float16).reshape(-1, outputs),
    }
    checkpoint = opened(tmp_path, made, config(group=group))
    assert checkpoint.format == "awq" and checkpoint.notes == ()
    q = read_weight(checkpoint, f"{P}.weight")
    golden = expected.view(ml_dtypes.bfloat16).reshape(inputs, outputs).T
    np.testing.assert_array_equal(np.asarray(q.dequantize(ml_dtypes.bfloat16)), golden)
    tensors, written = convert("awq", checkpoint.weights)
    assert_same_tensors(tensors, made)
    assert written == {**config(group=group), "modules_to_not_convert": None}


def test_the_layout_of_a_real_file(shared_data):
    from jq4.checkpoint.foreign import open_checkpoint

    checkpoint = open_checkpoint(shared_data / "quant_slices" / "safetensors" / "awq.safetensors")
    weight = checkpoint.weights["model.layers.0.weight"]
    assert (checkpoint.format, weight.shape, weight.abstract.group_size) == ("awq", (32, 64), 32)


def test_gemm_gemv_and_fast_hold_the_same_weight(tmp_path):
    codes, zeros, scales, dense = parts()
    layouts = {
        "gemm": gemm(codes, zeros, scales),
        "gemv": gemv(codes, zeros, scales, 32),
        "gemv_fast": fast(codes, zeros, scales, 32),
    }
    read = {
        name: read_weight(opened(tmp_path / name, made, config(name)), f"{P}.weight") for name, made in layouts.items()
    }
    for name in ("gemm", "gemv"):
        np.testing.assert_array_equal(read[name].zero_point, zeros.T)
        np.testing.assert_allclose(dense64(read[name]), dense, rtol=1e-12)
    assert (read["gemm"].codes == read["gemv"].codes).all() and (read["gemm"].codes == read["gemv_fast"].codes).all()
    index = np.arange(K) // GROUP  # the third tensor is rounded, and added as it is
    third = layouts["gemv_fast"][f"{P}.qzeros"][: len(scales)].astype(np.float64)
    added = codes * scales[index].astype(np.float64) + third[index]
    np.testing.assert_allclose(dense64(read["gemv_fast"]), added.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group, fill", [(64, 16), (128, 8), (-1, 8)])
def test_groups_filled_up_behind_the_last(group, fill, tmp_path):
    inputs = 384
    codes, zeros, scales, dense = parts(inputs=inputs, group=inputs if group == -1 else group)
    q = read_weight(opened(tmp_path / "v", gemv(codes, zeros, scales, fill), config("gemv", group)), f"{P}.weight")
    np.testing.assert_allclose(dense64(q), dense, rtol=1e-12)
    made = fast(codes, zeros, scales, fill, "scaled_zeros")
    q = read_weight(opened(tmp_path / "f", made, config("gemv_fast", group)), f"{P}.weight")
    np.testing.assert_allclose(dense64(q), dense, atol=1e-3)
    with pytest.raises(JQ4Error, match=r"wanted 12 groups of 32 .* filled up to a multiple of 32.*Mend group_size"):
        opened(tmp_path / "v", gemv(codes, zeros, scales, fill), config("gemv", 32))


def test_a_checkpoint_of_zeros_of_8_is_symmetric_and_written_so(tmp_path):
    codes, zeros, scales, dense = parts(zeros=8)
    made = gemm(codes, zeros, scales)
    checkpoint = opened(tmp_path, made, config())
    q = read_weight(checkpoint, f"{P}.weight")
    assert q.zero_point is None
    np.testing.assert_allclose(dense64(q), dense, rtol=1e-12)
    assert_same_tensors(convert("awq", checkpoint.weights)[0], made)
    q = read_weight(opened(tmp_path, gemv(codes, zeros, scales, 32), config("gemv")), f"{P}.weight")
    assert q.zero_point is None


def test_labels_give_way_to_contents_with_a_note(tmp_path):
    codes, zeros, scales, dense = parts()
    label = {"quant_method": "gptq", "bits": 4, "group_size": 64, "version": "gemv"}
    checkpoint = opened(tmp_path, gemm(codes, zeros, scales), label)
    assert checkpoint.format == "awq"
    np.testing.assert_allclose(dense64(read_weight(checkpoint, f"{P}.weight")), dense, rtol=1e-12)
    notes = "\n".join(checkpoint.notes)
    assert "labelled version 'gemv', and its shapes are those of 'gemm'" in notes
    assert "labelled group_size 64, and its scales are of groups of 32" in notes


@pytest.mark.parametrize("group", [32, 192])
def test_gptq_awq_and_compressed_tensors_hold_each_other_without_loss(group, tmp_path):
    for symmetric in (True, False):
        rng = np.random.default_rng(6)
        codes = rng.integers(0, 256, (64, K // 2), dtype=np.uint8)
        scale = (rng.normal(size=(64, K // group)) * 0.1).astype(np.float16)
        zeros = None if symmetric else rng.integers(0, 16, scale.shape, dtype=np.uint8)
        q = QArray(codes=codes, scale=scale, zero_point=zeros, group_size=group, axis=-1, dtype="float16")
        names = ("gptq", "awq", "compressed_tensors")
        made = {name: convert(name, [weight_of(q, f"{P}.weight")]) for name in names}
        for source in names:
            checkpoint = opened(tmp_path / source / str(symmetric), *made[source])
            assert checkpoint.notes == ()
            found = read_weight(checkpoint, f"{P}.weight")
            for part in ("codes", "scale", "zero_point"):
                np.testing.assert_array_equal(getattr(found, part), getattr(q, part))
            for target in names:
                tensors, settings = convert(target, checkpoint.weights)
                assert_same_tensors(tensors, made[target][0])
                assert settings == made[target][1]


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda t: t.pop("scales"), r"scales' is missing or empty, wanted beside qweight, qzeros"),
        (lambda t: t.update(scales=t["scales"][:, :9]), r"qweight' is I32\[192, 3\], wanted a layout of AWQ"),
        (lambda t: t.update(qzeros=t["qzeros"][:5]), r"qzeros' is I32\[5, 3\], wanted \[6, 3\]"),
        (lambda t: t.update(scales=t["scales"][:5], qzeros=t["qzeros"][:5]), r"divides 192 inputs"),
    ],
)
def test_contradictions_are_named_before_anything_is_read(damage, text, tmp_path):
    held = {name.removeprefix(f"{P}."): array for name, array in gemm(*parts()[:3]).items()}
    damage(held)
    with pytest.raises(JQ4Error, match=text):
        opened(tmp_path, {f"{P}.{name}": array for name, array in held.items()}, config())


def test_other_bits_and_divided_activations_are_refused(tmp_path):
    made = gemm(*parts()[:3])
    with pytest.raises(JQ4Error, match=r"bits is 3; AWQ's layouts hold 4"):
        opened(tmp_path, made, config() | {"bits": 3})
    act = {"model.layers.0.mlp.act.scales": np.ones(24, np.float16)}
    with pytest.raises(JQ4Error, match=r"act.scales' divides an activation .*Fold it into the rows"):
        opened(tmp_path, made | act, config())


def test_scales_that_are_not_finite_are_an_error_when_read(tmp_path):
    made = gemm(*parts()[:3])
    made[f"{P}.scales"][1, 2] = np.nan
    with pytest.raises(JQ4Error, match=r"scales' holds 1 values that are NaN or infinite"):
        opened(tmp_path, made, config()).weights[f"{P}.weight"].read()


def test_what_awq_cannot_hold_is_refused():
    codes = np.zeros((16, 32), np.uint8)
    q = QArray(codes=codes, scale=np.ones((16, 2), np.float16), group_size=32, axis=-1, dtype="float16")
    wide = dataclasses.replace(q, scale=np.ones((16, 1), np.float16), group_size=64)
    with pytest.raises(JQ4Error, match=r"found the group sizes 32 .*, -1 .*Write compressed-tensors"):
        convert("awq", [weight_of(q, "a.weight"), weight_of(wide, "b.weight")])
    short = dataclasses.replace(q, scale=np.ones((16, 2), np.float16), group_size=48)
    with pytest.raises(JQ4Error, match=r"shape \(16, 64\) in groups of 48; AWQ holds multiples of 8"):
        convert("awq", [weight_of(short)])
    dense = weight_of(np.zeros((4, 4), np.float32), "m.gate.weight")
    assert convert("awq", [weight_of(q, "m.up.weight"), dense])[1]["modules_to_not_convert"] == ["m.gate"]
    with pytest.raises(JQ4Error, match=r"the dense m.gate is part of the name of the packed m.gate_proj.weight"):
        convert("awq", [weight_of(q, "m.gate_proj.weight"), dense])
