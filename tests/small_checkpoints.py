"""Folders of small Llamas as others write them, dense and as GPTQ, with random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jq4.checkpoint.safetensors_files import SINGLE, write

HIDDEN, INNER, KEYS, VOCABULARY, GROUP = 64, 128, 32, 96, 32
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
Arrays = dict[str, np.ndarray]


def write_dense(folder: Path, layers: int = 2) -> Arrays:
    """A folder of float32 weights; its arrays."""
    draw = np.random.default_rng(0)
    arrays = _outside_of_linear(draw, layers)
    for name, shape in _linear(layers):
        arrays[f"{name}.weight"] = draw.normal(0, 0.1, shape)
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    _write(folder, arrays, CONFIG | {"num_hidden_layers": layers, "torch_dtype": "float32"})
    return arrays


def write_gptq(folder: Path, layers: int = 2, symmetric: bool = True) -> Arrays:
    """A folder of 4-bit GPTQ (v1 where it is symmetric, else v2); its arrays."""
    draw = np.random.default_rng(0)
    arrays = {name: array.astype(np.float16) for name, array in _outside_of_linear(draw, layers).items()}
    for name, (outputs, inputs) in _linear(layers):
        groups = inputs // GROUP
        zeros = (
            np.full((groups, outputs // 8), 0x77777777, np.int32) if symmetric else _words(draw, groups, outputs // 8)
        )
        arrays |= {
            f"{name}.qweight": _words(draw, inputs // 8, outputs),
            f"{name}.qzeros": zeros,
            f"{name}.scales": draw.uniform(0.01, 0.02, (groups, outputs)).astype(np.float16),
            f"{name}.g_idx": (np.arange(inputs) // GROUP).astype(np.int32),
        }
    how = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": symmetric}
    how["checkpoint_format"] = "gptq" if symmetric else "gptq_v2"
    _write(folder, arrays, CONFIG | {"num_hidden_layers": layers, "quantization_config": how})
    return arrays


def dequantized_gptq(arrays: Arrays, module: str, version_one: bool = True) -> np.ndarray:
    """f32[N, K] by the format's formula: scale * (code - zero), fields taken out of words one by one."""
    qweight, qzeros = (arrays[f"{module}.{name}"].view(np.uint32) for name in ("qweight", "qzeros"))
    codes = np.stack([qweight >> (4 * i) & 15 for i in range(8)], 1).reshape(-1, qweight.shape[1])
    zeros = np.stack([qzeros >> (4 * i) & 15 for i in range(8)], 2).reshape(qzeros.shape[0], -1) + version_one
    group = arrays[f"{module}.g_idx"]
    levels = codes.astype(np.float32) - zeros[group].astype(np.float32)
    return (levels * arrays[f"{module}.scales"][group].astype(np.float32)).T


def _outside_of_linear(draw: np.random.Generator, layers: int) -> Arrays:
    arrays = {
        name: draw.normal(0, 0.1, (VOCABULARY, HIDDEN)) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    names = [
        f"model.layers.{i}.{norm}" for i in range(layers) for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    return arrays | {f"{name}.weight": draw.uniform(0.5, 1.5, HIDDEN) for name in ("model.norm", *names)}


def _linear(layers: int) -> list[tuple[str, tuple[int, int]]]:
    return [(f"model.layers.{layer}.{name}", shape) for layer in range(layers) for name, shape in LINEAR.items()]


def _words(draw: np.random.Generator, *shape: int) -> np.ndarray:
    return draw.integers(-(2**31), 2**31, shape, dtype=np.int32)


def _write(folder: Path, arrays: Arrays, config: dict[str, Any]) -> None:
    kinds = {"float32": "F32", "float16": "F16", "int32": "I32"}
    folder.mkdir(parents=True)
    tensors = {name: (kinds[one.dtype.name], one.shape, lambda one=one: one) for name, one in arrays.items()}
    write(folder / SINGLE, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
