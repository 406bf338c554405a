"""Weights taken a block of rows at a time, so that unpacked codes and dense values never stand in memory as a whole."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from jq4.checkpoint.foreign import bit_strings
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
