"""A QArray on its way through a traced function: it keeps its leaf's path, and a transpose of it costs nothing.

`order` is a transpose that is still to be done: axis i of the value is axis order[i] of the QArray. It is kept as
negative axes for the trailing axes that really move, so that a slice along a leading axis (a layer under scan) is
still right. A product reads it and contracts the other axis; what needs the axes moved calls `settle`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from jq4 import qarray_ops
from jq4.partition import Partition
from jq4.qarray import QArray


@functools.partial(jax.tree_util.register_dataclass, data_fields=("q",), meta_fields=("path", "order", "partition"))
@dataclasses.dataclass(frozen=True)
class PackedLeaf:
    """A packed value inside a traced function.

    Attributes:
      q: the packed weight.
      path: the path of the argument's leaf that it comes from.
      order: the pending transpose: () or a permutation of the last axes, as negative numbers.
      partition: how `q` lies on several devices, where that is known.
    """

    q: QArray
    path: str
    order: tuple[int, ...] = ()
    partition: Partition | None = None

    @property
    def axes(self) -> list[int]:
        """For each axis of the value, the axis of `q` that it is, from 0."""
        leading = self.q.ndim - len(self.order)
        return [*range(leading), *(axis + self.q.ndim for axis in self.order)]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.q.shape[axis] for axis in self.axes)

    @property
    def ndim(self) -> int:
        return self.q.ndim

    @property
    def dtype(self) -> str:
        return self.q.dtype

    @property
    def grouped_axis(self) -> int:
        """The axis of the value that the groups lie along, from 0."""
        return self.axes.index(self.q.axis % self.q.ndim)

    def transposed(self, permutation: Sequence[int]) -> "PackedLeaf":
        """The value with its axes permuted, which only changes `order`."""
        axes = self.axes
        return self.with_axes([axes[axis] for axis in permutation])

    def with_axes(self, axes: Sequence[int]) -> "PackedLeaf":
        ndim = self.q.ndim
        still = 0
        while still < ndim and axes[still] == still:
            still += 1
        return dataclasses.replace(self, order=tuple(axis - ndim for axis in axes[still:]))

    def settle(self) -> QArray:
        """The QArray with the pending transpose done."""
        return qarray_ops.transpose(self.q, self.axes) if self.order else self.q

    def holding(self, q: QArray) -> "PackedLeaf":
        """Another QArray made from this leaf, no transpose pending."""
        return PackedLeaf(q, self.path)

    def dequantize(self) -> jax.Array:
        dense = self.q.dequantize()
        return jax.lax.transpose(dense, self.axes) if self.order else dense


def is_packed(value: Any) -> bool:
    return isinstance(value, PackedLeaf)
