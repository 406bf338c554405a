"""A Hugging Face config.json made of a GGUF file's metadata and of what its tensors are.

What the metadata leave to llama.cpp's code is as that code has it: Gemma's attention scale, its pattern of windows and
the local rotary base; a head that is not there is the embedding. Factors of a stretched rotary embedding (rope_freqs)
are recognized as Llama 3's formula where they are, and else kept as a table.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.gguf.container import Container, GGUFTensor
from jq4.checkpoint.foreign.gguf.expert_settings import expert_config
from jq4.checkpoint.foreign.gguf.names import ARCHITECTURES
from jq4.errors import JQ4Error

READ = tuple(sorted(set(ARCHITECTURES.values())))
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, which scale attention by width / heads
NO_CAP = 1e9  # of logits: llama.cpp's Gemma 2 always has one, and divides by it
_PATTERNS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2}
_MODEL_TYPES = {"gemma3": "gemma3_text", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss"}

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
# config.json's key -> GGUF's, after the architecture's name
_SIZES = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
}


def config_of(container: Container) -> dict[str, Any] | None:
    """config.json's content, or None for an architecture that is not known."""
    architecture = container.metadata.get("general.architecture")
    if architecture not in READ:
        return None
    read = _Values(container, str(architecture))
    config: dict[str, Any] = {"model_type": read.model_type(), "architectures": [_CLASSES[read.model_type()]]}
    config |= {key: read.size(name) for key, name in _SIZES.items()}
    if config["num_hidden_layers"] > len(container.tensors):
        raise read.error(
            "block_count", config["num_hidden_layers"], f"no more than {len(container.tensors)} tensors fill"
        )
    heads, width = config["num_attention_heads"], config["hidden_size"]
    config["num_key_value_heads"] = read.size("attention.head_count_kv", heads)
    config["head_dim"] = read.size("attention.key_length", max(1, width // heads))
    config["rms_norm_eps"] = read.number("attention.layer_norm_rms_epsilon", 1e-6)
    config["vocab_size"] = read.vocabulary()
    config["tie_word_embeddings"] = "output.weight" not in container.tensors
    config["rope_theta"] = read.number("rope.freq_base", 10_000.0)
    config["torch_dtype"] = _dtype(container.tensors.values())
    config |= _family(read, config) | _experts(read) | _rope(read, config) | _special_tokens(container.metadata)
    return config


class _Values:
    """The metadata of one architecture, with their kinds checked."""

    def __init__(self, container: Container, architecture: str) -> None:
        self.container, self.architecture = container, architecture

    def get(self, name: str, default: Any = None) -> Any:
        return self.container.metadata.get(f"{self.architecture}.{name}", default)

    def size(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # one for each layer, and all the same
        if type(value) is not int or not 0 < value < 2**31:
            raise self.error(name, value, "a positive whole number, the same for every layer")
        return value

    def whole(self, name: str) -> int:
        """A number that may be 0, as it is where it is missing."""
        return self.size(name) if type(self.get(name, 0)) is not int or self.get(name, 0) else 0

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.error(name, value, "a number above 0")
        return float(f"{value:.7g}")  # as it was before it was rounded to float32

    def has(self, stem: str) -> bool:
        return f"blk.0.{stem}" in self.container.tensors

    def width(self, stem: str) -> int:
        """The length of the rows of a tensor of the first layer; 1 where there is none."""
        tensor = self.container.tensors.get(f"blk.0.{stem}")
        return tensor.shape[-1] if tensor is not None and tensor.shape else 1

    def model_type(self) -> str:
        named = " ".join(str(self.container.metadata.get(f"general.{key}", "")) for key in ("name", "basename"))
        if self.architecture == "llama" and self.whole("expert_count"):
            return "mixtral"
        if self.architecture == "llama":
            return "mistral" if "mistral" in named.lower() else "llama"
        return _MODEL_TYPES.get(self.architecture, self.architecture)

    def vocabulary(self) -> int:
        embedding = self.container.tensors.get("token_embd.weight")
        if embedding is None:
            raise JQ4Error(
                f"{self.container.file}: tensor 'token_embd.weight' is missing, wanted in a model of architecture "
                f"{self.architecture!r}. Take the whole model's file, with all of its shards."
            )
        return embedding.shape[0]

    def error(self, name: str, found: Any, wanted: str) -> JQ4Error:
        return JQ4Error(
            f"{self.container.file}: {self.architecture}.{name} is {found!r}, wanted {wanted}. "
            "The file is damaged or of another kind of model; download it again."
        )


def _family(read: _Values, config: Mapping[str, Any]) -> dict[str, Any]:
    """What one family has and others have not."""
    architecture = read.architecture
    if architecture == "llama":
        settings: dict[str, Any] = {"hidden_act": "silu", "attention_bias": read.has("attn_q.bias")}
        settings["mlp_bias"] = read.has("ffn_up.bias")
        window = read.whole("attention.sliding_window") or None
        return settings | ({"sliding_window": window} if read.model_type() == "mistral" else {})
    if architecture.startswith("qwen"):
        return {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False}
    if architecture == "phi3":
        window = read.whole("attention.sliding_window") or None
        return {"hidden_act": "silu", "sliding_window": window, "attention_bias": False}
    if architecture == "gpt-oss":
        types = sliding_or_full(architecture, config["num_hidden_layers"])
        return {"sliding_window": read.size("attention.sliding_window", 128), "layer_types": types}
    return _gemma(read, config)


def _experts(read: _Values) -> dict[str, Any]:
    """The settings of experts, where a model has any; widths that are not told are those of the first layer."""
    count = read.whole("expert_count")
    if not count and read.architecture not in ("qwen2moe", "qwen3moe", "gpt-oss"):
        return {}
    count, used = read.size("expert_count"), read.size("expert_used_count")
    width = read.size("expert_feed_forward_length", read.width("ffn_down_exps.weight"))
    shared = read.size("expert_shared_feed_forward_length", read.width("ffn_down_shexp.weight"))
    return expert_config(read.architecture, count, used, width, shared)


def _gemma(read: _Values, config: Mapping[str, Any]) -> dict[str, Any]:
    largest = config["num_hidden_layers"] == LARGEST_GEMMA[read.architecture]
    scale = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    settings: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scale,
        "sliding_window": read.size("attention.sliding_window", 4096),
        "layer_types": sliding_or_full(read.architecture, config["num_hidden_layers"]),
        "attention_bias": False,
    }
    if read.architecture == "gemma2":
        for key, usual in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
            cap = read.number(key, usual)
            settings[key] = cap if cap < NO_CAP else None
    else:
        settings |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        settings["rope_local_base_freq"] = read.number("rope.freq_base_swa", 10_000.0)
        settings["sliding_window_pattern"] = _PATTERNS[read.architecture]
    return settings


def sliding_or_full(architecture: str, layers: int) -> list[str]:
    """layer_types of a Gemma or gpt-oss: all but every second (sixth) layer look back over a window."""
    pattern = _PATTERNS[architecture]
    return ["sliding_attention" if one % pattern else "full_attention" for one in range(1, layers + 1)]


def _rope(read: _Values, config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_scaling and what goes with it."""
    settings: dict[str, Any] = {}
    turned = read.size("rope.dimension_count", config["head_dim"])
    if turned != config["head_dim"]:
        settings["partial_rotary_factor"] = turned / config["head_dim"]
    tensors = read.container.tensors
    trained = read.whole("rope.scaling.original_context_length")
    kind = str(read.get("rope.scaling.type", "none"))
    if LONG in tensors and SHORT in tensors:
        settings["rope_scaling"] = {"type": "longrope"} | {
            key: _decimal(_factors(tensors[name])) for key, name in (("long_factor", LONG), ("short_factor", SHORT))
        }
        settings["original_max_position_embeddings"] = trained or config["max_position_embeddings"]
    elif FREQUENCIES in tensors:
        settings["rope_scaling"] = _stretched(_factors(tensors[FREQUENCIES]), config, turned)
    elif kind in ("linear", "yarn"):
        settings["rope_scaling"] = {"rope_type": kind, "factor": read.number("rope.scaling.factor", 1.0)}
        if trained:
            settings["rope_scaling"]["original_max_position_embeddings"] = trained
        if read.architecture == "gpt-oss":
            settings["rope_scaling"] |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    elif kind != "none":
        raise read.error("rope.scaling.type", kind, "none, linear, yarn, or longrope with its factors")
    return settings


def _factors(tensor: GGUFTensor) -> np.ndarray:
    if tensor.kind.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > 2**16:
        raise JQ4Error(
            f"{tensor.file}: tensor {tensor.name!r} is {tensor.kind.name}{list(tensor.shape)}, wanted a row of F32, "
            "a factor for each rotated pair. Download the file again."
        )
    factors = tensor.blocks().reshape(-1).view(np.float32)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise JQ4Error(
            f"{tensor.file}: tensor {tensor.name!r} holds {float(factors.min())} to {float(factors.max())}, wanted "
            "factors above 0. The file is damaged; download it again."
        )
    return factors.astype(np.float64)


def _decimal(factors: np.ndarray) -> list[float]:
    """As they were before they were rounded to float32."""
    return [float(f"{one:.7g}") for one in factors]


def _stretched(factors: np.ndarray, config: Mapping[str, Any], turned: int) -> dict[str, Any]:
    """Llama 3's settings, where its formula gives these factors; else the factors themselves, for any length."""
    for trained in (8192, 4096, 2048, 16384, 32768) if len(factors) == -(-turned // 2) else ():
        settings = {
            "rope_type": "llama3",
            "factor": float(f"{factors.max():.7g}"),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": trained,
        }
        formula = llama3_factors(settings, config["rope_theta"], turned)
        if np.allclose(formula, factors, rtol=1e-5, atol=0):
            return settings
    table = _decimal(factors)
    return {"rope_type": "longrope", "long_factor": table, "short_factor": table, "attention_factor": 1.0}


def llama3_factors(settings: Mapping[str, Any], theta: float, turned: int) -> np.ndarray:
    """f64[turned / 2]: what Llama 3's stretching divides each pair's frequency by."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, turned, 2) / turned)
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    blend = (settings["original_max_position_embeddings"] / wavelength - low) / (high - low)
    blend = np.clip(blend, 0, 1)  # 0 for the slow pairs, 1 for the fast ones
    return 1 / ((1 - blend) / settings["factor"] + blend)


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    found = {key: metadata.get(f"tokenizer.ggml.{name}") for key, name in names.items()}
    return {key: value for key, value in found.items() if type(value) is int}


def _dtype(tensors: Any) -> str:
    """What most of the dense elements of matrices are kept in."""
    sizes: dict[str, int] = {}
    for one in tensors:
        if one.kind.dtype is not None and len(one.shape) > 1:
            sizes[one.kind.dtype.name] = sizes.get(one.kind.dtype.name, 0) + math.prod(one.shape)
    return max(sizes, key=lambda name: sizes[name], default="float32")
