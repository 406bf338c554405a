"""What is known of a weight's inputs: the sums that calibration keeps, and how they are made and merged.

For a weight W that a function multiplies by inputs x of K features (all contraction axes of W, flattened in W's own
order), over all rows x of all batches seen:

    count          i32[*B]         rows seen
    absmax         f32[*B, K]      max |x|
    total          f32[*B, K]      sum x          -> mean
    square_total   f32[*B, K]      sum x**2       -> mean_square (the Hessian's diagonal)
    outer_total    f32[*B, K, K]   sum x x^T      -> hessian = E[x x^T]
    cross_total    f32[*B, K, K]   sum x y^T      -> cross = E[x y^T]; of jq4.observe_pair alone, see there: x are the
                                                   inputs in the dense model, and all the other sums are of y, the
                                                   inputs behind layers that are quantized already
    way_total      f32[*B, K, N]   sum y (x - y)^T W, in place of cross_total for one weight alone, where asked

`*B` are the axes along which there are many weights in one leaf: scanned layers, experts. Sums, not means, are kept,
so that statistics of two streams merge exactly as if they were one; zeros are the identity of every merge.
A Hessian is collected only where asked: for 14336 inputs it is 822 MB. Of a weight whose statistics serve no other the
outer_total may be in half the memory, as jq4.upper_squares.UpperSquares; `hessian` gives it whole.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jq4.errors import JQ4Error
from jq4.outer_rows import OuterRows
from jq4.product_inputs import expert_of_rows
from jq4.upper_squares import UpperSquares, whole

COLLECTABLE = ("absmax", "mean", "mean_square", "hessian")
CHEAP = ("absmax", "mean", "mean_square")
_STRIP = 64


LeafAxes = tuple[tuple[int, ...], tuple[int, ...]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightStatistics:
    """Statistics of one weight's inputs (see the module's text); what was not collected is None.

    `leaf_axes` are the axes of the leaf, negative, that are `*B` and that K is made of; None where nobody says.
    """

    count: Any
    absmax: Any = None
    total: Any = None
    square_total: Any = None
    outer_total: Any = None
    cross_total: Any = None
    way_total: Any = None
    leaf_axes: LeafAxes | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def mean(self) -> jax.Array:
        """E[x], f32[*B, K]."""
        return self._average(self.total, "mean", 1)

    @property
    def mean_square(self) -> jax.Array:
        """E[x**2], f32[*B, K]."""
        return self._average(self.square_total, "mean_square", 1)

    @property
    def hessian(self) -> jax.Array:
        """E[x x^T], f32[*B, K, K]."""
        return self._average(self.outer_total, "hessian", 2)

    @property
    def cross(self) -> jax.Array | None:
        """E[x y^T], f32[*B, K, K], x the dense model's inputs and y those counted here; None where there is no pair."""
        return None if self.cross_total is None else self._average(self.cross_total, "cross", 2)

    def _average(self, total: Any, name: str, feature_axes: int) -> jax.Array:
        if total is None:
            raise JQ4Error(f"{name} was not collected: call observe(..., collect=(..., {name!r}))")
        _check_kept(name, total)
        rows = jnp.maximum(self.count, 1).astype(jnp.float32)
        return whole(total) / jnp.expand_dims(rows, tuple(range(-feature_axes, 0)))

    def tells_axes(self, shape: tuple[int, ...], axis: int) -> bool:
        """Whether it is of a leaf's first axes, and of those that end with `axis`: as methods take K to be.

        Not so of "ikj,bij->bk", whose weight has an axis of outputs between those that are contracted. Axes of one do
        not count.
        """
        if self.leaf_axes is None:
            return True
        kept = [place for place in range(-len(shape), 0) if shape[place] != 1]
        leading, features = ([place for place in axes if place in kept] for axes in self.leaf_axes)
        if not features:
            return True
        last = kept.index(features[-1]) + 1
        ends_there = shape[axis] == 1 or features[-1] == axis
        return kept[: len(leading)] == leading and kept[last - len(features) : last] == features and ends_there


class ProductAxes(NamedTuple):
    """The axes of a leaf (negative, ascending) that a product contracts, and those that stack matrices of it."""

    contracted: tuple[int, ...]
    stacked: tuple[int, ...]


class ContractionAxes(dict[str, int]):
    """Path -> the axis (negative) to group along.

    Attributes:
      looked_up: the paths of tables that rows are looked up in.
      products: path -> all axes of the first product with the leaf that was seen.
    """

    def __init__(
        self, axes: Mapping[str, int], looked_up: Iterable[str] = (), products: Mapping[str, ProductAxes] | None = None
    ) -> None:
        super().__init__(axes)
        self.looked_up = frozenset(looked_up)
        self.products = dict(products or {})


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("weights",), meta_fields=("grouped_axes", "looked_up")
)
@dataclasses.dataclass(frozen=True)
class Statistics(Mapping[str, WeightStatistics]):
    """Statistics by leaf path, and the axis that each leaf is contracted along; a pytree.

    Attributes:
      weights: path -> WeightStatistics.
      grouped_axes: (path, negative axis of the leaf) for every leaf that the function contracts or looks up.
      looked_up: paths of the tables that rows are looked up in.
    """

    weights: dict[str, WeightStatistics]
    grouped_axes: tuple[tuple[str, int], ...] = ()
    looked_up: tuple[str, ...] = ()

    @property
    def axes(self) -> ContractionAxes:
        """Path -> the axis to group along, as jq4.contraction_axes gives it."""
        return ContractionAxes(dict(self.grouped_axes), self.looked_up)

    def __getitem__(self, path: str) -> WeightStatistics:
        return self.weights[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def check_collectable(collect: Collection[str]) -> frozenset[str]:
    """The names as a set; an error names the first that cannot be collected."""
    for name in collect:
        if name not in COLLECTABLE:
            raise JQ4Error(f"cannot collect {name!r}: wanted some of {', '.join(COLLECTABLE)}")
    return frozenset(collect)


def statistics_of(x: jax.Array, collect: frozenset[str], rows_only: bool = False) -> WeightStatistics:
    """Statistics of rows x[*B, M, K], computed in float32; of outer products `rows_only`, see `condensed`."""
    x = x.astype(jnp.float32)
    rows = jnp.full(x.shape[:-2], x.shape[-2], jnp.int32)
    outer = _outer(OuterRows(x), rows_only) if "hessian" in collect else None
    return WeightStatistics(
        count=rows,
        absmax=jnp.max(jnp.abs(x), axis=-2, initial=0.0) if "absmax" in collect else None,
        total=jnp.sum(x, axis=-2) if "mean" in collect else None,
        square_total=jnp.sum(x * x, axis=-2) if "mean_square" in collect else None,
        outer_total=outer,
    )


def pair_statistics_of(
    x: jax.Array, axis: int | None, collect: frozenset[str], rows_only: bool = False
) -> WeightStatistics:
    """Statistics of y, and those across, of rows x[*B, M, K] of which the batch axis `axis` (of two) holds x and y.

    Where there is no such axis, the rows are the same on both sides.
    """
    dense, mine = (x, x) if axis is None else (jnp.take(x, side, axis=axis).astype(jnp.float32) for side in (0, 1))
    statistics = statistics_of(mine, collect, rows_only)
    if "hessian" not in collect:
        return statistics
    across = OuterRows(dense.astype(jnp.float32), mine.astype(jnp.float32))
    return dataclasses.replace(statistics, cross_total=_outer(across, rows_only))


def _outer(rows: OuterRows, rows_only: bool) -> Any:
    return rows if rows_only else rows.total()


def ragged_statistics_of(x: jax.Array, group_sizes: jax.Array, collect: frozenset[str]) -> WeightStatistics:
    """Statistics per expert of rows x[M, K] sorted by expert, i32[E] rows each; rows beyond their sum are left out."""
    x = x.astype(jnp.float32)
    experts = group_sizes.shape[0]
    expert_of_row = expert_of_rows(group_sizes, x.shape[0])

    def sums(rows: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(rows, expert_of_row, experts)

    def outer_of(expert: jax.Array) -> jax.Array:
        mine = jnp.where((expert_of_row == expert)[:, None], x, 0.0)
        return jnp.einsum("mk,ml->kl", mine, mine, precision="highest")

    peak = jnp.maximum(jax.ops.segment_max(jnp.abs(x), expert_of_row, experts), 0.0)  # an empty segment gives -inf
    outer = jax.lax.map(outer_of, jnp.arange(experts)) if "hessian" in collect else None
    return WeightStatistics(
        count=group_sizes.astype(jnp.int32),
        absmax=peak if "absmax" in collect else None,
        total=sums(x) if "mean" in collect else None,
        square_total=sums(x * x) if "mean_square" in collect else None,
        outer_total=outer,
    )


def merge(a: WeightStatistics, b: WeightStatistics) -> WeightStatistics:
    """Statistics of both streams together; a total takes up rows where it lies, and rows are kept beside rows."""
    summed = jax.tree.map(_sum, a, b, is_leaf=_is_form)
    if a.absmax is None:
        return summed
    return dataclasses.replace(summed, absmax=jnp.maximum(a.absmax, b.absmax))


def settled(statistics: WeightStatistics, upper: bool = False) -> WeightStatistics:
    """The statistics with outer products summed; a Hessian's as UpperSquares where `upper`, if they are less."""
    outer = statistics.outer_total
    is_matrix = _is_rows(outer) and outer.x.ndim == 2
    if upper and is_matrix and UpperSquares.are_less(outer.x.shape[-1]) and statistics.cross_total is None:
        statistics = dataclasses.replace(statistics, outer_total=UpperSquares.zeros(outer.x.shape[-1]).added(outer.x))
    return jax.tree.map(lambda part: part.total() if _is_rows(part) else part, statistics, is_leaf=_is_form)


def condensed(statistics: WeightStatistics) -> WeightStatistics:
    """The statistics with outer products summed where their rows would take more memory."""

    def smaller(part: Any) -> Any:
        return part.total() if _is_rows(part) and not part.are_less else part

    return jax.tree.map(smaller, statistics, is_leaf=_is_form)


def _sum(a: Any, b: Any) -> Any:
    if isinstance(b, UpperSquares):
        a, b = b, a
    if isinstance(a, UpperSquares):
        if isinstance(b, UpperSquares):
            return dataclasses.replace(a, squares=a.squares + b.squares)
        return a.added(b.x) if _is_rows(b) else a.whole() + b
    if not _is_rows(a):
        return b.added_to(a) if _is_rows(b) else a + b
    if not _is_rows(b):
        return a.added_to(b)
    together = a.beside(b)
    return together if together.are_less else together.total()


def _is_rows(part: Any) -> bool:
    return isinstance(part, OuterRows)


def _is_form(part: Any) -> bool:
    return isinstance(part, OuterRows | UpperSquares)


def over_devices(local: WeightStatistics, axis_names: frozenset[str]) -> WeightStatistics:
    """Inside a shard_map: statistics of the rows of all devices along the named mesh axes together."""
    names = tuple(sorted(axis_names))
    if not names:
        return local
    summed = jax.tree.map(lambda leaf: jax.lax.psum(leaf, names), local)
    if local.absmax is None:
        return summed
    return dataclasses.replace(summed, absmax=jax.lax.pmax(local.absmax, names))


def check_finite(path: str, statistics: WeightStatistics) -> None:
    """Raises JQ4Error, naming the leaf, for sums that are not finite or given up; tracers are not looked at."""
    for field in dataclasses.fields(statistics)[:-1]:  # the sums
        total = getattr(statistics, field.name)
        parts = jax.tree.leaves(total)
        _check_kept(f"{path}: {field.name}", total)
        if any(isinstance(part, Tracer) for part in parts) or all(bool(_all_finite(part)) for part in parts):
            continue
        where = _bad_slices(total, statistics.count.ndim) if statistics.count.ndim else ""
        raise JQ4Error(
            f"{path}: its statistics are not finite ({field.name}{where}): calibration fed it a NaN, an Inf, or values "
            "whose squares overflow float32. Find the batch, or the layer before it, that makes them"
        )


def _check_kept(name: str, total: Any) -> None:
    """Raises JQ4Error for a sum that was deleted."""
    if any(
        isinstance(part, jax.Array) and not isinstance(part, Tracer) and part.is_deleted()
        for part in jax.tree.leaves(total)
    ):
        raise JQ4Error(
            f"{name} of these statistics was given up by a call with donate_stats=True: observe again, or quantize "
            "without it where statistics serve more than one call"
        )


def _bad_slices(total: jax.Array, leading: int) -> str:
    slices = total.reshape(-1, math.prod(total.shape[leading:]))
    bad = [int(i) for i in jnp.flatnonzero(~jnp.all(jnp.isfinite(slices), axis=-1))]
    return f" in slices {bad[:8]} of {len(slices)}"


@jax.jit
def _all_finite(values: jax.Array) -> jax.Array:
    """bool[]; strip by strip, for XLA's CPU compiler makes an array of what it then reduces."""
    count = min(len(values), _STRIP) if values.ndim else 0
    if not count:
        return jnp.all(jnp.isfinite(values))

    def strip(number: jax.Array, finite: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(values, number * count, count)  # the last overlaps the one before
        return finite & jnp.all(jnp.isfinite(part))

    return jax.lax.fori_loop(0, -(-len(values) // count), strip, jnp.bool(True))
