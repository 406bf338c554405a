"""Oracles: bitsandbytes itself (where installed, with transformers), and slices of a checkpoint that it wrote."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from test_nf4_double import read_slice

from jq4.checkpoint.foreign import bnb_nf4, open_checkpoint
from jq4.checkpoint.foreign.weights import dense_weight
from jq4.checkpoint.safetensors_files import open_tensors
from jq4.errors import JQ4Error
from jq4.formats import get_format
from jq4.qarray import QArray, is_qarray
from tests.foreign_folder import as_folder, dense, read_weight, weight_of, write_checkpoint

NF4 = np.asarray(get_format("nf4").levels, np.float32)
FP4 = np.float32([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]) / np.float32(12)
DYNAMIC = np.asarray(get_format("dynamic8").levels, np.float32)


def state_of(kind, shape, block, dtype="float32", **nested):
    fields = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": shape} | nested
    return np.frombuffer(json.dumps(fields).encode(), np.uint8)


def by_the_book(shape, kind="nf4", block=64, nested=False, seed=0):
    """Random tensors of one weight "m.weight", and what they mean, written from the format's description."""
    rng, size = np.random.default_rng(seed), int(np.prod(shape))
    codes = rng.integers(0, 16, size + size % 2, dtype=np.uint8)
    blocks = -(-size // block)
    table = NF4 if kind == "nf4" else FP4
    tensors = {
        "m.weight": (codes[::2] << 4 | codes[1::2])[:, None],
        "m.weight.quant_map": table,
        f"m.weight.quant_state.bitsandbytes__{kind}": state_of(kind, shape, block),
    }
    if nested:
        packed = rng.integers(0, 256, blocks, dtype=np.uint8)
        peaks = rng.uniform(0.1, 1, -(-blocks // 256)).astype(np.float32)
        absmax = DYNAMIC[packed] * np.repeat(peaks, 256)[:blocks] + np.float32(2.5)
        tensors |= {
            "m.weight.absmax": packed, "m.weight.nested_absmax": peaks, "m.weight.nested_quant_map": DYNAMIC,
            f"m.weight.quant_state.bitsandbytes__{kind}": state_of(
                kind, shape, block, nested_blocksize=256, nested_dtype="float32", nested_offset=2.5
            ),
        }  # fmt: skip
    else:
        tensors["m.weight.absmax"] = absmax = rng.uniform(-1, 1, blocks).astype(np.float32)
    return tensors, (table[codes[:size]] * np.repeat(absmax, block)[:size]).reshape(shape)


@pytest.mark.parametrize("name", ["llama_1b_nf4", "llama_1b_nf4_double_quant"])
def test_slices_of_a_real_checkpoint_are_exact(name, shared_data, tmp_path):
    _, count, block, offset, blobs = read_slice(shared_data / "quant_slices" / "bnb" / f"{name}.bin")
    weight, absmax, quant_map, nested_absmax, nested_map, expected = blobs
    nested = bool(nested_absmax)
    extra = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)} if nested else {}
    tensors = {
        "m.weight": np.frombuffer(weight, np.uint8)[:, None],
        "m.weight.absmax": np.frombuffer(absmax, np.uint8 if nested else np.float32),
        "m.weight.quant_map": np.frombuffer(quant_map, np.float32),
        "m.weight.quant_state.bitsandbytes__nf4": state_of("nf4", [4, count // 4], block, "bfloat16", **extra),
    }
    if nested:
        tensors["m.weight.nested_absmax"] = np.frombuffer(nested_absmax, np.float32)
        tensors["m.weight.nested_quant_map"] = np.frombuffer(nested_map, np.float32)
    q = read_weight(write_checkpoint(tmp_path / "m", tensors), "m.weight", "bitsandbytes")
    assert is_qarray(q.scale) == nested and q.group_size == block
    found = np.asarray(q.dequantize()).view(np.uint16)
    np.testing.assert_array_equal(found.reshape(-1), np.frombuffer(expected, np.uint16))


def test_the_layout_of_a_real_file_is_known(shared_data, tmp_path):
    file = shared_data / "quant_slices" / "safetensors" / "bnb_nf4.safetensors"
    with pytest.raises(JQ4Error, match=r"'model.layers.0.weight.quant_map' holds other levels than bitsandbytes'"):
        open_checkpoint(file)  # its data are all zero
    tensors = {name: tensor.read() for name, tensor in open_tensors(file).items()}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors | {"model.layers.0.weight.quant_map": NF4}))
    assert checkpoint.format == "bitsandbytes"
    assert {name: (weight.format, weight.shape) for name, weight in checkpoint.weights.items()} == {
        "model.layers.0.weight": ("nf4", (8, 8)),
        "model.norm.weight": ("float16", (8,)),
    }


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("shape", "kind", "block"), [
    ((6, 256), "nf4", 64), ((300, 64), "fp4", 64), ((48, 100), "nf4", 64), ((7, 33), "fp4", 32), ((3, 50), "nf4", 4096),
    ((5, 96), "nf4", 32),
])  # fmt: skip
def test_blocks_codes_and_statistics_by_the_book(shape, kind, block, nested, tmp_path):
    tensors, expected = by_the_book(shape, kind, block, nested)
    q = read_weight(write_checkpoint(tmp_path / "m", tensors), "m.weight")
    np.testing.assert_array_equal(dense(q), expected)
    crossing = shape[1] % block != 0
    notes = open_checkpoint(tmp_path / "m").notes
    assert any("cross the ends of rows" in note for note in notes) == crossing
    assert is_qarray(q.scale) == (nested and not crossing and 256 % (shape[1] // block) == 0)


@pytest.mark.parametrize("storage", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_any_storage_is_the_same_bytes(storage, tmp_path):
    tensors, _ = by_the_book((6, 256))
    plain = read_weight(write_checkpoint(tmp_path / "u8", tensors), "m.weight")
    tensors["m.weight"] = tensors["m.weight"].reshape(-1).view(storage)[:, None]
    other = read_weight(write_checkpoint(tmp_path / "other", tensors), "m.weight")
    jax.tree.map(np.testing.assert_array_equal, plain, other)


def test_llm_int8_is_a_scale_a_row(tmp_path):
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(-127, 128, (5, 12), dtype=np.int8), rng.uniform(1, 9, 5).astype(np.float32)
    tensors = {"a.weight": codes, "a.SCB": scale, "a.weight_format": np.uint8(0), "b.weight": np.ones(3, np.float32)}
    q = read_weight(write_checkpoint(tmp_path / "m", tensors), "a.weight", "bitsandbytes")
    np.testing.assert_allclose(dense(q, np.float32), codes * scale[:, None] / 127, rtol=3e-7)
    assert set(open_checkpoint(tmp_path / "m").weights) == {"a.weight", "b.weight"}
    with pytest.raises(JQ4Error, match=r"'a.weight_format' says 1, a layout for one kind of GPU, wanted 0"):
        open_checkpoint(write_checkpoint(tmp_path / "n", tensors | {"a.weight_format": np.uint8(1)}))


@pytest.mark.parametrize(("change", "message"), [
    ({"m.weight.absmax": None}, "quant_state.bitsandbytes__nf4' comes without 'm.weight.absmax'"),
    ({"m.weight.absmax": np.ones(23, np.float32)}, r"'m.weight.absmax' has shape \[23\], wanted \[24\]"),
    ({"m.weight.absmax": np.ones(24, np.uint8)}, "'m.weight.absmax' has dtype U8, wanted F32 or F16 or BF16"),
    ({"m.weight": np.ones((767, 1), np.uint8)}, r"'m.weight' has 767 bytes, wanted 768 for \(6, 256\)"),
    ({"m.weight": np.ones((768, 1), np.int32)}, "'m.weight' has dtype I32, wanted U8"),
    ({"m.weight.quant_map": NF4 + 1}, "'m.weight.quant_map' holds other levels than bitsandbytes' table, wanted those"),
    ({"state": state_of("nf4", [6, 256], 60)}, "has blocksize 60, wanted one of 32, 64"),
    ({"state": state_of("fp4", [6, 256], 64)}, "has quant_type 'fp4', wanted nf4 or fp4, as the tensor's name says"),
    ({"state": state_of("nf4", [6, -256], 64)}, r"has shape \[6, -256\], wanted two or more whole numbers above 0"),
    ({"m.weight.nested_absmax": np.ones(1, np.float32), "state": state_of("nf4", [6, 256], 64, nested_blocksize=256)},
     "has nested_dtype None, wanted float32"),
    ({"m.weight.nested_absmax": np.ones(1, np.float32), "state": state_of(
        "nf4", [6, 256], 64, nested_blocksize=256, nested_dtype="float32", nested_offset=float("nan")
    )}, "has nested_offset nan, wanted a finite number"),
    ({"state": state_of("nf4", [6, 256], 64, "int8")}, "has dtype 'int8', wanted one of bfloat16"),
    ({"state": np.frombuffer(b"[]", np.uint8)}, "holds list, wanted an object of settings"),
    ({"state": np.frombuffer(b"\xff{", np.uint8)}, "is not JSON"),
    ({"state": np.zeros(5000, np.uint8)}, "wanted JSON as at most 4096 bytes of U8"),
])  # fmt: skip
def test_what_contradicts_itself_is_refused_when_opened(change, message, tmp_path):
    tensors, _ = by_the_book((6, 256))
    change = {name.replace("state", "m.weight.quant_state.bitsandbytes__nf4"): new for name, new in change.items()}
    tensors = {name: array for name, array in (tensors | change).items() if array is not None}
    with pytest.raises(JQ4Error, match=message):
        open_checkpoint(write_checkpoint(tmp_path / "m", tensors))


def test_scales_that_are_not_finite_are_refused_when_read(tmp_path):
    tensors, _ = by_the_book((6, 256))
    tensors["m.weight.absmax"][3] = np.nan
    weight = open_checkpoint(write_checkpoint(tmp_path / "m", tensors)).weights["m.weight"]
    with pytest.raises(JQ4Error, match=r"'m.weight.absmax' holds 1 values that are NaN or infinite, wanted finite"):
        weight.read()


@pytest.mark.parametrize(("shape", "kind", "block", "nested"), [
    ((6, 256), "nf4", 64, False), ((6, 256), "nf4", 64, True), ((300, 64), "fp4", 64, True),
    ((48, 100), "nf4", 64, False), ((7, 33), "nf4", 64, False), ((7, 33), "fp4", 64, False),
    ((3, 512), "nf4", 256, False), ((2, 16384), "nf4", 32, True),
])  # fmt: skip
def test_what_was_read_is_written_back_byte_for_byte(shape, kind, block, nested, tmp_path):
    tensors, _ = by_the_book(shape, kind, block, nested)
    if shape[0] * shape[1] % 2:  # bitsandbytes' own padding
        tensors["m.weight"][-1] = tensors["m.weight"][-1] & 0xF0 | (7 if kind == "nf4" else 0)
    weight = open_checkpoint(write_checkpoint(tmp_path / "m", tensors)).weights["m.weight"]
    planned = bnb_nf4.plan(weight, {})
    assert planned.loss == ""
    encoded = planned.encode(weight.read())
    assert set(encoded) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(encoded[name], array, err_msg=name)
        assert encoded[name].shape == planned.tensors[name][1]


def test_what_a_writer_cannot_hold_is_told():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(8, 128)).astype(np.float32)
    codes, scale = rng.integers(0, 256, (8, 64), dtype=np.uint8), rng.uniform(1, 2, (8, 4)).astype(np.float32)
    q = QArray(codes, scale, format="int4", group_size=32, axis=-1)
    planned = bnb_nf4.plan(weight_of(q, "a.weight"), {})
    assert planned.loss == "int4 in groups of 32 rounded again, to NF4"
    found, again = planned.encode(q), planned.encode(dense(q))
    assert all(np.array_equal(found[name], again[name]) for name in found)
    with pytest.raises(JQ4Error, match="group_size is 48, wanted one of 32, 64"):
        bnb_nf4.plan(weight_of(values, "a.weight"), {"group_size": 48})
    with pytest.raises(JQ4Error, match=r"a.weight: has shape \[2, 8, 128\], and bitsandbytes holds matrices"):
        bnb_nf4.plan(weight_of(jax.tree.map(lambda a: np.stack([a, a]), q), "a.weight"), {})
    values[5, 7] = np.inf
    with pytest.raises(JQ4Error, match=r"a.weight: holds NaN or infinity in rows 0 to 7"):
        bnb_nf4.plan(weight_of(values, "a.weight"), {}).encode(values)
    fine = QArray(codes[:, :50], rng.uniform(1, 2, (8, 25)).astype(np.float32), format="nf4", group_size=4, axis=-1)
    planned = bnb_nf4.plan(weight_of(fine, "a.weight"), {})
    assert planned.doubt == "groups must make whole blocks of 64"
    with pytest.raises(JQ4Error, match="groups of 4 in rows of 100 do not share scales in blocks of 64"):
        planned.encode(fine)


@pytest.mark.parametrize(("name", "tensors"), [("embed_tokens", 1), ("mlp.gate", 1), ("up_proj", 4), ("lm_head", 1)])
def test_linear_layers_are_quantized_and_nothing_else(name, tensors):
    weight = weight_of(np.zeros((4, 64), np.float32), f"model.{name}.weight")
    assert len(bnb_nf4.plan(weight, {}).tensors) == tensors
    assert len(bnb_nf4.plan(weight, {"ignore": ["re:up_proj"]}).tensors) == 1
    kept = bnb_nf4.quantization_config([bnb_nf4.plan(weight, {})], {})["llm_int8_skip_modules"]
    assert kept == ([f"model.{name}"] if tensors == 1 else []) + ["lm_head"]


@pytest.fixture(scope="module")
def bitsandbytes():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import bitsandbytes.functional

    return bitsandbytes.functional


@pytest.mark.parametrize(("shape", "kind", "block", "nested"), [
    ((48, 256), "nf4", 64, False), ((48, 256), "fp4", 64, True), ((300, 64), "nf4", 64, True),
    ((48, 100), "fp4", 64, True), ((48, 100), "nf4", 128, False),
])  # fmt: skip
def test_bitsandbytes_reads_and_writes_the_same(shape, kind, block, nested, bitsandbytes, tmp_path):
    import torch
    from safetensors.torch import save_file

    dense = torch.tensor(np.random.default_rng(0).normal(size=shape), dtype=torch.bfloat16)
    dense[0, :64] = 0
    packed, state = bitsandbytes.quantize_4bit(dense, None, None, block, nested, kind)
    expected = bitsandbytes.dequantize_4bit(packed, state)
    theirs = {"m.weight": packed} | {f"m.weight.{name}": one for name, one in state.as_dict(packed=True).items()}
    save_file(theirs | {"dense.weight": dense}, tmp_path / "model.safetensors")
    q = read_weight(tmp_path, "m.weight", "bitsandbytes")
    np.testing.assert_array_equal(
        np.asarray(q.dequantize()).astype(np.float32), expected.to(torch.float32).numpy(), strict=True
    )
    tensors = open_tensors(tmp_path)
    if shape[1] % block == 0:
        held = open_checkpoint(tmp_path).weights["m.weight"]
        back = bnb_nf4.plan(held, {}).encode(held.read())
        for name in theirs:
            np.testing.assert_array_equal(back[name], tensors[name].read(), err_msg=name)
    if kind == "nf4":
        source = dense_weight(dataclasses.replace(tensors["dense.weight"], name="m.weight"))
        planned = bnb_nf4.plan(source, {"group_size": block, "double_quant": nested})
        for name, found in planned.encode(source.read()).items():
            wanted = tensors[name].read()
            if not nested or name.removeprefix("m.weight.") in ("m.weight", "quant_map", "nested_quant_map"):
                np.testing.assert_array_equal(found, wanted, err_msg=name)
            elif name.endswith("absmax"):  # its CPU kernel looks nested codes up in a table
                assert np.mean(np.abs(found.astype(np.float32) - wanted) > 1e-6) < 0.02
    assert DYNAMIC.tolist() == bitsandbytes.create_dynamic_map().tolist()


@pytest.mark.filterwarnings("ignore")  # of the peers' own
@pytest.mark.parametrize("double_quant", [False, True])
def test_transformers_loads_what_is_written(double_quant, bitsandbytes, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import torch

    config = transformers.LlamaConfig(  # rows of whole blocks: bitsandbytes' AVX-512 kernel dequantizes no others right
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "dense")
    source = open_checkpoint(tmp_path / "dense")
    planned = as_folder(
        tmp_path / "nf4", source.weights.values(), bnb_nf4, {"double_quant": double_quant}, dict(source.config or {})
    )
    assert sum("rounded to NF4" in one.loss for one in planned) == 7
    packed = open_checkpoint(tmp_path / "nf4")
    values = {
        name: dense(weight.read(), np.float32) if weight.packed else weight.read()
        for name, weight in packed.weights.items()
    }
    model.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", device_map="cpu", dtype=torch.float32)
    assert type(loaded.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(loaded.lm_head) is torch.nn.Linear
    loaded.train()  # without dropout: what is not trained, bitsandbytes multiplies in bfloat16 where the CPU can
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4)
