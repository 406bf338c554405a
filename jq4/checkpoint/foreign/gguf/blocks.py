"""Blocks of 32 elements: their bytes to codes, scales and offsets, and back.

    Q4_0    f16 d, 16 bytes of nibbles                     d (q - 8)
    Q4_1    f16 d, f16 m, 16 bytes                         d q + m
    Q5_0    f16 d, u32 of fifth bits, 16 bytes             d (q - 16)
    Q5_1    f16 d, f16 m, u32, 16 bytes                    d q + m
    Q8_0    f16 d, 32 int8                                 d q
    IQ4_NL  f16 d, 16 bytes                                d T[q]
    MXFP4   u8 e, 16 bytes                                 2^(e - 127) E2M1[q]

Nibbles are "half split": byte j holds element j in its low nibble and element j + half in its high one, where a
QArray's byte holds two neighbours. `neighbours` and `half_split` turn one order into the other without unpacking.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.bit_strings import pack, unpack
from jq4.checkpoint.foreign.gguf.block_types import BlockType


@dataclass(frozen=True)
class Fields:
    """What blocks [..., B] hold: codes u8[..., B, bytes] in a QArray's order, and what they are scaled by.

    Attributes:
      scale: [..., B], a float (f16, or e8m0 for MXFP4): a block's own, or that of its packed scales.
      offset: f16[..., B], a block's own, or the factor (with its sign) of its packed offsets.
      scales, offsets: u8[..., B, groups], unpacked codes, where scales are packed.
    """

    codes: np.ndarray
    scale: np.ndarray
    offset: Any = None
    scales: Any = None
    offsets: Any = None


def split(kind: BlockType, blocks: np.ndarray) -> Fields:
    """u8[..., B, nbytes] to fields."""
    if kind.format == "fp4":
        return Fields(neighbours(blocks[..., 1:], 16), as_dtype(blocks[..., :1], kind.scale_dtype))
    offset = as_dtype(blocks[..., 2:4], np.float16) if kind.has_offset else None
    body = blocks[..., 4 if kind.has_offset else 2 :]
    return Fields(_codes(kind, body), as_dtype(blocks[..., :2], np.float16), offset)


def join(kind: BlockType, fields: Fields) -> np.ndarray:
    """Fields to u8[..., B, nbytes]."""
    parts = [as_bytes(fields.scale)]
    if kind.has_offset:
        parts.append(as_bytes(fields.offset))
    return np.concatenate([*parts, _body(kind, fields.codes)], axis=-1)


def neighbours(halves: np.ndarray, half: int) -> np.ndarray:
    """Half-split nibbles u8[..., n * half] (n runs of 2 * half elements) as bytes of two neighbours."""
    pairs = np.ascontiguousarray(halves).view("<u2").reshape(-1, half // 2)
    packed = np.empty((len(pairs), 2, half // 16), np.uint64)
    for piece in _pieces(len(pairs)):
        low, high = pairs[piece] & 0x0F0F, (pairs[piece] >> 4) & 0x0F0F
        for which, nibbles in enumerate((low, high)):
            packed[piece, which] = (nibbles | nibbles >> 4).astype(np.uint8).view(np.uint64)
    return packed.view(np.uint8).reshape(halves.shape)


def half_split(packed: np.ndarray, half: int) -> np.ndarray:
    """Undoes `neighbours`."""
    runs = np.ascontiguousarray(packed).view(np.uint64).reshape(-1, 2, half // 16)
    pairs = np.empty((len(runs), half // 2), "<u2")
    for piece in _pieces(len(runs)):
        low, high = (np.ascontiguousarray(runs[piece, i]).view(np.uint8).astype(np.uint16) for i in (0, 1))
        pairs[piece] = ((low | low << 4) & 0x0F0F) | ((high | high << 4) & 0x0F0F) << 4
    return pairs.view(np.uint8).reshape(packed.shape)


def _pieces(runs: int) -> list[slice]:
    """Slices of runs that the cache holds."""
    return [slice(at, at + 4096) for at in range(0, runs, 4096)]


def as_dtype(field: np.ndarray, dtype: Any) -> np.ndarray:
    """Bytes u8[..., itemsize] as [...] of `dtype`."""
    return np.ascontiguousarray(field).view(dtype)[..., 0]


def as_bytes(values: np.ndarray) -> np.ndarray:
    """[...] as its bytes u8[..., itemsize]."""
    return np.ascontiguousarray(values[..., None]).view(np.uint8)


def _codes(kind: BlockType, body: np.ndarray) -> np.ndarray:
    if kind.format == "int8":
        return body ^ 0x80
    if kind.format == "int5":
        fifth = np.unpackbits(np.ascontiguousarray(body[..., :4]), axis=-1, bitorder="little")
        return pack(unpack(neighbours(body[..., 4:], 16), 4, 32) | fifth << 4, 5)
    return neighbours(body, 16)


def _body(kind: BlockType, codes: np.ndarray) -> np.ndarray:
    if kind.format == "int8":
        return codes ^ 0x80
    if kind.format == "int5":
        values = unpack(codes, 5, 32)
        fifth = np.packbits(values >> 4, axis=-1, bitorder="little")
        return np.concatenate([fifth, half_split(pack(values & 15, 4), 16)], axis=-1)
    return half_split(codes, 16)
