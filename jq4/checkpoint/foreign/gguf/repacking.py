"""What a packed weight becomes in a GGUF type without being quantized anew: its codes stay what they are.

the type's own form (qarrays.py)          the same bytes
codes around zero, one scale a group      Q4_0, Q5_0, Q8_0, IQ4_NL, MXFP4, where the scales fit float16 (MXFP4: a
                                          power of two). A group of 64, 128, ... or a whole row repeats its scale
int4, int5 with zero points or offsets    Q4_1, Q5_1: the offset is the weight of code 0, rounded to float16
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jq4.checkpoint.foreign.gguf import qarrays
from jq4.checkpoint.foreign.gguf.block_types import PACKED, BlockType
from jq4.errors import JQ4Error
from jq4.qarray import NEUTRAL, QArray, is_qarray


@dataclasses.dataclass(frozen=True)
class Repacking:
    """How a QArray takes the form of a type: `form(q, name)`; loss and doubt as in writing.Planned."""

    form: Callable[[QArray, str], QArray]
    loss: str = ""
    doubt: str = ""


def repacking(kind: BlockType, q: QArray) -> Repacking | None:
    """The way of a (perhaps abstract) QArray into a type, or None where its codes have no place there."""
    if kind.dtype is not None or q.layout != NEUTRAL or q.permutation is not None or q.input_rotation:
        return None
    if q.input_scale is not None:
        return None
    if qarrays.holds(kind, q):
        return Repacking(lambda q, name: q)
    length = q.shape[-1]
    whole = q.group_size % kind.group_size == 0 or q.group_size >= length
    if kind.packed_scales or q.axis != -1 or q.format != kind.format or not whole or length % kind.length:
        return None
    if is_qarray(q.scale) or is_qarray(q.offset):
        return None
    if kind.has_offset:
        return _with_offset(kind, q)
    return _around_zero(kind, q) if q.zero_point is None and q.offset is None else None


def natural_type(q: QArray) -> BlockType | None:
    """The type that holds a QArray as it is, if there is one; perhaps with a doubt."""
    ways = ((kind, repacking(kind, q)) for kind in PACKED)
    return next((kind for kind, way in ways if way is not None and not way.loss), None)


def _around_zero(kind: BlockType, q: QArray) -> Repacking:
    target = kind.scale_dtype
    wanted = "a power of two" if kind.format == "fp4" else "a float16"

    def form(q: QArray, name: str) -> QArray:
        scale = np.asarray(q.scale).astype(np.float32)
        stored = scale.astype(target)
        off = stored.astype(np.float32) != scale
        if off.any():
            raise JQ4Error(
                f"{name}: the scale {scale[off].flat[0]:g} is not {wanted}, which {kind.name} keeps. "
                "Choose another --type; the weights are then quantized anew, which the plan says."
            )
        return _formed(kind, q, stored, None)

    exact = jnp.dtype(q.scale.dtype) == target
    return Repacking(form, doubt="" if exact else f"every scale must be {wanted}")


def _with_offset(kind: BlockType, q: QArray) -> Repacking:
    def form(q: QArray, name: str) -> QArray:
        scale = np.asarray(q.scale).astype(np.float32)
        zero = np.float32(q.number_format.center) if q.zero_point is None else np.asarray(q.zero_point, np.float32)
        offset = -scale * zero if q.offset is None else np.asarray(q.offset).astype(np.float32) - scale * zero
        stored = scale.astype(np.float16), np.broadcast_to(offset, np.broadcast_shapes(offset.shape, scale.shape))
        if not np.isfinite(stored[0]).all() or not (np.abs(offset) <= 65504).all():
            raise JQ4Error(f"{name}: a scale or offset is beyond float16, which {kind.name} keeps. Choose --type bf16.")
        return _formed(kind, q, stored[0], stored[1].astype(np.float16))

    rounded = "offsets" if jnp.dtype(q.scale.dtype) == np.float16 else f"scales ({q.scale.dtype}) and offsets"
    return Repacking(form, loss=f"{rounded} rounded to float16")


def _formed(kind: BlockType, q: QArray, scale: np.ndarray, offset: np.ndarray | None) -> QArray:
    """The same codes with a scale (and an offset) for every group of the type."""
    groups = q.shape[-1] // kind.group_size

    def spread(part: np.ndarray) -> np.ndarray:
        whole = np.broadcast_to(part, (*q.shape[:-1], part.shape[-1]))
        repeated = np.repeat(whole, min(q.group_size, q.shape[-1]) // kind.group_size, -1)
        return np.ascontiguousarray(repeated[..., :groups])

    zero = np.zeros((*(1 for _ in q.shape[:-1]), groups), np.uint8) if kind.from_zero else None
    spread_offset: Any = None if offset is None else spread(offset)
    return QArray(
        codes=q.codes, scale=spread(scale), zero_point=zero, offset=spread_offset, format=kind.format,
        group_size=kind.group_size, axis=-1, dtype="float32",
    )  # fmt: skip
