"""Folders of small models with experts, as transformers writes them, with random weights; their names are told here."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jq4.checkpoint.safetensors_files import SINGLE, write

D, HEADS, KV_HEADS, LAYERS, VOCABULARY = 64, 4, 2, 2, 2048
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"architectures": ["MixtralForCausalLM"], "intermediate_size": 96, "num_local_experts": 4}
    | {"num_experts_per_tok": 2, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None},
    "qwen2_moe": {"architectures": ["Qwen2MoeForCausalLM"], "intermediate_size": 128, "num_experts": 4}
    | {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96}
    | {"norm_topk_prob": False},
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], "intermediate_size": 128, "num_experts": 8}
    | {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 32},
    "gpt_oss": {"architectures": ["GptOssForCausalLM"], "intermediate_size": 96, "num_local_experts": 4}
    | {"num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 8, "rms_norm_eps": 1e-5, "attention_bias": True}
    | {"rope_theta": 1e4, "rope_scaling": YARN, "layer_types": ["sliding_attention", "full_attention"]},
}


def write_moe(folder: Path, family: str, **changes: Any) -> dict[str, np.ndarray]:
    """A folder of float32 weights of a family, without a tokenizer; its arrays."""
    config = {"model_type": family, **SIZES, **FAMILIES[family], **changes}
    draw, arrays = np.random.default_rng(0), {}
    for name, shape in _shapes(family, config).items():
        norm = name.endswith("norm.weight")
        arrays[name] = (draw.uniform(0.5, 1.5, shape) if norm else draw.normal(0, 0.3, shape)).astype(np.float32)
    folder.mkdir(parents=True)
    write(folder / SINGLE, {name: ("F32", one.shape, lambda one=one: one) for name, one in arrays.items()})
    (folder / "config.json").write_text(json.dumps(config))
    return arrays


def _shapes(family: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    head = config.get("head_dim", D // HEADS)
    queries, keys = HEADS * head, KV_HEADS * head
    layer: dict[str, tuple[int, ...]] = {f"{one}_layernorm.weight": (D,) for one in ("input", "post_attention")}
    outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    layer |= {f"self_attn.{name}.weight": (rows, D) for name, rows in outputs.items()}
    layer["self_attn.o_proj.weight"] = (D, queries)
    if family in ("qwen2_moe", "gpt_oss"):
        layer |= {f"self_attn.{name}.bias": (rows,) for name, rows in outputs.items()}
    if family == "qwen3_moe":
        layer |= {f"self_attn.{name}_norm.weight": (head,) for name in "qk"}
    layer |= _of_experts(family, config)
    whole = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
    whole |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, D))
    return whole | {"model.norm.weight": (D,)}


def _of_experts(family: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    count = config.get("num_experts") or config["num_local_experts"]
    if family == "gpt_oss":
        inner = config["intermediate_size"]
        return {
            "self_attn.o_proj.bias": (D,), "self_attn.sinks": (HEADS,),
            "mlp.router.weight": (count, D), "mlp.router.bias": (count,),
            "mlp.experts.gate_up_proj": (count, D, 2 * inner), "mlp.experts.gate_up_proj_bias": (count, 2 * inner),
            "mlp.experts.down_proj": (count, inner, D), "mlp.experts.down_proj_bias": (count, D),
        }  # fmt: skip
    parent, words = "mlp", ("gate_proj", "up_proj", "down_proj")
    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    if family == "mixtral":
        parent, words = "block_sparse_moe", ("w1", "w3", "w2")
    shapes: dict[str, tuple[int, ...]] = {f"{parent}.gate.weight": (count, D)}
    for expert in range(count):
        for word, shape in zip(words, ((inner, D), (inner, D), (D, inner)), strict=True):
            shapes[f"{parent}.experts.{expert}.{word}.weight"] = shape
    if family == "qwen2_moe":
        inner = config["shared_expert_intermediate_size"]
        for word, shape in zip(words, ((inner, D), (inner, D), (D, inner)), strict=True):
            shapes[f"mlp.shared_expert.{word}.weight"] = shape
        shapes["mlp.shared_expert_gate.weight"] = (1, D)
    return shapes
