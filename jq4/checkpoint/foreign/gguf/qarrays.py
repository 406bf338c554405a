"""Blocks to QArrays, exactly, and back byte for byte.

A tensor [*E, N, K] of blocks becomes a QArray grouped along its axis -1, of numpy arrays:

    Q4_0 Q5_0 Q8_0 IQ4_NL MXFP4   codes and one scale a group
    Q4_1 Q5_1                     zero_point u8[1, G] of zeros (a code is its own level), and an offset
    Q4_K Q5_K                     zero_point as well; scale and offset are QArrays of int6 codes grouped by 8, with
                                  zero points of zeros, and the f16 factors d and -dmin for scales
    Q6_K IQ4_XS                   scale is a QArray of int8 or int6 codes, whose levels are the format's own
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from jq4.checkpoint.foreign.bit_strings import pack, unpack
from jq4.checkpoint.foreign.gguf import blocks as plain
from jq4.checkpoint.foreign.gguf import super_blocks
from jq4.checkpoint.foreign.gguf.block_types import BlockType
from jq4.checkpoint.foreign.gguf.blocks import Fields
from jq4.formats import get_format
from jq4.qarray import QArray
from pallas_kernels.packing import packed_length


def to_qarray(kind: BlockType, blocks: np.ndarray) -> QArray:
    """u8[*E, N, B, nbytes] as a QArray [*E, N, K]."""
    fields = (super_blocks if kind.packed_scales else plain).split(kind, blocks)
    scale, offset = fields.scale, fields.offset
    if kind.packed_scales:
        scale = _packed(kind, fields.scales, fields.scale)
        offset = _packed(kind, fields.offsets, fields.offset) if kind.has_offset else None
    return _assembled(kind, _joined(fields.codes), scale, offset)


def to_blocks(kind: BlockType, q: QArray) -> np.ndarray:
    """The QArray of `to_qarray` (`holds` is true of it) as u8[*E, N, B, nbytes]."""
    rows, count = q.codes.shape[:-1], q.shape[-1] // kind.length
    codes = np.asarray(q.codes).reshape(*rows, count, -1)
    if not kind.packed_scales:
        return plain.join(kind, Fields(codes, _floats(q.scale, kind), _floats(q.offset, kind)))
    offsets, factor = (_codes_of(kind, q.offset), q.offset.scale) if kind.has_offset else (None, None)
    scales = _codes_of(kind, q.scale)
    return super_blocks.join(
        kind, Fields(codes, _floats(q.scale.scale, kind), _floats(factor, kind), scales, offsets)
    )  # fmt: skip


def abstract(kind: BlockType, shape: tuple[int, ...]) -> QArray:
    """What `to_qarray` gives for a tensor of this shape, with jax.ShapeDtypeStruct for arrays."""
    rows, length = shape[:-1], shape[-1]
    groups, blocks = length // kind.group_size, length // kind.length
    codes = jax.ShapeDtypeStruct((*rows, packed_length(length, get_format(kind.format).bits)), np.uint8)
    floats = jax.ShapeDtypeStruct((*rows, blocks), kind.scale_dtype)
    scale: Any = floats
    if kind.packed_scales:
        bits = get_format(kind.packed_scales).bits
        inner = jax.ShapeDtypeStruct((*rows, packed_length(groups, bits)), np.uint8)
        zero = jax.ShapeDtypeStruct((*(1 for _ in rows), blocks), np.uint8) if kind.from_zero else None
        scale = _scales(kind, inner, floats, zero)
    zero = jax.ShapeDtypeStruct((*(1 for _ in rows), groups), np.uint8) if kind.from_zero else None
    return _whole(kind, codes, scale, scale if kind.has_offset else None, zero)


def holds(kind: BlockType, q: QArray) -> bool:
    """Whether a (perhaps abstract) QArray has exactly the form that `to_qarray` gives."""
    if q.ndim < 2 or q.axis != -1 or q.shape[-1] % kind.length or q.format != kind.format:
        return False
    wanted, found = jax.tree.flatten(abstract(kind, q.shape)), jax.tree.flatten(dataclasses.replace(q, dtype="float32"))
    return wanted[1] == found[1] and all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(wanted[0], found[0], strict=True)
    )


def _assembled(kind: BlockType, codes: np.ndarray, scale: Any, offset: Any) -> QArray:
    groups = codes.shape[-1] * 8 // get_format(kind.format).bits // kind.group_size
    zero = np.zeros((*(1 for _ in codes.shape[:-1]), groups), np.uint8) if kind.from_zero else None
    return _whole(kind, codes, scale, offset, zero)


def _whole(kind: BlockType, codes: Any, scale: Any, offset: Any, zero: Any) -> QArray:
    return QArray(
        codes=codes, scale=scale, offset=offset, zero_point=zero, format=kind.format, group_size=kind.group_size,
        axis=-1, dtype="float32",
    )  # fmt: skip


def _packed(kind: BlockType, codes: np.ndarray, factor: np.ndarray) -> QArray:
    """Codes u8[..., B, groups] and their factors [..., B] as the QArray of a scale."""
    zero = np.zeros((*(1 for _ in factor.shape[:-1]), factor.shape[-1]), np.uint8) if kind.from_zero else None
    return _scales(kind, pack(_joined(codes), get_format(kind.packed_scales).bits), factor, zero)


def _scales(kind: BlockType, codes: Any, factor: Any, zero: Any) -> QArray:
    return QArray(
        codes=codes, scale=factor, zero_point=zero, format=kind.packed_scales, group_size=kind.groups, axis=-1,
        dtype="float32",
    )  # fmt: skip


def _codes_of(kind: BlockType, scale: QArray) -> np.ndarray:
    """The codes u8[..., B, groups] of a packed scale."""
    codes = unpack(np.asarray(scale.codes), scale.bits, scale.shape[-1])
    return codes.reshape(*codes.shape[:-1], -1, kind.groups)


def _joined(parts: np.ndarray) -> np.ndarray:
    return parts.reshape(*parts.shape[:-2], -1)


def _floats(part: Any, kind: BlockType) -> Any:
    return None if part is None else np.asarray(part, kind.scale_dtype)
