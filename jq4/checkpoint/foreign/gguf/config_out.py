"""A GGUF file's settings and rotary factors, made of a Hugging Face config.json of a family that is known.

llama.cpp builds some things from code that a config.json could say otherwise (Gemma's attention scale and windows,
which layers of Qwen look back over a window): where it does, a note tells what llama.cpp will do.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.gguf.config_in import (
    FREQUENCIES,
    LARGEST_GEMMA,
    LONG,
    NO_CAP,
    SHORT,
    llama3_factors,
    sliding_or_full,
)
from jq4.checkpoint.foreign.gguf.expert_settings import expert_metadata, expert_notes, number_of_experts
from jq4.checkpoint.foreign.gguf.names import ARCHITECTURES
from jq4.errors import JQ4Error

# what the family's class in transformers takes for granted
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072},
    "qwen2": {"max_position_embeddings": 32768},
    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128},
    "phi3": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "mixtral": {
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        "max_position_embeddings": 32768, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen3_moe": {
        "max_position_embeddings": 32768, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
    "gpt_oss": {
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 150_000.0, "head_dim": 64,
        "num_local_experts": 128, "num_experts_per_tok": 4, "sliding_window": 128,
    },
    "gemma2": {
        "max_position_embeddings": 8192, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
    },
    "gemma3": {
        "max_position_embeddings": 131072, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "num_attention_heads": 8,
        "num_key_value_heads": 4, "num_hidden_layers": 26, "hidden_size": 2304, "intermediate_size": 9216,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


# what llama.cpp takes for yarn
_OF_YARN = {
    "attention_factor": None, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": None, "mscale_all_dim": None,
    "truncate": True,
}  # fmt: skip


class Settings:
    """A config.json read for writing GGUF: `architecture`, `get(key)`, `size(key)`, and what both need of it."""

    def __init__(self, config: Mapping[str, Any] | None) -> None:
        self.whole = config or {}
        named = self.whole.get("model_type")
        if named not in ARCHITECTURES:
            raise JQ4Error(
                f"config.json: model_type is {named!r}, which cannot be written as GGUF. "
                f"Supported: {', '.join(sorted(ARCHITECTURES))}."
            )
        self.architecture = ARCHITECTURES[named]
        self._text = self.whole.get("text_config") or self.whole
        self._defaults = _DEFAULTS[named if named in _DEFAULTS else self.architecture]

    def get(self, key: str, default: Any = None) -> Any:
        if key in self._text:
            return self._text[key]
        return self._defaults.get(key, self.whole.get(key, default))

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default) or default
        if type(value) is not int or value <= 0:
            raise JQ4Error(
                f"config.json: {key} is {value!r}, wanted a positive whole number. Take the config.json of the weights."
            )
        return value

    @property
    def layers(self) -> int:
        return self.size("num_hidden_layers")

    @property
    def experts(self) -> int:
        """Of each layer; 0 for a model without."""
        named = next((one for one in ("num_experts", "num_local_experts") if self._text.get(one) is not None), None)
        if named is not None:
            return self.size(named) if self._text[named] else 0
        return number_of_experts(self._defaults)

    @property
    def heads(self) -> dict[str, Any]:
        """The counts of heads, as names.permuted_heads wants them."""
        heads = self.size("num_attention_heads")
        return {"num_attention_heads": heads, "num_key_value_heads": self.size("num_key_value_heads", heads)}

    @property
    def head_dim(self) -> int:
        return self.size("head_dim", self.size("hidden_size") // self.size("num_attention_heads"))

    @property
    def tied(self) -> bool:
        return bool(self.get("tie_word_embeddings", False))

    @property
    def is_mistral(self) -> bool:
        """Whether it is one in llama.cpp's architecture "llama", which has no window."""
        return self.whole.get("model_type") == "mistral"

    @property
    def rope(self) -> dict[str, Any]:
        """rope_scaling and rope_parameters as one, of the layers that see all of the text; `rope_theta` among it."""
        stated = self.get("rope_parameters") or {}
        stated = stated.get("full_attention") or ({} if "sliding_attention" in stated else stated)
        rope = {"rope_theta": self.get("rope_theta") or 10_000.0, **stated, **(self.get("rope_scaling") or {})}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        return rope | {"rope_type": "longrope" if kind in ("su", "longrope") else kind}

    @property
    def local_theta(self) -> float:
        """The rotary base of the layers that look back over a window (Gemma 3)."""
        local = (self.get("rope_parameters") or {}).get("sliding_attention") or {}
        return float(local.get("rope_theta") or self.get("rope_local_base_freq"))

    @property
    def turned(self) -> int:
        """Dimensions of a head that are rotated."""
        fraction = self.rope.get("partial_rotary_factor") or self.get("partial_rotary_factor") or 1.0
        return int(self.head_dim * fraction)


def metadata_of(settings: Settings, vocabulary: int) -> dict[str, Any]:
    """The values under the architecture's name, but those of the tokenizer."""
    heads = settings.heads
    values: dict[str, Any] = {
        "vocab_size": vocabulary,
        "context_length": settings.size("max_position_embeddings"),
        "embedding_length": settings.size("hidden_size"),
        "block_count": settings.layers,
        "feed_forward_length": settings.size("intermediate_size"),
        "attention.head_count": heads["num_attention_heads"],
        "attention.head_count_kv": heads["num_key_value_heads"],
        "attention.key_length": settings.head_dim,
        "attention.value_length": settings.head_dim,
        "attention.layer_norm_rms_epsilon": float(settings.get("rms_norm_eps", 1e-6)),
        "rope.dimension_count": settings.turned,
        "rope.freq_base": float(settings.rope["rope_theta"]),
    }
    window = settings.get("sliding_window")
    if window and (settings.architecture in ("gemma2", "gemma3", "phi3", "gpt-oss") or settings.is_mistral):
        values["attention.sliding_window"] = int(window)
    if settings.architecture == "gemma2":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            values[key] = float(settings.get(key) or NO_CAP)
    if settings.architecture == "gemma3":
        values["rope.freq_base_swa"] = settings.local_theta
    values |= expert_metadata(settings, settings.experts) | _scaling(settings)
    return {f"{settings.architecture}.{key}": value for key, value in values.items()}


def factors_of(settings: Settings) -> dict[str, np.ndarray]:
    """The tensors of rotary factors, f32[turned / 2], where there are any."""
    rope = settings.rope
    if rope["rope_type"] == "llama3":
        try:
            factors = llama3_factors(rope, float(rope["rope_theta"]), settings.turned)
        except KeyError as error:
            raise JQ4Error(
                f"config.json: rope_scaling has no {error}, wanted by llama3. Take the config.json of the weights."
            ) from error
        return {FREQUENCIES: factors.astype(np.float32)}
    if rope["rope_type"] != "longrope":
        return {}
    long, short = (np.asarray(rope[key], np.float32) for key in ("long_factor", "short_factor"))
    if settings.architecture != "phi3" and np.array_equal(long, short):
        return {FREQUENCIES: long}
    return {LONG: long, SHORT: short}


def notes_of(settings: Settings) -> list[str]:
    """What llama.cpp will do otherwise than config.json says."""
    notes, architecture = [], settings.architecture
    kind, window = settings.rope["rope_type"], settings.get("sliding_window")
    if kind not in ("default", "linear", "yarn", "llama3", "longrope"):
        notes.append(f"rope_type {kind!r} has no form in GGUF: llama.cpp does not stretch the rotary embedding")
    if window and settings.is_mistral:
        notes.append(f"sliding_window {window} is kept for jq4: llama.cpp lets a Mistral look at all of the text")
    if window and settings.whole.get("model_type") == "mixtral":
        notes.append(f"sliding_window {window} is left out: llama.cpp lets a Mixtral look at all of the text")
    if settings.get("use_sliding_window") and architecture.startswith("qwen"):
        notes.append("use_sliding_window is left out: llama.cpp lets a Qwen look at all of the text")
    left_out = sorted(key for key in _OF_YARN if settings.rope.get(key, _OF_YARN[key]) != _OF_YARN[key])
    if kind == "yarn" and left_out:
        notes.append(f"{', '.join(left_out)} of rope_scaling are left out: llama.cpp takes its own")
    notes += expert_notes(settings)
    if architecture in LARGEST_GEMMA or architecture == "gpt-oss":
        types = sliding_or_full(architecture, settings.layers)
        if settings.get("layer_types", types) != types:
            notes.append(f"layer_types are left out: llama.cpp has windows as every {architecture} has them")
    if architecture in LARGEST_GEMMA:
        largest = settings.layers == LARGEST_GEMMA[architecture]
        built = settings.size("hidden_size") // settings.heads["num_attention_heads"] if largest else settings.head_dim
        if settings.get("query_pre_attn_scalar") != built:
            notes.append(
                f"query_pre_attn_scalar is {settings.get('query_pre_attn_scalar')}: llama.cpp takes {built} for "
                f"a {architecture} of {settings.layers} layers"
            )
    return notes


def _scaling(settings: Settings) -> dict[str, Any]:
    rope = settings.rope
    kind = rope["rope_type"]
    trained = settings.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    if kind in ("linear", "yarn"):
        scaling: dict[str, Any] = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope.get("factor") or 1.0)}
        return scaling | ({"rope.scaling.original_context_length": int(trained)} if trained else {})
    if kind == "longrope" and LONG in factors_of(settings):
        longest = settings.size("max_position_embeddings")
        trained = int(trained or longest)
        stretch = max(1.0, longest / trained)
        sharpness = 1.0 if stretch == 1.0 else math.sqrt(1 + math.log(stretch) / math.log(trained))
        return {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": trained,
            "rope.scaling.attn_factor": float(rope.get("attention_factor") or sharpness),
        }
    return {}
