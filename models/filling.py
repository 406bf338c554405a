"""A checkpoint's weights as the leaves of the decoder's params: described first, then read layer by layer.

A packed tensor [N, K] becomes a kernel [K, N] by swapping the axes of its arrays (jq4.host_moves); rows of fused ones
are cut out; layers are stacked, or held in runs where they are packed unlike (models.layer_runs). No code is unpacked.
The dtype of a packed leaf is what its file dequantizes to. The decoder does not round to it: codes and scales are
multiplied in what it computes in. Reading takes the memory of the model and of its largest leaf.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4 import host_moves
from jq4.checkpoint.deferred import Deferred
from jq4.checkpoint.foreign import Checkpoint, LazyWeight
from jq4.checkpoint.structure import nested
from models.config import DecoderConfig
from models.layer_runs import LAYERS, alike_runs, bounds, run_name
from models.matching import matched_weights
from models.tensor_names import Path, Place, places


@dataclasses.dataclass(frozen=True)
class LazyLeaf:
    """One leaf of the params, to be read slice by slice.

    Attributes:
      keys: where it stands in the tree.
      abstract: the leaf, with a ShapeDtypeStruct for every array.
      slices: what each layer's slice of it is read by, or the leaf itself where it is not stacked.
      stacked: whether its first axis counts layers.
      outer: the axis of a slice along which the bytes of its file lie furthest apart.
    """

    keys: Path
    abstract: Any
    slices: tuple[LazyWeight, ...]
    stacked: bool
    outer: int

    def read(self) -> Any:
        """The whole leaf in numpy: allocated once, then filled layer by layer."""
        arrays, tree = jax.tree.flatten(jax.tree.map(lambda one: np.empty(one.shape, one.dtype), self.abstract))
        for index, each in enumerate(self.slices):
            for array, part in zip(arrays, jax.tree.leaves(each.read()), strict=True):
                host_moves.copy(array[index] if self.stacked else array, part)
        return jax.tree.unflatten(tree, arrays)


def params_of(where: str, checkpoint: Checkpoint, config: DecoderConfig, dtype: Any = None) -> dict[str, Any]:
    """The decoder's params; dense leaves in the dtype of the file, or in `dtype`. Raises as `lazy_leaves`."""
    leaves = lazy_leaves(where, checkpoint, config, dtype)
    return nested({leaf.keys: _made(leaf) for leaf in leaves})


def deferred_params_of(where: str, checkpoint: Checkpoint, config: DecoderConfig) -> dict[str, Any]:
    """The same, each leaf read when it is written. Raises as `lazy_leaves`."""
    leaves = lazy_leaves(where, checkpoint, config)
    return nested({leaf.keys: Deferred(leaf.abstract, functools.partial(_made, leaf)) for leaf in leaves})


def _made(leaf: LazyLeaf) -> Any:
    return jax.tree.map(jnp.asarray, leaf.read())


def lazy_leaves(where: str, checkpoint: Checkpoint, config: DecoderConfig, dtype: Any = None) -> list[LazyLeaf]:
    """The leaves of the decoder's params, from a checkpoint's headers alone.

    Raises JQ4Error, naming `where` and the tensor, for what is missing, unknown or misshapen.
    """
    matched, table = matched_weights(where, checkpoint, config), places(config)
    runs = _runs_of(config, matched)
    leaves = []
    for path, place in table.items():
        kept = dtype or dense_dtype(matched[path])
        if not place.stacked:
            leaves.append(leaf_of(path, place, matched[path], kept))
            continue
        for first, last in bounds(config, runs):
            keys = (LAYERS, run_name(config, first), *path[1:]) if runs else path
            leaves.append(leaf_of(keys, place, matched[path][first:last], kept))
    return leaves


def leaf_of(keys: Path, place: Place, weights: Sequence[LazyWeight], dtype: Any) -> LazyLeaf:
    """The leaf of these weights, one for each layer of it, which are packed alike or dense, and then of `dtype`."""
    values = [_moved(place, host_moves.phantom(weight.abstract)) for weight in weights]
    fit = functools.partial(_fitted, pattern=host_moves.pattern_of(values) if weights[0].packed else None, dtype=dtype)
    one = host_moves.described(fit(values[0]))
    slices = tuple(
        LazyWeight(weight.name, one, lambda weight=weight: fit(_moved(place, weight.read())), weight.tensors)
        for weight in weights
    )
    stack = (len(weights),) if place.stacked else ()
    whole = jax.tree.map(lambda part: jax.ShapeDtypeStruct((*stack, *part.shape), part.dtype), one)
    return LazyLeaf(keys, whole, slices, place.stacked, int(place.transposed))


def dense_dtype(weights: Sequence[LazyWeight]) -> Any:
    """What the dense ones among a leaf's weights become: their own dtype where they have one, at most float32."""
    found = {np.dtype(weight.abstract.dtype) for weight in weights if not weight.packed}
    kept = found.pop() if len(found) == 1 else np.dtype(np.float32)
    return np.dtype(np.float32) if kept == np.float64 else kept


def _runs_of(config: DecoderConfig, matched: Mapping[Path, list[LazyWeight]]) -> tuple[int, ...]:
    """The first layers of runs that can be stacked; empty where all can."""
    stacked = [(place, matched[path]) for path, place in places(config).items() if place.stacked]
    return alike_runs([[_kind(place, each[layer]) for place, each in stacked] for layer in range(config.num_layers)])


def _kind(place: Place, weight: LazyWeight) -> Any:
    if not weight.packed:
        return "dense"
    return host_moves.structure_of(_moved(place, host_moves.phantom(weight.abstract)))


def _moved(place: Place, value: Any) -> Any:
    """A tensor's value with the axes of the leaf: its rows cut, then transposed."""
    value = host_moves.rows(value, *place.rows)
    return host_moves.transposed(value) if place.transposed else value


def _fitted(value: Any, pattern: host_moves.Pattern | None, dtype: Any) -> Any:
    return value.astype(dtype, copy=False) if pattern is None else host_moves.fitted(value, pattern)
