"""Training on several devices: rows cut over all of them, and weights over some (data-parallel, FSDP).

A mesh of two axes, data x fsdp. Each device takes its rows of a batch, [A, B/A, ...] cut along B/A over both. What is
trained, its moments and what is fixed beside it lie whole on each of the `data` and cut over the `fsdp` (ZeRO-3,
Rajbhandari et al. 2020; Zhao et al. 2023): XLA gathers a weight where it is used, a layer at a time under a scan, and
scatters its gradient. fsdp = 1 is plain data parallelism; fsdp = all devices holds the least.

Which axis of an array is cut? The last one that the devices divide, but the leading axis of a stack only where there
is no other: along it a scan slices. It is a rule of shapes alone, so that a weight [L, K, N], its moments and its
quantizer [L, G, N] are cut alike, along N, and rounding needs no other device's groups. Of a packed leaf the grouped
axis is left alone.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jq4.errors import JQ4Error
from jq4.qarray import QArray, is_qarray

DATA, FSDP = "data", "fsdp"
_SMALLEST = 2**12  # elements below which an array is left whole: a gather would cost more than it saves


def training_mesh(fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices, weights cut over `fsdp` of them.

    Raises:
      JQ4Error: the number of devices is no multiple of `fsdp`.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or len(devices) % fsdp:
        raise JQ4Error(f"fsdp is {fsdp}, wanted a divisor of the {len(devices)} devices")
    return Mesh(np.asarray(devices).reshape(-1, fsdp), (DATA, FSDP))


def shardings_over(mesh: Mesh, tree: Any, smallest: int = _SMALLEST) -> Any:
    """A NamedSharding for every array of a tree (or of its shapes), those of QArrays' parts too."""
    ways = mesh.shape[FSDP]

    def of_leaf(leaf: Any) -> Any:
        if is_qarray(leaf):
            return jax.tree.map(lambda part: NamedSharding(mesh, _spec(part.shape, ways, smallest, leaf)), leaf)
        return NamedSharding(mesh, _spec(leaf.shape, ways, smallest))

    return jax.tree.map(of_leaf, tree, is_leaf=is_qarray)


def placed_over(mesh: Mesh, tree: Any) -> Any:
    """The tree on the devices of the mesh."""
    return jax.device_put(tree, shardings_over(mesh, tree))


def rows_over(mesh: Mesh) -> NamedSharding:
    """Where a batch [A, B/A, ...] lies."""
    return NamedSharding(mesh, PartitionSpec(None, (DATA, FSDP)))


def _spec(shape: tuple[int, ...], ways: int, smallest: int, packed: QArray | None = None) -> PartitionSpec:
    if ways == 1 or np.prod(shape) < smallest:
        return PartitionSpec()
    axes = [axis for axis in range(-1, -len(shape) - 1, -1) if packed is None or axis != packed.axis]
    inner = [axis for axis in axes if len(shape) < 3 or axis != -len(shape)]
    for axis in (*inner, *axes):
        if shape[axis] % ways == 0:
            entries = [None] * len(shape)
            entries[axis] = FSDP  # type: ignore[call-overload]
            return PartitionSpec(*entries)
    return PartitionSpec()
