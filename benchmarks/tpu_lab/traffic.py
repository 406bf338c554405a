"""The HBM bytes of a Pallas kernel: a block is fetched when its index differs from that of the step before.

Read from the `pallas_call` equations of a trace, with the index maps evaluated over the whole grid. Operands that a
kernel fetches by itself, and index maps that need the data, are counted as read once.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

MOST_STEPS = 2**20


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One `pallas_call`: its name, steps of its grid, and the HBM bytes it moves (None: its grid is not static)."""

    name: str
    steps: int | None
    nbytes: int | None


def kernels(jaxpr: Any) -> Iterator[Kernel]:
    """The kernels of a jaxpr, wherever they are called from; a loop's body counts once."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "pallas_call":
            yield _kernel(eqn)
            continue
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from kernels(inner)


def _kernel(eqn: Any) -> Kernel:
    mapping = eqn.params["grid_mapping"]
    name = str(eqn.params.get("name") or getattr(eqn.params.get("name_and_src_info"), "name", ""))
    if not all(isinstance(length, int) for length in mapping.grid) or math.prod(mapping.grid) > MOST_STEPS:
        return Kernel(name, None, None)
    steps = math.prod(mapping.grid)
    return Kernel(name, steps, sum(_moved(block, mapping.grid) for block in mapping.block_mappings))


def _moved(block: Any, grid: tuple[int, ...]) -> int:
    """Bytes of one operand or result over the whole grid; what sticks out of the array is not moved."""
    aval = block.array_aval
    places = _places(block, grid)
    if places is None:
        return _nbytes(math.prod(aval.shape), aval.dtype)
    lengths = np.asarray([_length(entry) for entry in block.block_shape])
    inside = np.minimum((places + 1) * lengths, aval.shape) - places * lengths  # i64[steps, axes]
    fetched = np.concatenate([[True], np.any(places[1:] != places[:-1], axis=1)])
    return _nbytes(int(np.prod(inside[fetched], axis=1).sum()), aval.dtype)


def _places(block: Any, grid: tuple[int, ...]) -> np.ndarray | None:
    """The block index i64[steps, axes] at every step, or None where only the data tells it."""
    import jax
    import jax.core

    if "any" in str(block.transformed_block_aval.memory_space):
        return None
    closed = block.index_map_jaxpr
    jaxpr = getattr(closed, "jaxpr", closed)
    indices = [axis.reshape(-1).astype(np.int32) for axis in np.indices(grid)] if grid else []
    needed = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
    if any(id(variable) in needed for variable in jaxpr.invars[len(indices) :]):
        return None

    def one(*place: Any) -> list[Any]:
        extra = [None] * (len(jaxpr.invars) - len(place))
        return jax.core.eval_jaxpr(jaxpr, getattr(closed, "consts", ()), *place, *extra)

    found = jax.vmap(one)(*indices) if indices else [np.asarray(value)[None] for value in one()]
    steps = math.prod(grid)
    return np.stack([np.broadcast_to(np.asarray(column), (steps,)) for column in found], axis=1).astype(np.int64)


def _length(entry: Any) -> int:
    return entry if isinstance(entry, int) else getattr(entry, "block_size", 1)


def _nbytes(elements: int, dtype: Any) -> int:
    bits = {"int4": 4, "uint4": 4}.get(np.dtype(dtype).name, 8 * np.dtype(dtype).itemsize)
    return math.ceil(elements * bits / 8)
