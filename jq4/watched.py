"""A dense weight on its way through a traced function, that still knows which axes of its leaf its own are.

Every axis of the value is a run of atoms, each a piece of one axis of the leaf: `Atom((-2,), 64)` is the leaf's axis
-2 whole; splitting it gives `Atom((-2, 0), 4)` and `Atom((-2, 1), 16)`, whose ids sort in row-major order. So a weight
can be transposed, merged, split, sliced by a loop or indexed, and a product with it still tells which axes of the leaf
it contracts.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax


class Atom(NamedTuple):
    """A piece of a leaf's axis: its id (the axis, negative, then the path of splits) and its size."""

    id: tuple[int, ...]
    size: int

    @property
    def axis(self) -> int:
        return self.id[0]


Axes = tuple[tuple[Atom, ...], ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("array", "indices"),
    meta_fields=("path", "axes", "loops", "indexed"),
)
@dataclasses.dataclass(frozen=True)
class Watched:
    """A dense value made from one leaf by moving axes.

    Attributes:
      array: the value.
      indices: where the value was taken from along the axes `indexed`, one scalar each.
      path: the leaf's path.
      axes: for each axis of the value, the atoms of the leaf that it runs over.
      loops: the scans that the value is a slice of: (number of the scan, axis of the leaf), outermost first.
      indexed: axes of the leaf (with their sizes) of which the value is the slice at `indices`.
    """

    array: Any
    indices: tuple[Any, ...]
    path: str
    axes: Axes
    loops: tuple[tuple[int, int], ...] = ()
    indexed: tuple[Atom, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    @classmethod
    def whole(cls, array: Any, path: str) -> Self:
        ndim = len(array.shape)
        return cls(array, (), path, tuple((Atom((i - ndim,), size),) for i, size in enumerate(array.shape)))

    def holding(self, array: Any) -> "Watched":
        """The same axes over another array of this shape."""
        return dataclasses.replace(self, array=array)

    def moved(self, array: Any, axes: Axes) -> "Watched":
        """The value after its axes were moved."""
        return dataclasses.replace(self, array=array, axes=axes)

    def slice_of(self, loop: int) -> "Watched":
        """Inside the body of scan number `loop`, whose slices the array already is."""
        (leading,) = self.axes[0]
        return dataclasses.replace(self, axes=self.axes[1:], loops=(*self.loops, (loop, leading.axis)))

    def localised(self) -> "Watched":
        """Inside a shard_map: the same axes at the sizes of this device's shard."""
        axes = tuple(
            (run[0]._replace(size=size),) if len(run) == 1 else run
            for run, size in zip(self.axes, self.array.shape, strict=True)
        )
        return dataclasses.replace(self, axes=axes)

    def can_be_scanned(self) -> bool:
        return len(self.axes[0]) == 1 and len(self.axes[0][0].id) == 1

    def at(self, axis: int, index: Any, array: Any) -> "Watched | None":
        """The slice of size one at `index` along `axis`, which stays as an axis of one; None if not a whole axis."""
        atoms = self.axes[axis]
        if len(atoms) != 1 or len(atoms[0].id) != 1:
            return None
        axes = (*self.axes[:axis], (), *self.axes[axis + 1 :])
        return dataclasses.replace(
            self, array=array, axes=axes, indices=(*self.indices, index), indexed=(*self.indexed, atoms[0])
        )


def reshaped_axes(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The atoms of each axis after a row-major reshape to `shape`, splitting where they must; None if they cannot."""
    waiting = [atom for run in axes for atom in run][::-1]
    result = []
    for size in shape:
        run: list[Atom] = []
        missing = size
        while missing > 1:
            while waiting and waiting[-1].size == 1:
                waiting.pop()
            if not waiting:
                return None
            atom = waiting.pop()
            if missing % atom.size == 0:
                run.append(atom)
                missing //= atom.size
            elif atom.size % missing == 0:
                run.append(Atom((*atom.id, 0), missing))
                waiting.append(Atom((*atom.id, 1), atom.size // missing))
                missing = 1
            else:
                return None
        result.append(tuple(run))
    return tuple(result)


def size_of(atoms: Sequence[Atom]) -> int:
    return math.prod(atom.size for atom in atoms)
