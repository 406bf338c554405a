"""Where each leaf of the params tree lies in a Hugging Face checkpoint: one table, used for reading and for writing.

torch stores a linear layer as [out, in], one tensor a layer; the decoder's leaves are kernels [L, in, out]. Phi-3 keeps
queries, keys and values in one tensor, and gate and up in another: their leaves are rows of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from models.config import DecoderConfig

Path = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """A leaf's tensor: its name (with {layer}, after the body's prefix), whole shape, and the leaf's rows in it."""

    name: str
    stored: tuple[int, ...]
    rows: tuple[int, int]
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        """Whether there is one such tensor for every layer."""
        return "{layer}" in self.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape, without the axis of layers."""
        shape = (self.rows[1] - self.rows[0], *self.stored[1:])
        return shape[::-1] if self.transposed else shape


def places(config: DecoderConfig) -> dict[Path, Place]:
    """Every leaf of the decoder's params and its place. The head's name has no prefix: it lies beside the body."""
    table = dict(_layer_places(config))
    table["embed", "embedding"] = _whole("embed_tokens.weight", config.vocab_size, config.hidden_size)
    table["final_norm", "scale"] = _whole("norm.weight", config.hidden_size)
    if not config.tied_embeddings:
        head = (config.vocab_size, config.hidden_size)
        table["lm_head", "kernel"] = Place("lm_head.weight", head, (0, head[0]), transposed=True)
    return table


def _layer_places(config: DecoderConfig) -> Iterator[tuple[Path, Place]]:
    yield from _norms(config)
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    if config.family == "phi3":
        yield from _linear("attention", "self_attn.qkv_proj", parts, width, False)
        yield from _linear("mlp", "mlp.gate_up_proj", {"gate_proj": inner, "up_proj": inner}, width, False)
    else:
        for name, features in parts.items():
            yield from _linear("attention", f"self_attn.{name}", {name: features}, width, config.qkv_bias)
        for name in ("gate_proj", "up_proj"):
            yield from _linear("mlp", f"mlp.{name}", {name: inner}, width, config.mlp_bias)
    yield from _linear("attention", "self_attn.o_proj", {"o_proj": width}, queries, config.output_bias)
    yield from _linear("mlp", "mlp.down_proj", {"down_proj": width}, inner, config.mlp_bias)


def _linear(
    group: str, stored_name: str, parts: dict[str, int], inputs: int, bias: bool
) -> Iterator[tuple[Path, Place]]:
    """The leaves that share one linear layer of the file, in the order of its rows."""
    outputs, start = sum(parts.values()), 0
    for name, features in parts.items():
        rows = (start, start + features)
        prefix = f"layers.{{layer}}.{stored_name}"
        yield ("layers", group, name, "kernel"), Place(f"{prefix}.weight", (outputs, inputs), rows, transposed=True)
        if bias:
            yield ("layers", group, name, "bias"), Place(f"{prefix}.bias", (outputs,), rows)
        start += features


def _norms(config: DecoderConfig) -> Iterator[tuple[Path, Place]]:
    norms = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
    if config.gemma:
        norms["pre_feedforward_norm"] = "pre_feedforward_layernorm"
        norms["post_feedforward_norm"] = "post_feedforward_layernorm"
    for name, stored_name in norms.items():
        yield ("layers", name, "scale"), _whole(f"layers.{{layer}}.{stored_name}.weight", config.hidden_size)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            stored = _whole(f"layers.{{layer}}.self_attn.{name}.weight", config.head_dim)
            yield ("layers", "attention", name, "scale"), stored


def _whole(name: str, *shape: int) -> Place:
    return Place(name, shape, (0, shape[0]))
