"""MLX's affine quantization, in MLX's own files and in transformers' (quant_method "metal").

    P.weight                u32[*B, N, K b / 32], one little-endian bit string a row: our bytes
    P.scales, P.biases      [*B, N, K / g]; transformers says P.qbiases        w = code * scale + bias

Linear layers, tables and experts alike. config.json says bits and group size, for all ("quantization", and again as
"quantization_config") and for single modules ({"model.embed_tokens": {"bits": 8, "group_size": 64}, ...}); shapes tell
their product, which must agree. Our form has integer zero points of zero, so that levels are codes, and the bias as
offset.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign import bit_strings
from jq4.checkpoint.foreign.partners import FLOATS, partner, read_finite, refusal
from jq4.checkpoint.foreign.weights import LazyWeight, abstract_qarray
from jq4.checkpoint.safetensors_files import DTYPES, StoredTensor
from jq4.qarray import QArray

NAME = "mlx"

_BITS = (2, 3, 4, 5, 6, 8)
_OTHER = "Dequantize it with mlx-lm and save it dense."


def claims(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> bool:
    return any(_is_packed(tensors, name) for name in tensors)


def _is_packed(tensors: Mapping[str, StoredTensor], name: str) -> bool:
    prefix = name.removesuffix(".scales")
    return prefix != name and f"{prefix}.weight" in tensors and tensors[f"{prefix}.weight"].dtype == "U32"


def read(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[LazyWeight], list[str]]:
    own = config.get("quantization")
    settings = quantization or (own if isinstance(own, dict) else {})
    prefixes = [name.removesuffix(".scales") for name in tensors if _is_packed(tensors, name)]
    return [_weight(tensors, prefix, settings) for prefix in prefixes], []


def _weight(tensors: Mapping[str, StoredTensor], prefix: str, settings: Mapping[str, Any]) -> LazyWeight:
    codes, scale = tensors[f"{prefix}.weight"], tensors[f"{prefix}.scales"]
    spelling = "qbiases" if f"{prefix}.qbiases" in tensors else "biases"
    own = settings.get(prefix)
    said = {**settings, **(own if isinstance(own, dict) else {})}
    if said.get("mode", "affine") != "affine":
        raise refusal(codes, f"has the mode {said['mode']!r}", "affine", _OTHER)
    bias = partner(tensors, codes, f"{prefix}.{spelling}", FLOATS, scale.shape)
    partner(tensors, codes, scale.name, FLOATS, (*codes.shape[:-1], None))
    bits, group = said.get("bits"), said.get("group_size")
    words, groups = codes.shape[-1], scale.shape[-1]
    if type(bits) is not int or type(group) is not int or bits not in _BITS or group < 1:
        raise refusal(
            codes, f"has bits {bits!r} and group_size {group!r} in config.json", f"one of {_BITS} and a number above 0"
        )
    if len(codes.shape) < 2 or not groups or words * 32 != bits * group * groups:
        raise refusal(
            codes, f"has shape {list(codes.shape)} with scales {list(scale.shape)}",
            f"rows of {bits} * {group} / 32 words a scale, as config.json has bits and group_size",
        )  # fmt: skip
    shape = (*codes.shape[:-1], group * groups)
    abstract = abstract_qarray(
        shape, format=f"int{bits}", group_size=group, dtype=DTYPES[scale.dtype],
        parts={
            "scale": (scale.shape, DTYPES[scale.dtype]),
            "zero_point": ((*(1 for _ in shape[:-1]), groups), np.uint8),
            "offset": (bias.shape, DTYPES[bias.dtype]),
        },
    )  # fmt: skip
    read_it = functools.partial(_read, abstract, codes, scale, bias)
    return LazyWeight(f"{prefix}.weight", abstract, read_it, (codes.name, scale.name, bias.name))


def _read(abstract: QArray, codes: StoredTensor, scale: StoredTensor, bias: StoredTensor) -> QArray:
    return dataclasses.replace(
        abstract,
        codes=bit_strings.trimmed(bit_strings.bytes_of_words(codes.read()), abstract.bits, abstract.shape[-1]),
        scale=read_finite(scale),
        zero_point=np.zeros(abstract.zero_point.shape, np.uint8),
        offset=read_finite(bias),
    )
