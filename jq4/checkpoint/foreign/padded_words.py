"""compressed-tensors' packing of 3, 5, 6 and 7 bits before release 0.18: floor(32/b) codes a word, high bits unused.

word = sum_i code[i] << b*i,  i < 10, 6, 5, 4
"""

import numpy as np

from jq4.checkpoint.foreign.row_blocks import packed_by_rows


def padded_width(length: int, bits: int) -> int:
    """Words that `length` codes take."""
    return -(-length // (32 // bits))


def unpack_padded(words: np.ndarray, bits: int, length: int) -> np.ndarray:
    """i32[..., W] to u8[..., length]."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    fields = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return fields.astype(np.uint8).reshape(*words.shape[:-1], -1)[..., :length]


def repacked(words: np.ndarray, bits: int, length: int) -> np.ndarray:
    """i32[..., W] to the dense bit string u8[..., packed_length] of a QArray, some rows at a time."""
    flat = words.reshape(-1, words.shape[-1])
    return packed_by_rows((*words.shape[:-1], length), bits, lambda rows: unpack_padded(flat[rows], bits, length))
