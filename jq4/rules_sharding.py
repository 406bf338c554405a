"""Packed rules for what places a weight on a mesh: each part goes where its axes of the weight go (jq4.partition)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jq4 import qarray_ops
from jq4.errors import JQ4Error
from jq4.packed_leaf import PackedLeaf
from jq4.partition import check_grouped_axis, part_specs
from jq4.qarray_ops import NoPackedForm

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
    check_grouped_axis(q, entries[q.axis], mesh, leaf.path)
    leaf = dataclasses.replace(leaf, q=q, partition=None)  # a shard lies on one device
    return leaf, dataclasses.replace(leaf, q=part_specs(q, entries))


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


RULES = {
    "sharding_constraint": sharding_constraint,
    "reshard": reshard,
    "device_put": device_put,
}
