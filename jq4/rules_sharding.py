"""What a sharding of a weight means for its parts: codes, scales, zero points and the permutation.

Every axis but the grouped one is sharded alike in all parts, except where a scale has 1 (it is replicated there). The
grouped axis K over n shards must leave whole groups and whole packing units in each; with one group along K the scale
is replicated. Anything else would need the groups of another shard, and is refused with the sizes.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jq4 import qarray_ops
from jq4.errors import JQ4Error
from jq4.packed_leaf import PackedLeaf
from jq4.qarray import NEUTRAL, QArray
from jq4.qarray_ops import NoPackedForm
from pallas_kernels import packing
from pallas_kernels.int4_matmul.spec import TPU

Values = list[Any]


def leaf_specs(leaf: PackedLeaf, spec: PartitionSpec, mesh: Any) -> tuple[PackedLeaf, PackedLeaf]:
    """The leaf in a form that the spec can cut, and the same tree with a PartitionSpec for each part.

    Raises:
      JQ4Error: a shard of the grouped axis would not hold whole groups.
    """
    entries: list[Any] = [None] * leaf.ndim
    for axis, entry in enumerate(spec):
        entries[leaf.axes[axis]] = entry
    q = qarray_ops.plain_scales(leaf.q)
    _check_grouped_axis(q, entries[q.axis], mesh, leaf.path)
    return dataclasses.replace(leaf, q=q), dataclasses.replace(leaf, q=_part_specs(q, entries))


def sharding_constraint(eqn: Any, values: Values) -> Values:
    return [constrained(values[0], eqn.params["sharding"], jax.lax.with_sharding_constraint)]


def reshard(eqn: Any, values: Values) -> Values:
    return [constrained(values[0], eqn.params["dst_sharding"], jax.sharding.reshard)]


def device_put(eqn: Any, values: Values) -> Values:
    """One packed operand to one place; several operands in one equation are put one by one."""
    targets = eqn.params["devices"]
    return [
        constrained(value, target, jax.device_put) if isinstance(value, PackedLeaf) else jax.device_put(value, target)
        for value, target in zip(values, targets, strict=True)
    ]


def constrained(leaf: PackedLeaf, sharding: Any, place: Callable[[Any, Any], Any]) -> PackedLeaf:
    """The parts placed as `sharding` places the weight; a place that is no mesh holds for every part."""
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda part: place(part, sharding), leaf)
    try:
        leaf, specs = leaf_specs(leaf, sharding.spec, sharding.mesh)
    except JQ4Error as error:
        raise NoPackedForm(str(error)) from None
    kind = sharding.memory_kind

    def put(part: Any, spec: Any) -> Any:
        return place(part, NamedSharding(sharding.mesh, spec, memory_kind=kind))

    return jax.tree.map(put, leaf, specs)


def _part_specs(q: QArray, entries: list[Any]) -> QArray:
    of_codes, of_scales = _entries_of_layout(q, entries)

    def spec_of(part: Any, axes: list[Any] = of_scales) -> Any:
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


def _entries_of_layout(q: QArray, entries: list[Any]) -> tuple[list[Any], list[Any]]:
    """The spec's entries in the order of the axes of the codes, and of the scales (jq4.layouts)."""
    if q.layout == NEUTRAL:
        return entries, entries
    lead, k, n = entries[:-2], entries[q.axis], entries[-3 - q.axis]
    if q.layout == TPU:
        return [*lead, k, n], [*lead, k, None, n]
    return [*lead, n, k], [*lead, n, k]


def _check_grouped_axis(q: QArray, entry: Any, mesh: Any, path: str) -> None:
    shards = math.prod(mesh.shape[name] for name in jax.tree.leaves(entry))
    if shards == 1:
        return
    length, unit = q.shape[q.axis], packing.codes_per_unit(q.bits)
    rows = length / shards
    whole = rows % unit == 0 and (q.num_groups == 1 or rows % q.group_size == 0)
    if not whole or q.permutation is not None or q.padding:
        raise JQ4Error(
            f"{path}: axis {q.axis} of shape {q.shape} is the grouped one, and {shards} shards over {entry!r} "
            f"leave {rows:g} rows each; wanted whole groups of {q.group_size} (and whole units of {unit} codes) in "
            "each shard, in file order. Shard another axis, use fewer shards, or quantize with a smaller group_size"
        )


RULES = {
    "sharding_constraint": sharding_constraint,
    "reshard": reshard,
    "device_put": device_put,
}
