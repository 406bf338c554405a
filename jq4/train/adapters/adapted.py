"""A weight with its adapter on its way through a traced function.

The weight (a PackedLeaf, or a dense array: plain LoRA) is moved about as the function says. The adapter is not: it
keeps the leaf's own axes, and only slices reach it. The value knows which axes of the leaf its own are (jq4.watched),
so that the product which it meets can multiply by A and by B in their place.
"""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jq4.packed_leaf import PackedLeaf, is_packed
from jq4.train.adapters.adapter import RANK, ROWS, Adapter
from jq4.train.adapters.labelled import product
from jq4.watched import Atom, Watched


@dataclasses.dataclass(frozen=True)
class Part:
    """A or B split as the value's axes are: an array, and what its axes are: atoms' ids, and the rank."""

    array: jax.Array
    axes: tuple[Hashable, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("array", "indices", "a", "b", "keys"),
    meta_fields=("path", "axes", "loops", "indexed", "a_axes", "b_axes", "key_axes", "scaling", "dropout"),
)
@dataclasses.dataclass(frozen=True)
class Adapted(Watched):
    """A leaf and its adapter, or what moving the leaf's axes made of it.

    Attributes:
      array: the weight, a PackedLeaf or a dense array.
      a, b, keys: of the adapter, with the axes of the leaf that `a_axes`, `b_axes` and `key_axes` name; keys may have
        ROWS besides.
      scaling: what A B is multiplied by.
      dropout: what share of A's inputs is dropped, where there are keys.
    """

    a: Any = None
    b: Any = None
    keys: Any = None
    a_axes: tuple[int, ...] = ()
    b_axes: tuple[int, ...] = ()
    key_axes: tuple[Hashable, ...] = ()
    scaling: float = 1.0
    dropout: float = 0.0

    @classmethod
    def of(cls, base: PackedLeaf | jax.Array, adapter: Adapter, path: str) -> "Adapted":
        whole, keys = cls.whole(base, path), adapter.dropout_keys
        key_axes: tuple[Hashable, ...] = ()
        if keys is not None:
            key_axes = (*adapter.stacked, *[ROWS] * (keys.ndim - len(adapter.stacked)))
        return dataclasses.replace(
            whole, a=adapter.a, b=adapter.b, keys=keys,
            a_axes=adapter.a_axes, b_axes=adapter.b_axes, key_axes=key_axes,
            scaling=adapter.scaling, dropout=adapter.dropout,
        )  # fmt: skip

    @property
    def drops(self) -> bool:
        """Whether inputs are dropped."""
        return bool(self.dropout) and self.keys is not None

    @property
    def drops_by_row(self) -> bool:
        """Whether each row of the inputs has a key of its own."""
        return self.drops and ROWS in self.key_axes

    @property
    def is_packed(self) -> bool:
        return is_packed(self.array)

    def dense(self) -> Any:
        """The weight alone, dense."""
        return self.array.dequantize() if is_packed(self.array) else self.array

    def delta(self) -> jax.Array:
        """scaling * A B, f32 in the shape of the value."""
        (a, b), names = self.parts(), [atom.id for run in self.axes for atom in run]
        return product(a.array, a.axes, b.array, b.axes, names, "highest").reshape(self.shape) * self.scaling

    def parts(self) -> tuple[Part, Part]:
        """A and B with every axis split as the value's axes are."""
        atoms: dict[int, list[Atom]] = {}
        for run in self.axes:
            for atom in run:
                atoms.setdefault(atom.axis, []).append(atom)
        return _split(self.a, self.a_axes, atoms), _split(self.b, self.b_axes, atoms)

    # Slices -------------------------------------------------------------------------------------------------------

    def whole_axis(self, axis: int) -> int | None:
        """The axis of the leaf that an axis of the value is, where it is one, unsplit and alone."""
        run = self.axes[axis]
        return run[0].axis if len(run) == 1 and len(run[0].id) == 1 else None

    def cut(self, axis: int, size: int, take: Any) -> "Adapted":
        """The value of which `take(array, axis)` cuts `size` elements along `axis`, a whole one; but the weight."""
        leaf_axis = self.whole_axis(axis)

        def cut(part: Any, axes: Sequence[Hashable]) -> Any:
            return take(part, axes.index(leaf_axis)) if leaf_axis in axes else part

        runs = (*self.axes[:axis], (Atom((leaf_axis,), size),), *self.axes[axis + 1 :])  # type: ignore[arg-type]
        return dataclasses.replace(
            self, axes=runs, a=cut(self.a, self.a_axes), b=cut(self.b, self.b_axes), keys=cut(self.keys, self.key_axes)
        )

    def leading_first(self) -> "Adapted":
        """Every part with the value's leading axis in front, which is whole: so that a scan can cut them all."""
        axis, length = self.whole_axis(0), self.shape[0]
        assert axis is not None

        def front(part: Any, axes: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
            if axis not in axes:
                return jnp.broadcast_to(part, (length, *part.shape)), (axis, *axes)
            place = axes.index(axis)
            return jnp.moveaxis(part, place, 0), (axis, *axes[:place], *axes[place + 1 :])

        (a, a_axes), (b, b_axes) = front(self.a, self.a_axes), front(self.b, self.b_axes)
        keys, key_axes = (None, ()) if self.keys is None else front(self.keys, self.key_axes)
        return dataclasses.replace(self, a=a, b=b, keys=keys, a_axes=a_axes, b_axes=b_axes, key_axes=key_axes)

    def without_leading(self) -> "Adapted":
        """Inside the body of a scan, which has cut every part along its first axis."""
        return dataclasses.replace(
            self, axes=self.axes[1:], a_axes=self.a_axes[1:], b_axes=self.b_axes[1:], key_axes=self.key_axes[1:]
        )

    # Other changes ------------------------------------------------------------------------------------------------

    def times(self, base: Any, factor: Any) -> "Adapted":
        """The value times a number, of which `base` is the weight."""
        return dataclasses.replace(self, array=base, b=self.b * jnp.asarray(factor, self.b.dtype))

    def stopped(self, base: Any) -> "Adapted":
        return dataclasses.replace(self, array=base, a=lax.stop_gradient(self.a), b=lax.stop_gradient(self.b))

    def specs(self, spec: Sequence[Any], base: Any) -> "Adapted | None":
        """PartitionSpecs in the place of all parts, for a value cut by `spec`; None where a part of an axis is cut."""
        entries = (*spec, *[None] * (len(self.axes) - len(spec)))
        cut = {self.whole_axis(i): entry for i, entry in enumerate(entries) if entry is not None}
        if None in cut:
            return None

        def of(axes: Sequence[Any]) -> PartitionSpec:
            return PartitionSpec(*(cut.get(axis) for axis in axes))

        keys = None if self.keys is None else of(self.key_axes)
        return dataclasses.replace(self, array=base, a=of(self.a_axes), b=of(self.b_axes), keys=keys)


def _split(array: jax.Array, axes: Sequence[int], atoms: dict[int, list[Atom]]) -> Part:
    """A part with each of its axes split in the atoms of that axis; those that the value no longer has are one long."""
    shape: list[int] = []
    names: list[Hashable] = []
    for axis, size in zip(axes, array.shape, strict=True):
        if axis == RANK:
            shape.append(size)
            names.append(RANK)
            continue
        pieces = sorted(atoms.get(axis, ()))
        shape += [atom.size for atom in pieces]
        names += [atom.id for atom in pieces]
    return Part(array.reshape(shape), tuple(names))
