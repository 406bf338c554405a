"""The dense weight of a QArray on the host, in numpy, as a whole or a few rows at a time.

Computed in float32 by the formula of jq4.qarray, each product and each sum rounded by itself.

XLA may fuse the last product and the sum, which is one rounding less; the formats' own software does not. Where a
conversion is checked against it, or a weight is quantized anew, this is what is compared and rounded.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.bit_strings import unpack
from jq4.checkpoint.foreign.row_blocks import row_blocks
from jq4.errors import JQ4Error
from jq4.qarray import NEUTRAL, QArray, dequantize_array, is_qarray

At = tuple[Any, ...]  # the index of some rows of a weight [*B, N, K]: numbers, and a slice
_SCALES = ("scale", "offset")  # what may be packed itself


def host_dequantize(q: QArray) -> np.ndarray:
    """A neutral QArray of host arrays as f32[*B, ..., K, ...]."""
    if q.layout != NEUTRAL or q.input_rotation:
        raise JQ4Error(f"{q!r}: dequantized on the host are neutral weights without a rotation; use jq4.dequantize.")
    codes = unpack(_last(q, q.codes), q.bits, q.shape[q.axis])
    if q.zero_point is not None:
        levels = codes.astype(np.float32) - _spread(q, q.zero_point)
    elif q.number_format.levels is not None:
        levels = np.asarray(q.number_format.levels, np.float32)[codes]
    else:
        levels = codes.astype(np.float32) - np.float32(q.number_format.center)
    weight = levels * _spread(q, q.scale)
    if q.offset is not None:
        weight += _spread(q, q.offset)
    if q.permutation is not None:
        order = np.argsort(np.asarray(q.permutation), axis=-1)
        order = order.reshape(*order.shape[:-1], *(1,) * (weight.ndim - order.ndim), order.shape[-1])
        weight = np.take_along_axis(weight, order, -1)
    if q.input_scale is not None:
        weight = weight * _last(q, q.input_scale).astype(np.float32)
    return np.moveaxis(weight, -1, q.axis)


def dense_rows(value: Any, multiple: int = 1) -> Iterator[tuple[At, np.ndarray]]:
    """A weight, packed or not, in float32, a few rows at a time as `some_rows` cuts them; of one axis, as a whole."""
    if len(value.shape) < 2:
        yield (), np.asarray(dequantize_array(value, np.float32) if is_qarray(value) else value, np.float32)
        return
    for at, block in some_rows(value, multiple):
        yield at, host_dequantize(block) if is_qarray(block) else np.asarray(block, np.float32)


def finite_rows(value: Any, name: str, multiple: int = 1) -> Iterator[tuple[At, np.ndarray]]:
    """The same, to be quantized; a JQ4Error that names the weight where a value is NaN or infinite."""
    for at, dense in dense_rows(value, multiple):
        if not np.isfinite(dense).all():
            *batch, rows = at
            where = f"rows {rows.start} to {rows.stop - 1}" + (f" of matrix {tuple(batch)}" if batch else "")
            raise JQ4Error(f"{name}: holds NaN or infinity in {where}; mend the source.")
        yield at, dense


def some_rows(value: Any, multiple: int = 1) -> Iterator[tuple[At, Any]]:
    """Rows [rows, K] of a weight [*B, N, K] in its order, packed as it is packed along K, with their index.

    Each cut but the last of a matrix is of a multiple of `multiple` rows. What is not packed along K comes dense.
    """
    if is_qarray(value):
        if value.axis != -1 or value.input_rotation:
            value = np.asarray(dequantize_array(value, np.float32))
        else:
            parts = {name: host_dequantize(part) for name in _SCALES if is_qarray(part := getattr(value, name))}
            value = dataclasses.replace(value, **parts)
    *outer, rows, width = value.shape
    for batch in np.ndindex(*outer):
        for block in row_blocks(rows, width, multiple):
            at = (*batch, block)
            yield at, _cut(value, at) if is_qarray(value) else value[at]


def _cut(q: QArray, at: At) -> QArray:
    """Rows of a QArray [*B, N, K]; an axis on which a part is broadcast stays as it is."""
    *batch, rows = at

    def cut(part: Any) -> np.ndarray:
        part = np.asarray(part)
        indices = (index if size > 1 else 0 for index, size in zip(batch, part.shape, strict=False))
        return part[tuple(indices)][rows if part.shape[-2] > 1 else slice(None)]

    names = ("codes", "scale", "zero_point", "offset", "input_scale")
    parts = {name: cut(part) for name in names if (part := getattr(q, name)) is not None}
    order = None if q.permutation is None else np.asarray(q.permutation)[tuple(batch)]
    return dataclasses.replace(q, **parts, permutation=order, activation_scale=None, activations="")


def _last(q: QArray, part: Any) -> np.ndarray:
    """A part with the grouped axis last."""
    return np.moveaxis(np.asarray(part), q.axis, -1)


def _spread(q: QArray, part: Any) -> np.ndarray:
    """One value a group as one a code, f32."""
    values = _last(q, host_dequantize(part) if is_qarray(part) else part).astype(np.float32)
    if values.shape[-1] == 1:
        return values
    return np.repeat(values, q.group_size, -1)[..., : q.shape[q.axis]]
