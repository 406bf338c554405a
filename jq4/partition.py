"""A weight that lies on several devices: what its sharding means for its parts, and its product, shard by shard.

Every axis but the grouped one is sharded alike in all parts, except where a scale has 1 (it is replicated there). The
grouped axis K over n shards must leave whole groups and whole packing units in each; with one group along K the scale
is replicated. Anything else would need the groups of another shard, and is refused with the sizes.

A kernel is a black box to XLA's partitioner (a TPU's is refused outright), and inside a `jax.jit` nothing tells how an
argument is sharded. So `quantized(f, shardings=...)` is told (jq4.shardings); each packed leaf carries its `Partition`
to its products, and these run under `jax.shard_map`, as the partitioner would cut the dense ones:

    N over n       x[M, K] whole     W[K, N/n]     out[M, N/n]           no communication
    K over n       x[M, K/n]         W[K/n, N]     out[M, N] summed      one all-reduce, in the result's own dtype
    B over n       x[B/n, M, K]      W[B/n, K, N]  out[B/n, M, N]        no communication
    mesh axes that the weight does not lie along cut the rows of x, where they divide them

and experts W[E, K, N], whose rows of x are ragged and stay whole, by N and K alike and

    E over n       x turned so that the rows of the first own expert come first; out turned back, summed: an all-reduce

(`jax.experimental.custom_partitioning`, which would be asked by the partitioner, has no TPU backend: jax #38196.)
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jq4.errors import JQ4Error
from jq4.qarray import NEUTRAL, QArray
from jq4.qarray_ops import plain_scales
from jq4.record import note_uncut
from jq4.shardings import ways
from pallas_kernels import packing
from pallas_kernels.int4_matmul.gpu_fragments import MULTIPLE_K
from pallas_kernels.int4_matmul.spec import HOPPER, TPU

Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Partition:
    """How a weight lies on a mesh: for each of its axes, the mesh axes that cut it.

    It is asked by axes counted from the end, so that a slice along a leading axis (a layer under scan) keeps it. A
    partition never changes what a product is, only who computes which part.
    """

    mesh: Any
    entries: tuple[Names, ...]

    @property
    def is_explicit(self) -> bool:
        """Whether shardings on the mesh are part of the types of arrays."""
        return any(kind == AxisType.Explicit for kind in self.mesh.axis_types)

    def of_axis(self, axis: int) -> Names:
        """The mesh axes that cut axis `axis`, a negative number."""
        return self.entries[axis] if -axis <= len(self.entries) else ()

    def ways(self, names: Names) -> int:
        return ways(self.mesh, names)

    def permuted(self, axes: Sequence[int]) -> "Partition":
        """That of a weight whose axis i is this one's axis axes[i], counted from 0."""
        return Partition(self.mesh, tuple(self.of_axis(axis - len(axes)) for axis in axes))

    def merged(self, axes: Sequence[Sequence[int]], shape: Sequence[int]) -> "Partition | None":
        """That of a weight whose axis i merges axes[i] of this one of `shape`; None where an inner one is cut."""
        entries = []
        for joined in axes:
            cuts = [self.of_axis(axis - len(shape)) for axis in joined if shape[axis] > 1]
            if any(cuts[1:]):
                return None
            entries.append(cuts[0] if cuts else ())
        return Partition(self.mesh, tuple(entries))


def partition_of(path: str, shape: tuple[int, ...], sharding: Any) -> Partition | None:
    """The partition that a sharding of the dense weight means; None where it lies on one device.

    Raises:
      JQ4Error: a sharding over several devices that names no mesh axes, or more axes than the weight has.
    """
    if sharding is None or (sharding.is_fully_replicated and not isinstance(sharding, NamedSharding)):
        return None
    if not isinstance(sharding, NamedSharding):
        raise JQ4Error(f"{path}: found a {type(sharding).__name__}, wanted a NamedSharding for a packed weight")
    if sharding.mesh.size == 1:
        return None
    if len(sharding.spec) > len(shape):
        raise JQ4Error(f"{path}: found the partition {sharding.spec} for a weight of shape {shape}")
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    partition = Partition(sharding.mesh, tuple(_names(entry) for entry in spec))
    for axis, (size, names) in enumerate(zip(shape, partition.entries, strict=True)):
        if size % partition.ways(names):
            raise JQ4Error(
                f"{path}: axis {axis} of shape {shape} has {size} elements, which {partition.ways(names)} shards over "
                f"{names!r} do not divide; shard another axis or replicate this one"
            )
    return partition


def _names(entry: Any) -> Names:
    return () if entry is PartitionSpec.UNCONSTRAINED else tuple(jax.tree.leaves(entry))


def sharded_product(
    product: Callable[[jax.Array, QArray], jax.Array], x: jax.Array, q: QArray, partition: Partition | None, path: str
) -> jax.Array:
    """product(x[*B, M, K], q of logical shape [*B, K, N] or [*B, N, K]) -> [*B, M, N], each device its own part of q.

    Without a partition, and inside a `shard_map` (whose body sees one shard), it is one product.

    Raises:
      JQ4Error: a shard of K would not hold whole groups.
    """
    if partition is None or jax.sharding.get_abstract_mesh().manual_axes:
        return product(x, q)
    q = plain_scales(q)
    *batch, k, n = _canonical_entries(q, partition)
    check_grouped_axis(q, k, partition.mesh, path)
    rows = _axes_of_rows(partition, x)

    def of_shard(x: jax.Array, q: QArray) -> jax.Array:
        out = product(x, q)
        return jax.lax.psum(out, k) if k else out

    specs = (PartitionSpec(*batch, rows, k), _specs(q, [*batch, k, n]))
    out_specs = PartitionSpec(*batch, rows, n)
    mapped = jax.shard_map(of_shard, mesh=partition.mesh, in_specs=specs, out_specs=out_specs)
    return mapped(*_typed((x, q), specs, partition))


def sharded_ragged_product(
    product: Callable[[jax.Array, QArray, jax.Array], jax.Array],
    x: jax.Array, q: QArray, group_sizes: jax.Array, partition: Partition | None, path: str,
) -> jax.Array:  # fmt: skip
    """product(x[M, K], q[E, K, N], group_sizes i32[E]) -> [M, N], each device multiplying its own part of q.

    Raises:
      JQ4Error: a shard of K would not hold whole groups.
    """
    if partition is None or jax.sharding.get_abstract_mesh().manual_axes:
        return product(x, q, group_sizes)
    q = plain_scales(q)
    e, k, n = _canonical_entries(q, partition)
    check_grouped_axis(q, k, partition.mesh, path)

    def of_shard(x: jax.Array, q: QArray, sizes: jax.Array) -> jax.Array:
        if not e:
            out = product(x, q, sizes)
            return jax.lax.psum(out, k) if k else out
        own = q.shape[0]
        first = jax.lax.axis_index(e) * own
        before = jnp.sum(jnp.where(jnp.arange(sizes.shape[0]) < first, sizes, 0))  # rows of other devices' experts
        out = product(jnp.roll(x, -before, 0), q, jax.lax.dynamic_slice_in_dim(sizes, first, own))
        return jax.lax.psum(jnp.roll(out, before, 0), (*e, *k))

    specs = (PartitionSpec(None, k), _specs(q, [e, k, n]), PartitionSpec())
    mapped = functools.partial(jax.shard_map, mesh=partition.mesh, in_specs=specs, out_specs=PartitionSpec(None, n))
    return mapped(of_shard)(*_typed((x, q, group_sizes), specs, partition))


def merged_or_noted(partition: Partition | None, q: QArray, axes: Sequence[Sequence[int]]) -> Partition | None:
    """`Partition.merged`; where there is none the product is left to XLA, which is noted."""
    if partition is None:
        return None
    merged = partition.merged(axes, q.shape)
    if merged is None:
        note_uncut(q, f"merging axes {axes} of {q.shape}, cut along {partition.entries}, leaves no whole shards")
    return merged


def _canonical_entries(q: QArray, partition: Partition) -> list[Names]:
    """The mesh axes of [*B, K, N], whichever of the two comes first in q."""
    batch = [partition.of_axis(axis) for axis in range(-q.ndim, -2)]
    return [*batch, partition.of_axis(q.axis), partition.of_axis(-3 - q.axis)]


def _specs(q: QArray, entries: Sequence[Any]) -> QArray:
    """`part_specs` for the entries of [*B, K, N]."""
    *batch, k, n = entries
    return part_specs(q, [*batch, k, n] if q.axis == -2 else [*batch, n, k])


def _typed(operands: tuple[Any, ...], specs: tuple[Any, ...], partition: Partition) -> tuple[Any, ...]:
    """The operands; on a mesh of explicit axes of the types that the specs say, which `shard_map` does not change."""
    if not partition.is_explicit:
        return operands
    return jax.tree.map(
        lambda part, spec: jax.sharding.reshard(part, NamedSharding(partition.mesh, spec)), operands, specs
    )


def _axes_of_rows(partition: Partition, x: jax.Array) -> Names:
    """The mesh axes that cut the rows of x: those that the weight does not lie along, as many as divide them.

    Explicit axes are in x's type, and those are the ones.
    """
    taken = {name for entry in partition.entries for name in entry}
    free = [name for name in partition.mesh.axis_names if name not in taken]
    if partition.is_explicit:
        of_rows = [*jax.typeof(x).sharding.spec, *[None] * x.ndim][x.ndim - 2]
        free = [name for name in jax.tree.leaves(of_rows) if name in free]
    while free and x.shape[-2] % partition.ways(tuple(free)):
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
    shards = ways(mesh, entry)
    if shards == 1:
        return
    length, unit = q.shape[q.axis], _stored_unit(q)
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


def _stored_unit(q: QArray) -> int:
    """Rows of the grouped axis that are stored together: bytes, words, or a tensor core's tiles."""
    if q.layout == HOPPER:
        return MULTIPLE_K
    return 8 if q.layout == TPU and q.codes.dtype == jnp.int32 else packing.codes_per_unit(q.bits)
