"""Codes and the words that files keep them in, in numpy: the bit diagram of pallas_kernels.packing, on the host.

A little-endian int32 word that holds codes from its lowest bit on is four bytes of one long bit string, so for 2, 4 and
8 bits (and for dense 3, 5, 6 and 7) words along an axis are, viewed as bytes, what a QArray keeps along that axis: then
nothing needs to be unpacked, and the byte views below do.
"""

from typing import Any

import numpy as np

from pallas_kernels.packing import codes_per_unit, packed_length


def unpack(packed: np.ndarray, bits: int, length: int) -> np.ndarray:
    """u8[..., bytes] to the first `length` codes u8[..., length] of the bit string along the last axis."""
    if bits == 8:
        return packed[..., :length]
    unit = codes_per_unit(bits)
    width = bits * unit // 8  # bytes of a unit
    filled = _filled(packed, -(-length // unit) * width).reshape(*packed.shape[:-1], -1, width)
    fields = np.empty((*filled.shape[:-1], unit), np.uint8)
    for i in range(unit):
        first, shift = divmod(bits * i, 8)
        field = filled[..., first] >> shift
        if shift + bits > 8:
            field = field | filled[..., first + 1] << (8 - shift)
        fields[..., i] = field & (2**bits - 1)
    return fields.reshape(*packed.shape[:-1], -1)[..., :length]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """u8[..., K] of values below 2**bits to u8[..., packed_length(K)] along the last axis; zeros fill the last unit."""
    if bits == 8:
        return np.ascontiguousarray(codes, np.uint8)
    unit = codes_per_unit(bits)
    length = packed_length(codes.shape[-1], bits)
    units = _filled(codes, length * 8 // bits).reshape(*codes.shape[:-1], -1, unit)
    packed = np.zeros((*units.shape[:-1], bits * unit // 8), np.uint8)
    for i in range(unit):
        first, shift = divmod(bits * i, 8)
        packed[..., first] |= units[..., i] << shift
        if shift + bits > 8:
            packed[..., first + 1] |= units[..., i] >> (8 - shift)
    return packed.reshape(*codes.shape[:-1], -1)


def bytes_of_words(words: np.ndarray) -> np.ndarray:
    """Words [..., W] (little-endian, any integer dtype) as their bytes u8[..., W * itemsize], lowest first."""
    words = np.ascontiguousarray(words)
    return words.view(np.uint8).reshape(*words.shape[:-1], -1)


def words_of_bytes(packed: np.ndarray, dtype: Any = np.int32) -> np.ndarray:
    """Bytes u8[..., B] as words [..., ceil(B / itemsize)]; zeros fill the last word."""
    size = np.dtype(dtype).itemsize
    return np.ascontiguousarray(_filled(packed, -(-packed.shape[-1] // size) * size)).view(dtype)


def trimmed(packed: np.ndarray, bits: int, length: int) -> np.ndarray:
    """Bytes u8[..., B] cut, or filled with zeros, to what a QArray keeps for `length` codes; bits behind are zero."""
    kept = np.array(_filled(packed, packed_length(length, bits))[..., : packed_length(length, bits)])
    whole, rest = divmod(bits * length, 8)
    kept[..., whole + bool(rest) :] = 0
    if rest:
        kept[..., whole] &= 2**rest - 1
    return kept


def _filled(array: np.ndarray, length: int) -> np.ndarray:
    """The last axis cut or filled with zeros to `length`."""
    short = length - array.shape[-1]
    if short <= 0:
        return array[..., :length]
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, short)])
