"""One leaf to a QArray, in bounded work space.

A method that tells what it found of each slice (GPTQ) goes through the slices by itself. Any other is one program, in
which slices of a stacked leaf and strips of a matrix are worked on one after another, a few million weights at a time,
however large the leaf; all at once where several devices share it.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jq4.methods import get_method
from jq4.qarray import QArray
from jq4.rounding import Encoding

_WORK_ELEMENTS = 2**22  # weights of a leaf that are worked on at a time


def quantize_leaf(
    weight: jax.Array,
    statistics: Any,
    method: str,
    encoding: Encoding,
    options: Mapping[str, Any],
    release: Callable[[str], None] | None = None,
) -> tuple[QArray, Any]:
    """One leaf float[*B, K, N] as a QArray, and what its method found of its slices, if it tells.

    Args:
      statistics: of the leaf; None for a method that looks at none.
      release: called with the name of each sum of the statistics, such as "cross_total", that has been used.
    """
    row = get_method(method)
    if row.diagnosed is not None:
        return row.diagnosed(weight, statistics, encoding, release=release, **options)
    packed = _in_parts(weight, statistics, method, encoding, tuple(options.items()), _work_of(weight))
    if release is not None:
        release("cross_total")
    return packed, None


@functools.partial(jax.jit, static_argnames=("method", "encoding", "options", "work"))
def _in_parts(
    weight: jax.Array,
    statistics: Any,
    method: str,
    encoding: Encoding,
    options: tuple[tuple[str, Any], ...],
    work: int | None,
) -> QArray:
    """Slices one by one, or `work` of the leaf's weights or fewer at a time; all together where that is None."""

    def run(weight: jax.Array, statistics: Any = None) -> QArray:
        return get_method(method).quantize(weight, statistics, encoding, **dict(options))

    if work is None:
        return run(weight, statistics)
    if statistics is not None:
        return _over_stack(run, weight, statistics)
    return _over_slices(lambda part: _over_columns(run, part, encoding, work), weight, encoding, work)


def _over_stack(run: Callable[..., QArray], weight: jax.Array, statistics: Any) -> QArray:
    """`run` on the slices that have statistics of their own (layers, experts), one after another."""
    leading = statistics.count.shape
    if not leading or weight.shape[: len(leading)] != leading:
        return run(weight, statistics)
    flat = jax.tree.map(lambda part: part.reshape(-1, *part.shape[len(leading) :]), (weight, statistics))
    found = jax.lax.map(lambda each: run(*each), flat)
    return jax.tree.map(lambda part: part.reshape(*leading, *part.shape[1:]), found)


def _over_slices(run: Callable[[jax.Array], QArray], weight: jax.Array, encoding: Encoding, work: int) -> QArray:
    """`run` on the stacked slices of a weight, a few at a time."""
    leading = weight.shape[: weight.ndim + min(encoding.axis, -2)]
    slices = math.prod(leading)
    at_once = max(1, work * slices // weight.size)
    if at_once >= slices:
        return run(weight)
    flat = weight.reshape(slices, *weight.shape[len(leading) :])
    packed = jax.lax.map(run, flat, batch_size=at_once if at_once > 1 else None)
    return jax.tree.map(lambda part: part.reshape(*leading, *part.shape[1:]), packed)


def _over_columns(run: Callable[[jax.Array], QArray], weight: jax.Array, encoding: Encoding, work: int) -> QArray:
    """`run` on strips of a weight, cut along its longest axis but the grouped one, which no group crosses."""
    others = [axis for axis in range(-weight.ndim, 0) if axis != encoding.axis]
    if weight.size <= work or encoding.per_tensor or not others:
        return run(weight)
    axis = max(others, key=lambda axis: weight.shape[axis])
    length = weight.shape[axis]
    width = max(1, length * work // weight.size)

    def strip(i: jax.Array, packed: QArray) -> QArray:
        start = jnp.minimum(i * width, length - width)  # the last strip overlaps the one before it, with equal codes
        part = run(jax.lax.dynamic_slice_in_dim(weight, start, width, axis % weight.ndim))
        return jax.tree.map(
            lambda whole, piece: jax.lax.dynamic_update_slice_in_dim(whole, piece, start, axis % weight.ndim),
            packed,
            part,
        )

    empty = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), jax.eval_shape(run, weight))
    return jax.lax.fori_loop(0, -(-length // width), strip, empty)


def _work_of(leaf: Any) -> int | None:
    """How many weights of a leaf are worked on at a time; None, for all, where many devices share it."""
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    return _WORK_ELEMENTS if sharding is None or len(sharding.device_set) == 1 else None
