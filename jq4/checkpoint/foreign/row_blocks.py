"""Weights taken a block of rows at a time, so that unpacked codes and dense values never stand in memory as a whole."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jq4.checkpoint.foreign import bit_strings
from jq4.qarray import QArray, dequantize_array, is_qarray
from pallas_kernels.packing import packed_length

ELEMENTS = 2**18  # of a block, about: what a core's cache holds


def row_blocks(rows: int, width: int, multiple: int = 1) -> Iterator[slice]:
    """Slices over `rows` rows of `width` elements, each (but the last) of a multiple of `multiple` rows."""
    step = max(ELEMENTS // max(width, 1) // multiple, 1) * multiple
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def packed_by_rows(shape: tuple[int, ...], bits: int, codes: Callable[[slice], np.ndarray]) -> np.ndarray:
    """u8[*B, N, bytes(K)] of the weight [*B, N, K], whose rows' codes u8[rows, K] are asked for block by block."""
    rows, width = math.prod(shape[:-1]), shape[-1]
    packed = np.empty((rows, packed_length(width, bits)), np.uint8)
    for block in row_blocks(rows, width):
        packed[block] = bit_strings.pack(codes(block), bits)
    return packed.reshape(*shape[:-1], -1)


def dense_blocks(weight: Any, multiple: int = 1) -> Iterator[tuple[slice, np.ndarray]]:
    """The dense values f32[rows, K] of an array or QArray [*B, N, K], with the rows (of B * N) that they are."""
    *_, width = weight.shape
    rows = math.prod(weight.shape[:-1])
    if not is_qarray(weight):
        flat = weight.reshape(rows, width)
        for block in row_blocks(rows, width, multiple):
            yield block, flat[block].astype(np.float32)
        return
    if weight.axis != -1 or weight.permutation is not None or weight.input_scale is not None or weight.input_rotation:
        yield from dense_blocks(np.asarray(dequantize_array(weight, np.float32)), multiple)
        return
    parts = {name: _rows_of(getattr(weight, name), weight) for name in ("scale", "zero_point", "offset")}
    codes = weight.codes.reshape(rows, -1)
    for block in row_blocks(rows, width, multiple):
        held = {name: None if part is None else part[block] for name, part in parts.items()}
        yield block, dense_rows(dataclasses.replace(weight, codes=codes[block], **held))


def dense_rows(q: QArray) -> np.ndarray:
    """f32[N, K] of a QArray [N, K] of numpy arrays, grouped along K: level * scale + offset, in float32."""
    width = q.shape[-1]

    def spread(part: np.ndarray) -> np.ndarray:
        values = part.astype(np.float32)
        return values if values.shape[-1] == 1 else np.repeat(values, q.group_size, axis=-1)[:, :width]

    codes, form = bit_strings.unpack(q.codes, q.bits, width), q.number_format
    if q.zero_point is not None:
        levels = codes.astype(np.float32) - spread(q.zero_point)
    elif form.levels is None:
        levels = codes.astype(np.float32) - np.float32(form.center)
    else:
        levels = np.asarray(form.levels, np.float32)[codes]
    dense = levels * spread(q.scale)
    return dense if q.offset is None else dense + spread(q.offset)


def _rows_of(part: Any, q: QArray) -> Any:
    """A scale (dense or packed), zero point or offset as [B * N, G or 1]."""
    if part is None:
        return None
    if is_qarray(part):
        part = dequantize_array(jax.tree.map(np.asarray, part))
    part = np.asarray(part)
    return np.broadcast_to(part, (*q.shape[:-1], part.shape[-1])).reshape(-1, part.shape[-1])
