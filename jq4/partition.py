"""A weight that lies on several devices: what its sharding means for its parts, and its product, shard by shard.

Every axis but the grouped one is sharded alike in all parts, except where a scale has 1 (it is replicated there). The
grouped axis K over n shards must leave whole groups and whole packing units in each; with one group along K the scale
is replicated. Anything else would need the groups of another shard, and is refused with the sizes.

A kernel is a black box to XLA's partitioner (a TPU's is refused outright), and inside a `jax.jit` nothing tells how an
argument is sharded. So `quantized(f, shardings=...)` is told; each packed leaf carries its `Partition` to its
products, and these run under `jax.shard_map`, as the partitioner would cut the dense ones:

    N over n       x[M, K] whole     W[K, N/n]     out[M, N/n]           no communication
    K over n       x[M, K/n]         W[K/n, N]     out[M, N] summed      one all-reduce, in the result's own dtype
    mesh axes that the weight does not lie along cut the rows of x, where they divide them

(`jax.experimental.custom_partitioning`, which would be asked by the partitioner, has no TPU backend: jax #38196.)
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jq4.errors import JQ4Error
from jq4.paths import find_path, flatten_with_paths, leaf_path
from jq4.qarray import NEUTRAL, QArray, is_qarray
from pallas_kernels import packing
from pallas_kernels.int4_matmul.gpu_fragments import MULTIPLE_K
from pallas_kernels.int4_matmul.spec import HOPPER, TPU


@dataclasses.dataclass(frozen=True)
class Partition:
    """How a weight lies on a mesh: for each of its axes, the mesh axes that cut it.

    It is asked by axes counted from the end, so that a slice along a leading axis (a layer under scan) keeps it. A
    partition never changes what a product is, only who computes which part.
    """

    mesh: Any
    entries: tuple[tuple[str, ...], ...]

    def of_axis(self, axis: int) -> tuple[str, ...]:
        """The mesh axes that cut axis `axis`, a negative number."""
        return self.entries[axis] if -axis <= len(self.entries) else ()

    def ways(self, names: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[name] for name in names)


def chooser(shardings: Any) -> Callable[[str, tuple[int, ...]], Partition | None]:
    """A function (path, shape) -> Partition or None, from what `restore` takes: the shardings of the dense weights.

    `shardings` is None, one Sharding for all, a callable (path, shape) -> Sharding or None, or a tree of these (an
    inner node speaks for all below it).
    """
    if shardings is None:
        return lambda path, shape: None
    if isinstance(shardings, Sharding):
        return lambda path, shape: _partition_of(shardings, len(shape))
    if callable(shardings):
        return lambda path, shape: _partition_of(shardings(path, shape), len(shape))
    leaves = jax.tree_util.tree_leaves_with_path(shardings, is_leaf=lambda value: isinstance(value, Sharding))
    known = {leaf_path(keys): sharding for keys, sharding in leaves}

    def choose(path: str, shape: tuple[int, ...]) -> Partition | None:
        names = path.split("/")
        above = ["/".join(names[:length]) for length in range(len(names), -1, -1)]
        return _partition_of(next((known[name] for name in above if name in known), None), len(shape))

    return choose


def _partition_of(sharding: Any, ndim: int) -> Partition | None:
    """None where a weight lies on one device."""
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    spec = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    return Partition(sharding.mesh, tuple(tuple(jax.tree.leaves(entry)) for entry in spec))


def shardings_of(tree: Any) -> Callable[[str, tuple[int, ...]], NamedSharding | None]:
    """Where a tree's packed weights lie, as `quantized(f, shardings=...)` takes it; shapes with shardings will do."""
    known = {path: _sharding_of(leaf) for path, leaf in flatten_with_paths(tree) if is_qarray(leaf)}
    return lambda path, shape: find_path(known, path)


def _sharding_of(q: QArray) -> NamedSharding | None:
    """Of the dense weight, from that of its codes."""
    sharding = getattr(q.codes, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    spec = [*sharding.spec, *[None] * (q.ndim - len(sharding.spec))]
    if q.layout != NEUTRAL and q.axis != (-2 if q.layout == TPU else -1):
        spec[-2:] = spec[:-3:-1]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def sharded_product(
    product: Callable[[jax.Array, QArray], jax.Array], x: jax.Array, q: QArray, partition: Partition | None, path: str
) -> jax.Array:
    """product(x[M, K], q of logical shape [K, N] or [N, K]) -> [M, N], each device multiplying its own part of q.

    Without a partition, for stacked matrices, and inside a `shard_map` (whose body sees one shard) it is one product.

    Raises:
      JQ4Error: a shard of K would not hold whole groups.
    """
    if partition is None or q.ndim != 2 or jax.sharding.get_abstract_mesh().manual_axes:
        return product(x, q)
    k, n = partition.of_axis(q.axis), partition.of_axis(-3 - q.axis)
    check_grouped_axis(q, k, partition.mesh, path)
    rows = _axes_of_rows(partition, x.shape[0])

    def of_shard(x: jax.Array, q: QArray) -> jax.Array:
        out = product(x, q)
        return jax.lax.psum(out, k) if k else out

    specs = (PartitionSpec(rows, k), part_specs(q, [k, n] if q.axis == -2 else [n, k]))
    mapped = functools.partial(jax.shard_map, mesh=partition.mesh, in_specs=specs, out_specs=PartitionSpec(rows, n))
    return mapped(of_shard)(x, q)


def _axes_of_rows(partition: Partition, count: int) -> tuple[str, ...]:
    """The mesh axes that cut the rows of x: those that the weight does not lie along, as many as divide them."""
    taken = {name for entry in partition.entries for name in entry}
    free = [name for name in partition.mesh.axis_names if name not in taken]
    while free and count % partition.ways(tuple(free)):
        free.pop()
    return tuple(free)


def part_specs(q: QArray, entries: Sequence[Any]) -> QArray:
    """A PartitionSpec for each part of a weight, in its place; an entry of a spec for each axis of the weight."""
    of_codes, of_scales = _entries_of_layout(q, entries)

    def spec_of(part: Any, axes: Sequence[Any] = of_scales) -> Any:
        if part is None:
            return None
        return PartitionSpec(*(entry if size > 1 else None for entry, size in zip(axes, part.shape, strict=True)))

    permutation = None
    if q.permutation is not None:
        permutation = PartitionSpec(*entries[: q.permutation.ndim - 1], None)
    return dataclasses.replace(
        q,
        codes=PartitionSpec(*of_codes),
        scale=spec_of(q.scale),
        zero_point=spec_of(q.zero_point),
        offset=spec_of(q.offset),
        permutation=permutation,
        input_scale=spec_of(q.input_scale, entries),
        activation_scale=spec_of(q.activation_scale, entries),
    )


def _entries_of_layout(q: QArray, entries: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The spec's entries in the order of the axes of the codes, and of the scales (jq4.layouts)."""
    if q.layout == NEUTRAL:
        return entries, entries
    lead, k, n = entries[:-2], entries[q.axis], entries[-3 - q.axis]
    if q.layout == TPU:
        return [*lead, k, n], [*lead, k, None, n]
    if q.layout == HOPPER:
        return [*lead, n, k], [*lead, k, n]
    return [*lead, n, k], [*lead, n, k]


def check_grouped_axis(q: QArray, entry: Any, mesh: Any, path: str) -> None:
    """Raises JQ4Error where shards of the grouped axis over the mesh axes `entry` would not hold whole groups."""
    shards = math.prod(mesh.shape[name] for name in jax.tree.leaves(entry))
    if shards == 1:
        return
    length, unit = q.shape[q.axis], MULTIPLE_K if q.layout == HOPPER else packing.codes_per_unit(q.bits)
    rows = length / shards
    whole = rows % unit == 0 and (q.num_groups == 1 or rows % q.group_size == 0)
    if q.input_rotation and rows % q.input_rotation:
        raise JQ4Error(
            f"{path}: inputs are rotated in blocks of {q.input_rotation}, and {shards} shards over {entry!r} leave "
            f"{rows:g} of {length} each: shard another axis, or over fewer devices"
        )
    if not whole or q.permutation is not None or q.padding:
        raise JQ4Error(
            f"{path}: axis {q.axis} of shape {q.shape} is the grouped one, and {shards} shards over {entry!r} "
            f"leave {rows:g} rows each; wanted whole groups of {q.group_size} (and whole units of {unit} codes) in "
            "each shard, in file order. Shard another axis, use fewer shards, or quantize with a smaller group_size"
        )
