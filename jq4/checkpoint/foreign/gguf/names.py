"""GGUF's tensor names and Hugging Face's, for the families that are known, and the order of llama's query and key rows.

llama.cpp rotates neighbouring dimensions of a head where Hugging Face rotates halves, so the files of architecture
"llama" (Llama, and Mistral under that name) hold the rows of attn_q and attn_k with each head's [2, d/2] as [d/2, 2].
All other architectures here keep Hugging Face's order. Whole rows move, so packed ones move as they are.

The experts of a layer are one tensor in GGUF: experts.py.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.errors import JQ4Error

# model_type of config.json -> general.architecture
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
}

_BODY = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OTHERS = {
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "llama": {"ffn_gate_inp": "block_sparse_moe.gate"},  # Mixtral's router
    "qwen2moe": {
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
    },
    "qwen3moe": {"ffn_gate_inp": "mlp.gate"},
    "gpt-oss": {
        "post_attention_norm": "post_attention_layernorm",
        "attn_sinks": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
    },
}
_BARE = ".self_attn.sinks"  # a parameter: its name has no ".weight"

_GGUF_LAYER = re.compile(r"blk\.([0-9]{1,9})\.(\w+)\.(weight|bias)")
_HF_NAME = re.compile(r"(?:model\.|language_model\.model\.|model\.language_model\.)?(.+)\.(weight|bias)")
_HF_LAYER = re.compile(r"layers\.([0-9]{1,9})\.(.+)")


def hf_name(name: str, architecture: str) -> str | None:
    """Hugging Face's name of a GGUF tensor, or None where there is none, as of several experts."""
    stem, _, ending = name.rpartition(".")
    if stem in _BODY and ending == "weight":
        return f"{_BODY[stem]}.{ending}"
    found = _GGUF_LAYER.fullmatch(name)
    stem = _layer_table(architecture).get(found[2]) if found else None
    if found is None or stem is None:
        return None
    ending = "" if _BARE.endswith(f".{stem}") else f".{found[3]}"
    return f"model.layers.{int(found[1])}.{stem}{ending}"


def gguf_name(name: str, architecture: str) -> str | None:
    """GGUF's name of a Hugging Face tensor, or None where there is none, as of one expert."""
    if name in ("lm_head.weight", "language_model.lm_head.weight"):
        return "output.weight"
    found = _HF_NAME.fullmatch(f"{name}.weight" if name.endswith(_BARE) else name)
    if found is None:
        return None
    stem, ending = found.groups()
    body = next((key for key, value in _BODY.items() if value == f"model.{stem}"), None)
    if body:
        return f"{body}.{ending}"
    layer = _HF_LAYER.fullmatch(stem)
    own = next((key for key, value in _layer_table(architecture).items() if layer and value == layer[2]), None)
    return f"blk.{int(layer[1])}.{own}.{ending}" if layer and own else None


def layer_and_stem(name: str) -> tuple[int, str]:
    """ "blk.3.attn_q.weight" as (3, "attn_q"); ("output.weight") as (-1, "output")."""
    found = _GGUF_LAYER.fullmatch(name)
    return (int(found[1]), found[2]) if found else (-1, name.rpartition(".")[0])


def permuted_heads(name: str, architecture: str, config: Mapping[str, Any]) -> int:
    """How many heads' rows a GGUF tensor has in llama's order; 0 where its rows are as Hugging Face has them."""
    if architecture != "llama":
        return 0
    heads = config.get("num_attention_heads") or 0
    stem = layer_and_stem(name)[1]
    return {"attn_q": heads, "attn_k": config.get("num_key_value_heads") or heads}.get(stem, 0)


def is_shifted_norm(name: str, architecture: str) -> bool:
    """Whether a GGUF tensor is a norm that holds 1 + w where Hugging Face holds w."""
    return architecture.startswith("gemma") and layer_and_stem(name)[1].endswith("norm")


def from_llama_order(rows: np.ndarray, heads: int, name: str) -> np.ndarray:
    """Rows [N, ...] of a file in Hugging Face's order: each head's [d/2, 2] as [2, d/2]."""
    return _swapped(rows, heads, (-1, 2), name)


def to_llama_order(rows: np.ndarray, heads: int, name: str) -> np.ndarray:
    """The way back: each head's [2, d/2] as [d/2, 2]."""
    return _swapped(rows, heads, (2, -1), name)


def _swapped(rows: np.ndarray, heads: int, pair: tuple[int, int], name: str) -> np.ndarray:
    if not heads:
        return rows
    if rows.shape[0] % (2 * heads):
        raise JQ4Error(
            f"{name}: has {rows.shape[0]} rows, wanted an even number for each of {heads} heads. "
            "The metadata is not of these weights; download the file again."
        )
    split = rows.reshape(heads, *(size if size > 0 else rows.shape[0] // heads // 2 for size in pair), *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def _layer_table(architecture: str) -> dict[str, str]:
    if architecture.startswith("gemma"):
        return _LAYER | _GEMMA
    table = _LAYER | _OTHERS.get(architecture, {})
    if "post_attention_norm" in table:
        del table["ffn_norm"]
    return table
