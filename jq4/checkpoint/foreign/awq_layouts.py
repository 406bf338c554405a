"""AWQ's bits: three ways to lay 4-bit codes out, to a QArray's bytes u8[N, K/2] (packed along K) and, for gemm, back.

gemm    i32 [K, N/8]. Nibble i of word c is column 8c + ORDER[i]: packed along N, where a QArray is packed along K. The
        words of 8 rows are an 8 by 8 matrix of nibbles, whose transpose is 8 words of 8 neighbouring k, one for each
        column: what a QArray holds. Words are transposed like bits in Hacker's Delight (Warren 2012, 7-3): blocks of 1,
        2 and 4 nibbles off the diagonal change places, by shifts and masks of whole arrays of words, and what is left
        is a transposition of words. Nothing is unpacked, and the same three steps are the way back.
gemv    i32 [N, K/8], natural order: the QArray's bytes as they are.
fast    i16 [N/4, K]. In tiles of 4 rows by 64 columns, (n, k) is nibble (k % 32) // 8 of the word in row n // 4, column
        64 (k // 64) + 16 (n % 4) + 8 (k % 64 // 32) + k % 8. Two neighbouring words hold neighbouring k.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from jq4.checkpoint.foreign.bit_strings import bytes_of_words, pack, unpack, words_of_bytes
from jq4.checkpoint.foreign.transposing import SKEW

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = np.argsort(ORDER)
_STEPS = ((1, 4, 0x0F0F0F0F), (2, 8, 0x00FF00FF), (4, 16, 0x0000FFFF))  # nibbles, bits, the half that is moved
_TALL, _WIDE = 128, 64  # blocks of 8 rows, and words of a row, at a time: 256 KB that stay in the cache
_ROWS = 16


def codes_of_gemm(words: np.ndarray) -> np.ndarray:
    """i32[K, N/8] to u8[N, K/2]; K is a multiple of 8."""
    inputs, eighths = words.shape
    rows = words.view(np.uint32).reshape(inputs // 8, 8, eighths)
    codes = np.empty((eighths, 8, inputs // 8), np.uint32)
    for across, down in _tiles(eighths, inputs // 8):
        block = _skewed([rows[down, row, across] for row in range(8)])  # u32[8, R, C]
        _transpose_nibbles(block)
        for nibble, column in enumerate(ORDER):
            codes[across, column, down] = block[nibble].T
    return codes.view(np.uint8).reshape(eighths * 8, -1)


def gemm_of_codes(codes: np.ndarray) -> np.ndarray:
    """u8[N, K/2] to i32[K, N/8]: undoes `codes_of_gemm`."""
    eighths, blocks = codes.shape[0] // 8, codes.shape[1] // 4
    columns = np.ascontiguousarray(codes).view(np.uint32).reshape(eighths, 8, blocks)
    words = np.empty((blocks, 8, eighths), np.uint32)
    for across, down in _tiles(eighths, blocks):
        block = _skewed([columns[across, column, down] for column in ORDER])  # u32[8, C, R]
        _transpose_nibbles(block)
        for row in range(8):
            words[down, row, across] = block[row].T
    return words.view(np.int32).reshape(blocks * 8, eighths)


def _tiles(width: int, height: int) -> Iterator[tuple[slice, slice]]:
    for left in range(0, width, _WIDE):
        for top in range(0, height, _TALL):
            yield slice(left, left + _WIDE), slice(top, top + _TALL)


def _skewed(lanes: Sequence[np.ndarray]) -> np.ndarray:
    """The arrays [A, B] as one [8, A, B] whose rows do not share their place in the cache."""
    rows, columns = lanes[0].shape
    held = np.empty((len(lanes), rows, columns + SKEW), np.uint32)[..., :columns]
    for lane, array in enumerate(lanes):
        held[lane] = array
    return held


def _transpose_nibbles(words: np.ndarray) -> None:
    """u32[8, ...] in place: nibble i of word k changes places with nibble k of word i."""
    for distance, bits, mask in _STEPS:
        pairs = words.reshape(4 // distance, 2, distance, *words.shape[1:])
        upper, lower = pairs[:, 0], pairs[:, 1]
        moved = upper >> np.uint32(bits)
        moved ^= lower
        moved &= np.uint32(mask)
        lower ^= moved
        moved <<= np.uint32(bits)
        upper ^= moved


def zeros_of_gemm(words: np.ndarray) -> np.ndarray:
    """i32[G, N/8], interleaved like gemm's codes, to u8[G, N]."""
    fields = unpack(bytes_of_words(words), 4, words.shape[1] * 8).reshape(*words.shape, 8)
    return fields[..., _INVERSE].reshape(words.shape[0], -1)


def gemm_of_zeros(zeros: np.ndarray) -> np.ndarray:
    """u8[G, N] to i32[G, N/8]."""
    fields = zeros.reshape(zeros.shape[0], -1, 8)[..., list(ORDER)]
    return words_of_bytes(pack(fields.reshape(zeros.shape), 4))


def codes_of_fast(words: np.ndarray) -> np.ndarray:
    """i16[N/4, K] to u8[N, K/2]; K is a multiple of 64."""
    quarters, inputs = words.shape
    codes = np.empty((quarters, 4, inputs // 64, 2, 4, 4), np.uint8)  # [N/4, n%4, K/64, half, nibble, pair]
    for first in range(0, quarters, _ROWS):
        block = np.ascontiguousarray(words[first : first + _ROWS]).view(np.uint32)
        pairs = block.reshape(-1, inputs // 64, 4, 2, 4).swapaxes(1, 2)  # [rows, n%4, K/64, half, pair]
        for nibble in range(4):
            low, high = pairs >> np.uint32(4 * nibble), pairs >> np.uint32(12 + 4 * nibble)
            codes[first : first + _ROWS, ..., nibble, :] = (low & np.uint32(0x0F)) | (high & np.uint32(0xF0))
    return codes.reshape(quarters * 4, -1)
