"""The watcher's rules: what keeps a weight watched, and what a product with it tells.

Each takes the watcher, an equation and its input values, of which at least one is Watched, and gives the outputs.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jq4.statistics import pair_statistics_of, ragged_statistics_of, statistics_of
from jq4.watched import Atom, Watched, reshaped_axes

Values = list[Any]


def same_axes(watcher: Any, eqn: Any, values: Values) -> Values:
    """A cast or an identity: one value in, the same axes out."""
    (out,) = watcher.compute(eqn, values)
    return [values[0].holding(out)]


def by_scalar(watcher: Any, eqn: Any, values: Values) -> Values:
    """A weight times or over a number is still that weight; anything else is a plain array."""
    (out,) = watcher.compute(eqn, values)
    weight, number = values if isinstance(values[0], Watched) else reversed(values)
    inverse = eqn.primitive.name == "div" and weight is values[1]
    return [out if inverse or len(number.shape) else weight.holding(out)]


def each_same_axes(watcher: Any, eqn: Any, values: Values) -> Values:
    outputs = watcher.compute(eqn, values)
    return [v.holding(out) if isinstance(v, Watched) else out for v, out in zip(values, outputs, strict=True)]


def transpose(watcher: Any, eqn: Any, values: Values) -> Values:
    (out,) = watcher.compute(eqn, values)
    weight = values[0]
    return [weight.moved(out, tuple(weight.axes[axis] for axis in eqn.params["permutation"]))]


def reshape(watcher: Any, eqn: Any, values: Values) -> Values:
    (out,) = watcher.compute(eqn, values)
    if eqn.params.get("dimensions") is not None or math.prod(out.shape) != math.prod(values[0].shape):
        return [out]
    axes = reshaped_axes(values[0].axes, out.shape)
    return [out if axes is None else values[0].moved(out, axes)]


def broadcast_in_dim(watcher: Any, eqn: Any, values: Values) -> Values:
    """Only what adds axes of one keeps the weight watched."""
    (out,) = watcher.compute(eqn, values)
    weight = values[0]
    if math.prod(out.shape) != math.prod(weight.shape):
        return [out]
    axes: list[tuple[Atom, ...]] = [()] * out.ndim
    for run, place in zip(weight.axes, eqn.params["broadcast_dimensions"], strict=True):
        axes[place] = run
    return [weight.moved(out, tuple(axes))]


def squeeze(watcher: Any, eqn: Any, values: Values) -> Values:
    (out,) = watcher.compute(eqn, values)
    gone = {axis % len(values[0].shape) for axis in eqn.params["dimensions"]}
    return [values[0].moved(out, tuple(run for axis, run in enumerate(values[0].axes) if axis not in gone))]


def slice_(watcher: Any, eqn: Any, values: Values) -> Values:
    (out,) = watcher.compute(eqn, values)
    return [_sliced(values[0], list(eqn.params["start_indices"]), out)]


def dynamic_slice(watcher: Any, eqn: Any, values: Values) -> Values:
    (out,) = watcher.compute(eqn, values)
    return [_sliced(values[0], values[1:], out)] if isinstance(values[0], Watched) else [out]


def _sliced(weight: Watched, starts: list[Any], out: jax.Array) -> Any:
    """A slice of size one along whole axes (a layer, an expert) stays watched; any other is plain."""
    cut = [axis for axis, (old, new) in enumerate(zip(weight.shape, out.shape, strict=True)) if old != new]
    current: Watched | None = weight.holding(out)
    for axis in cut:
        index = jnp.clip(starts[axis], 0, weight.shape[axis] - 1)  # as lax.dynamic_slice takes a start outside
        current = current.at(axis, index, out) if out.shape[axis] == 1 and current is not None else None
    return out if current is None else current


def gather(watcher: Any, eqn: Any, values: Values) -> Values:
    """Rows looked up in a table: the axis to group along is the one that is taken whole."""
    weight = values[0]
    outputs = watcher.compute(eqn, values)
    if isinstance(weight, Watched):
        rows = [axis for axis, size in enumerate(eqn.params["slice_sizes"]) if size > 1]
        if len(rows) == 1 and eqn.params["slice_sizes"][rows[0]] == weight.shape[rows[0]] and weight.axes[rows[0]]:
            watcher.looked_up.setdefault(weight.path, weight.axes[rows[0]][-1].axis)
    return outputs


def dot_general(watcher: Any, eqn: Any, values: Values) -> Values:
    outputs = watcher.compute(eqn, values)
    side = 1 if isinstance(values[1], Watched) else 0
    weight, x = values[side], values[1 - side]
    (contract, batch) = eqn.params["dimension_numbers"]
    pairs = sorted(
        (weight.axes[w], x_axis) for w, x_axis in zip(contract[side], contract[1 - side], strict=True) if weight.axes[w]
    )
    batched = sorted((weight.axes[w], x_axis) for w, x_axis in zip(batch[side], batch[1 - side], strict=True))
    features = [atom for run, _ in pairs for atom in run]
    if not features:
        return outputs
    watcher.note_contraction(weight, features, [atom for run, _ in batched for atom in run])
    if collect := watcher.collects(weight.path):
        x = watcher.narrowed(x.array if isinstance(x, Watched) else x)
        x_batch = [axis for _, axis in batched]
        x_features = [axis for _, axis in pairs]
        lost = [axis for axis in contract[1 - side] if axis not in x_features]  # axes of one that the weight ignores
        rows = [axis for axis in range(x.ndim) if axis not in (*x_batch, *x_features, *lost)]
        x = lax.transpose(x, (*x_batch, *rows, *lost, *x_features))
        sizes = [x.shape[i] for i in range(len(x_batch))]
        x = _drop_ones(x.reshape(*sizes, -1, math.prod(atom.size for atom in features)), batched)  # [*B, M, K]
        _summarize(watcher, weight, x, [run[0] for run, _ in batched if run], features, collect)
    return outputs


def _summarize(
    watcher: Any, weight: Watched, x: jax.Array, batch: list[Atom], features: list[Atom], collect: frozenset[str]
) -> None:
    """Adds the statistics of rows x[*batch, M, K]."""
    rows_only = watcher.is_at_top and not weight.indices
    if weight.path not in watcher.pair_axes:
        watcher.add(weight, batch, features, statistics_of(x, collect, rows_only))
        return
    pair = next((i for i, atom in enumerate(batch) if atom.axis == watcher.pair_axes[weight.path]), None)
    rest = [atom for i, atom in enumerate(batch) if i != pair]
    watcher.add(weight, rest, features, pair_statistics_of(x, pair, collect, rows_only))


def _drop_ones(x: jax.Array, batched: list[Any]) -> jax.Array:
    """x without the batch axes that are no axis of the leaf (they have size one)."""
    return jnp.squeeze(x, tuple(place for place, (run, _) in enumerate(batched) if not run))


def ragged_dot(watcher: Any, eqn: Any, values: Values) -> Values:
    """lhs [M, K] rows by expert, rhs [E, K, N]: statistics per expert.

    Of a pair (jq4.observe_pair) only the quantized side is looked at: the router may send other rows to an expert.
    """
    outputs = watcher.compute(eqn, values)
    x, weight, group_sizes = values[:3]
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, batch), groups = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
    if not isinstance(weight, Watched):
        return outputs
    paired = [run[0].axis for run in (weight.axes[axis] for axis in batch[1]) if run]
    pair = paired == [watcher.pair_axes.get(weight.path)] and len(batch[0]) == 1
    plain = len(groups) == 1 and (pair or not batch[0]) and len(contract[0]) == 1
    if not plain or not weight.axes[contract[1][0]]:
        return outputs
    features = list(weight.axes[contract[1][0]])
    watcher.note_contraction(weight, features, weight.axes[groups[0]])
    if collect := watcher.collects(weight.path):
        rows = jnp.moveaxis(x, contract[0][0], -1)
        if pair:
            rows, group_sizes = jnp.take(rows, 1, axis=batch[0][0]), group_sizes[1]
        statistics = ragged_statistics_of(rows.reshape(-1, rows.shape[-1]), group_sizes, collect)
        watcher.add(weight, list(weight.axes[groups[0]][:1]), features, statistics)
    return outputs


def convolution(watcher: Any, eqn: Any, values: Values) -> Values:
    """lhs an image, rhs a kernel: its inputs are the patches, flattened in the kernel's own axis order."""
    outputs = watcher.compute(eqn, values)
    x, kernel = values
    parameters = eqn.params
    numbers = parameters["dimension_numbers"]
    if not isinstance(kernel, Watched) or isinstance(x, Watched):
        return outputs
    _, in_axis, *spatial = numbers.rhs_spec
    if not kernel.axes[in_axis]:
        return outputs
    watcher.note_contraction(kernel, [kernel.axes[in_axis][-1]])
    collect = watcher.collects(kernel.path)
    ordinary = parameters["feature_group_count"] == 1 and parameters["batch_group_count"] == 1
    if not collect or not ordinary:
        return outputs
    shape = [kernel.shape[axis] for axis in spatial]
    patches = lax.conv_general_dilated_patches(
        x, shape, parameters["window_strides"], parameters["padding"], parameters["lhs_dilation"],
        parameters["rhs_dilation"], numbers, precision=lax.Precision.HIGHEST,
    )  # fmt: skip
    patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)  # [..., Cin * prod(spatial)], Cin outermost
    patches = patches.reshape(-1, kernel.shape[in_axis], *shape)  # [M, Cin, *spatial]
    kernel_axes = (in_axis, *spatial)
    order = sorted(range(len(kernel_axes)), key=lambda i: kernel_axes[i])
    rows = lax.transpose(patches, (0, *(1 + i for i in order))).reshape(patches.shape[0], -1)  # [M, K]
    features = [atom for i in order for atom in kernel.axes[kernel_axes[i]]]
    watcher.add(kernel, [], features, statistics_of(rows, collect, watcher.is_at_top and not kernel.indices))
    return outputs


RULES: dict[str, Callable[[Any, Any, Values], Values]] = {
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot,
    "ragged_dot": ragged_dot,
    "conv_general_dilated": convolution,
    "gather": gather,
    "transpose": transpose,
    "reshape": reshape,
    "broadcast_in_dim": broadcast_in_dim,
    "squeeze": squeeze,
    "slice": slice_,
    "dynamic_slice": dynamic_slice,
    "convert_element_type": same_axes,
    "neg": same_axes,
    "mul": by_scalar,
    "div": by_scalar,
    "reduce_precision": same_axes,
    "copy": same_axes,
    "copy_p": same_axes,
    "name": same_axes,
    "stop_gradient": same_axes,
    "sharding_constraint": same_axes,
    "pvary": each_same_axes,
    "pcast": each_same_axes,
    "optimization_barrier": each_same_axes,
}
