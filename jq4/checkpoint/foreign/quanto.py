"""quanto (optimum-quanto): qint2, qint4 and qint8 weights.

    P.weight._data._data    u8[ceil(R / 2), g] for 4 bits, u8[ceil(R / 4), g] for 2: W[N, K] as [R, g], R = N K / g;
                            row r is field r // rows of byte row r % rows, counted from the LOW bits
    P.weight._scale, P.weight._shift   [R, 1]      w = code * scale - shift, the shift a float
    P.weight._data          i8[N, K] for 8 bits, with P.weight._scale [N, 1]; w = code * scale
    P.input_scale, P.output_scale      scalars, 1 where activations are not rounded

A file does not say N and K of a weight in groups. The bias has N; else config.json tells K of the layers that it knows.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.partners import FLOATS, checked, partner, read_finite, read_scalar, refusal
from jq4.checkpoint.foreign.row_blocks import packed_by_rows
from jq4.checkpoint.foreign.weights import LazyWeight, abstract_qarray
from jq4.checkpoint.safetensors_files import DTYPES, StoredTensor
from jq4.qarray import QArray

NAME = "quanto"

_GROUPED, _PLAIN, _ROUNDED = ".weight._data._data", ".weight._data", (".input_scale", ".output_scale")
# layers whose inputs have the length that config.json gives by this name
_WIDTHS = {
    "hidden_size": ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "lm_head"),
    "intermediate_size": ("down_proj",),
}


def claims(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> bool:
    return any(name.endswith((_GROUPED, _PLAIN)) for name in tensors)


def read(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[LazyWeight], list[str]]:
    weights = [_grouped(tensors, tensor, config) for name, tensor in tensors.items() if name.endswith(_GROUPED)]
    weights += [_bytes(tensors, tensor) for name, tensor in tensors.items() if name.endswith(_PLAIN)]
    taken = {name for weight in weights for name in weight.tensors}
    scales = [tensors[name] for name in taken if name.endswith(_ROUNDED)]
    rounded = sorted(one.name for one in scales if read_scalar(checked(one, FLOATS)) != 1)
    if not rounded:
        return weights, []
    return weights, [f"{len(rounded)} scales of activations ({rounded[0]}, ...): their rounding is not applied"]


def _named(tensors: Mapping[str, StoredTensor], prefix: str, *parts: StoredTensor) -> tuple[str, ...]:
    return (*(one.name for one in parts), *(prefix + one for one in _ROUNDED if prefix + one in tensors))


def _grouped(tensors: Mapping[str, StoredTensor], codes: StoredTensor, config: Mapping[str, Any]) -> LazyWeight:
    prefix = codes.name.removesuffix(_GROUPED)
    checked(codes, ("U8",), (None, None))
    scale = partner(tensors, codes, f"{prefix}.weight._scale", FLOATS, (None, 1))
    shift = partner(tensors, codes, f"{prefix}.weight._shift", FLOATS, scale.shape)
    rows, group = scale.shape[0], codes.shape[1]
    bits = next((bits for bits in (4, 2) if codes.shape[0] == -(-rows * bits // 8)), None)
    if bits is None or not rows or not group:
        raise refusal(codes, f"has shape {list(codes.shape)}", f"rows of 2 or 4 codes a byte of {rows} groups")
    width = _width(tensors, codes, prefix, rows * group, config)
    if width % group or rows * group % width:
        raise refusal(codes, f"has groups of {group} and {rows * group} weights", f"whole rows of {width} columns")
    shape = (rows * group // width, width)
    groups = (shape[0], width // group)
    abstract = abstract_qarray(
        shape, format=f"int{bits}", group_size=group, dtype=DTYPES[scale.dtype],
        parts={
            "scale": (groups, DTYPES[scale.dtype]),
            "zero_point": ((1, groups[1]), np.uint8),
            "offset": (groups, DTYPES[shift.dtype]),
        },
    )  # fmt: skip
    read_it = functools.partial(_read_grouped, abstract, codes, scale, shift)
    return LazyWeight(f"{prefix}.weight", abstract, read_it, _named(tensors, prefix, codes, scale, shift))


def _read_grouped(abstract: QArray, codes: StoredTensor, scale: StoredTensor, shift: StoredTensor) -> QArray:
    held, bits = codes.read(), abstract.bits
    groups = abstract.num_groups

    def of_rows(rows: slice) -> np.ndarray:
        flat = np.arange(rows.start * groups, rows.stop * groups)
        field, row = np.divmod(flat, held.shape[0])
        unpacked = held[row] >> (bits * field).astype(np.uint8)[:, None] & np.uint8(2**bits - 1)
        return unpacked.reshape(-1, abstract.shape[-1])

    return dataclasses.replace(
        abstract,
        codes=packed_by_rows(abstract.shape, bits, of_rows),
        scale=read_finite(scale).reshape(abstract.scale.shape),
        zero_point=np.zeros(abstract.zero_point.shape, np.uint8),
        offset=-read_finite(shift).reshape(abstract.offset.shape),
    )


def _width(
    tensors: Mapping[str, StoredTensor], codes: StoredTensor, prefix: str, size: int, config: Mapping[str, Any]
) -> int:
    """K of the weight [N, K], by the layer's bias or by its name."""
    bias = tensors.get(f"{prefix}.bias")
    if bias is not None and len(bias.shape) == 1 and bias.shape[0] and size % bias.shape[0] == 0:
        return size // bias.shape[0]
    inner = config.get("text_config")
    settings = {**config, **(inner if isinstance(inner, dict) else {})}
    layer = prefix.rpartition(".")[2]
    width = next((settings.get(key) for key, layers in _WIDTHS.items() if layer in layers), None)
    if layer == "o_proj":
        heads, head = settings.get("num_attention_heads"), settings.get("head_dim")
        width = heads * head if type(heads) is int and type(head) is int else settings.get("hidden_size")
    if type(width) is not int or width < 1:
        raise refusal(
            codes, f"holds {size} weights whose shape is told by neither the file nor config.json",
            "a bias, or a layer of a Llama-like model with its config.json",
            "Load it with quanto, dequantize it and save it dense.",
        )  # fmt: skip
    return width


def _bytes(tensors: Mapping[str, StoredTensor], codes: StoredTensor) -> LazyWeight:
    prefix = codes.name.removesuffix(_PLAIN)
    if codes.dtype != "I8":
        raise refusal(codes, f"has dtype {codes.dtype}", "I8", "Load it with quanto, dequantize it and save it dense.")
    checked(codes, ("I8",), (None, None))
    scale = partner(tensors, codes, f"{prefix}.weight._scale", FLOATS)
    rows, width = codes.shape
    if scale.shape != (rows, 1) and math.prod(scale.shape) != 1:
        raise refusal(scale, f"has shape {list(scale.shape)}", f"[{rows}, 1]")
    groups = (scale.shape[0], 1) if scale.shape == (rows, 1) else (1, 1)
    abstract = abstract_qarray(
        (rows, width), format="int8", group_size=width, dtype=DTYPES[scale.dtype],
        parts={"scale": (groups, DTYPES[scale.dtype])},
    )  # fmt: skip

    def read_it() -> QArray:
        held = codes.read().view(np.uint8) ^ np.uint8(128)
        return dataclasses.replace(abstract, codes=held, scale=read_finite(scale).reshape(groups))

    return LazyWeight(f"{prefix}.weight", abstract, read_it, _named(tensors, prefix, codes, scale))
