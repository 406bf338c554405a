"""Checkpoints of random packed weights, as a reader of foreign files gives them: QArrays [N, K] of numpy arrays."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jq4.checkpoint.foreign import Checkpoint, LazyWeight
from jq4.checkpoint.foreign.bit_strings import pack, unpack
from jq4.formats import get_format
from jq4.host_moves import described
from jq4.qarray import QArray, is_qarray
from models.config import DecoderConfig
from models.tensor_names import places
from pallas_kernels.packing import padding_of

RAW: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "torch_dtype": "float16",
}
BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a random weight is packed; `scale` is a dtype, or "packed" for scales in 8 bits."""

    format: str = "int4"
    group: int = 16
    zero: bool = False
    offset: bool = False
    permuted: bool = False
    scale: Any = np.float16


def config_of(family: str, **changes: Any) -> DecoderConfig:
    return DecoderConfig.from_hf({"model_type": family, **RAW, **changes})


def random_qarray(random: np.random.Generator, shape: tuple[int, int], kind: Kind, of_inputs: int = 0) -> QArray:
    """[N, K] of about unit rows; `of_inputs` seeds the permutation, which weights of the same inputs share."""
    bits, (n, k) = get_format(kind.format).bits, shape
    groups = -(-k // kind.group)
    spread = 1.0 if not get_format(kind.format).is_integer else 2.0 ** (bits - 2)
    scale = random.uniform(0.5, 1.5, (n, groups)) / spread / np.sqrt(k)
    parts: dict[str, Any] = {"scale": _packed_scales(random, n, groups) if kind.scale == "packed" else scale}
    if kind.scale != "packed":
        parts["scale"] = scale.astype(kind.scale)
    if kind.zero:
        parts["zero_point"] = random.integers(0, 2**bits, (n, groups), np.uint8)
    if kind.offset:
        parts["offset"] = random.normal(0, 0.05, (n, groups)).astype(np.float16)
    if kind.permuted:
        parts["permutation"] = np.random.default_rng(of_inputs).permutation(k).astype(np.int32)
    codes = pack(random.integers(0, 2**bits, shape, np.uint8), bits)
    statics: dict[str, Any] = {"format": kind.format, "group_size": kind.group, "dtype": "float16"}
    return QArray(codes=codes, axis=-1, padding=padding_of(k, bits), **statics, **parts)


def _packed_scales(random: np.random.Generator, n: int, groups: int) -> QArray:
    """Scales in blocks of a few rows, as jq4.double_quant has them where there are few groups."""
    rows = 8
    return QArray(
        codes=random.integers(0, 256, (n, groups), np.uint8),
        scale=random.uniform(0.002, 0.006, (-(-n // rows), 1)).astype(np.float32),
        offset=np.full((1, 1), 0.06, np.float32),
        format="dynamic8",
        group_size=rows,
        axis=-2,
    )


def random_checkpoint(config: DecoderConfig, choose: Callable[[str], Kind | None], seed: int = 0) -> Checkpoint:
    """Weights of every name; `choose` says how one is packed, by its name: None leaves it dense."""
    values: dict[str, Any] = {}
    random = np.random.default_rng(seed)
    for path, place in places(config).items():
        for layer in range(config.num_layers) if place.stacked else [None]:
            name = place.name if path[0] == "lm_head" else "model." + place.name.format(layer=layer)
            kind = choose(name) if len(place.stored) == 2 else None
            if name in values:
                continue
            if kind is not None:
                values[name] = random_qarray(random, place.stored, kind, place.stored[1])  # pyright: ignore[reportArgumentType]
            else:
                level = 1.0 if "norm" in name and not config.gemma else 0.0
                values[name] = random.normal(level, 0.2, place.stored).astype(np.float32)
    return checkpoint_of(values, config)


def checkpoint_of(values: Mapping[str, Any], config: DecoderConfig) -> Checkpoint:
    weights = {name: LazyWeight(name, described(value), lambda value=value: value) for name, value in values.items()}
    return Checkpoint("random", weights, config.to_hf())


def dense_of(checkpoint: Checkpoint) -> Checkpoint:
    """The same weights dequantized, in float32."""

    def dense(weight: LazyWeight) -> Any:
        value = weight.read()
        return dequantized(value) if is_qarray(value) else value

    values = {name: dense(weight) for name, weight in checkpoint.weights.items()}
    return dataclasses.replace(checkpoint_of(values, config_from(checkpoint)), format="safetensors")


def dequantized(q: QArray) -> np.ndarray:
    """The dense weight f32[N, K] by the module text of jq4.qarray, in numpy."""

    def spread(part: np.ndarray) -> np.ndarray:
        return np.repeat(part, q.group_size, -1)[..., :k] if q.axis == -1 else np.repeat(part, q.group_size, -2)[:n]

    n, k = q.shape
    form = get_format(q.format)
    codes = np.asarray(q.codes) if q.axis == -2 else unpack(np.asarray(q.codes), q.bits, k)
    scale = dequantized(q.scale) if is_qarray(q.scale) else np.asarray(q.scale, np.float32)
    if q.zero_point is not None:
        levels = codes.astype(np.float32) - spread(q.zero_point)
    else:
        levels = (
            codes.astype(np.float32) - form.center if form.is_integer else np.asarray(form.levels, np.float32)[codes]
        )
    weight = levels * spread(scale)
    if q.offset is not None:
        weight += q.offset if q.offset.shape == (1, 1) else spread(np.asarray(q.offset, np.float32))
    if q.permutation is not None:
        weight = weight[:, np.argsort(q.permutation)]
    return weight


def config_from(checkpoint: Checkpoint) -> DecoderConfig:
    return DecoderConfig.from_hf(checkpoint.config or {})
