"""Where a packed weight's parts go: the sharding of a weight, turned into shardings of codes, scale and zero point.

Every axis but the grouped one is sharded alike in all parts (an axis on which a part has size 1 is replicated). Along
the grouped axis a shard must be a QArray of its own: whole groups, whole bytes, no padding and no permutation. Where
one group spans the whole axis its scale is replicated, and only the codes are split.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jq4.errors import CheckpointError
from jq4.qarray import PARTS, QArray, is_qarray
from jq4.shardings import ways


def default_sharding() -> Sharding:
    """Where JAX puts a new array that nobody placed."""
    return jax.device_put(0).sharding


def check_array(path: str, shape: tuple[int, ...], sharding: Sharding) -> Sharding:
    """`sharding` itself if it splits `shape` evenly; otherwise CheckpointError naming the axis and its sizes."""
    if isinstance(sharding, NamedSharding):
        spec = _full_spec(path, len(shape), sharding)
        for axis, (size, names) in enumerate(zip(shape, spec, strict=True)):
            shards = ways(sharding.mesh, names)
            if size % shards:
                raise CheckpointError(
                    f"{path}: axis {axis} of {shape} has {size} elements, which {shards} shards over "
                    f"mesh axis {names!r} do not divide; shard another axis or replicate this one"
                )
    return sharding


def qarray_shardings(path: str, weight: QArray, sharding: Any) -> QArray:
    """The shardings of a packed weight's parts, as a QArray that holds them in place of arrays.

    `weight` may hold ShapeDtypeStructs. `sharding` is that of the dense weight, or a QArray of shardings already.
    """
    if is_qarray(sharding):
        return sharding
    if not isinstance(sharding, NamedSharding):
        if not sharding.is_fully_replicated:
            raise CheckpointError(
                f"{path}: found a {type(sharding).__name__}, wanted a NamedSharding for a packed weight"
            )
        return jax.tree.map(lambda _: sharding, weight)
    check_array(path, weight.shape, sharding)
    spec = _full_spec(path, weight.ndim, sharding)
    grouped = weight.axis % weight.ndim
    _check_grouped_axis(path, weight, ways(sharding.mesh, spec[grouped]))

    def shrunk(part: Any) -> NamedSharding:
        kept = (names if size > 1 else None for names, size in zip(spec, part.shape, strict=True))
        return NamedSharding(sharding.mesh, PartitionSpec(*kept), memory_kind=sharding.memory_kind)

    def place(name: str, part: Any) -> Any:
        if part is None:
            return None
        if name == "permutation":
            batch = (*spec[: part.ndim - 1], None)
            return NamedSharding(sharding.mesh, PartitionSpec(*batch), memory_kind=sharding.memory_kind)
        if is_qarray(part):
            return qarray_shardings(f"{path}/{name}", part, shrunk(part))
        return check_array(f"{path}/{name}", part.shape, shrunk(part))

    return _replace_parts(weight, {name: place(name, getattr(weight, name)) for name in PARTS})


def _check_grouped_axis(path: str, weight: QArray, shards: int) -> None:
    if shards == 1:
        return
    length = weight.shape[weight.axis]
    groups, rest = weight.num_groups, length // shards
    whole_groups = groups == 1 or rest % weight.group_size == 0
    whole_bytes = weight.padding == 0 and rest * weight.bits % 8 == 0 and weight.codes.shape[weight.axis] % shards == 0
    if whole_groups and whole_bytes and weight.permutation is None:
        return
    reason = (
        "its rows are permuted (act-order)"
        if weight.permutation is not None
        else f"a shard must hold whole groups of {weight.group_size} and whole bytes of {weight.bits}-bit codes"
    )
    raise CheckpointError(
        f"{path}: axis {weight.axis} is the grouped one, its {length} elements in {groups} groups give shards of "
        f"{rest} over {shards} devices, but {reason}; shard another axis, or over fewer devices"
    )


def _replace_parts(weight: QArray, parts: Mapping[str, Any]) -> QArray:
    return QArray(
        **parts,
        format=weight.format,
        group_size=weight.group_size,
        axis=weight.axis,
        padding=weight.padding,
        dtype=weight.dtype,
        layout=weight.layout,
        activations=weight.activations,
        input_rotation=weight.input_rotation,
    )


def _full_spec(path: str, ndim: int, sharding: NamedSharding) -> tuple[Any, ...]:
    spec = tuple(sharding.spec)
    if len(spec) > ndim:
        raise CheckpointError(f"{path}: found the partition {sharding.spec} for an array of {ndim} axes")
    return (*spec, *(None,) * (ndim - len(spec)))
