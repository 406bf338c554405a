"""What can be done to a packed weight without unpacking it: transposes, reshapes, casts, slices, gathers of rows.

Codes, scale, zero point and offset of a neutral QArray have the same axes (the grouped one shortened: bytes or
groups instead of rows), so whatever moves whole axes moves all four alike. A reshape may also merge axes into the
grouped one from the left, or split it, as long as every group and every packing unit stays whole:

    [H, D, O] -> [H*D, O]   grouped along D, D a multiple of the group (or one group a row of D)
    [H*D, O] -> [H, D, O]   the same, backwards

What has no packed form raises `NoPackedForm`, whose message says why. Layouts other than "neutral" keep the order
of their own axes and only learn a new logical one; where that is not enough they are re-laid, which is recorded.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jq4.errors import JQ4Error
from jq4.qarray import NEUTRAL, PARTS, QArray, dense, is_qarray
from jq4.record import note_relay
from pallas_kernels import packing


class NoPackedForm(JQ4Error):  # noqa: N818  it is caught and acted upon, seldom shown
    """This operation on a packed weight has no form that keeps it packed; the message says why."""


def astype(q: QArray, dtype: Any) -> QArray:
    """The same weight, dequantizing to `dtype`."""
    return dataclasses.replace(q, dtype=jnp.dtype(dtype).name)


def transpose(q: QArray, permutation: Sequence[int]) -> QArray:
    """`lax.transpose` of the weight: [d0, d1, ...] to [d_permutation[0], ...]."""
    order = [int(axis) % q.ndim for axis in permutation]
    if order == list(range(q.ndim)):
        return q
    if q.layout != NEUTRAL:
        return _transpose_prepared(q, order)
    stacked = _permutation_batch(q)
    if order[:stacked] != list(range(stacked)):
        raise NoPackedForm(
            f"transposing {order} moves the stacked axes of an activation-ordered weight of shape {q.shape}"
        )
    grouped = order.index(q.axis % q.ndim) - q.ndim
    moved = _map_parts(q, lambda part: jax.lax.transpose(part, order), lambda part: transpose(part, order))
    return dataclasses.replace(moved, axis=grouped)


def reshape(q: QArray, new_shape: Sequence[int]) -> QArray:
    """`lax.reshape` of the weight, in row-major order; the grouped axis stays, swallows axes on its left, or splits.

    Raises:
      NoPackedForm: groups or packing units would be broken, or the grouped axis merged with one on its right.
    """
    new_shape = tuple(int(size) for size in new_shape)
    if new_shape == q.shape:
        return q
    q = neutral(q, "reshape")
    before, after = math.prod(q.shape[: q.axis]), _product_after(q.shape, q.axis)
    stacked = _permutation_batch(q)
    if q.permutation is not None and new_shape[:stacked] != q.shape[:stacked]:
        raise NoPackedForm(
            f"reshaping {q.shape} to {new_shape} changes the stacked axes of an activation-ordered weight"
        )
    length = q.shape[q.axis]
    for axis in range(-len(new_shape), 0):  # the axis whose right side is what it was: the innermost part of K
        if _product_after(new_shape, axis) != after or (new_shape[axis] == 1 and length != 1):
            continue
        outer, inner = math.prod(new_shape[:axis]), new_shape[axis]
        if (outer, inner) == (before, length):
            return _reshape_parts(q, new_shape, axis)
        if outer * inner == before * length:
            return _regroup(q, inner, new_shape, axis)
    raise NoPackedForm(f"reshaping {q.shape} to {new_shape} merges the grouped axis {q.axis} with one on its right")


def slice_in_dim(q: QArray, start: int, limit: int, stride: int = 1, axis: int = 0) -> QArray:
    """`lax.slice_in_dim` along an axis that is not the grouped one."""
    return _along(q, axis, "slice", lambda part, at: jax.lax.slice_in_dim(part, start, limit, stride, at))


def dynamic_slice_in_dim(q: QArray, start: Any, size: int, axis: int = 0) -> QArray:
    """`lax.dynamic_slice_in_dim` along an axis that is not the grouped one."""
    return _along(q, axis, "dynamic_slice", lambda part, at: jax.lax.dynamic_slice_in_dim(part, start, size, at))


def index(q: QArray, i: Any, axis: int = 0) -> QArray:
    """Row `i` (an int or a traced scalar) of an axis that is not the grouped one; the axis goes."""
    row = dynamic_slice_in_dim(q, i, 1, axis)
    kept = [size for at, size in enumerate(row.shape) if at != axis % q.ndim]
    if row.layout != NEUTRAL or (row.permutation is not None and axis % q.ndim < _permutation_batch(row)):
        return _drop_leading(row, axis)
    return reshape(row, kept)


def take_rows(q: QArray, indices: jax.Array, axis: int = 0, mode: Any = "clip") -> QArray:
    """`jnp.take(weight, indices, axis)`, still packed: [V, D] by i32[*I] gives [*I, D]. `mode` as jnp.take's."""
    q = neutral(q, "gather")
    axis = axis % q.ndim
    _refuse_grouped(q, axis, "gather")
    if q.permutation is not None and axis < _permutation_batch(q):
        raise NoPackedForm("a gather of stacked activation-ordered weights")

    def take(part: jax.Array) -> jax.Array:
        if part.shape[axis] == 1 != q.shape[axis]:
            return part.reshape(*part.shape[:axis], *(1,) * indices.ndim, *part.shape[axis + 1 :])
        return jnp.take(part, indices, axis=axis, mode=mode)

    # axis is counted from the end: a gather on its left leaves it, one on its right pushes it further.
    moved = q.axis if axis < q.axis % q.ndim else q.axis - indices.ndim + 1
    return dataclasses.replace(_map_parts(q, take, lambda part: take_rows(part, indices, axis, mode)), axis=moved)


def neutral(q: QArray, why: str) -> QArray:
    """The weight in the neutral layout; re-laying is noted as the cost that it is."""
    if q.layout == NEUTRAL:
        return q
    from jq4.layouts import to_neutral

    note_relay(q, f"{why}: {q.layout} -> neutral")
    return to_neutral(q)


def plain_scales(q: QArray) -> QArray:
    """The same weight with dense scales, where they were packed themselves (double quantization)."""
    return dataclasses.replace(q, scale=dense(q.scale), offset=dense(q.offset))


def sliceable_scales(q: QArray) -> QArray:
    """The same weight with scales that can be cut along its leading axis: packed ones too, unless grouped along it."""

    def sliceable(part: Any) -> Any:
        return dense(part) if is_qarray(part) and part.axis == -part.ndim else part

    return dataclasses.replace(q, scale=sliceable(q.scale), offset=sliceable(q.offset))


# ---------------------------------------------------------------------------------------------------------------


def _map_parts(
    q: QArray, function: Callable[[jax.Array], jax.Array], packed: Callable[[QArray], QArray] | None = None
) -> QArray:
    """`function` on every part that has the weight's axes; the permutation stays.

    Scales and offsets that are packed themselves go through `packed`, which does the same to a weight; without it, or
    where it has no packed form for them, they are made dense.
    """
    moved: dict[str, Any] = {}
    for name in PARTS:
        part = getattr(q, name)
        if part is None or name == "permutation":
            continue
        if is_qarray(part):
            moved[name] = _packed_or_dense(part, function, packed)
        else:
            moved[name] = function(part)
    return dataclasses.replace(q, **moved)


def _packed_or_dense(
    part: QArray, function: Callable[[jax.Array], jax.Array], packed: Callable[[QArray], QArray] | None
) -> Any:
    if packed is not None:
        try:
            return packed(part)
        except NoPackedForm:
            pass
    return function(dense(part))


def _permutation_batch(q: QArray) -> int:
    return 0 if q.permutation is None else q.permutation.ndim - 1


def _product_after(shape: Sequence[int], axis: int) -> int:
    return math.prod(shape[axis:][1:])


def _full(part: jax.Array, q: QArray) -> jax.Array:
    """A scale with its broadcasting ones spelled out, so that axes can be merged."""
    shape = list(q.shape)
    shape[q.axis] = part.shape[q.axis]
    return jnp.broadcast_to(part, shape)


def _reshape_parts(q: QArray, new_shape: tuple[int, ...], axis: int) -> QArray:
    """The grouped axis keeps its length; everything on either side of it is reshaped freely."""

    def move(part: jax.Array, full: bool) -> jax.Array:
        ones = all(size == 1 for at, size in enumerate(part.shape) if at != q.axis % q.ndim)
        shape = [1] * len(new_shape) if ones and not full else list(new_shape)
        shape[axis] = part.shape[q.axis]
        return (part if ones else _full(part, q) if not full else part).reshape(shape)

    q = plain_scales(q)
    rest = {
        name: move(part, False) for name in ("scale", "zero_point", "offset") if (part := getattr(q, name)) is not None
    }
    return dataclasses.replace(q, codes=move(q.codes, True), axis=axis, **rest, **_inputs_reshaped(q, new_shape, axis))


def _regroup(q: QArray, inner: int, new_shape: tuple[int, ...], axis: int) -> QArray:
    """K rows become `inner` rows (more: merged with axes on the left; fewer: split). Groups and bytes stay whole."""
    q = plain_scales(q)
    if q.input_rotation and min(inner, q.shape[q.axis]) % q.input_rotation:
        raise NoPackedForm(f"reshaping {q.shape} to {new_shape} breaks blocks of {q.input_rotation} rotated inputs")
    length, shorter = q.shape[q.axis], min(inner, q.shape[q.axis])
    group = min(q.group_size, shorter)
    whole = shorter % group == 0 and max(inner, length) % shorter == 0 and shorter % packing.codes_per_unit(q.bits) == 0
    if not whole or q.padding or (q.group_size > shorter and q.num_groups > 1):
        raise NoPackedForm(
            f"reshaping {q.shape} to {new_shape} breaks groups of {q.group_size} along axis {q.axis}, "
            f"or the bytes of {q.bits}-bit codes"
        )
    if q.permutation is not None:
        raise NoPackedForm(
            f"reshaping {q.shape} to {new_shape} splits or merges the rows of an activation-ordered weight"
        )

    def regroup(part: jax.Array) -> jax.Array:
        full = _full(part, q)
        if group < q.group_size and length > inner:  # one group along K serves every piece that K is split into
            full = jnp.repeat(full, length // inner, axis=q.axis)
        shape = list(new_shape)
        shape[axis] = inner // group
        return full.reshape(shape)

    codes_shape = list(new_shape)
    codes_shape[axis] = packing.packed_length(inner, q.bits)
    rest = {name: regroup(part) for name in ("scale", "zero_point", "offset") if (part := getattr(q, name)) is not None}
    inputs = _inputs_reshaped(q, new_shape, axis)
    return dataclasses.replace(q, codes=q.codes.reshape(codes_shape), group_size=group, axis=axis, **rest, **inputs)


def _inputs_reshaped(q: QArray, new_shape: tuple[int, ...], axis: int) -> dict[str, jax.Array]:
    """input_scale and activation_scale of the reshaped weight; ones stay ones, so that products can place them."""
    parts = {name: getattr(q, name) for name in ("input_scale", "activation_scale") if getattr(q, name) is not None}
    return {name: _input_part_reshaped(part, name, q, new_shape, axis) for name, part in parts.items()}


def _input_part_reshaped(part: jax.Array, name: str, q: QArray, new_shape: tuple[int, ...], axis: int) -> jax.Array:
    grouped, at = q.axis % q.ndim, axis % len(new_shape)
    stacked = max((i + 1 for i, size in enumerate(part.shape) if i != grouped and size > 1), default=0)
    length = part.shape[grouped]
    kept_stack = stacked <= min(grouped, at) and new_shape[:stacked] == q.shape[:stacked]
    if kept_stack and (length == 1 or new_shape[at] == q.shape[grouped]):
        shape = [*part.shape[:stacked], *(1,) * (len(new_shape) - stacked)]
        shape[at] = length
        return part.reshape(shape)
    if length > 1 and stacked <= grouped:  # rows merge with axes on their left, or split: spelled out, in their order
        whole = jnp.broadcast_to(part, (*q.shape[: grouped + 1], *part.shape[grouped + 1 :]))
        return whole.reshape(*new_shape[: at + 1], *(1,) * (len(new_shape) - at - 1))
    raise NoPackedForm(f"reshaping {q.shape} to {new_shape} with {name} of shape {part.shape}")


def _refuse_grouped(q: QArray, axis: int, operation: str) -> None:
    if axis % q.ndim == q.axis % q.ndim:
        raise NoPackedForm(f"{operation} along axis {axis} of {q.shape}, which is the grouped one")


def _along(q: QArray, axis: int, operation: str, function: Callable[[jax.Array, int], jax.Array]) -> QArray:
    _refuse_grouped(q, axis, operation)
    at = axis % q.ndim
    stacked_prepared = q.layout != NEUTRAL and at < q.ndim - 2
    if not stacked_prepared:
        q = neutral(q, operation)
    size = q.shape[at]

    def move(part: jax.Array) -> jax.Array:
        return part if part.shape[at] == 1 != size else function(part, at)

    moved = _map_parts(
        q, move, lambda part: part if part.shape[at] == 1 != size else _along(part, at, operation, function)
    )
    if q.permutation is not None and at < _permutation_batch(q):
        moved = dataclasses.replace(moved, permutation=function(q.permutation, at))
    return moved


def _drop_leading(q: QArray, axis: int) -> QArray:
    at = axis % q.ndim
    permutation = q.permutation
    if permutation is not None and at < _permutation_batch(q):
        permutation = jnp.squeeze(permutation, at)
    dropped = _map_parts(q, lambda part: jnp.squeeze(part, at), lambda part: _drop_leading(part, axis))
    return dataclasses.replace(dropped, permutation=permutation)


def _transpose_prepared(q: QArray, order: list[int]) -> QArray:
    """Prepared codes keep their own order of K and N: swapping the last two logical axes costs nothing."""
    last = q.ndim - 2
    if sorted(order[:last]) != list(range(last)):
        return transpose(neutral(q, "transpose"), order)
    if order[:last] != list(range(last)):
        q = _map_parts(q, lambda part: jax.lax.transpose(part, [*order[:last], *range(last, part.ndim)]))
    if order[-1] != last:
        return q
    inputs = {name: getattr(q, name) for name in ("input_scale", "activation_scale") if getattr(q, name) is not None}
    swapped = {name: jnp.swapaxes(part, -1, -2) for name, part in inputs.items()}
    return dataclasses.replace(q, axis={-1: -2, -2: -1}[q.axis], **swapped)
