"""What a decoder is built from, read from Hugging Face's config.json as transformers 4 and 5 write it.

The families differ in a dozen switches of one architecture; `DecoderConfig` has those switches, and nothing below
it knows a family's name except the table of tensor names. Values missing from a file are those that the family's class
in transformers takes for granted; a size that no class should guess is an error.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jq4.errors import JQ4Error
from models.families import ARCHITECTURES, DEFAULTS, WRAPPERS
from models.rope import ROPE_KINDS, RopeConfig

NO_WINDOW = 2**31 - 1  # a layer that sees all of the text before it
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
_MOST_LAYERS = 10_000  # beyond any model: what follows makes lists of this length before the weights are looked at
_LARGEST = 2**40  # of any size
_ROPE_FLOATS = (
    *("low_freq_factor", "high_freq_factor", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder, hashable. Sizes are in elements; `windows` has one length in tokens for every layer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    max_position_embeddings: int = 2048
    windows: tuple[int, ...] = ()  # empty: no layer has one
    local_rope: RopeConfig | None = None  # of the layers with a window, where it differs (Gemma 3)
    activation: str = "silu"
    norm_eps: float = 1e-6
    attention_scale: float | None = None  # of query·key; head_dim^-1/2 when None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False  # embeddings times sqrt(D), norms times (1 + scale), and a norm after each sublayer too
    family: str = "llama"
    dtype: str = "float32"  # what the checkpoint says its weights are
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    source: str = ""  # the config.json it came from

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "DecoderConfig":
        """Reads a parsed config.json. Raises JQ4Error for an unknown architecture, a missing or an impossible value."""
        try:
            return cls._from_hf(raw)
        except JQ4Error:
            raise
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:  # a value of another kind than ours
            raise JQ4Error(
                f"config.json: a value is not of the kind that its key wants ({error}). "
                "Take the config.json that belongs to the weights."
            ) from error

    @classmethod
    def _from_hf(cls, raw: Mapping[str, Any]) -> "DecoderConfig":
        family, text = _family_and_text(raw)
        read = _Reader(family, text)
        heads, width = read.size("num_attention_heads"), read.size("hidden_size")
        head_dim = read.size("head_dim") if read.get("head_dim") else width // heads
        kv_heads = read.size("num_key_value_heads") if read.get("num_key_value_heads") else heads
        if heads % kv_heads:
            raise read.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads = {heads}")
        layers, gemma = read.size("num_hidden_layers"), family.startswith("gemma")
        if layers > _MOST_LAYERS:
            raise read.error("num_hidden_layers", layers, f"at most {_MOST_LAYERS}")
        sliding = _sliding_layers(read, layers)
        rope, local_rope = _ropes(read, head_dim)
        window = read.size("sliding_window") if any(sliding) else None
        attention_bias = bool(read.get("attention_bias") or False)
        return cls(
            vocab_size=read.size("vocab_size"),
            hidden_size=width,
            intermediate_size=read.size("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            max_position_embeddings=read.size("max_position_embeddings"),
            windows=tuple(window if is_sliding else NO_WINDOW for is_sliding in sliding) if window else (),
            local_rope=local_rope,
            activation=_activation(read, gemma),
            norm_eps=float(read.get("rms_norm_eps")),
            attention_scale=float(read.get("query_pre_attn_scalar")) ** -0.5 if gemma else None,
            attention_softcap=_softcap(read.get("attn_logit_softcapping")) if family == "gemma2" else None,
            final_softcap=_softcap(read.get("final_logit_softcapping")) if gemma else None,
            tied_embeddings=bool(read.get("tie_word_embeddings") or False),
            qkv_bias=attention_bias or family == "qwen2",
            output_bias=attention_bias,
            mlp_bias=bool(read.get("mlp_bias") or False) and family == "llama",
            qk_norm=family in ("qwen3", "gemma3_text"),
            gemma=gemma,
            family=family,
            dtype=_stated_dtype(text, raw),
            bos_token_id=next(iter(_as_tuple(read.get("bos_token_id", raw.get("bos_token_id")))), None),
            eos_token_ids=_as_tuple(read.get("eos_token_id", raw.get("eos_token_id"))),
            source=json.dumps(raw, sort_keys=True),
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json this was read from, as it was."""
        if not self.source:
            raise JQ4Error(
                "this DecoderConfig was made by hand, so there is no config.json to write back. "
                "Make it with DecoderConfig.from_hf({...}) from the values that config.json should hold."
            )
        return json.loads(self.source)


class _Reader:
    """Reads a config's values with the family's defaults, and words the errors."""

    def __init__(self, family: str, values: Mapping[str, Any]):
        self.family, self.values = family, values

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        if value is None and key not in self.values:
            value = DEFAULTS[self.family].get(key, default)
        return value

    def size(self, key: str) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LARGEST:
            raise self.error(key, value, "a positive whole number")
        return value

    def error(self, key: str, found: Any, wanted: str) -> JQ4Error:
        return JQ4Error(
            f"config.json ({self.family}): {key} is {found!r}, wanted {wanted}. "
            "Take the config.json that belongs to the weights."
        )


def _family_and_text(raw: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The family, and the part of the file that describes the text model."""
    if not isinstance(raw, Mapping):
        raise JQ4Error(f"config.json holds {type(raw).__name__}, wanted an object with the model's settings.")
    named = raw.get("model_type") or next(
        (ARCHITECTURES[name] for name in raw.get("architectures") or () if name in ARCHITECTURES), None
    )
    text = raw
    if named in WRAPPERS:
        named, text = WRAPPERS[named], raw.get("text_config") or {}
    if named not in DEFAULTS:
        found = raw.get("model_type") or raw.get("architectures") or "nothing"
        raise JQ4Error(
            f"config.json: the architecture is {found!r}, which models/ does not know. "
            f"Supported model_type: {', '.join(sorted([*DEFAULTS, *WRAPPERS]))}. "
            "Use jq4.quantized on your own Flax implementation of it instead."
        )
    if text.get("use_bidirectional_attention"):
        raise JQ4Error("config.json: use_bidirectional_attention is true, wanted a causal decoder (false).")
    return str(named), text


def _sliding_layers(read: _Reader, layers: int) -> list[bool]:
    """Which layers look back over a window only."""
    if not read.get("sliding_window") or read.family == "llama":
        return [False] * layers
    if read.family in ("mistral", "phi3"):
        return [True] * layers
    if read.family.startswith("qwen") and not read.get("use_sliding_window"):
        return [False] * layers
    types = read.get("layer_types")
    if types is not None:
        if len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
            raise read.error("layer_types", types, f"{layers} of 'sliding_attention' or 'full_attention'")
        return [kind == "sliding_attention" for kind in types]
    if read.family.startswith("qwen"):
        return [layer >= read.get("max_window_layers") for layer in range(layers)]
    return [bool((layer + 1) % read.get("sliding_window_pattern")) for layer in range(layers)]


def _activation(read: _Reader, gemma: bool) -> str:
    key = "hidden_activation" if gemma else "hidden_act"
    found = read.get(key) or ("gelu_pytorch_tanh" if gemma else "silu")
    if found not in ACTIVATIONS:
        raise read.error(key, found, f"one of {', '.join(ACTIVATIONS)}")
    return found


def _ropes(read: _Reader, head_dim: int) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotary embedding of the layers that see all, and that of the sliding ones where it is another."""
    stated = read.get("rope_parameters") or {}
    scaling = read.get("rope_scaling") or {}
    theta = read.get("rope_theta", 10_000.0)
    if "full_attention" in stated or "sliding_attention" in stated:
        full = {**scaling, **(stated.get("full_attention") or {})}
        local = stated.get("sliding_attention") or {}
    else:
        full = {**stated, **scaling}
        local = {}
    rope = _rope(read, {"rope_theta": theta, **full}, head_dim)
    if read.family == "gemma3_text":
        local = {"rope_theta": read.get("rope_local_base_freq"), **local}
    return rope, _rope(read, {"rope_theta": theta, **local}, head_dim) if local else None


def _rope(read: _Reader, values: Mapping[str, Any], head_dim: int) -> RopeConfig:
    kind = values.get("rope_type") or values.get("type") or "default"
    if read.family == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # the names that Phi-3's first files used
    if kind not in ROPE_KINDS:
        raise read.error("rope_type", kind, f"one of {', '.join(ROPE_KINDS)}")
    longest = read.size("max_position_embeddings")
    trained = read.get("original_max_position_embeddings") or values.get("original_max_position_embeddings") or longest
    factor = values.get("factor")
    if factor is None and kind in ("linear", "dynamic", "llama3"):
        raise read.error("rope factor", None, f"a number, as rope_type {kind!r} stretches by it")
    if factor is not None and not float(factor) > 0:
        raise read.error("rope factor", factor, "a number above 0")
    rope = RopeConfig(
        theta=float(values["rope_theta"]),
        head_dim=head_dim,
        kind=kind,
        rotary_fraction=float(values.get("partial_rotary_factor") or read.get("partial_rotary_factor") or 1.0),
        max_position_embeddings=longest,
        original_max_position_embeddings=int(trained),
        factor=float(factor) if factor is not None else longest / trained,
        truncate=bool(values.get("truncate", True)),
        short_factor=tuple(map(float, values.get("short_factor") or ())),
        long_factor=tuple(map(float, values.get("long_factor") or ())),
        **{key: float(values[key]) for key in _ROPE_FLOATS if values.get(key) is not None},
    )
    pairs = (rope.rotary_dim + 1) // 2
    for key in ("short_factor", "long_factor") if kind == "longrope" else ():
        if len(getattr(rope, key)) != pairs:
            raise read.error(key, f"{len(getattr(rope, key))} numbers", f"{pairs}, one for each rotated pair")
    return rope


def _stated_dtype(*holders: Mapping[str, Any]) -> str:
    stated = (holder.get(key) for holder in holders for key in ("dtype", "torch_dtype"))
    return str(next((name for name in stated if name), "float32"))


def _softcap(value: Any) -> float | None:
    return None if value is None else float(value)


def _as_tuple(ids: Any) -> tuple[int, ...]:
    if ids is None:
        return ()
    return tuple(int(one) for one in ids) if isinstance(ids, list | tuple) else (int(ids),)
