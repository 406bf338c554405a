"""Google's own packed Gemma checkpoints (quant_method "gemma"): 2, 4 and 8 bits, one scale a row.

    P.weight                u8[N, K / 2] for 4 bits, u8[N, K / 4] for 2, the lower index in the lower bits, unsigned;
                            i8[N, K] for 8
    P.weight_scale          f32[N, 1]          w = (code - 2**(bits - 1)) * scale
    P.input_activation_scale, P.output_activation_scale   f32 scalars
    P.embedding_quantized, P.embedding_scale   a table [V, D] likewise, held as P.weight

2 and 4 bits are both bytes: config.json says which, by module. A row of odd length cannot be told from a longer one.

An activation scale s that is not 0 has the layer round its inputs (or outputs) to clip(round(x / s), -128, 127) * s.
Ours clip at -127 and do not round outputs, so these scales are not taken: weights are the checkpoint's own, and a note
says so.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.file_patterns import matches
from jq4.checkpoint.foreign.model_dtype import model_dtype
from jq4.checkpoint.foreign.partners import FLOATS, checked, partner, read_finite, read_scalar, refusal
from jq4.checkpoint.foreign.weights import LazyWeight, abstract_qarray
from jq4.checkpoint.safetensors_files import StoredTensor
from jq4.errors import JQ4Error
from jq4.qarray import QArray

NAME = "gemma"

_SCALE, _TABLE = ".weight_scale", ".embedding_quantized"
_ROUNDED = (".input_activation_scale", ".output_activation_scale")


def claims(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> bool:
    return quantization.get("quant_method") == "gemma" or any(name.endswith((_TABLE, *_ROUNDED)) for name in tensors)


def read(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[LazyWeight], list[str]]:
    overrides = _overrides(quantization)
    dtype = model_dtype(config)
    weights = []
    for prefix, codes, scale in _pairs(tensors):
        bits = _bits(codes, prefix, quantization, overrides)
        weights.append(_weight(tensors, prefix, codes, scale, bits, dtype))
    return weights, _notes(tensors)


def _pairs(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor, StoredTensor]]:
    """Modules with their codes and scales."""
    for name, tensor in tensors.items():
        if name.endswith(_SCALE):
            prefix = name.removesuffix(_SCALE)
            yield prefix, partner(tensors, tensor, f"{prefix}.weight", ("U8", "I8"), (None, None)), tensor
        elif name.endswith(_TABLE):
            prefix = name.removesuffix(_TABLE)
            checked(tensor, ("U8", "I8"), (None, None))
            yield prefix, tensor, partner(tensors, tensor, f"{prefix}.embedding_scale", FLOATS)


def _notes(tensors: Mapping[str, StoredTensor]) -> list[str]:
    scales = [checked(tensor, FLOATS) for name, tensor in tensors.items() if name.endswith(_ROUNDED)]
    rounded = [tensor.name for tensor in scales if read_scalar(tensor) != 0]
    if not rounded:
        return []
    return [
        f"{len(rounded)} scales of activations ({rounded[0]}, ...): Gemma rounds these layers' inputs and outputs to 8 "
        "bits, which is not applied"
    ]


def _overrides(quantization: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found = quantization.get("module_quant_configs") or {}
    if not isinstance(found, dict) or not all(isinstance(one, dict) for one in found.values()):
        raise JQ4Error("config.json: module_quant_configs is no object of objects. Download config.json again.")
    return list(found.items())


def _bits(codes: StoredTensor, module: str, quantization: Mapping[str, Any], overrides: list[tuple[str, Any]]) -> int:
    where = "config.json: module_quant_configs"
    said = next((one for pattern, one in overrides if matches(pattern, module, where, anywhere=True)), {})
    bits = said.get("num_bits", quantization.get("num_bits", 4))
    if codes.dtype == "I8":
        return 8
    if bits not in (2, 4):
        raise refusal(codes, f"is {codes.dtype} and config.json says {bits!r} bits", "I8 for 8 bits, U8 for 2 or 4")
    return bits


def _weight(
    tensors: Mapping[str, StoredTensor], prefix: str, codes: StoredTensor, scale: StoredTensor, bits: int, dtype: Any
) -> LazyWeight:
    rows, width = codes.shape[0], codes.shape[-1] * 8 // bits
    checked(scale, FLOATS, (rows, None))
    groups = max(scale.shape[1], 1)
    if not width or not scale.shape[1] or width % groups:
        raise refusal(scale, f"has shape {list(scale.shape)}", f"groups that divide {width}, the weight's columns")
    abstract = abstract_qarray(
        (rows, width), format=f"int{bits}", group_size=width // groups, dtype=dtype,
        parts={"scale": ((rows, groups), np.float32)},
    )  # fmt: skip
    read_it = functools.partial(_read, abstract, codes, scale)
    rounded = [prefix + one for one in _ROUNDED if prefix + one in tensors]
    return LazyWeight(f"{prefix}.weight", abstract, read_it, (codes.name, scale.name, *rounded))


def _read(abstract: QArray, codes: StoredTensor, scale: StoredTensor) -> QArray:
    held = codes.read().view(np.uint8)
    held = held ^ np.uint8(128) if abstract.bits == 8 else held
    return dataclasses.replace(abstract, codes=held, scale=read_finite(scale).astype(np.float32))
