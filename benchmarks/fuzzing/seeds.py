"""Small sound files of every format that jq4 reads, as parts that can be changed one by one before they are written."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jq4.checkpoint.foreign.gguf.block_types import BY_NAME, BlockType
from jq4.formats import get_format
from tests import test_foreign_awq as awq
from tests import test_foreign_compressed_tensors as compressed
from tests import test_foreign_gptq as gptq
from tests.gguf_inputs import random_blocks
from tests.small_checkpoints import CONFIG

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A Hugging Face folder: `shards` maps a file's name to the tensors in it."""

    shards: Mapping[str, Arrays]
    config: Mapping[str, Any]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"format": "pt"})


@dataclasses.dataclass(frozen=True)
class GGUF:
    """A .gguf file: values by key (as `file_writing.header` takes them), and tensors in blocks."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[BlockType, tuple[int, ...], bytes]]


def _one(tensors: Arrays, quantization: Any = None, **more: Any) -> Folder:
    quantized = {} if quantization is None else {"quantization_config": quantization}
    dense = {"model.norm.weight": np.ones(8, ml_dtypes.bfloat16), "lm_head.weight": np.ones((4, 8), np.float16)}
    return Folder({"model.safetensors": tensors | dense}, {**CONFIG, "num_hidden_layers": 1, **quantized, **more})


def _dense() -> Folder:
    random = np.random.default_rng(0)
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int64, np.int8, np.bool_)
    made = {f"layers.{i}.weight": random.normal(size=(3, 4)).astype(dtype) for i, dtype in enumerate(dtypes)}
    return _one(made | {"empty": np.zeros((0, 4), np.float32), "one": np.array(1.5, np.float32)})


def _shards() -> Folder:
    parts = {
        f"model-0000{i + 1}-of-00002.safetensors": {f"layers.{i}.weight": np.ones((4, 4), np.float32)} for i in range(2)
    }
    return Folder(parts, {**CONFIG, "num_hidden_layers": 2})


def _gptq(bits: int = 4, symmetric: bool = True, ordered: bool = False, **label: Any) -> Folder:
    random = np.random.default_rng(bits)
    inputs, group, outputs = 96, 32, 32
    zeros = None if symmetric else random.integers(1, 2**bits, (inputs // group, outputs)).astype(np.uint8)
    index = random.permutation(np.arange(inputs) // group) if ordered else None
    made, _ = gptq.make(bits, inputs, outputs, group, zeros=zeros, g_idx=index)
    return _one(made, gptq.config(bits, group, sym=symmetric, desc_act=ordered, **label))


def _awq(layout: str) -> Folder:
    codes, zeros, scales, _ = awq.parts()
    filled = (codes, zeros, scales, 32)
    made = {
        "gemm": lambda: awq.gemm(codes, zeros, scales),
        "gemv": lambda: awq.gemv(*filled),
        "gemv_fast": lambda: awq.fast(*filled),
    }[layout]()
    return _one(made, awq.config(layout))


def _compressed(bits: int, shape: tuple[int, ...], group: int | None, symmetric: bool, **label: Any) -> Folder:
    return _one(compressed.make(bits, shape, group, symmetric)[0], compressed.config(bits, group, symmetric, **label))


def _padded() -> Folder:
    made, _ = compressed.make(3, (20, 96), None, False, pack=compressed.padded_words)
    return _one(made, compressed.config(3, None, False, version="0.17.1"))


def _ordered() -> Folder:
    made, _ = compressed.make(4, (16, 96), 32)
    made[f"{compressed.P}.weight_g_idx"] = np.random.default_rng(0).permutation(np.arange(96) // 32).astype(np.int32)
    return _one(made, compressed.config())


def _bytes() -> Folder:
    random, prefix = np.random.default_rng(0), compressed.P
    made = {
        f"{prefix}.weight": random.integers(-8, 8, (16, 64), dtype=np.int8),
        f"{prefix}.weight_scale": random.uniform(0.1, 1, (16, 2)).astype(np.float16),
        f"{prefix}.weight_zero_point": random.integers(-8, 8, (16, 2), dtype=np.int8),
    }
    return _one(made, compressed.config(4, 32, False, format="int-quantized"))


def _fp4(kind: str) -> Folder:
    random, prefix = np.random.default_rng(0), compressed.P
    made: Arrays = {f"{prefix}.weight_packed": random.integers(0, 256, (4, 32), np.uint8)}
    if kind == "nvfp4":
        made[f"{prefix}.weight_scale"] = np.ones((4, 4), ml_dtypes.float8_e4m3fn)
        made[f"{prefix}.weight_global_scale"] = np.array([2.0], np.float32)
    else:
        made[f"{prefix}.weight_scale"] = random.integers(100, 140, (4, 2), np.uint8)
    return _one(made, compressed.config(4, 16, True, format=f"{kind}-pack-quantized"))


def _bitsandbytes(nested: bool) -> Folder:
    random, name, blocks = np.random.default_rng(0), "model.layers.0.mlp.up_proj.weight", 32
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [16, 128]}
    made: Arrays = {
        name: random.integers(0, 256, (1024, 1), np.uint8),
        f"{name}.quant_map": np.asarray(get_format("nf4").levels, np.float32),
        f"{name}.absmax": random.uniform(0.1, 1, blocks).astype(np.float32),
    }
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.5}
        made[f"{name}.absmax"] = random.integers(0, 256, blocks, np.uint8)
        made[f"{name}.nested_absmax"] = np.ones(1, np.float32)
        made[f"{name}.nested_quant_map"] = np.asarray(get_format("dynamic8").levels, np.float32)
    made[f"{name}.quant_state.bitsandbytes__nf4"] = _text(json.dumps(state))
    return _one(made, {"quant_method": "bitsandbytes", "load_in_4bit": True})


def _int8() -> Folder:
    random, name = np.random.default_rng(0), "model.layers.0.mlp.up_proj"
    return _one({f"{name}.weight": random.integers(-127, 128, (8, 16), np.int8), f"{name}.SCB": np.ones(8, np.float32)})


def _gpt_oss() -> Folder:
    random, name = np.random.default_rng(0), "model.layers.0.mlp.experts.gate_up_proj"
    blocks = random.integers(0, 256, (2, 6, 3, 16), np.uint8)
    return _one({f"{name}_blocks": blocks, f"{name}_scales": random.integers(100, 140, (2, 6, 3), np.uint8)})


def _hqq(axis: int) -> Folder:
    random, name = np.random.default_rng(0), "model.layers.0.mlp.up_proj"
    packed, parts = ((48, 8), (96, 1)) if axis == 1 else ((4, 96), (1, 96))
    settings = {"nbits": np.int32(4), "group_size": np.int32(8), "axis": np.int32(axis), "view_as_float": np.uint8(0)}
    made = {
        "W_q": random.integers(0, 256, packed, np.uint8),
        "scale": random.uniform(0.5, 1, parts).astype(np.float32),
        "zero": random.uniform(5, 9, parts).astype(np.float32),
        "shape": np.array([24, 32], np.int64),
        "packing": _text("4bit_u8"),
        "compute_dtype": _text("torch.float32"),
        **{key: np.asarray(value) for key, value in settings.items()},
    }
    return _one({f"{name}.{part}": array for part, array in made.items()})


def _torchao() -> Folder:
    random, name = np.random.default_rng(0), "model.layers.0.mlp.up_proj"
    made = {
        f"{name}._weight_qdata": random.integers(-128, 128, (6, 32), np.int8),
        f"{name}._weight_scale": np.ones((4, 6), ml_dtypes.bfloat16),
        f"{name}._weight_zero_point": np.ones((4, 6), ml_dtypes.bfloat16),
    }
    entry = {
        "_type": "Int4Tensor",
        "_data": {
            "block_size": [1, 16],
            "shape": [6, 64],
            "activation_dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
        },
        "_tensor_data_names": ["qdata", "scale", "zero_point"],
    }
    held = {f"{name}.weight": json.dumps(entry), "tensor_names": json.dumps([f"{name}.weight"])}
    return dataclasses.replace(_one(made), metadata={"format": "pt", **held})


def _gemma() -> Folder:
    random, name = np.random.default_rng(0), "model.layers.0.mlp.up_proj"
    made = {
        f"{name}.weight": random.integers(0, 256, (8, 16), np.uint8),
        f"{name}.weight_scale": np.ones((8, 1), np.float32),
        "model.embed_tokens.embedding_quantized": random.integers(-128, 128, (8, 16), np.int8),
        "model.embed_tokens.embedding_scale": np.ones((8, 1), np.float32),
    }
    return _one(made, {"quant_method": "gemma", "num_bits": 4, "module_quant_configs": {".*up_proj": {"num_bits": 2}}})


def _mlx() -> Folder:
    random, name = np.random.default_rng(0), "model.layers.0.mlp.up_proj"
    made = {
        f"{name}.weight": random.integers(0, 2**32, (8, 8), np.uint32),
        f"{name}.scales": np.ones((8, 2), np.float16),
        f"{name}.biases": np.ones((8, 2), np.float16),
    }
    return _one(made, {"bits": 4, "group_size": 32, name: {"bits": 4, "group_size": 32}})


def _quanto() -> Folder:
    random, name = np.random.default_rng(0), "model.layers.0.mlp.up_proj"
    made = {
        f"{name}.weight._data._data": random.integers(0, 256, (8, 32), np.uint8),
        f"{name}.weight._scale": np.ones((16, 1), np.float32),
        f"{name}.weight._shift": np.ones((16, 1), np.float32),
        f"{name}.bias": np.ones(8, np.float32),
        "model.layers.0.mlp.down_proj.weight._data": random.integers(-128, 128, (4, 8), np.int8),
        "model.layers.0.mlp.down_proj.weight._scale": np.ones((4, 1), np.float32),
    }
    return _one(made, {"quant_method": "quanto"})


def _text(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _gguf(architecture: str, tokenizer: str, kinds: tuple[str, ...], **more: Any) -> GGUF:
    """A model of one layer, of 256 wide, whose matrices take the types in turn."""
    width, tokens = 256, [f"t{i}" for i in range(10)] + ["t", "0", "t0t1"]
    sizes = {
        "context_length": 64,
        "embedding_length": width,
        "feed_forward_length": width,
        "block_count": 1,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "rope.dimension_count": 64,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    values: dict[str, Any] = {"general.architecture": architecture, "general.name": "m"}
    values |= {f"{architecture}.{key}": value for key, value in sizes.items()}
    values |= {
        "tokenizer.ggml.model": tokenizer,
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3, 3, 4, *[1] * 10], np.int32),
        "tokenizer.ggml.scores": np.arange(13, dtype=np.float32),
        "tokenizer.ggml.merges": ["t 0", "t0 t1"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ x }}",
    }
    values |= {key.replace("__", "."): value for key, value in more.items()}
    matrices = ("token_embd", "blk.0.attn_q", "blk.0.attn_k", "blk.0.ffn_up", "output")
    held = {}
    for i, name in enumerate(matrices):
        kind = BY_NAME[kinds[i % len(kinds)]]
        rows = 16 if kind.dtype is None else 8
        raw = (
            random_blocks(kind, rows, width // kind.length, i)
            if kind.dtype is None
            else np.ones((rows, width), kind.dtype)
        )
        held[f"{name}.weight"] = (kind, (rows, width), raw.tobytes())
    held["blk.0.attn_norm.weight"] = (BY_NAME["F32"], (width,), np.ones(width, np.float32).tobytes())
    return GGUF(values, held)


def _rope(architecture: str, *names: str) -> GGUF:
    seed = _gguf(architecture, "llama", ("Q4_0", "F32"))
    row = (BY_NAME["F32"], (32,), np.linspace(1, 8, 32, dtype=np.float32).tobytes())
    return dataclasses.replace(seed, tensors={**seed.tensors, **dict.fromkeys(names, row)})


_DYNAMIC = {"+:.*up_proj": {"bits": 4, "group_size": 32}, r"-:.*lm_head": {}}
_PATTERNS = {"targets": [r"re:.*up_proj$", r"re:^(?!.*lm_head).*"]}

SEEDS: dict[str, tuple[Callable[[], Folder | GGUF], ...]] = {
    "safetensors": (_dense, _shards),
    "gptq": (
        _gptq,
        lambda: _gptq(3, False),
        lambda: _gptq(8, False, True, checkpoint_format="gptq_v2"),
        lambda: _gptq(4, False, True, dynamic=_DYNAMIC),
        lambda: _gptq(2, extra_config={".*up_proj": {"bits": 2}}),
    ),
    "awq": (lambda: _awq("gemm"), lambda: _awq("gemv"), lambda: _awq("gemv_fast")),
    "compressed-tensors": (
        lambda: _compressed(4, (16, 64), 32, False, **_PATTERNS),
        lambda: _compressed(4, (2, 8, 64), 32, True),
        lambda: _compressed(5, (16, 27), None, False),
        _padded,
        _ordered,
        _bytes,
        lambda: _fp4("mxfp4"),
        lambda: _fp4("nvfp4"),
    ),
    "bitsandbytes": (lambda: _bitsandbytes(False), lambda: _bitsandbytes(True), _int8),
    "mxfp4": (_gpt_oss,),
    "hqq": (lambda: _hqq(1), lambda: _hqq(0)),
    "torchao": (_torchao,),
    "gemma": (_gemma,),
    "mlx": (_mlx,),
    "quanto": (_quanto,),
    "gguf": (
        lambda: _gguf("llama", "gpt2", ("Q4_0", "Q4_1", "Q8_0")),
        lambda: _gguf("qwen3", "gpt2", ("Q4_K", "Q6_K", "F16")),
        lambda: _gguf("gemma2", "llama", ("Q5_0", "Q5_1", "IQ4_NL"), gemma2__attention__sliding_window=16),
        lambda: _gguf("mine", "llama", ("Q5_K", "IQ4_XS", "MXFP4", "BF16")),
        lambda: _rope("llama", "rope_freqs.weight"),
        lambda: _rope("phi3", "rope_factors_long.weight", "rope_factors_short.weight"),
    ),
}
