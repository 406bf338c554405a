"""Settings of models with experts, from GGUF's metadata and back, and what llama.cpp takes for granted of them.

    GGUF                                  config.json
    expert_count                          num_experts (Qwen), num_local_experts
    expert_used_count                     num_experts_per_tok
    expert_feed_forward_length            moe_intermediate_size (Qwen), intermediate_size (gpt-oss)
    expert_shared_feed_forward_length     shared_expert_intermediate_size (Qwen 2)

Whether the weights of the chosen experts are made to sum to 1 is no setting there but the architecture's.
"""

from collections.abc import Mapping
from typing import Any, Protocol

_NORMALIZED = {"qwen2moe": False, "qwen3moe": True}  # norm_topk_prob, as llama.cpp's code has it
_SWIGLU = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}  # of gpt-oss, in llama.cpp's code


class Stated(Protocol):
    """A config.json that is read for writing GGUF: config_out.Settings."""

    architecture: str

    def get(self, key: str, default: Any = None) -> Any: ...

    def size(self, key: str, default: int | None = None) -> int: ...


def number_of_experts(config: Mapping[str, Any]) -> int:
    """Of each layer; 0 for a model without experts."""
    return config.get("num_experts") or config.get("num_local_experts") or 0


def expert_config(architecture: str, count: int, used: int, width: int, shared_width: int) -> dict[str, Any]:
    """What config.json says of `count` experts, of which `used` are asked, of `width` inner features."""
    if architecture == "llama":
        return {"num_local_experts": count, "num_experts_per_tok": used, "sliding_window": None}
    if architecture == "gpt-oss":
        return {
            "num_local_experts": count, "num_experts_per_tok": used, "experts_per_token": used,
            "intermediate_size": width, "attention_bias": True, "hidden_act": "silu", "swiglu_limit": 7.0,
        }  # fmt: skip
    config = {
        "num_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": width,
        "norm_topk_prob": _NORMALIZED[architecture],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return config | ({"shared_expert_intermediate_size": shared_width} if architecture == "qwen2moe" else {})


def expert_metadata(settings: Stated, count: int) -> dict[str, Any]:
    """The values under the architecture's name, of a model of `count` experts in each layer."""
    if not count:
        return {}
    used = settings.get("experts_per_token")
    values = {"expert_count": count, "expert_used_count": settings.size("num_experts_per_tok", used)}
    if settings.architecture in _NORMALIZED:
        values["expert_feed_forward_length"] = settings.size("moe_intermediate_size")
    if settings.architecture == "gpt-oss":
        values["expert_feed_forward_length"] = settings.size("intermediate_size")
    if settings.architecture == "qwen2moe":
        values["expert_shared_feed_forward_length"] = settings.size("shared_expert_intermediate_size")
    return values


def expert_notes(settings: Stated) -> list[str]:
    """What llama.cpp will do otherwise than config.json says."""
    architecture, notes = settings.architecture, []
    if architecture in _NORMALIZED:
        normalized = bool(settings.get("norm_topk_prob", False))
        if normalized != _NORMALIZED[architecture]:
            does = "divides" if _NORMALIZED[architecture] else "does not divide"
            notes.append(
                f"norm_topk_prob {normalized} is left out: llama.cpp {does} the chosen experts' weights by their sum"
            )
        if settings.get("mlp_only_layers") or settings.get("decoder_sparse_step", 1) != 1:
            notes.append(
                "mlp_only_layers and decoder_sparse_step are left out: llama.cpp loads files with experts in all layers"
            )
    if architecture == "gpt-oss":
        notes += [
            f"{key} {settings.get(key)} is left out: llama.cpp takes {built}"
            for key, built in _SWIGLU.items()
            if settings.get(key, built) != built
        ]
    return notes
