"""Super-blocks of 256 elements, whose scales are codes themselves: bytes to fields, and back.

    Q4_K    f16 d, f16 dmin, 12 bytes of 8 scales and 8 minima of 6 bits, 128 bytes     d sc q - dmin m
    Q5_K    the same with 32 bytes of fifth bits before the 128                         d sc q - dmin m
    Q6_K    128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, f16 d       d sc (q - 32)
    IQ4_XS  f16 d, u16 and 4 bytes of 8 scales of 6 bits, 128 bytes                     d (sc - 32) T[q]

Nibbles are half split over runs of 64 (Q4_K, Q5_K: a sub-block low, the next one high), 128 (Q6_K) or 32 (IQ4_XS)
elements. Six-bit pairs: sub-blocks 0..3 have the low six bits of bytes b (scale) and b + 4 (minimum); sub-blocks 4..7
have the nibbles of byte b + 4, and their two high bits on top of bytes b - 4 and b. The minima are taken away, so their
factor is kept as -dmin.
"""

import numpy as np

from jq4.checkpoint.foreign.bit_strings import pack, unpack
from jq4.checkpoint.foreign.gguf.block_types import BlockType
from jq4.checkpoint.foreign.gguf.blocks import Fields, as_bytes, as_dtype, half_split, neighbours


def split(kind: BlockType, blocks: np.ndarray) -> Fields:
    """u8[..., B, nbytes] to fields."""
    return {"Q4_K": _split_q4_k, "Q5_K": _split_q5_k, "Q6_K": _split_q6_k, "IQ4_XS": _split_iq4_xs}[kind.name](blocks)


def join(kind: BlockType, fields: Fields) -> np.ndarray:
    """Fields to u8[..., B, nbytes]."""
    return {"Q4_K": _join_q4_k, "Q5_K": _join_q5_k, "Q6_K": _join_q6_k, "IQ4_XS": _join_iq4_xs}[kind.name](fields)


def _split_q4_k(blocks: np.ndarray) -> Fields:
    return Fields(neighbours(blocks[..., 16:], 32), *_scales_and_minima(blocks))


def _join_q4_k(fields: Fields) -> np.ndarray:
    return np.concatenate([_head(fields), half_split(fields.codes, 32)], axis=-1)


def _split_q5_k(blocks: np.ndarray) -> Fields:
    low = unpack(neighbours(blocks[..., 48:], 32), 4, 256)
    fifth = np.unpackbits(blocks[..., 16:48, None], axis=-1, bitorder="little")  # [..., 32 elements, 8 sub-blocks]
    return Fields(pack(low | fifth.swapaxes(-1, -2).reshape(low.shape) << 4, 5), *_scales_and_minima(blocks))


def _join_q5_k(fields: Fields) -> np.ndarray:
    codes = unpack(fields.codes, 5, 256)
    fifth = (codes >> 4).reshape(*codes.shape[:-1], 8, 32).swapaxes(-1, -2)
    high = np.packbits(fifth, axis=-1, bitorder="little")[..., 0]
    return np.concatenate([_head(fields), high, half_split(pack(codes & 15, 4), 32)], axis=-1)


def _split_q6_k(blocks: np.ndarray) -> Fields:
    low = unpack(neighbours(blocks[..., :128], 64), 4, 256)
    pairs = blocks[..., 128:192].reshape(*low.shape[:-1], 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    codes = low | (pairs & 3).reshape(low.shape) << 4
    scales = blocks[..., 192:208] ^ 0x80
    return Fields(pack(codes, 6), as_dtype(blocks[..., 208:210], np.float16), scales=scales)


def _join_q6_k(fields: Fields) -> np.ndarray:
    codes = unpack(fields.codes, 6, 256)
    pairs = (codes >> 4).reshape(*codes.shape[:-1], 2, 4, 32)
    high = pairs[..., 0, :] | pairs[..., 1, :] << 2 | pairs[..., 2, :] << 4 | pairs[..., 3, :] << 6
    return np.concatenate(
        [
            half_split(pack(codes & 15, 4), 64),
            high.reshape(*codes.shape[:-1], 64),
            fields.scales ^ 0x80,
            as_bytes(fields.scale),
        ],
        axis=-1,
    )


def _split_iq4_xs(blocks: np.ndarray) -> Fields:
    high = as_dtype(blocks[..., 2:4], "<u2")[..., None] >> np.arange(0, 16, 2, dtype=np.uint16)
    scales = unpack(blocks[..., 4:8], 4, 8) | (high & 3).astype(np.uint8) << 4
    return Fields(neighbours(blocks[..., 8:], 16), as_dtype(blocks[..., :2], np.float16), scales=scales)


def _join_iq4_xs(fields: Fields) -> np.ndarray:
    high = (fields.scales >> 4).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)
    return np.concatenate(
        [
            as_bytes(fields.scale),
            as_bytes(np.bitwise_or.reduce(high, axis=-1).astype("<u2")),
            pack(fields.scales & 15, 4),
            half_split(fields.codes, 16),
        ],
        axis=-1,
    )


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scale, offset, scales and offsets of Q4_K and Q5_K."""
    first, second, third = (blocks[..., at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=-1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=-1)
    factor = as_dtype(blocks[..., 2:4], np.float16)
    return as_dtype(blocks[..., :2], np.float16), -factor, scales, minima


def _head(fields: Fields) -> np.ndarray:
    """The first 16 bytes of Q4_K and Q5_K."""
    scales, minima = fields.scales, fields.offsets
    first = scales[..., :4] | (scales[..., 4:] >> 4) << 6
    second = minima[..., :4] | (minima[..., 4:] >> 4) << 6
    third = (scales[..., 4:] & 15) | (minima[..., 4:] & 15) << 4
    return np.concatenate([as_bytes(fields.scale), as_bytes(-fields.offset), first, second, third], axis=-1)
