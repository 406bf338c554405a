"""Adapters put into their weights: dense, or quantized again, with what that loses said leaf by leaf.

    dense     W + scaling A B, rounded to the leaf's dtype
    recipe    the same, packed. What was trained may be smaller than what rounding loses: `change_db` tells

Quantizing again costs what quantizing costs, and an adapter that was trained around a base's own rounding errors loses
that: beside the packed base it loses nothing.

A leaf that stacks layers, on one device, is merged layer by layer: what is held in float32 is one of them, beside the
result. It is merged whole where layers depend on each other (scales that are packed as well) or statistics are given.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error
from jq4.leaf_errors import LeafError, energies_of, error_from, in_ones
from jq4.methods import get_method
from jq4.paths import find_path, flatten_with_paths, leaf_path
from jq4.qarray import is_qarray
from jq4.qarray_ops import index
from jq4.quantize import quantize_planned, quantize_report
from jq4.quantize_report import LeafReport
from jq4.recipe import Recipe
from jq4.rule import Rule
from jq4.sqnr import common_unit, decibels
from jq4.train.adapters.adapter import Adapter, Adapters
from jq4.train.plan import aligned

DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class MergedLeaf:
    """What became of one leaf.

    Attributes:
      format: "dense", or the packed leaf's.
      error: of the leaf against W + scaling A B in float32: its SQNR, and its output error where statistics are given.
      change_db: 10 log10 of the energy of scaling A B over that of the error: below 0 rounding lost more than training
        changed. inf where nothing was lost.
    """

    path: str
    format: str
    error: LeafError
    change_db: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def merge_lora(
    params: Any,
    adapters: Adapters,
    to: Recipe | Rule | str = DENSE,
    *,
    stats: Any = None,
    axes: Mapping[str, int] | None = None,
) -> tuple[Any, list[MergedLeaf]]:
    """(the tree with adapters put into their leaves, what that lost of each).

    Args:
      params: the tree that the adapters are for, packed or dense.
      adapters: of `jq4.lora`, trained.
      to: "dense"; or the recipe (or the name of a preset) by which the leaves that have adapters are packed again, and
        what it means to be dense is. Leaves without adapters stay as they are.
      stats, axes: as `jq4.quantize` takes them; statistics of the inputs also tell the outputs' error.

    Raises:
      JQ4Error: for adapters that are not those of these params, and what `jq4.quantize` raises.
    """
    merging = Merging.of(params, adapters, to, stats=stats, axes=axes)
    report: list[MergedLeaf] = []

    def merged(keys: Any, leaf: Any) -> Any:
        path = leaf_path(keys)
        if path not in merging.adapters:
            return leaf
        result, told = merging.merged(path, leaf)
        report.append(told)
        own = _devices(leaf)
        return jax.device_put(result, own.pop()) if len(own) == 1 else jax.tree.map(jnp.asarray, result)

    tree = jax.tree_util.tree_map_with_path(merged, params, is_leaf=is_qarray)
    return tree, report


@dataclasses.dataclass(frozen=True)
class Merging:
    """What becomes of each leaf that has an adapter, which needs no other leaf.

    Attributes:
      adapters: by the paths of the params.
      plan: path -> how the leaf is packed again; nothing of those that become dense.
      stats: of the leaves' inputs, or None.
    """

    adapters: Mapping[str, Adapter]
    plan: Mapping[str, LeafReport]
    stats: Any = None

    @classmethod
    def of(
        cls,
        params: Any,
        adapters: Adapters,
        to: Recipe | Rule | str = DENSE,
        *,
        stats: Any = None,
        axes: Mapping[str, int] | None = None,
    ) -> "Merging":
        """Arguments as `merge_lora` takes them; of the params shapes are enough."""
        leaves = dict(flatten_with_paths(params))
        found = aligned(adapters.by_path, leaves, "the adapters")
        for path, adapter in found.items():
            if tuple(leaves[path].shape) != adapter.shape:
                raise JQ4Error(f"{path}: its adapter is for shape {adapter.shape}, found {tuple(leaves[path].shape)}")
        plan = {} if to == DENSE else _plan(params, found, to, stats, axes)
        return cls(found, {path: entry for path, entry in plan.items() if entry.is_planned}, stats)

    def merged(self, path: str, leaf: Any) -> tuple[Any, MergedLeaf]:
        """(the leaf with its adapter in it, what that lost). Of a leaf merged by slices the arrays are NumPy's."""
        adapter = self.adapters[path]
        if 0 in leaf.shape:
            raise JQ4Error(f"{path}: the leaf is empty, shape {tuple(leaf.shape)}: wanted weights")
        if self._goes_by_slices(path, leaf, adapter):
            result, energies = _stacked(leaf.shape[0], lambda i: self._merged_layer(path, leaf, adapter, i))
        else:
            result, energies = self._merged(path, leaf, adapter)
        change = energies.pop("change")
        error = error_from(path, energies, leaf.shape, find_path(self.stats or {}, path), axis=adapter.inputs[-1])
        format = result.format if is_qarray(result) else DENSE
        return result, MergedLeaf(path, format, error, decibels(change.sum(), energies["noise"].sum()))

    def _merged_layer(self, path: str, leaf: Any, adapter: Adapter, i: int) -> tuple[Any, dict[str, np.ndarray]]:
        layer = index(leaf, i) if is_qarray(leaf) else leaf[i]
        try:
            return self._merged(path, layer, adapter.layer(i))
        except JQ4Error as error:
            raise JQ4Error(f"{error} (in layer {i} of the stack)") from None

    def _merged(self, path: str, leaf: Any, adapter: Adapter) -> tuple[Any, dict[str, np.ndarray]]:
        """(the leaf, or a slice of it, merged; its energies and that of what was learned)."""
        exact, entry = _exact(leaf, adapter), self.plan.get(path)
        if entry is None:
            result = exact.astype(leaf.dtype)
        else:
            result, _ = quantize_planned(exact, entry, self.stats)
            result = dataclasses.replace(result, dtype=jnp.dtype(leaf.dtype).name)
        energies = energies_of(exact, result, find_path(self.stats or {}, path), axis=adapter.inputs[-1])
        unit, learned = jax.device_get(_learned(adapter))
        return result, {**energies, "change": in_ones(learned, unit)}

    def _goes_by_slices(self, path: str, leaf: Any, adapter: Adapter) -> bool:
        """Whether a leaf stacks layers of which each becomes the same alone as beside the others, on one device."""
        if adapter.stacked[:1] != (-len(adapter.shape),) or find_path(self.stats or {}, path) is not None:
            return False
        if len(_devices((leaf, adapter))) > 1:
            return False
        rule = self.plan[path].rule if path in self.plan else None
        return rule is None or not (rule.double_quant or get_method(rule.method).needs_statistics)


def _stacked(count: int, made: Callable[[int], Any]) -> Any:
    """The trees made(0), made(1), ... as one, of NumPy arrays with a leading axis."""
    whole: Any = None
    for i in range(count):
        part = jax.tree.map(np.asarray, made(i))
        if whole is None:
            whole = jax.tree.map(lambda array: np.empty((count, *array.shape), array.dtype), part)
        jax.tree.map(lambda array, values, i=i: array.__setitem__(i, values), whole, part)
    return whole


def _devices(tree: Any) -> set[Any]:
    """Those that hold a tree's JAX arrays."""
    return {device for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) for device in leaf.devices()}


def _plan(
    params: Any, found: Mapping[str, Adapter], to: Recipe | Rule | str, stats: Any, axes: Any
) -> dict[str, LeafReport]:
    """Path -> what the recipe plans for a leaf with an adapter, were it dense in float32."""

    def dense(keys: Any, leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32) if leaf_path(keys) in found else None

    alone = jax.tree_util.tree_map_with_path(dense, params, is_leaf=is_qarray)
    known = {path: leaf.axis for path, leaf in flatten_with_paths(params) if is_qarray(leaf)}
    known |= {path: axis for path in found if (axis := find_path(axes or {}, path)) is not None}
    return {entry.path: entry for entry in quantize_report(alone, to, stats, known).leaves}


@jax.jit
def _exact(leaf: Any, adapter: Adapter) -> jax.Array:
    weight = leaf.dequantize(jnp.float32) if is_qarray(leaf) else leaf.astype(jnp.float32)
    return weight + adapter.delta()


@jax.jit
def _learned(adapter: Adapter) -> tuple[jax.Array, jax.Array]:
    """(a unit, the energy in it of scaling A B), f32[]."""
    delta = adapter.delta()
    unit = common_unit(delta, delta)
    return unit, jnp.sum((delta / unit) ** 2)
