"""Leaves that are made when they are written, so that a tree is saved that is never whole in memory.

    tree = deferred_tree("model.jq4")                   # every leaf unread
    tree = tree_map(lambda leaf: leaf.then(f), tree)    # and f(leaf) once it is read
    jq4.save("other.jq4", tree)                         # read, changed and written leaf by leaf

A Deferred is a leaf to JAX, as a ShapeDtypeStruct is; only `save` makes it.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jq4.checkpoint import arrays, atomic, structure
from jq4.checkpoint.manifest import Manifest, ScalarInfo, arrays_of, assemble
from jq4.checkpoint.reading import jax_holds
from jq4.checkpoint.verification import check_listing, verify_files
from jq4.checkpoint.zarr_slices import StoredArray


@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """A leaf to be.

    Attributes:
      abstract: what is read, with a ShapeDtypeStruct for every array; `then` may make something else of it.
      make: what makes it, anew at every call.
    """

    abstract: Any
    make: Callable[[], Any]

    def then(self, change: Callable[[Any], Any]) -> "Deferred":
        """The same leaf, changed once it is made."""
        return Deferred(self.abstract, lambda: change(self.make()))


def shapes_of(tree: Any) -> Any:
    """The tree with what each Deferred reads in its place, as shapes."""
    return jax.tree.map(lambda leaf: leaf.abstract if isinstance(leaf, Deferred) else leaf, tree)


def stored_leaves(folder: Path, found: Manifest, verify: bool = True) -> dict[str, Any]:
    """Path -> leaf of a folder of jq4's own, scalars apart, with StoredArrays in the place of arrays.

    verify: whether every file's SHA-256 is checked first. Raises CheckpointError for what is missing or damaged.
    """
    data = folder / found.data
    (verify_files if verify else check_listing)(data, found)
    arrays.check_zarr(data, found)
    held = [leaf for leaf in found.leaves if not isinstance(leaf, ScalarInfo)]
    stored = {info.path: StoredArray(data, info) for leaf in held for info in arrays_of(leaf)}
    return {leaf.path: assemble(leaf, stored) for leaf in held}


def deferred_tree(folder: Path, found: Manifest) -> Any:
    """The tree of a folder of jq4's own with every leaf deferred; its files are checked, and stay while it is held."""
    data = atomic.reading(folder / found.data)
    data.__enter__()  # until the last leaf that may read there is gone
    leaves = stored_leaves(folder, found)

    def deferred(info: Any) -> Any:
        if isinstance(info, ScalarInfo):
            return info.value
        leaf = leaves[info.path]
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), leaf)
        return Deferred(shapes, lambda held=data: jax.tree.map(_read, leaf))

    return structure.rebuild(found.tree, [deferred(info) for info in found.leaves])


def _read(array: StoredArray) -> Any:
    return jnp.asarray(array[...]) if jax_holds(array.info.dtype) else array[...]
