"""From a checked folder to a tree of arrays, each placed where its sharding says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.checkpoint import manifest, placement, structure
from jq4.checkpoint.arrays import read_group
from jq4.checkpoint.manifest import ArrayInfo, LeafInfo, Manifest, QArrayInfo, ScalarInfo, arrays_of
from jq4.errors import CheckpointError
from jq4.shardings import Shardings, check_used, chooser


def read_tree(data: Path, found: Manifest, shardings: Shardings) -> Any:
    """The tree that the data folder holds. `shardings`: see jq4.checkpoint.orbax.restore."""
    check_used(shardings, (leaf.path for leaf in found.leaves), "the checkpoint", CheckpointError)
    choose = chooser(shardings, CheckpointError)
    wanted: dict[str, dict[str, tuple[ArrayInfo, Any]]] = {}
    for leaf in found.leaves:
        if isinstance(leaf, ScalarInfo):
            continue
        for info, sharding in _place(leaf, choose(leaf.path, leaf.shape)):
            if info.array is not None:
                group, _, name = info.array.partition("/")
                wanted.setdefault(group, {})[name] = (info, sharding)
    read = {
        f"{group}/{name}": array
        for group, named in sorted(wanted.items())
        for name, array in read_group(data / group, named).items()
    }
    leaves = [_finish(leaf, read) for leaf in found.leaves]
    return structure.rebuild(found.tree, leaves)


def _place(leaf: ArrayInfo | QArrayInfo, sharding: Any) -> list[tuple[ArrayInfo, Any]]:
    """The arrays of a leaf with the sharding of each; None stands for numpy."""
    infos = list(arrays_of(leaf))
    if sharding is None:
        return [(info, placement.default_sharding() if jax_holds(info.dtype) else None) for info in infos]
    for info in infos:
        if not jax_holds(info.dtype):
            raise CheckpointError(f"{info.path}: {info.dtype} cannot be sharded while jax_enable_x64 is off; enable it")
    if isinstance(leaf, ArrayInfo):
        return [(leaf, placement.check_array(leaf.path, leaf.shape, sharding))]
    by_array = jax.tree.leaves(placement.qarray_shardings(leaf.path, manifest.abstract(leaf), sharding))
    return list(zip(_in_tree_order(leaf), by_array, strict=True))


def _in_tree_order(leaf: ArrayInfo | QArrayInfo) -> list[ArrayInfo]:
    marked = manifest.assemble(leaf, {info.path: info for info in arrays_of(leaf)})
    return jax.tree.leaves(marked)


def jax_holds(dtype: str) -> bool:
    """Whether an array of this dtype can be JAX's: 64-bit ones cannot while jax_enable_x64 is off."""
    return jax.dtypes.canonicalize_dtype(jnp.dtype(dtype)) == jnp.dtype(dtype)


def _finish(leaf: LeafInfo, read: Mapping[str, Any]) -> Any:
    if isinstance(leaf, ScalarInfo):
        return leaf.value
    parts = {info.path: _empty(info) if info.array is None else read[info.array] for info in arrays_of(leaf)}
    return manifest.assemble(leaf, parts)


def _empty(info: ArrayInfo) -> Any:
    empty = np.zeros(info.shape, jnp.dtype(info.dtype))
    return jax.device_put(empty) if jax_holds(info.dtype) else empty
