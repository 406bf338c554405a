"""Oracle: gguf-py, which reads what we write and writes what we read, and the folder that a file was made of."""

import json

import numpy as np
import pytest

from jq4.checkpoint.foreign import gguf, open_checkpoint
from jq4.checkpoint.foreign.gguf.mixture import chosen_type
from jq4.checkpoint.foreign.gguf.names import from_llama_order
from jq4.checkpoint.foreign.host_dequantize import host_dequantize
from jq4.cli import main
from jq4.errors import JQ4Error
from jq4.qarray import is_qarray
from tests.moe_folders import FAMILIES, HEADS, KV_HEADS, LAYERS, D, write_moe

ARCHITECTURES = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}
WORDS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def written(checkpoint, file, kind):
    checkpoint = gguf.by_rows(checkpoint)
    options = {"type": kind, "config": checkpoint.config}
    gguf.write(file, [gguf.plan(weight, options) for weight in checkpoint.weights.values()], checkpoint, options)
    return open_checkpoint(file)


def converted(capsys, *arguments):
    assert main(["convert", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def dense(weight):
    value = weight.read()
    return host_dequantize(value) if is_qarray(value) else np.asarray(value)


def stacked(arrays, family, layer, part):
    """f32[E, N, K] of a layer's experts, by the names and the layout of transformers."""
    if family == "gpt_oss":
        name = f"model.layers.{layer}.mlp.experts.{'down_proj' if part == 'down' else 'gate_up_proj'}"
        rows = arrays[name].swapaxes(1, 2)
        return rows if part == "down" else rows[:, ("gate", "up").index(part) :: 2]
    parent, words = ("block_sparse_moe", MIXTRAL) if family == "mixtral" else ("mlp", WORDS)
    name = f"model.layers.{layer}.{parent}.experts.{{}}.{words[part]}.weight"
    count = sum(key.startswith(name.partition("{")[0]) and key.endswith(name.partition("}")[2]) for key in arrays)
    return np.stack([arrays[name.format(expert)] for expert in range(count)])


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_py_finds_the_experts_of_a_layer_in_one_tensor(family, tmp_path):
    peer = pytest.importorskip("gguf", reason="gguf is the oracle here and is not installed")
    arrays = write_moe(tmp_path / "hf", family)
    written(open_checkpoint(tmp_path / "hf"), tmp_path / "m.gguf", "f32")
    reader = peer.GGUFReader(tmp_path / "m.gguf")
    held = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    architecture = next(key for key, name in peer.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family])
    known = {peer.TENSOR_NAMES[one] for one in peer.MODEL_TENSORS[architecture]}
    assert {name.replace("blk.0.", "blk.{bid}.").rpartition(".")[0] for name in held if "blk.1." not in name} <= known
    for layer in range(LAYERS):
        for part in WORDS:
            np.testing.assert_array_equal(
                held[f"blk.{layer}.ffn_{part}_exps.weight"], stacked(arrays, family, layer, part)
            )
    if family == "gpt_oss":
        biases = arrays["model.layers.1.mlp.experts.gate_up_proj_bias"]
        np.testing.assert_array_equal(held["blk.1.ffn_up_exps.bias"], biases[:, 1::2])
        np.testing.assert_array_equal(held["blk.1.attn_sinks.weight"], arrays["model.layers.1.self_attn.sinks"])
    if family == "qwen2_moe":
        assert held["blk.1.ffn_gate_inp_shexp.weight"].shape == (D,)
        shared = arrays["model.layers.1.mlp.shared_expert.down_proj.weight"]
        np.testing.assert_array_equal(held["blk.1.ffn_down_shexp.weight"], shared)
    config, prefix = FAMILIES[family], ARCHITECTURES[family]
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values[f"{prefix}.expert_count"] == (config.get("num_experts") or config["num_local_experts"])
    assert values[f"{prefix}.expert_used_count"] == 2
    width = {"mixtral": None, "gpt_oss": 96}.get(family, 32)
    assert values.get(f"{prefix}.expert_feed_forward_length") == width


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_experts_comes_back_from_its_file(family, tmp_path):
    arrays = write_moe(tmp_path / "hf", family)
    original = open_checkpoint(tmp_path / "hf")
    back = written(original, tmp_path / "m.gguf", "f32")
    assert sorted(back.weights) == sorted(arrays) and not back.notes
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(back.weights[name].read()), array, err_msg=name)
    for key, value in {**original.config, "rope_scaling": None}.items():
        if key in FAMILIES[family] or key == "hidden_size":
            assert back.config.get(key) == (value if key != "rope_scaling" else back.config[key]), key
    written(back, tmp_path / "again.gguf", "f32")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def of_gguf_py(peer, file, family, config, kinds, tensors):
    """Writes a file by gguf-py: `tensors` f32 by GGUF's names, in the type that kinds(name) says; as dequantized."""
    prefix = ARCHITECTURES[family]
    writer = peer.GGUFWriter(file, prefix)
    for key, value in {
        "context_length": 128, "embedding_length": D, "block_count": 1, "feed_forward_length": 128,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": 32,
        "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64,
    }.items():  # fmt: skip
        writer.add_uint32(f"{prefix}.{key}", value)
    writer.add_float32(f"{prefix}.attention.layer_norm_rms_epsilon", 1e-5)
    wanted = {}
    for name, array in tensors.items():
        kind = kinds(name)
        blocks = peer.quants.quantize(array, kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
        wanted[name] = peer.quants.dequantize(blocks, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "MXFP4", "F16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_gguf_py_writes_are_read_without_difference(family, kind, tmp_path):
    peer = pytest.importorskip("gguf", reason="gguf is the oracle here and is not installed")
    draw = np.random.default_rng(1)
    shapes = {"token_embd.weight": (96, D), "output_norm.weight": (D,), "blk.0.attn_q.weight": (HEADS * 32, D)}
    shapes |= {f"blk.0.ffn_{part}_exps.weight": (4, 64, D) for part in WORDS}
    fused = kind == "Q8_0" and family != "gpt_oss"  # gate and up of an expert in one
    if fused:
        shapes["blk.0.ffn_gate_up_exps.weight"] = (4, 128, D)
        del shapes["blk.0.ffn_gate_exps.weight"], shapes["blk.0.ffn_up_exps.weight"]
    tensors = {name: draw.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    types = peer.GGMLQuantizationType
    wanted = of_gguf_py(
        peer, tmp_path / "m.gguf", family, None,
        lambda name: types[kind] if "exps" in name or "attn_q" in name else types.F32, tensors,
    )  # fmt: skip
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert not [note for note in checkpoint.notes if "tensor" in note]
    found = {name: dense(weight) for name, weight in checkpoint.weights.items()}
    assert all(weight.packed == (kind != "F16") for name, weight in checkpoint.weights.items() if "experts" in name)
    if family == "gpt_oss" and kind != "F16":
        found = {name: one.swapaxes(1, 2) if "experts" in name else one for name, one in found.items()}
    if fused:
        both = wanted["blk.0.ffn_gate_up_exps.weight"]
        wanted |= {"blk.0.ffn_gate_exps.weight": both[:, :64], "blk.0.ffn_up_exps.weight": both[:, 64:]}
    for part in WORDS:
        np.testing.assert_array_equal(stacked(found, family, 0, part), wanted[f"blk.0.ffn_{part}_exps.weight"])
    queries = wanted["blk.0.attn_q.weight"]
    queries = from_llama_order(queries, HEADS, "") if family == "mixtral" else queries
    np.testing.assert_array_equal(found["model.layers.0.self_attn.q_proj.weight"], queries)
    assert checkpoint.config["model_type"] == family


def test_mxfp4_experts_of_gpt_oss_go_to_gguf_and_back_byte_for_byte(tmp_path, capsys):
    from safetensors.numpy import load_file

    from tests.foreign_folder import save

    arrays, draw = write_moe(tmp_path / "dense", "gpt_oss"), np.random.default_rng(0)
    for name in [name for name in arrays if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        outer, width, rows = arrays.pop(name).shape
        arrays[f"{name}_blocks"] = draw.integers(0, 256, (outer, rows, width // 32, 16), dtype=np.uint8)
        arrays[f"{name}_scales"] = draw.integers(118, 124, (outer, rows, width // 32), dtype=np.uint8)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    save(tmp_path / "mx", arrays, {"quant_method": "mxfp4"}, **config)
    told = converted(capsys, tmp_path / "mx", tmp_path / "m.gguf", "--to", "gguf", "--verify")
    assert told["lossless"] and all(one["largest"] == 0 for one in told["verified"])
    told = converted(capsys, tmp_path / "m.gguf", tmp_path / "back", "--to", "gpt-oss", "--verify")
    assert told["lossless"] and all(one["largest"] == 0 for one in told["verified"])
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("back", "mx"))
    assert sorted(found) == sorted(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_dense_experts_are_quantized_one_by_one_and_proven(tmp_path, capsys):
    for family in ("qwen3_moe", "gpt_oss"):
        write_moe(tmp_path / family, family)
        file = tmp_path / f"{family}.gguf"
        told = converted(capsys, tmp_path / family, file, "--to", "gguf", "--type", "q8_0", "--verify")
        experts = [one for one in told["verified"] if ".experts." in one["name"] and "bias" not in one["name"]]
        assert len(experts) == (2 * 8 * 3 if family == "qwen3_moe" else 2 * 2)
        assert all(0 < one["relative"] < 0.01 for one in experts)
        routers = [one for one in told["verified"] if ".gate.weight" in one["name"] or "router" in one["name"]]
        assert routers and all(one["largest"] == 0 for one in routers)
    # llama.cpp's type for the keys of a model of eight experts is the one that is finer
    held = {
        weight.name: weight.format
        for weight in written(open_checkpoint(tmp_path / "qwen3_moe"), tmp_path / "q.gguf", "q4_0").weights.values()
    }
    assert held["model.layers.0.self_attn.k_proj.weight"] == "int8"
    assert (
        held["model.layers.0.self_attn.q_proj.weight"] == held["model.layers.1.mlp.experts.7.up_proj.weight"] == "int4"
    )


def test_dense_experts_of_our_own_folder_are_turned_in_slabs_too(tmp_path, capsys, monkeypatch):
    write_moe(tmp_path / "hf", "gpt_oss", intermediate_size=64)  # square down projections, as gpt-oss has them
    converted(capsys, tmp_path / "hf", tmp_path / "orbax", "--to", "orbax")
    arguments = ("--to", "gguf", "--type", "q8_0", "--verify")
    told = converted(capsys, tmp_path / "orbax", tmp_path / "whole.gguf", *arguments)
    monkeypatch.setattr("jq4.checkpoint.conversion.slabs.SLAB_BYTES", 20_000)
    told_again = converted(capsys, tmp_path / "orbax", tmp_path / "cut.gguf", *arguments)
    assert told["verified"] == told_again["verified"]
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "cut.gguf").read_bytes()


def test_types_of_a_mixture_are_those_of_llama_cpp_for_experts():
    def chosen(stem, experts):
        return chosen_type("q4_k_m", f"blk.1.{stem}.weight", (4, 256, 256), 16, False, experts).name

    assert [chosen(stem, 8) for stem in ("attn_v", "attn_k", "attn_q", "attn_output")] == [
        "Q8_0",
        "Q8_0",
        "Q4_K",
        "Q5_K",
    ]
    assert [chosen(stem, 4) for stem in ("attn_v", "attn_k", "attn_output")] == ["Q6_K", "Q4_K", "Q4_K"]
    assert [chosen(stem, 4) for stem in ("ffn_down_exps", "ffn_up_exps", "ffn_gate_inp")] == ["Q6_K", "Q4_K", "F32"]


def test_int4_experts_of_compressed_tensors_are_q4_0_and_come_back(tmp_path, capsys):
    from safetensors.numpy import load_file

    from tests.foreign_folder import assert_same_tensors, convert, save, weight_of
    from tests.test_foreign_peers import random_qarray

    arrays, draw = write_moe(tmp_path / "dense", "qwen3_moe"), np.random.default_rng(0)
    weights = {n: random_qarray(draw, a.shape, 4, 32, True) if ".experts." in n else a for n, a in arrays.items()}
    tensors, quantization = convert("compressed_tensors", [weight_of(value, name) for name, value in weights.items()])
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    save(tmp_path / "ct", tensors, quantization, **config)
    for before, after, target in (("ct", "m.gguf", "gguf"), ("m.gguf", "back", "compressed-tensors")):
        told = converted(capsys, tmp_path / before, tmp_path / after, "--to", target, "--verify")
        assert told["lossless"] and all(
            one["largest"] == 0 and one["same_codes"] is not False for one in told["verified"]
        )
    held = open_checkpoint(tmp_path / "m.gguf").weights["model.layers.1.mlp.experts.5.up_proj.weight"]
    assert (held.format, held.abstract.group_size, held.tensors) == ("int4", 32, ("blk.1.ffn_up_exps.weight",))
    assert_same_tensors(load_file(tmp_path / "back" / "model.safetensors"), tensors)


def test_what_experts_cannot_be_is_said(tmp_path, capsys):
    write_moe(tmp_path / "hf", "qwen3_moe")
    checkpoint = open_checkpoint(tmp_path / "hf")
    options = {"type": "f32", "config": {**checkpoint.config, "num_experts": 9}}
    planned = [gguf.plan(weight, options) for weight in checkpoint.weights.values()]
    with pytest.raises(JQ4Error, match=r"blk.0.ffn_gate_exps.weight: found 8 experts, the last of them 7, wanted 9"):
        gguf.outline(planned, checkpoint, options)
    one = {**options, "config": checkpoint.config, "type": "q8_0"}
    mixed = [
        gguf.plan(w, one if ".7.up_proj" in w.name else {**one, "type": "f32"}) for w in checkpoint.weights.values()
    ]
    with pytest.raises(JQ4Error, match=r"ffn_up_exps.weight: expert 7 is Q8_0\[32, 64\] and others are F32\[32, 64\]"):
        gguf.outline(mixed, checkpoint, one)
    said = gguf.notes(planned, checkpoint, {**options, "config": {**checkpoint.config, "norm_topk_prob": False}})
    assert "norm_topk_prob False is left out: llama.cpp divides the chosen experts' weights by their sum" in said


def test_a_number_of_experts_that_the_tensors_deny_is_refused(tmp_path):
    peer = pytest.importorskip("gguf", reason="gguf writes the file here and is not installed")
    tensors = {
        "token_embd.weight": np.zeros((96, D), np.float32),
        "blk.0.ffn_up_exps.weight": np.zeros((3, 64, D), np.float32),
    }
    of_gguf_py(peer, tmp_path / "m.gguf", "qwen3_moe", None, lambda name: peer.GGMLQuantizationType.F32, tensors)
    with pytest.raises(
        JQ4Error, match=r"'blk.0.ffn_up_exps.weight' has shape \[3, 64, 64\], wanted 3 axes, .* 4 experts"
    ):
        open_checkpoint(tmp_path / "m.gguf")
