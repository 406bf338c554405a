"""Which matrices a transformer is made of, told from its config.json (or from safetensors headers) alone.

Enough is known to count bytes: every weight matrix [K, N] with how many copies of it there are and how many of those a
token goes through, what is never quantized (embedding, output head, router, norms, biases), and what a layer keeps of
each token in its KV cache:

    attention with Hkv heads     2 * Hkv * head_dim numbers a token and layer, of the last `window` tokens if it slides
    multi-head latent attention  kv_lora_rank + qk_rope_head_dim (DeepSeek-V2 2024): the latent, shared by all heads

The keys are Hugging Face's. The families listed in KNOWN are checked against transformers' own parameter counts in
tests/test_plan.py. Another model_type that has the same keys is read as if it were a Llama (or Mixtral) and called an
estimate; one that lacks them is an error.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jq4.errors import JQ4Error

# model_type -> what its class in transformers takes for granted and config.json may leave out
KNOWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"head_dim": 128, "qk_norm": True},
    "phi3": {},
    "gemma2": {
        "head_dim": 256,
        "tie_word_embeddings": True,
        "norms": 4,
        "sliding_window_pattern": 2,
        "sliding_window": 4096,
    },
    "gemma3_text": {
        "head_dim": 256,
        "tie_word_embeddings": True,
        "norms": 4,
        "sliding_window_pattern": 6,
        "qk_norm": True,
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
    },
    "mixtral": {},
    "qwen2_moe": {"qkv_bias": True, "shared_expert_gate": True},
    "qwen3_moe": {"qk_norm": True},
    "glm4_moe": {"qkv_bias_only": True, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "kimi_k2": {},
}
_SLIDING_EVERYWHERE = ("mistral", "mixtral", "phi3")


@dataclasses.dataclass(frozen=True)
class Matrix:
    """`copies` weight matrices [K = inputs, N = outputs]; a token is multiplied by `active` of them."""

    name: str
    copies: int
    inputs: int
    outputs: int
    active: float
    quantized: bool = True

    @property
    def size(self) -> int:
        return self.copies * self.inputs * self.outputs


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a model holds. `vectors` counts the elements of norms and biases.

    `cache` lists (layers, numbers kept of a token, window in tokens or None) for kinds of layers.
    """

    model_type: str
    matrices: tuple[Matrix, ...]
    vectors: int
    cache: tuple[tuple[int, int, int | None], ...]
    max_context: int | None
    notes: tuple[str, ...] = ()
    estimate: bool = False

    @property
    def parameters(self) -> int:
        return sum(matrix.size for matrix in self.matrices) + self.vectors

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets; a looked-up embedding counts whole, as is usual."""
        embedding = sum(m.size for m in self.matrices if m.name == "embedding")
        met = sum(m.active * m.inputs * m.outputs for m in self.matrices if m.name != "embedding")
        return round(embedding + met) + self.vectors

    def cache_elements(self, context: int) -> int:
        """Numbers that the KV cache of one sequence of `context` tokens holds."""
        return sum(layers * each * min(context, window or context) for layers, each, window in self.cache)


def from_config(raw: Mapping[str, Any], name: str = "config.json") -> Architecture:
    """Reads a parsed config.json. Raises JQ4Error, naming the file and key, where a size is missing or impossible."""
    text = raw.get("text_config") or raw
    text = {**{key: raw[key] for key in ("model_type", "tie_word_embeddings") if key in raw}, **text}
    model_type = str(text.get("model_type") or "unknown")
    config = _Config({**KNOWN.get(model_type, {}), **text}, name)
    layers, width = config.size("num_hidden_layers"), config.size("hidden_size")
    attention, attention_vectors, kept = _attention(config, width)
    moe_layers = _moe_layers(config, layers)
    matrices = [dataclasses.replace(m, copies=layers, active=layers) for m in attention]
    matrices += _mlp(config, layers - moe_layers, width) + _experts(config, moe_layers, width)
    vocabulary = config.size("vocab_size")
    tied = bool(config.get("tie_word_embeddings", False))
    matrices.append(Matrix("embedding", 1, vocabulary, width, 1 if tied else 0, quantized=False))
    if not tied:
        matrices.append(Matrix("lm_head", 1, width, vocabulary, 1, quantized=False))
    windows = _windows(config, model_type, layers)
    notes = []
    if model_type not in KNOWN:
        notes.append(f"model_type {model_type!r} is not one jq4 knows: read like a Llama, so this is an estimate")
    if text is not raw and "text_config" in raw:
        notes.append("only the text model is counted, not the towers for images or sound")
    if windows[1]:
        notes.append(
            f"{windows[1]} of {layers} layers look back {windows[0]} tokens and are counted so; `jq4 generate` "
            "itself keeps the whole context in every layer"
        )
    return Architecture(
        model_type,
        tuple(matrices),
        layers * (attention_vectors + int(config.get("norms", 2)) * width)
        + width
        + _expert_vectors(config, moe_layers),
        tuple(c for c in ((layers - windows[1], kept, None), (windows[1], kept, windows[0])) if c[0]),
        config.get("max_position_embeddings"),
        tuple(notes),
        estimate=model_type not in KNOWN,
    )


class _Config:
    """Values of a config with errors that name the file."""

    def __init__(self, values: Mapping[str, Any], name: str):
        self.values, self.name = values, name

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise JQ4Error(
                f"{self.name}: {key} is {value!r}, wanted a positive whole number; this is not the config.json of a "
                "decoder-only transformer that jq4 can plan for"
            )
        return value


def _attention(config: _Config, width: int) -> tuple[list[Matrix], int, int]:
    """The matrices of one layer, the elements of its vectors, and what its cache keeps of a token."""
    heads = config.size("num_attention_heads")
    if config.get("kv_lora_rank"):
        return _latent_attention(config, width, heads)
    kv_heads = config.size("num_key_value_heads", heads)
    head_dim = config.size("head_dim", width // heads)
    queries, keys = heads * head_dim, kv_heads * head_dim
    matrices = [Matrix("q_proj", 1, width, queries, 1), Matrix("k_proj", 1, width, keys, 1)]
    matrices += [Matrix("v_proj", 1, width, keys, 1), Matrix("o_proj", 1, queries, width, 1)]
    vectors = 2 * head_dim if config.get("qk_norm") or config.get("use_qk_norm") else 0
    has_bias = config.get("attention_bias", False)
    if config.get("qkv_bias") or has_bias:
        vectors += queries + 2 * keys
    if has_bias and not config.get("qkv_bias_only"):
        vectors += width
    return matrices, vectors, 2 * keys


def _latent_attention(config: _Config, width: int, heads: int) -> tuple[list[Matrix], int, int]:
    latent, rope = config.size("kv_lora_rank"), config.size("qk_rope_head_dim")
    plain, values = config.size("qk_nope_head_dim"), config.size("v_head_dim")
    queries = heads * (plain + rope)
    if config.get("q_lora_rank"):
        rank = config.size("q_lora_rank")
        matrices = [Matrix("q_a_proj", 1, width, rank, 1), Matrix("q_b_proj", 1, rank, queries, 1)]
    else:
        rank, matrices = 0, [Matrix("q_proj", 1, width, queries, 1)]
    matrices.append(Matrix("kv_a_proj", 1, width, latent + rope, 1))
    matrices.append(Matrix("kv_b_proj", 1, latent, heads * (plain + values), 1))
    matrices.append(Matrix("o_proj", 1, heads * values, width, 1))
    bias = rank + latent + rope + width if config.get("attention_bias") else 0
    return matrices, rank + latent + bias, latent + rope


def _num_experts(config: _Config) -> int:
    keys = ("n_routed_experts", "num_experts", "num_local_experts")
    return next((config.size(key) for key in keys if config.get(key)), 0)


def _moe_layers(config: _Config, layers: int) -> int:
    if not _num_experts(config):
        return 0
    first = int(config.get("first_k_dense_replace", 0))
    every = int(config.get("moe_layer_freq", 1))
    sparse_step = int(config.get("decoder_sparse_step", 1))
    dense_ones = set(config.get("mlp_only_layers", ()))
    return sum(
        layer >= first and layer % every == 0 and (layer + 1) % sparse_step == 0 and layer not in dense_ones
        for layer in range(layers)
    )


def _mlp(config: _Config, layers: int, width: int) -> list[Matrix]:
    return _gated("mlp", layers, layers, width, config.size("intermediate_size")) if layers else []


def _experts(config: _Config, layers: int, width: int) -> list[Matrix]:
    """Routed experts, the shared one, and the router, of all MoE layers."""
    if not layers:
        return []
    experts = _num_experts(config)
    each = config.size("moe_intermediate_size", config.get("intermediate_size"))
    matrices = _gated("experts", layers * experts, layers * config.size("num_experts_per_tok"), width, each)
    shared = config.get("shared_expert_intermediate_size") or int(config.get("n_shared_experts", 0)) * each
    if shared:
        matrices += _gated("shared_expert", layers, layers, width, shared)
    return [*matrices, Matrix("router", layers, width, experts, layers, quantized=False)]


def _expert_vectors(config: _Config, layers: int) -> int:
    return layers * config.size("hidden_size") if config.get("shared_expert_gate") else 0


def _gated(name: str, copies: int, active: int, width: int, inner: int) -> list[Matrix]:
    return [
        Matrix(f"{name}.gate_proj", copies, width, inner, active),
        Matrix(f"{name}.up_proj", copies, width, inner, active),
        Matrix(f"{name}.down_proj", copies, inner, width, active),
    ]


def _windows(config: _Config, model_type: str, layers: int) -> tuple[int | None, int]:
    """The window in tokens, and how many layers look back no further than that."""
    window = config.get("sliding_window")
    if not window or (model_type.startswith("qwen") and not config.get("use_sliding_window")):
        return None, 0
    kinds = config.get("layer_types")
    if kinds:
        return window, sum(kind == "sliding_attention" for kind in kinds)
    if config.get("sliding_window_pattern"):
        return window, layers - layers // int(config.get("sliding_window_pattern"))
    if model_type.startswith("qwen"):
        return window, max(0, layers - int(config.get("max_window_layers", layers)))
    return (window, layers) if model_type in _SLIDING_EVERYWHERE else (None, 0)
