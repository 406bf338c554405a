"""Packed rules for what moves a weight's axes about: cast, transpose, reshape, slice, gather, and the identities.

A rule takes an equation and its input values, of which at least one is a PackedLeaf, and gives the outputs. Where
this equation has no packed form it raises `NoPackedForm`, and the leaf goes dense there.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jq4 import jax_compat, qarray_ops
from jq4.packed_leaf import PackedLeaf, is_packed
from jq4.qarray import PARTS, QArray
from jq4.qarray_ops import NoPackedForm

Values = list[Any]


def convert_element_type(eqn: Any, values: Values) -> Values:
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        raise NoPackedForm(f"a cast to {dtype}, which is not a float")
    leaf = values[0]
    return [dataclasses.replace(leaf, q=qarray_ops.astype(leaf.q, dtype))]


def transpose(eqn: Any, values: Values) -> Values:
    return [values[0].transposed(eqn.params["permutation"])]


def reshape(eqn: Any, values: Values) -> Values:
    if eqn.params["dimensions"] is not None:
        raise NoPackedForm("a reshape that also transposes")
    return [_reshaped(values[0], eqn.outvars[0].aval.shape)]


def broadcast_in_dim(eqn: Any, values: Values) -> Values:
    """Only what adds axes of one: the weight's own axes stay in their order, so it is a reshape."""
    leaf, shape = values[0], eqn.params["shape"]
    if math.prod(shape) != math.prod(leaf.shape):
        raise NoPackedForm(f"a broadcast of {leaf.shape} to {tuple(shape)}")
    return [_reshaped(leaf, shape)]


def squeeze(eqn: Any, values: Values) -> Values:
    return [_reshaped(values[0], eqn.outvars[0].aval.shape)]


def slice_(eqn: Any, values: Values) -> Values:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    leaf = values[0]
    for axis, bounds in enumerate(zip(starts, limits, strides, strict=True)):
        if bounds != (0, leaf.shape[axis], 1):
            leaf = _along(leaf, axis, lambda q, at, bounds=bounds: qarray_ops.slice_in_dim(q, *bounds, axis=at))
    return [leaf]


def dynamic_slice(eqn: Any, values: Values) -> Values:
    leaf, starts, sizes = values[0], values[1:], eqn.params["slice_sizes"]
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if size != leaf.shape[axis]:
            start = jnp.clip(start, 0, leaf.shape[axis] - size)  # the primitive's own meaning of a start outside
            leaf = _along(leaf, axis, lambda q, at, s=start, n=size: qarray_ops.dynamic_slice_in_dim(q, s, n, axis=at))
    return [leaf]


def split(eqn: Any, values: Values) -> Values:
    leaf, axis, pieces, start = values[0], eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        bounds = (start, start + size, 1)
        pieces.append(_along(leaf, axis, lambda q, at, bounds=bounds: qarray_ops.slice_in_dim(q, *bounds, axis=at)))
        start += size
    return pieces


def rev(eqn: Any, values: Values) -> Values:
    """The weight backwards along axes that are not the grouped one (the kernel of a transposed convolution)."""
    leaf, axes = values[0], eqn.params["dimensions"]
    q = qarray_ops.plain_scales(qarray_ops.neutral(leaf.settle(), "rev"))
    if q.axis % q.ndim in axes or q.permutation is not None:
        raise NoPackedForm(f"reversing axes {axes} of {q!r}, which would cut through its groups or its row order")
    return [leaf.holding(jax.tree.map(lambda part: lax.rev(part, axes), q))]


def gather(eqn: Any, values: Values) -> Values:
    """Slices that are whole along the grouped axis (`jnp.take`, `w[i]`): the same gather of codes and of scales.

    Matrices stay packed (an expert of a stack); single rows (an embedding's) are dequantized, and only they.
    """
    leaf, indices = values
    if not is_packed(leaf):
        raise NoPackedForm("a packed array of indices")
    q = qarray_ops.plain_scales(qarray_ops.neutral(leaf.settle(), "gather"))
    numbers, sizes, grouped = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], q.axis % q.ndim
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    if sizes[grouped] != q.shape[grouped] or grouped in gone or not _fills_with_nan(eqn):
        raise NoPackedForm(f"a gather of parts of the grouped axis {q.axis}, or with a fill value")
    if q.permutation is not None and q.permutation.ndim > 1:
        raise NoPackedForm("a gather of stacked activation-ordered weights")

    def taken(part: Any) -> Any:
        if part is None:
            return None
        spread = [
            part.shape[axis] if size == q.shape[axis] and axis not in gone else q.shape[axis]
            for axis, size in enumerate(sizes)
        ]
        part_sizes = [part.shape[axis] if size == q.shape[axis] else size for axis, size in enumerate(sizes)]
        part_sizes = [1 if axis in gone else size for axis, size in enumerate(part_sizes)]
        options = {name: eqn.params[name] for name in ("indices_are_sorted", "unique_indices", "mode")}
        return lax.gather(jnp.broadcast_to(part, spread), indices, numbers, part_sizes, **options)

    slice_axes = [axis for axis in range(q.ndim) if axis not in gone]
    parts = {name: taken(getattr(q, name)) for name in PARTS if name != "permutation"}
    axis = numbers.offset_dims[slice_axes.index(grouped)] - parts["codes"].ndim
    result = PackedLeaf(dataclasses.replace(q, axis=axis, **parts), leaf.path)
    return [result if sum(sizes[axis] > 1 for axis in slice_axes) > 1 else result.dequantize()]


def _fills_with_nan(eqn: Any) -> bool:
    """Whether what an index out of bounds gives is NaN, as scales filled with NaN give it."""
    fill = eqn.params["fill_value"]
    return fill is None or bool(np.isnan(fill))


def concatenate(eqn: Any, values: Values) -> Values:
    """Packed weights of one format beside one another along an axis that is not the grouped one (fused projections)."""
    axis = eqn.params["dimension"]
    if not all(map(is_packed, values)):
        raise NoPackedForm("a concatenation with a dense array")
    weights = [qarray_ops.plain_scales(qarray_ops.neutral(leaf.settle(), "concatenate")) for leaf in values]
    first = weights[0]
    structures = {jax.tree.structure(q) for q in weights}
    if axis == first.axis % first.ndim or len(structures) > 1 or first.permutation is not None:
        raise NoPackedForm("a concatenation along the grouped axis, or of different formats")
    if first.input_scale is not None or first.activation_scale is not None:
        raise NoPackedForm("a concatenation of weights with scales of their inputs")

    def join(name: str) -> Any:
        parts = [getattr(q, name) for q in weights]
        if parts[0] is None:
            return None
        spread = [_spelled_out(part, q, axis) for part, q in zip(parts, weights, strict=True)]
        return lax.concatenate(spread, axis)

    names = ("codes", "scale", "zero_point", "offset")
    path = " + ".join(dict.fromkeys(leaf.path for leaf in values))
    return [PackedLeaf(dataclasses.replace(first, **{name: join(name) for name in names}), path)]


def scale_by_scalar(eqn: Any, values: Values) -> Values:
    """Times, or divided by, one number: the scales take it."""
    leaf, number = values if is_packed(values[0]) else reversed(values)
    divided = eqn.primitive.name == "div"
    if is_packed(number) or jnp.ndim(number) != 0 or (divided and not is_packed(values[0])):
        raise NoPackedForm("a product with an array")
    number = jnp.asarray(number, jnp.promote_types(leaf.dtype, jnp.float32))
    return [_rescaled(leaf, 1 / number if divided else number)]


def negate(eqn: Any, values: Values) -> Values:
    return [_rescaled(values[0], jnp.float32(-1))]


def identity(eqn: Any, values: Values) -> Values:
    return [values[0]]


def stop_gradient(eqn: Any, values: Values) -> Values:
    return [jax.tree.map(lax.stop_gradient, values[0])]


def on_every_part(eqn: Any, values: Values) -> Values:
    """Operations that are the same for any array: pvary, pcast, copy, optimization_barrier."""
    leaves, structure = jax.tree.flatten(values)
    if eqn.primitive.multiple_results:
        return jax.tree.unflatten(structure, jax_compat.bind(eqn, leaves))
    return jax.tree.unflatten(structure, [jax_compat.bind(eqn, [leaf])[0] for leaf in leaves])


# ---------------------------------------------------------------------------------------------------------------


def _reshaped(leaf: PackedLeaf, shape: Any) -> PackedLeaf:
    if tuple(shape) == leaf.shape:
        return leaf
    return leaf.holding(qarray_ops.reshape(leaf.settle(), shape))


def _along(leaf: PackedLeaf, axis: int, function: Any) -> PackedLeaf:
    """`function` on the QArray at the axis that stands for `axis`; a pending transpose stays pending."""
    return dataclasses.replace(leaf, q=function(leaf.q, leaf.axes[axis]))


def _spelled_out(part: jax.Array, q: QArray, axis: int) -> jax.Array:
    shape = list(part.shape)
    shape[axis] = q.shape[axis]
    return jnp.broadcast_to(part, shape)


def _rescaled(leaf: PackedLeaf, factor: jax.Array) -> PackedLeaf:
    """The weight times a number: scale and offset in its dtype (float32), since their own would round the product."""
    q = qarray_ops.plain_scales(leaf.q)

    def scaled(part: Any) -> Any:
        return None if part is None else part.astype(factor.dtype) * factor

    return dataclasses.replace(leaf, q=dataclasses.replace(q, scale=scaled(q.scale), offset=scaled(q.offset)))


RULES = {
    "convert_element_type": convert_element_type,
    "transpose": transpose,
    "reshape": reshape,
    "broadcast_in_dim": broadcast_in_dim,
    "squeeze": squeeze,
    "slice": slice_,
    "dynamic_slice": dynamic_slice,
    "split": split,
    "rev": rev,
    "gather": gather,
    "concatenate": concatenate,
    "mul": scale_by_scalar,
    "div": scale_by_scalar,
    "neg": negate,
    "copy": identity,
    "copy_p": identity,
    "name": identity,
    "stop_gradient": stop_gradient,
    "pvary": on_every_part,
    "pcast": on_every_part,
    "optimization_barrier": on_every_part,
}
