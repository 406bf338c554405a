"""Writes dense safetensors: packed weights dequantized a few rows at a time, dense ones as they are or cast.

Rows are dequantized in float32 by the formula of jq4.qarray and rounded once to the dtype that is written: the file's
own dtype of the weight, or what is asked for. Float32 holds what every integer format and codebook dequantizes to; of
a narrower dtype the table says that it rounds.

options: "dtype": a name of safetensors' or numpy's ("BF16", "bfloat16"), or None for each weight's own.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jq4.checkpoint.foreign.host_dequantize import host_dequantize
from jq4.checkpoint.foreign.weights import LazyWeight
from jq4.checkpoint.foreign.writing import Planned, as_it_is, flat_pieces
from jq4.checkpoint.safetensors_files import DTYPES
from jq4.errors import JQ4Error
from jq4.qarray import dequantize_array, is_qarray

NAME = "safetensors"
ROW_BYTES = 4 * 2**20  # of float32 values that are made at a time
_FLOATS = {name: DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}


def plan(weight: LazyWeight, options: Mapping[str, Any]) -> Planned:
    own = np.dtype(weight.abstract.dtype)
    wanted = own if options.get("dtype") is None else _dtype_of(options["dtype"])
    if not weight.packed and (own == wanted or own not in _FLOATS.values()):
        return as_it_is(weight)
    name = next(name for name, dtype in DTYPES.items() if dtype == wanted)

    def pieces(value: Any) -> Iterator[np.ndarray]:
        parts = (block for _, block in dense_rows(value)) if weight.packed else flat_pieces(value)
        return (part.astype(wanted) for part in parts)

    def encode(value: Any) -> dict[str, np.ndarray]:
        return {weight.name: np.concatenate([part.reshape(-1) for part in pieces(value)]).reshape(weight.shape)}

    return Planned(weight, {weight.name: (name, weight.shape)}, encode, loss=_loss(weight, own, wanted), pieces=pieces)


def quantization_config(planned: list[Planned], options: Mapping[str, Any]) -> dict[str, Any]:
    """None: the weights are dense."""
    del planned, options
    return {}


def dense_rows(value: Any) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
    """A weight [*B, N, K], packed or not, in float32, a few rows at a time in its order, each with its index."""
    shape = tuple(value.shape)
    if is_qarray(value) and (len(shape) < 2 or value.axis != -1 or value.input_rotation):
        value = np.asarray(dequantize_array(value, np.float32))
    if len(shape) < 2:
        yield (slice(None),) * len(shape), np.asarray(value, np.float32)
        return
    for at in row_slices(shape):
        block = rows_of(value, at)
        yield at, host_dequantize(block) if is_qarray(block) else np.asarray(block, np.float32)


def row_slices(shape: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """The indices of a few rows at a time of a weight [*B, N, K], in its order."""
    step = max(1, ROW_BYTES // (4 * max(1, shape[-1])))
    for batch in np.ndindex(*shape[:-2]):
        for start in range(0, shape[-2], step):
            yield (*batch, slice(start, min(start + step, shape[-2])))


def rows_of(value: Any, at: tuple[Any, ...]) -> Any:
    """Rows [rows, K] of a weight [*B, N, K] grouped along K; an axis on which a part is broadcast stays as it is."""
    if not is_qarray(value):
        return value[at]
    *batch, rows = at

    def cut(part: Any) -> Any:
        if is_qarray(part):
            part = host_dequantize(part)
        part = np.asarray(part)
        indices = (index if size > 1 else 0 for index, size in zip(batch, part.shape, strict=False))
        return part[tuple(indices)][rows if part.shape[-2] > 1 else slice(None)]

    names = ("codes", "scale", "zero_point", "offset", "input_scale")
    parts = {name: cut(part) for name in names if (part := getattr(value, name)) is not None}
    order = None if value.permutation is None else np.asarray(value.permutation)[tuple(batch)]
    return dataclasses.replace(value, **parts, permutation=order, activation_scale=None, activations="")


def _dtype_of(given: str) -> np.dtype[Any]:
    for name, dtype in _FLOATS.items():
        if given.lower() in (name.lower(), dtype.name):
            return dtype
    known = ", ".join(dtype.name for dtype in _FLOATS.values())
    raise JQ4Error(f"--dtype {given}: is not a dtype of dense weights, wanted one of {known}")


def _loss(weight: LazyWeight, own: np.dtype[Any], wanted: np.dtype[Any]) -> str:
    if not weight.packed:
        return "" if _holds(wanted, own) else f"{own.name} rounded to {wanted.name}"
    return "" if _holds(wanted, np.dtype(np.float32)) else f"dequantized and rounded to {wanted.name}"


def _holds(wide: np.dtype[Any], narrow: np.dtype[Any]) -> bool:
    """Whether every number of `narrow` is one of `wide`."""
    wide_info, narrow_info = ml_dtypes.finfo(wide), ml_dtypes.finfo(narrow)
    return bool(wide_info.nmant >= narrow_info.nmant and wide_info.maxexp >= narrow_info.maxexp)
