"""Oracle: gguf-py's dequantization, the model that a file was made of, and transformers' reading of GGUF tokenizers."""

import dataclasses
import json
import os
import struct

import numpy as np
import pytest

from jq4.checkpoint.foreign import gguf, open_checkpoint
from jq4.checkpoint.foreign.gguf.container import read_container
from jq4.checkpoint.foreign.gguf.names import from_llama_order, gguf_name, hf_name, to_llama_order
from jq4.checkpoint.foreign.gguf.tokenizer_in import merges_of, tokenizer_files
from jq4.checkpoint.foreign.host_dequantize import host_dequantize
from jq4.checkpoint.safetensors_files import write as write_safetensors
from jq4.errors import JQ4Error
from jq4.qarray import is_qarray
from models.config import DecoderConfig
from models.tensor_names import places
from models.tokenizer import Tokenizer

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(torch|transformers|importlib).*")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 1.2], "long_factor": [1.0, 3.0, 7.0, 9.0]}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "tie_word_embeddings": True}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama-3": {"rope_theta": 5e5, "rope_scaling": LLAMA3, "tie_word_embeddings": True, "head_dim": 32},
    "llama-yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "mistral": {"sliding_window": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "phi3": {"sliding_window": 64, "partial_rotary_factor": 0.5, "rope_scaling": LONGROPE}
    | {"original_max_position_embeddings": 64},
    "gemma2": GEMMA | {"attn_logit_softcapping": None},
    "gemma3_text": GEMMA
    | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6, "rope_local_base_freq": 5e3},
}


def _folder(folder, config):
    """A Hugging Face folder of random weights of a config, without a tokenizer."""
    folder.mkdir()
    random, stored = np.random.default_rng(0), {}
    for place in places(DecoderConfig.from_hf(config)).values():
        for layer in range(config["num_hidden_layers"]) if place.stacked else [0]:
            name = place.name.format(layer=layer)
            stored[name if name == "lm_head.weight" else f"model.{name}"] = place.stored
    write_safetensors(
        folder / "model.safetensors",
        {
            name: ("F32", shape, lambda shape=shape: random.normal(0, 0.1, shape).astype(np.float32))
            for name, shape in stored.items()
        },
    )
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def _written(checkpoint, file, **options):
    options = {"config": checkpoint.config, **options}
    planned = [gguf.plan(weight, options) for weight in checkpoint.weights.values()]
    gguf.write(file, planned, checkpoint, options)
    return open_checkpoint(file), planned


def _dense(weight):
    value = weight.read()
    return host_dequantize(value) if is_qarray(value) else np.asarray(value)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_a_real_file_has_the_weights_of_gguf_py_in_the_order_of_hugging_face(kind, shared_data):
    theirs = pytest.importorskip("gguf", reason="gguf is the oracle here and is not installed")
    file = shared_data / "gguf" / f"tinystories-656k-{kind}.gguf"
    checkpoint, original = open_checkpoint(file), open_checkpoint(shared_data / "tinystories-656k")
    wanted = {one.name: theirs.quants.dequantize(one.data, one.tensor_type) for one in theirs.GGUFReader(file).tensors}
    assert {weight.tensors[0] for weight in checkpoint.weights.values()} == set(wanted)
    for name, weight in checkpoint.weights.items():
        assert weight.packed == name.endswith(("proj.weight", "embed_tokens.weight"))
        values, found = wanted[weight.tensors[0]], _dense(weight)
        heads = {"q_proj": 8, "k_proj": 4}.get(name.split(".")[-2], 0)
        np.testing.assert_array_equal(found, from_llama_order(values, heads, name), err_msg=name)
        dense = np.asarray(original.weights[name.replace("model.embed_tokens", "lm_head")].read())
        assert np.abs(found - dense).max() < 0.09 * np.abs(dense).max(), name  # rows in another order are far off
    config, wanted_config = (DecoderConfig.from_hf(one.config) for one in (checkpoint, original))
    assert checkpoint.format == "gguf" and not checkpoint.notes
    for field in ("rope", "num_layers", "num_kv_heads", "intermediate_size", "tied_embeddings", "eos_token_ids"):
        assert getattr(config, field) == getattr(wanted_config, field), field


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_comes_back_from_its_file(family, tmp_path):
    config = {"model_type": family.split("-")[0], **SIZES, **FAMILIES[family]}
    original = _folder(tmp_path / "hf", config)
    back, planned = _written(original, tmp_path / "m.gguf", type="f32")
    assert sorted(back.weights) == sorted(original.weights)
    for name, weight in original.weights.items():
        tolerance = 1e-7 if family.startswith("gemma") and "norm" in name else 0
        np.testing.assert_allclose(_dense(back.weights[name]), weight.read(), rtol=0, atol=tolerance, err_msg=name)
    wanted, found = DecoderConfig.from_hf(config), DecoderConfig.from_hf(back.config)
    assert dataclasses.replace(found, source="") == dataclasses.replace(wanted, source="")
    _written(back, tmp_path / "again.gguf", type="f32")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    assert [one.loss for one in planned if one.loss] == (
        ["kept as 1 + w, which rounds w to 2**-24"] * sum("norm" in name for name in original.weights)
        if family.startswith("gemma")
        else []
    )


def test_factors_that_no_formula_gives_are_kept_as_a_table(tmp_path):
    config = {"model_type": "llama", **SIZES, "rope_scaling": LONGROPE | {"attention_factor": 1.0}}
    table = [1.0, 1.5, 2.0, 1.25, 3.0, 1.0, 1.0, 4.0]
    config["rope_scaling"] |= {"short_factor": table, "long_factor": table}
    back, _ = _written(_folder(tmp_path / "hf", config), tmp_path / "m.gguf", type="f32")
    assert back.config["rope_scaling"] == {
        "rope_type": "longrope", "long_factor": table, "short_factor": table, "attention_factor": 1.0,
    }  # fmt: skip


def test_the_order_of_llama_rows_is_that_of_its_converter():
    rows = np.arange(16)[:, None]
    np.testing.assert_array_equal(to_llama_order(rows, 2, "q")[:8, 0], [0, 4, 1, 5, 2, 6, 3, 7])
    np.testing.assert_array_equal(from_llama_order(to_llama_order(rows, 2, "q"), 2, "q"), rows)
    with pytest.raises(JQ4Error, match=r"^blk.0.attn_q.weight: has 16 rows, wanted an even number for each of 3 heads"):
        from_llama_order(rows, 3, "blk.0.attn_q.weight")


def test_names_go_both_ways():
    for architecture, name, theirs in (
        ("llama", "model.layers.11.mlp.down_proj.weight", "blk.11.ffn_down.weight"),
        ("gemma2", "model.layers.0.post_attention_layernorm.weight", "blk.0.post_attention_norm.weight"),
        ("llama", "model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight", "blk.0.ffn_up.weight"),
        ("qwen3", "lm_head.weight", "output.weight"),
    ):
        assert (gguf_name(name, architecture), hf_name(theirs, architecture)) == (theirs, name)
    assert gguf_name("language_model.model.embed_tokens.weight", "gemma3") == "token_embd.weight"
    assert gguf_name("model.layers.0.mlp.router.weight", "llama") is None


def test_shards_are_one_checkpoint(tmp_path, shared_data):
    from jq4.checkpoint.foreign.gguf.file_writing import header

    whole = read_container(shared_data / "gguf" / "tinystories-656k-q8_0.gguf")
    names = list(whole.tensors)
    for number, part in enumerate((names[:7], names[7:]), 1):
        described = {name: (whole.tensors[name].kind, whole.tensors[name].shape) for name in part}
        metadata = {**whole.metadata, "split.count": 2, "split.tensors.count": len(names)} if number == 1 else {}
        content = header(metadata, described)
        for name in part:
            data = whole.tensors[name].blocks().tobytes()
            content += data + bytes(-len(data) % 32)
        (tmp_path / f"m-{number:05}-of-00002.gguf").write_bytes(content)
    checkpoint = open_checkpoint(tmp_path / "m-00002-of-00002.gguf")
    assert len(checkpoint.weights) == len(names)
    wanted = open_checkpoint(whole.file).weights["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(_dense(checkpoint.weights[wanted.name]), _dense(wanted))
    assert list(open_checkpoint(tmp_path).weights) == list(checkpoint.weights)
    (tmp_path / "other.gguf").touch()
    with pytest.raises(JQ4Error, match=r"holds 2 \.gguf files \(m-00001-of-00002\.gguf, \.\.\.\); say which one"):
        open_checkpoint(tmp_path)
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(JQ4Error, match=r"m-00001-of-00002\.gguf: the shard is missing"):
        open_checkpoint(tmp_path / "m-00002-of-00002.gguf")


@pytest.mark.parametrize(
    ("layers", "wanted"), [(0, "a positive whole number"), (2**31 - 1, "no more than 20 tensors fill")]
)
def test_metadata_that_no_model_can_have_are_an_error(layers, wanted, tmp_path, shared_data):
    content = (shared_data / "gguf" / "tinystories-656k-q4_0.gguf").read_bytes()
    place = content.index(b"llama.block_count") + len(b"llama.block_count") + 4
    file = tmp_path / "bad.gguf"
    file.write_bytes(content[:place] + struct.pack("<I", layers) + content[place + 4 :])
    with pytest.raises(JQ4Error, match=rf"bad\.gguf: llama\.block_count is {layers}, wanted {wanted}"):
        open_checkpoint(file)


def test_the_tokenizer_of_a_real_file_is_that_of_transformers(shared_data):
    pytest.importorskip("transformers", reason="transformers is the oracle here and is not installed")
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

    name, text = "tinystories-656k-q8_0.gguf", (shared_data / "tinystories_text" / "tinystories.txt").read_text()[:2000]
    ours = Tokenizer.from_files(open_checkpoint(shared_data / "gguf" / name).files.get, name)
    architecture, described, settings = get_gguf_tokenizer(str(shared_data / "gguf" / name))
    theirs, _ = convert_gguf_tokenizer(architecture, described)
    assert ours is not None
    assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode(text).ids) == text
    assert ours.encode(text).ids[0] == ours.bos_token_id == theirs.token_to_id(settings["bos_token"])
    assert ours.eos_token_ids == (theirs.token_to_id(settings["eos_token"]),)


def test_a_tokenizer_of_pieces_comes_back(tmp_path, shared_data):
    original = open_checkpoint(shared_data / "tinystories-656k")
    back, _ = _written(original, tmp_path / "m.gguf", type="q8_0")
    text = (shared_data / "tinystories_text" / "tinystories.txt").read_text()[:5000]
    ours, wanted = (Tokenizer.from_files(one.files.get, "tokenizer") for one in (back, original))
    assert ours is not None and wanted is not None
    assert ours.encode(text).ids == wanted.encode(text).ids
    assert ours.decode(ours.encode(text).ids) == text
    theirs = pytest.importorskip("gguf", reason="gguf is the oracle here and is not installed")
    fields = theirs.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 2048
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 1


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o", "smollm"])
def test_a_byte_level_tokenizer_comes_back_and_is_that_of_transformers(pre, tmp_path):
    import tokenizers
    from random_model import TEXT

    from jq4.checkpoint.foreign.gguf.splits import pre_tokenizer
    from jq4.checkpoint.foreign.gguf.tokenizer_out import tokenizer_metadata

    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, show_progress=False, special_tokens=["<end>", "<begin>"]
    )
    trained.train_from_iterator([TEXT], trainer)
    content = json.loads(trained.to_str())
    content["pre_tokenizer"] = pre_tokenizer(pre)[0]
    files = {"tokenizer.json": json.dumps(content).encode(), "tokenizer_config.json": b'{"eos_token": "<end>"}'}
    metadata, notes = tokenizer_metadata(files, {}, 340)
    assert (metadata["tokenizer.ggml.pre"], notes) == (pre, [])
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD339]"
    back, notes = tokenizer_files({"general.architecture": "qwen2", **metadata}, "m.gguf")
    ours, wanted = (
        tokenizers.Tokenizer.from_buffer(back["tokenizer.json"]),
        tokenizers.Tokenizer.from_str(json.dumps(content)),
    )
    text = "The quick fox's 12345 jumps,\n\n  over<end> the Lazy dog\u00e9 HTTPServer!  \n"
    assert notes == []
    assert ours.encode(text).ids == wanted.encode(text).ids
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here and is not installed")
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    assert transformers
    theirs, _ = convert_gguf_tokenizer(
        "qwen2",
        {
            "tokenizer_type": "gpt2",
            "pre_tokenizer_type": pre,
            "tokens": metadata["tokenizer.ggml.tokens"],
            "merges": metadata["tokenizer.ggml.merges"],
            "token_type": metadata["tokenizer.ggml.token_type"].tolist(),
        },
    )
    if pre != "smollm":  # whose digits transformers does not cut
        assert ours.encode(text).ids == theirs.encode(text).ids


def test_merges_made_from_scores_are_those_of_transformers():
    base = pytest.importorskip("transformers.tokenization_utils_base", reason="transformers is the oracle here")
    tokens = ["<unk>", "a", "b", "c", "ab", "bc", "abc", "ca", "cab", "cabc"]
    scores = [0.0, 0.0, 0.0, 0.0, -3.0, -1.0, -2.0, -4.0, -5.0, -6.0]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    wanted = base.generate_merges(vocabulary, dict(zip(tokens, scores, strict=True)))
    assert [tuple(one) for one in merges_of(vocabulary, scores, {0})] == list(wanted)


def test_metadata_of_a_tokenizer_that_contradict_each_other_are_an_error():
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a", "b"]}
    for key, value, message in (
        ("scores", np.float32([1.0]), "scores has 1 values, wanted 2 numbers"),
        ("bos_token_id", 2, "bos_token_id has 2, wanted a token's number below 2"),
        ("merges", ["a b c"], "merges has 'a b c', wanted two tokens"),
        ("tokens", "ab", "tokens has str, wanted a list of strings"),
    ):
        with pytest.raises(JQ4Error, match=rf"^m\.gguf: tokenizer\.ggml\.{message}"):
            tokenizer_files({**metadata, f"tokenizer.ggml.{key}": value}, "m.gguf")
