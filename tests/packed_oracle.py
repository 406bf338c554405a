"""An oracle of packed weights that shares nothing with the project: numpy, float64, the bit string read bit by bit.

Codes along an axis are one little-endian bit string: code k is bits [bits*k, bits*(k+1)) of it.
"""

import numpy as np

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
E4M3 = [  # a sign, 4 bits of exponent, 3 of mantissa; no infinities
    (-1.0) ** (b >> 7) * (2.0 ** ((b >> 3 & 15) - 7) * (1 + (b & 7) / 8) if b >> 3 & 15 else (b & 7) * 2.0**-9)
    for b in range(256)
]
CODEBOOKS = {"nf4": NF4, "fp4": FP4, "e4m3": E4M3}
BITS = {"nf4": 4, "fp4": 4, "e4m3": 8} | {f"int{bits}": bits for bits in range(2, 9)}


def pack_bits(codes: np.ndarray, bits: int, axis: int, garbage: int = 0) -> np.ndarray:
    """u8 codes to bytes; the last packing unit is filled with codes of value `garbage`."""
    moved = np.moveaxis(codes, axis, -1)
    unit = 1
    while unit * bits % 8:
        unit *= 2
    fill = np.full((*moved.shape[:-1], -moved.shape[-1] % unit), garbage, np.uint8)
    moved = np.concatenate([moved, fill], -1)
    string = (moved[..., None] >> np.arange(bits)) & 1  # [..., K, bits], lowest bit first
    packed = np.packbits(string.reshape(*moved.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")
    return np.moveaxis(packed, -1, axis)


def unpack_bits(packed: np.ndarray, bits: int, axis: int, length: int) -> np.ndarray:
    """Undoes `pack_bits`."""
    moved = np.moveaxis(np.asarray(packed), axis, -1)
    string = np.unpackbits(moved, axis=-1, bitorder="little")
    string = string[..., : string.shape[-1] // bits * bits].reshape(*moved.shape[:-1], -1, bits)
    codes = (string.astype(np.int64) << np.arange(bits)).sum(-1)
    return np.moveaxis(codes[..., :length], -1, axis).astype(np.uint8)


def dequantize64(codes, scale, zero_point, offset, format: str, group_size: int, axis: int) -> np.ndarray:
    """float64 weight of unpacked codes and per-group arrays, row by row along `axis`."""
    codes = np.moveaxis(np.asarray(codes), axis, 0)
    parts = [
        None if p is None else np.moveaxis(np.asarray(p, np.float64), axis, 0) for p in (scale, zero_point, offset)
    ]
    rows = []
    for k in range(codes.shape[0]):
        s, z, o = (None if p is None else p[k // group_size] for p in parts)
        if format in CODEBOOKS:
            level = np.asarray(CODEBOOKS[format])[codes[k]]
        else:
            level = codes[k] - (2.0 ** (BITS[format] - 1) if z is None else z)
        rows.append(level * s + (0.0 if o is None else o))
    return np.moveaxis(np.stack(rows), 0, axis)


def words_along(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """u8 codes to little-endian i32 words of one bit string along `axis`; zeros fill the last word."""
    packed = np.moveaxis(pack_bits(codes, bits, axis), axis, -1)
    held = np.zeros((*packed.shape[:-1], -(-bits * codes.shape[axis] // 32) * 4), np.uint8)
    width = min(held.shape[-1], packed.shape[-1])  # the last packing unit may end behind the last word
    held[..., :width] = packed[..., :width]
    return np.moveaxis(held.view("<i4"), -1, axis)
