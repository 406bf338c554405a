"""Packed weights moved on the host, in numpy, without unpacking a code: rows cut, axes swapped, rows joined.

A Hugging Face tensor is [N, K], grouped along K; a kernel of ours is [K, N]. Bytes are packed along K in both, so that
swapping the axes of codes, scales, zero points, offsets and scales of inputs alike is all there is to it, and whole
rows of N can be cut and joined. Scales that are packed themselves (jq4.double_quant) are weights of their own and may
be grouped along N: there a cut in the midst of a block makes the blocks smaller, each with the scale that it had.

`phantom` gives arrays of any shape that take no memory, so that what a move makes of a weight can be asked of its
description alone.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error
from jq4.formats import get_format
from jq4.qarray import PARTS, QArray, is_qarray

_STATIC = ("format", "axis", "padding", "activations", "input_rotation", "layout")
_STRIP = 256  # rows at a time, so that they stay in a cache
_LEVELLED = ("scale", "zero_point", "offset")


def phantom(abstract: Any) -> Any:
    """Arrays of these shapes and dtypes, all of one zero, for ShapeDtypeStructs (or anything with shape and dtype)."""
    return jax.tree.map(lambda one: np.broadcast_to(np.zeros((), one.dtype), one.shape), abstract)


def described(value: Any) -> Any:
    """The shapes and dtypes of an array or QArray."""
    return jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), value)


def transposed(value: Any) -> Any:
    """[*B, N, K] as [*B, K, N]; views."""
    if not is_qarray(value):
        return np.swapaxes(value, -1, -2)
    moved = _mapped(value, transposed)
    return dataclasses.replace(moved, axis=-3 - value.axis if value.axis in (-1, -2) else value.axis)


def rows(value: Any, start: int, stop: int) -> Any:
    """Rows [start, stop) of [*B, N, K] along N, where N is not the grouped axis; views."""
    if not is_qarray(value):
        return value[..., start:stop, :] if value.ndim > 1 else value[start:stop]
    if (start, stop) == (0, value.shape[-2]):
        return value
    if value.axis == -2:
        raise JQ4Error(f"rows {start} to {stop} of {value!r} are cut along its grouped axis; dequantize it first")
    return _mapped(value, lambda part: _rows_of_part(part, start, stop))


def joined(values: Sequence[QArray]) -> QArray:
    """Weights [N_i, K] of one format and grouping, one below the other, as [sum N_i, K].

    Raises JQ4Error, saying why, where that is not one packed weight.
    """
    first = values[0]
    for other in values[1:]:
        for name in (*_STATIC, "group_size"):
            if _static(first, name) != _static(other, name):
                raise JQ4Error(f"{name} is {_static(first, name)!r} in one and {_static(other, name)!r} in another")
        for name in ("permutation", "input_scale", "activation_scale"):
            if not _same(getattr(first, name), getattr(other, name)):
                raise JQ4Error(f"their {name} differs")
        for name in ("scale", "offset"):
            if _dtype_of(getattr(first, name)) != _dtype_of(getattr(other, name)):
                raise JQ4Error(f"{name} is {_dtype_of(getattr(first, name))} and {_dtype_of(getattr(other, name))}")
    pattern = pattern_of(values)
    values = [fitted(one, dataclasses.replace(pattern, zero_point=_whole_zeros(one, pattern))) for one in values]
    codes = np.concatenate([np.asarray(one.codes) for one in values], axis=-2)
    levelled = {
        name: _joined_parts([getattr(one, name) for one in values], [one.shape[-2] for one in values])
        for name in _LEVELLED
        if getattr(values[0], name) is not None
    }
    return dataclasses.replace(values[0], codes=codes, **levelled)


def layer(value: Any, index: int) -> Any:
    """Slice `index` of a stack [L, *B, N, K] as [*B, N, K]; views."""
    if not is_qarray(value):
        return value[index]
    moved = {
        name: layer(part, index if part.shape[0] > 1 else 0)
        for name in PARTS
        if (part := getattr(value, name)) is not None
    }
    return dataclasses.replace(value, **moved)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What packed weights of one format and grouping must agree in to be stacked; None and "" where they have none.

    Attributes:
      dtype: the weights' own; float32 where they differ.
      group_size: codes that share a scale.
      zero_point: shape and dtype.
      permuted: whether they have a permutation.
    """

    dtype: str
    group_size: int
    zero_point: tuple[tuple[int, ...], Any] | None
    permuted: bool


def pattern_of(values: Sequence[QArray]) -> Pattern:
    """The pattern of weights that share `structure_of`; nothing but shapes and dtypes is read."""
    first, zeros = values[0], [one.zero_point for one in values if one.zero_point is not None]
    zero_point = None
    if zeros:
        shapes, kinds = {tuple(zero.shape) for zero in zeros}, {np.dtype(zero.dtype) for zero in zeros}
        whole = list(first.shape)
        whole[first.axis] = first.num_groups
        kind = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
        zero_point = (shapes.pop() if len(shapes) == 1 else tuple(whole), kind)
    return Pattern(
        dtype=first.dtype if len({one.dtype for one in values}) == 1 else "float32",
        group_size=first.group_size if len({one.group_size for one in values}) == 1 else _group(first),
        zero_point=zero_point,
        permuted=any(one.permutation is not None for one in values),
    )


def fitted(q: QArray, pattern: Pattern) -> QArray:
    """The same weight in a pattern, exactly: a zero point at the format's center or a trivial permutation is added."""
    changed: dict[str, Any] = {"dtype": pattern.dtype, "group_size": pattern.group_size}
    if pattern.zero_point is not None:
        shape, kind = pattern.zero_point
        zero = get_format(q.format).center if q.zero_point is None else np.asarray(q.zero_point)
        changed["zero_point"] = np.broadcast_to(np.asarray(zero).astype(kind, copy=False), shape)
    if pattern.permuted and q.permutation is None:
        changed["permutation"] = np.arange(q.shape[q.axis], dtype=np.int32)
    return dataclasses.replace(q, **changed)


def structure_of(q: QArray) -> tuple[Any, ...]:
    """What weights must share so that one pattern fits them."""
    bare = dataclasses.replace(q, zero_point=None, permutation=None, dtype="float32", group_size=_group(q))
    leaves, tree = jax.tree.flatten(bare)
    return (tree, *((tuple(leaf.shape), np.dtype(leaf.dtype).name) for leaf in leaves))


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copies into a row-major array, casting; transposed bytes go eight at a time, which is five times as fast."""
    wide = source.ndim == 2 and source.dtype == target.dtype == np.uint8 and source.T.flags.c_contiguous
    if not wide or source.flags.c_contiguous or source.shape[0] % 8 or not target.flags.c_contiguous:
        np.copyto(target, source, casting="unsafe")
        return
    eights = target.reshape(-1, 8, target.shape[1])
    for start in range(0, source.shape[1], _STRIP):
        words = np.ascontiguousarray(source.T[start : start + _STRIP].view(np.uint64).T)
        eights[:, :, start : start + _STRIP] = words.view(np.uint8).reshape(len(eights), -1, 8).swapaxes(1, 2)


def _mapped(q: QArray, move: Callable[[Any], Any]) -> QArray:
    """`move` on every part with the weight's axes; the permutation stays."""
    names = [name for name in PARTS if name != "permutation" and getattr(q, name) is not None]
    return dataclasses.replace(q, **{name: move(getattr(q, name)) for name in names})


def _rows_of_part(part: Any, start: int, stop: int) -> Any:
    if part.shape[-2] == 1:
        return part
    if is_qarray(part) and part.axis == -2:
        finer = _finer(part, math.gcd(_group(part), start))
        group = finer.group_size
        cut = {name: getattr(finer, name)[..., start // group : -(-stop // group), :] for name in ("scale", "offset")}
        if finer.number_format.bits != 8:
            raise JQ4Error(f"scales packed in {finer.format} cannot be cut along their grouped axis")
        length = min(group, stop - start)
        return dataclasses.replace(finer, codes=finer.codes[..., start:stop, :], group_size=length, **cut)
    return rows(part, start, stop)


def _finer(q: QArray, group: int) -> QArray:
    """Packed scales grouped along -2 in smaller groups (a divisor of theirs), with an offset for every group."""
    groups, per = -(-q.shape[-2] // group), _group(q) // group

    def spread(part: Any) -> Any:
        part = np.asarray(part)
        return np.repeat(part, per, axis=-2)[..., :groups, :]

    offset = np.zeros((1,) * q.ndim, np.float32) if q.offset is None else np.asarray(q.offset)
    whole = offset.shape[-2] == 1
    shape = (*offset.shape[:-2], groups, offset.shape[-1])
    spelled = np.broadcast_to(offset, shape) if whole else spread(offset)
    return dataclasses.replace(q, scale=spread(q.scale), offset=spelled, group_size=group)


def _joined_parts(parts: list[Any], lengths: list[int]) -> Any:
    """Parts [*, N_i or 1, G], one below the other."""
    if is_qarray(parts[0]):
        return _joined_packed_scales(parts, lengths)
    width = max(part.shape[-1] for part in parts)
    if all(part.shape[-2] == 1 and np.array_equal(part, parts[0]) for part in parts):
        return parts[0]
    spelled = [
        np.broadcast_to(np.asarray(part), (*part.shape[:-2], length, width))
        for part, length in zip(parts, lengths, strict=True)
    ]
    return np.concatenate(spelled, axis=-2)


def _joined_packed_scales(parts: list[QArray], lengths: list[int]) -> QArray:
    if parts[0].axis == -1:
        return joined([_with_offset(part) for part in parts])
    # a block may be short only where it is the last
    group = math.gcd(*(_group(part) for part in parts), *lengths[:-1])
    finer = [_finer(part, group) for part in parts]
    moved = {name: np.concatenate([np.asarray(getattr(one, name)) for one in finer], -2) for name in ("codes", "scale")}
    widest = max(one.offset.shape[-1] for one in finer)
    offsets = [np.broadcast_to(one.offset, (*one.offset.shape[:-1], widest)) for one in finer]
    return dataclasses.replace(finer[0], **moved, offset=np.concatenate(offsets, -2))


def _whole_zeros(q: QArray, pattern: Pattern) -> Any:
    """The zero points of weights to be joined, one for every row of this one."""
    return None if pattern.zero_point is None else ((q.shape[-2], q.num_groups), pattern.zero_point[1])


def _with_offset(q: QArray) -> QArray:
    return q if q.offset is not None else dataclasses.replace(q, offset=np.zeros((1,) * q.ndim, np.float32))


def _group(q: QArray) -> int:
    return min(q.group_size, q.shape[q.axis])


def _static(q: QArray, name: str) -> Any:
    return _group(q) if name == "group_size" else getattr(q, name)


def _dtype_of(part: Any) -> str:
    if part is None:
        return "none"
    return f"packed {part.format}" if is_qarray(part) else jnp.dtype(part.dtype).name


def _same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and np.array_equal(np.asarray(one), np.asarray(other))
