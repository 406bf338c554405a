"""A checkpoint's weights as the decoder's params: leaf by leaf, layer by layer, packed weights packed.

A packed tensor [N, K] becomes a kernel [K, N] by swapping the axes of its arrays (jq4.host_moves); rows of fused ones
are cut out; layers are stacked, or held in runs where they are packed unlike (models.layer_runs). No code is unpacked.
The dtype of a packed leaf is what its file dequantizes to. The decoder does not round to it: codes and scales are
multiplied in what it computes in. Reading takes the memory of the model and of its largest leaf.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4 import host_moves
from jq4.checkpoint.foreign import Checkpoint, LazyWeight
from models.config import DecoderConfig
from models.layer_runs import LAYERS, alike_runs, bounds, run_name
from models.matching import matched_weights
from models.tensor_names import Path, Place, places

Matched = dict[Path, list[LazyWeight]]


def params_of(where: str, checkpoint: Checkpoint, config: DecoderConfig, dtype: Any = None) -> dict[str, Any]:
    """The decoder's params; dense leaves in the dtype of the file, or in `dtype`.

    Raises JQ4Error, naming `where` and the tensor, for what is missing, unknown or misshapen.
    """
    matched = matched_weights(where, checkpoint, config)
    table, runs = places(config), runs_of_weights(config, matched)
    leaves = {
        path: _on_device(leaf_of(table[path], each, dtype or dense_dtype(each)))
        for path, each in matched.items()
        if not table[path].stacked
    }
    for first, last in bounds(config, runs):
        for path, each in matched.items():
            if table[path].stacked:
                leaf = leaf_of(table[path], each[first:last], dtype or dense_dtype(each))
                leaves[path_in_run(config, path, first) if runs else path] = _on_device(leaf)
    return nested(leaves)


def runs_of_weights(config: DecoderConfig, matched: Matched) -> tuple[int, ...]:
    """The first layers of runs that can be stacked; empty where all can."""
    stacked = [(place, matched[path]) for path, place in places(config).items() if place.stacked]
    return alike_runs([[_kind(place, each[layer]) for place, each in stacked] for layer in range(config.num_layers)])


def path_in_run(config: DecoderConfig, path: Path, first: int) -> Path:
    """Where the leaf of the run from layer `first` on stands."""
    return (LAYERS, run_name(config, first), *path[1:])


def leaf_of(place: Place, weights: Sequence[LazyWeight], dtype: Any) -> Any:
    """The leaf [L, ...], or [...] of one that is not stacked: allocated once, then filled layer by layer."""
    abstract, pattern = described_leaf(place, weights, dtype)
    arrays, tree = jax.tree.flatten(jax.tree.map(lambda one: np.empty(one.shape, one.dtype), abstract))
    for index, weight in enumerate(weights):
        value = moved(place, weight.read(), pattern)
        for array, part in zip(arrays, jax.tree.leaves(value), strict=True):
            host_moves.copy(array[index] if place.stacked else array, part)
    return jax.tree.unflatten(tree, arrays)


def described_leaf(place: Place, weights: Sequence[LazyWeight], dtype: Any) -> tuple[Any, host_moves.Pattern | None]:
    """The leaf's arrays as ShapeDtypeStructs, and the pattern that its layers are fitted to where they are packed."""
    values = [moved(place, host_moves.phantom(weight.abstract), None) for weight in weights]
    pattern = host_moves.pattern_of(values) if weights[0].packed else None
    one = values[0] if pattern is None else host_moves.fitted(values[0], pattern)
    stack = (len(weights),) if place.stacked else ()
    return jax.tree.map(
        lambda part: jax.ShapeDtypeStruct((*stack, *part.shape), dtype if pattern is None else part.dtype), one
    ), pattern


def moved(place: Place, value: Any, pattern: host_moves.Pattern | None) -> Any:
    """A tensor's value as the leaf has it: its rows cut, transposed, fitted to the pattern of its stack."""
    value = host_moves.rows(value, *place.rows)
    if place.transposed:
        value = host_moves.transposed(value)
    return value if pattern is None else host_moves.fitted(value, pattern)


def dense_dtype(weights: Sequence[LazyWeight]) -> Any:
    """What the dense ones among a leaf's weights become: their own dtype where they have one, at most float32."""
    found = {np.dtype(weight.abstract.dtype) for weight in weights if not weight.packed}
    kept = found.pop() if len(found) == 1 else np.dtype(np.float32)
    return np.dtype(np.float32) if kept == np.float64 else kept


def nested(leaves: dict[Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def _kind(place: Place, weight: LazyWeight) -> Any:
    if not weight.packed:
        return "dense"
    return host_moves.structure_of(moved(place, host_moves.phantom(weight.abstract), None))


def _on_device(leaf: Any) -> Any:
    return jax.tree.map(jnp.asarray, leaf)
