"""Oracle: the safetensors library for files, transformers' published configs for config.json, hand-made damage."""

import json
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from jq4.checkpoint.safetensors_files import read_header
from jq4.errors import JQ4Error
from models import Decoder, DecoderConfig
from models.config import NO_WINDOW
from models.hf import load_config, load_params, save_params

FILE = "model.safetensors"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 6,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
GEMMA = LLAMA | {"model_type": "gemma3_text", "tie_word_embeddings": True, "sliding_window": 5}
EMBEDDING, HEAD, QUERY = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"


def _params(config: DecoderConfig, dtype: Any = np.float32) -> Any:
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), dtype), shapes)


def _folder(tmp_path: Path, raw: dict[str, Any]) -> tuple[Path, DecoderConfig, dict[str, np.ndarray]]:
    """A sound folder of random weights, its config, and the tensors to be changed and written again."""
    config = DecoderConfig.from_hf(raw)
    save_params(tmp_path, config, _params(config))
    return tmp_path, config, safetensors.numpy.load_file(tmp_path / "model.safetensors")


def _rewrite(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file({name: np.ascontiguousarray(one) for name, one in tensors.items()}, folder / FILE)


def _same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3_text"])
def test_what_is_saved_is_read_back_and_by_safetensors_too(tmp_path, family, dtype):
    raw = {**(GEMMA if family == "gemma3_text" else LLAMA), "model_type": family}
    config = DecoderConfig.from_hf(raw)
    params = _params(config, jnp.dtype(dtype))
    save_params(tmp_path, config, params)
    _same(load_params(tmp_path, load_config(tmp_path)), params)
    with safe_open(tmp_path / FILE, "np") as file:
        assert set(file.keys()) == set(read_header(tmp_path / FILE))
        query = "model.layers.1.self_attn." + ("qkv_proj.weight" if family == "phi3" else "q_proj.weight")
        kernel = np.asarray(params["layers"]["attention"]["q_proj"]["kernel"][1])  # [D, Hq * hd]
        np.testing.assert_array_equal(file.get_tensor(query)[: kernel.shape[1]], kernel.T)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    assert not list(tmp_path.glob("*.partial"))


def test_another_dtype_is_given_on_request(tmp_path):
    folder, config, _ = _folder(tmp_path, LLAMA)
    params = load_params(folder, config, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_shards_are_read_as_one_file_is(tmp_path):
    folder, config, tensors = _folder(tmp_path, LLAMA)
    wanted = load_params(folder, config)
    _shard(folder, tensors)
    _same(load_params(folder, config), wanted)


def _shard(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    (folder / FILE).unlink()
    names = sorted(tensors)
    where = {name: f"model-{1 + place % 2:05}-of-00002.safetensors" for place, name in enumerate(names)}
    for shard in set(where.values()):
        safetensors.numpy.save_file({name: tensors[name] for name in names if where[name] == shard}, folder / shard)
    (folder / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


@pytest.mark.parametrize("kept", [[HEAD], [EMBEDDING], [EMBEDDING, HEAD]])
def test_a_tied_embedding_is_found_under_either_name(tmp_path, kept):
    folder, config, tensors = _folder(tmp_path, LLAMA | {"tie_word_embeddings": True})
    wanted = load_params(folder, config)
    table = tensors.pop(EMBEDDING)
    _rewrite(folder, tensors | dict.fromkeys(kept, table))
    _same(load_params(folder, config), wanted)


@pytest.mark.parametrize(
    ("body", "head"),
    [("model.", ""), ("", ""), ("language_model.model.", "language_model."), ("model.language_model.", "")],
)
def test_the_names_of_a_model_inside_another_are_known(tmp_path, body, head):
    folder, _, tensors = _folder(tmp_path, GEMMA | {"tie_word_embeddings": False})
    config = DecoderConfig.from_hf(
        {"model_type": "gemma3", "text_config": {**GEMMA, "tie_word_embeddings": False}, "vision_config": {}}
    )
    wanted = load_params(folder, config)
    moved = {(head if name == HEAD else body) + name.removeprefix("model."): one for name, one in tensors.items()}
    vision = {"vision_tower.vision_model.embeddings.patch_embedding.weight": np.zeros((2, 2), np.float32)}
    harmless = {f"{body}layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    _rewrite(folder, moved | vision | harmless)
    _same(load_params(folder, config), wanted)


def _changed(tensors: dict[str, np.ndarray], **changes: Any) -> dict[str, np.ndarray]:
    return {name: one for name, one in {**tensors, **changes}.items() if one is not None}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({QUERY: None}, r"missing 1 tensor: 'model.layers.1.self_attn.q_proj.weight'; found 20 other tensors"),
        ({HEAD: None}, r"missing 1 tensor: 'lm_head.weight'.*tie_word_embeddings\": true"),
        ({QUERY: np.zeros((8, 5), np.float32)}, r"q_proj.weight' has shape \(8, 5\), wanted \(8, 6\) by config.json"),
        ({QUERY: np.zeros((8, 6), np.int32)}, r"q_proj.weight' is I32, wanted one of F64, F32, F16, BF16"),
        (
            {"model.layers.2.mlp.up_proj.weight": np.zeros((1, 1), np.float32)},
            r"found 1 tensor: 'model.layers.2.mlp.up_proj.weight', which a llama model with 2 layers has no place for",
        ),
        ({"vision_tower.a": np.zeros(1, np.float32)}, r"found 1 tensor: 'vision_tower.a'"),
    ],
)
def test_a_missing_extra_or_misshapen_tensor_is_named(tmp_path, changes, text):
    folder, config, tensors = _folder(tmp_path, LLAMA)
    _rewrite(folder, _changed(tensors, **changes))
    with pytest.raises(JQ4Error, match=text) as caught:
        load_params(folder, config)
    assert str(tmp_path) in str(caught.value)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    folder, config, tensors = _folder(tmp_path, LLAMA | {"tie_word_embeddings": True})
    _rewrite(folder, tensors | {HEAD: tensors[EMBEDDING] + 1})
    with pytest.raises(JQ4Error, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        load_params(folder, config)


def test_packed_weights_are_refused_by_their_method(tmp_path):
    folder, _, tensors = _folder(tmp_path, LLAMA)
    config = DecoderConfig.from_hf(LLAMA | {"quantization_config": {"quant_method": "exl2"}})
    packed = {QUERY: None, QUERY.replace("weight", "q_weight"): np.zeros((1, 8), np.int32)}
    _rewrite(folder, _changed(tensors, **packed))
    with pytest.raises(JQ4Error, match=r"the weights are packed \(exl2\), wanted dense ones. Take the dense original"):
        load_params(folder, config)


@pytest.mark.parametrize(
    ("shard", "text"),
    [
        ("../model-00001-of-00002.safetensors", "names the shard '../model-00001-of-00002.safetensors', wanted a file"),
        ("/etc/passwd", "names the shard '/etc/passwd', wanted a file name"),
        ("..", "names the shard '..'"),
        ("model-00009-of-00009.safetensors", "the shard is missing, wanted by model.safetensors.index.json"),
        (7, "found no weight_map"),
        ("model-00002-of-00002.safetensors", "which model.safetensors.index.json places in"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, shard, text):
    folder, config, tensors = _folder(tmp_path, LLAMA)
    where = _shard(folder, tensors)
    first = next(name for name, held in where.items() if held.startswith("model-00001"))
    index = {"weight_map": where | {first: shard}}
    (folder / f"{FILE}.index.json").write_text(json.dumps(index))
    with pytest.raises(JQ4Error, match=text):
        load_params(folder, config)


def test_a_tensor_that_only_the_index_knows_is_missing(tmp_path):
    folder, config, tensors = _folder(tmp_path, LLAMA)
    where = _shard(folder, tensors) | {"model.ghost": "model-00001-of-00002.safetensors"}
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(JQ4Error, match=r"00001-of-00002.safetensors: tensor 'model.ghost' is missing"):
        load_params(folder, config)


def test_files_of_any_other_name_are_read_together(tmp_path):
    folder, config, tensors = _folder(tmp_path, LLAMA)
    wanted = load_params(folder, config)
    _shard(folder, tensors)
    (folder / f"{FILE}.index.json").unlink()
    _same(load_params(folder, config), wanted)
    safetensors.numpy.save_file({HEAD: np.ascontiguousarray(tensors[HEAD])}, folder / "packed-4bit.safetensors")
    with pytest.raises(JQ4Error, match=r"'lm_head.weight' is in both model-.*.safetensors and packed-4bit.safet"):
        load_params(folder, config)


def test_a_pickle_is_never_opened_and_an_empty_folder_is_no_model(tmp_path):
    config = DecoderConfig.from_hf(LLAMA)
    with pytest.raises(JQ4Error, match=r"found neither model.safetensors nor model.safetensors.index.json"):
        load_params(tmp_path, config)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(JQ4Error, match=r"pytorch_model.bin: is a pickle.*safe_serialization=True"):
        load_params(tmp_path, config)
    with pytest.raises(JQ4Error, match=r"config.json: cannot be read"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(JQ4Error, match=r"config.json: is not JSON"):
        load_config(tmp_path)


def _file(header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


HOSTILE = {
    "empty": (b"", "it has 0 bytes, wanted at least 8"),
    "short-prefix": (b"\x08\0\0", "it has 3 bytes, wanted at least 8"),
    "header-past-the-end": (_file({}, length=1 << 40), "its header claims 1099511627776 bytes"),
    "not-json": (_file(b'{"a":'), "its header does not parse"),
    "not-utf8": (_file(b'{"\xff\xfe": 1}'), "its header does not parse"),
    "deep": (_file(b"[" * 100_000), "its header does not parse"),
    "endless-number": (_file(b'{"a": ' + b"9" * 5000 + b"}"), "its header does not parse"),
    "a-list": (_file([1]), "its header is a list, wanted a JSON object"),
    "twice": (_file(b'{"a": {}, "a": {}}'), "its header names 'a' 2 times"),
    "no-offsets": (_file({"a": {"dtype": "F32", "shape": [2]}}), "tensor 'a' is described by"),
    "extra-key": (_file({"a": _entry(more=1)}), "tensor 'a' is described by"),
    "unknown-dtype": (_file({"a": _entry("F5")}), "tensor 'a' has dtype 'F5', wanted one of F64"),
    "dtype-a-list": (_file({"a": _entry(["F32"])}), "has dtype"),
    "negative-shape": (_file({"a": _entry(shape=(-2, -1))}), r"tensor 'a' has shape \[-2, -1\]"),
    "bool-shape": (_file({"a": _entry(shape=(True, 2))}), "tensor 'a' has shape"),
    "huge-shape": (_file({"a": _entry(shape=(2**62, 2**62))}), "tensor 'a' has 8 bytes, wanted"),
    "past-the-data": (_file({"a": _entry(shape=(4,), offsets=(0, 16))}), "an ascending pair within 8 bytes"),
    "backwards": (_file({"a": _entry(offsets=(8, 0))}), "an ascending pair"),
    "three-offsets": (_file({"a": _entry(offsets=(0, 4, 8))}), "an ascending pair"),
    "wrong-size": (_file({"a": _entry(shape=(3,))}), r"tensor 'a' has 8 bytes, wanted 12 for F32\[3\]"),
    "overlap": (
        _file({"a": _entry(), "b": _entry(shape=(1,), offsets=(4, 8))}),
        "tensor 'b' and tensor 'a' overlap",
    ),
    "gap": (
        _file({"a": _entry(shape=(1,), offsets=(4, 8))}),
        "tensor 'a' and the header leave 4 bytes between",
    ),
    "tail": (_file({"a": _entry()}, b"\0" * 20), "12 bytes follow tensor 'a'"),
    "truncated": (_file({"a": _entry()}, b"\0" * 7), "an ascending pair within 7 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_safetensors_file_is_refused(tmp_path, name):
    content, text = HOSTILE[name]
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(JQ4Error, match=text) as caught:
        load_params(tmp_path, DecoderConfig.from_hf(LLAMA))
    assert FILE in str(caught.value)


def test_every_truncation_of_a_real_file_is_refused(tmp_path):
    folder, config, _ = _folder(tmp_path, LLAMA)
    content = (folder / FILE).read_bytes()
    for length in range(0, len(content), 97):
        (folder / FILE).write_bytes(content[:length])
        with pytest.raises(JQ4Error, match=r"model\.safetensors"):
            load_params(folder, config)


def test_saving_refuses_what_does_not_fit_and_leaves_the_folder_alone(tmp_path):
    config = DecoderConfig.from_hf(LLAMA)
    params = _params(config)
    wrong = jax.tree.map(lambda leaf: leaf, params)
    wrong["layers"]["mlp"]["up_proj"]["kernel"] = jnp.zeros((2, 6, 9))
    with pytest.raises(JQ4Error, match=r"layers/mlp/up_proj/kernel: found shape \(2, 6, 9\), wanted \(2, 6, 10\)"):
        save_params(tmp_path / "new", config, wrong)
    with pytest.raises(JQ4Error, match=r"lm_head/kernel: the leaf is missing"):
        save_params(tmp_path / "new", config, {key: one for key, one in params.items() if key != "lm_head"})
    with pytest.raises(JQ4Error, match=r"embed/embedding: found a str, wanted a dense array"):
        save_params(tmp_path / "new", config, params | {"embed": {"embedding": "x"}})
    assert not (tmp_path / "new").exists()


def test_an_unknown_architecture_is_named_with_those_supported():
    with pytest.raises(JQ4Error, match=r"the architecture is 'mamba'.*gemma2, gemma3, gemma3_text, llama, mistral"):
        DecoderConfig.from_hf({"model_type": "mamba"})
    with pytest.raises(JQ4Error, match=r"the architecture is \['BertModel'\]"):
        DecoderConfig.from_hf({"architectures": ["BertModel"]})
    with pytest.raises(JQ4Error, match=r"holds list, wanted an object"):
        DecoderConfig.from_hf([])  # pyright: ignore[reportArgumentType]
    named_by_class = {key: one for key, one in LLAMA.items() if key != "model_type"}
    assert DecoderConfig.from_hf(named_by_class | {"architectures": ["Qwen3ForCausalLM"]}).qk_norm


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_size": None}, r"hidden_size is None, wanted a positive whole number"),
        ({"num_hidden_layers": -1}, r"num_hidden_layers is -1"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000, wanted at most 10000"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, r"rope factor is -2.0, wanted a number above 0"),
        ({"vocab_size": "11"}, r"vocab_size is '11'"),
        ({"head_dim": "x"}, r"head_dim is 'x', wanted a positive whole number"),
        ({"num_key_value_heads": [2]}, r"num_key_value_heads is \[2\], wanted a positive whole number"),
        ({"model_type": "mistral", "sliding_window": -3}, r"sliding_window is -3, wanted a positive whole number"),
        (
            {"rms_norm_eps": "x"},
            r"a value is not of the kind that its key wants \(could not convert string to float: 'x'",
        ),
        ({"rope_scaling": "abc"}, r"a value is not of the kind"),
        ({"rope_theta": None}, r"a value is not of the kind"),
        ({"eos_token_id": {}}, r"a value is not of the kind"),
        ({"model_type": "gemma3", "text_config": 5}, r"a value is not of the kind"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, r"a value is not of the kind"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads is 3, wanted a divisor of num_attention_heads = 2"),
        ({"hidden_act": "tanh"}, r"hidden_act is 'tanh', wanted one of silu"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, r"rope_type is 'spiral', wanted one of default, linear"),
        ({"rope_scaling": {"type": "linear"}}, r"rope factor is None"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, r"short_factor is '1 numbers', wanted 2"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, r"layer_types is \['full_attention'\], wanted 2"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, r"use_bidirectional_attention is true"),
    ],
)
def test_an_impossible_config_is_refused(changes, text):
    with pytest.raises(JQ4Error, match=text):
        DecoderConfig.from_hf(LLAMA | changes)


def test_google_s_own_gemma_3_config_is_read():
    """text_config of google/gemma-3-4b-it as published: it names little else than sizes."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106]}
    config = DecoderConfig.from_hf(raw | {"text_config": text, "torch_dtype": "bfloat16", "vision_config": {}})
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert config.windows == tuple(NO_WINDOW if layer % 6 == 5 else 1024 for layer in range(34))
    assert config.local_rope is not None
    assert (config.rope.theta, config.rope.kind, config.rope.factor) == (1e6, "linear", 8.0)
    assert (config.local_rope.theta, config.local_rope.kind) == (1e4, "default")
    assert (config.eos_token_ids, config.dtype, config.tied_embeddings) == ((1, 106), "bfloat16", True)


def test_a_config_is_hashable_and_written_back_as_it_was():
    raw = LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "something_else": {"kept": [1, 2]}}
    config = DecoderConfig.from_hf(raw)
    assert config.to_hf() == raw
    assert hash(config) == hash(DecoderConfig.from_hf(config.to_hf()))
    with pytest.raises(JQ4Error, match=r"made by hand"):
        DecoderConfig(5, 4, 4, 1, 1, 1, 4, config.rope).to_hf()
