"""LoftQ (Li et al. 2023): codes and adapters fitted to a weight together, by turns.

    A B = 0;   Q = quantize(W - s A B)   and   A B = best of rank r for (W - Q) / s      as often as told

so that Q + s A B begins nearer to W than Q does alone: at two and three bits that is what QLoRA's training starts too
far from. The paper fixes the number of turns; rounding may undo a turn, so that of each leaf the turn that left the
least, in energy, is kept. Quantizing is the recipe's, statistics and all.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jq4.errors import JQ4Error
from jq4.paths import leaf_path
from jq4.qarray import is_qarray
from jq4.quantize import quantize_planned, quantize_report
from jq4.quantize_report import LeafReport
from jq4.recipe import Recipe
from jq4.rule import Rule
from jq4.train.adapters.adapter import Adapter, Adapters
from jq4.train.adapters.lora import IGNORE, axes_of, begun, check_size, of_difference, targeted

TURNS = 5  # the paper's


def loftq(
    params: Any,
    recipe: Recipe | Rule | str,
    rank: int,
    targets: Sequence[str] | str = ("Linear",),
    *,
    ignore: Sequence[str] | str = IGNORE,
    alpha: float | None = None,
    rslora: bool = False,
    key: Any = None,
    turns: int = TURNS,
    stats: Any = None,
    axes: Mapping[str, int] | None = None,
) -> tuple[Any, Adapters]:
    """(the packed tree, its adapters) of a dense tree.

    Args:
      params: the dense tree.
      recipe, stats, axes: as `jq4.quantize` takes them.
      rank, targets, ignore, alpha, rslora, key: as `jq4.lora` takes them; the key is for leaves that stay dense, whose
        adapters begin at zero.
      turns: how often a leaf is quantized; 1 leaves the codes as `jq4.quantize` finds them.

    Raises:
      JQ4Error: a leaf is packed already; and what `jq4.quantize` and `jq4.lora` raise.
    """
    check_size(rank, alpha)
    if turns < 1:
        raise JQ4Error(f"turns is {turns}, wanted 1 or more")
    meant = targeted(params, targets, ignore, axes)
    if packed := [path for path, leaf in meant.items() if is_qarray(leaf)]:
        raise JQ4Error(
            f"{packed[0]}: is packed already: LoftQ starts from the dense tree (jq4.lora takes a packed one)"
        )
    options = {"alpha": float(rank if alpha is None else alpha), "rslora": rslora}
    key = jax.random.key(0) if key is None else key
    plan = {entry.path: entry for entry in quantize_report(params, recipe, stats, axes).leaves}
    found: dict[str, Adapter] = {}

    def fitted(keys: Any, leaf: Any) -> Any:
        path = leaf_path(keys)
        entry = plan[path]
        if path not in meant:
            return quantize_planned(leaf, entry, stats)[0] if entry.is_planned else leaf
        of_leaf = axes_of(path, leaf, axes)
        if not entry.is_planned:
            found[path] = begun(path, leaf, rank, of_leaf, key, options)
            return leaf
        weight = jnp.asarray(leaf, jnp.float32)
        packed, found[path] = _by_turns(
            weight, entry, stats, turns, lambda q: of_difference(path, weight, q, rank, of_leaf, options)
        )
        return dataclasses.replace(packed, dtype=jnp.dtype(leaf.dtype).name)

    tree = jax.tree_util.tree_map_with_path(fitted, params, is_leaf=is_qarray)
    return tree, Adapters({path: found[path] for path in meant})


def _by_turns(weight: jax.Array, entry: LeafReport, stats: Any, turns: int, adapter_of: Any) -> tuple[Any, Adapter]:
    best, least, target = None, jnp.inf, weight
    for _ in range(turns):
        packed, _ = quantize_planned(target, entry, stats)
        adapter = adapter_of(packed)
        left = float(_left(weight, packed, adapter))
        if best is None or left < least:
            best, least = (packed, adapter), left
        target = weight - adapter.delta()
    assert best is not None
    return best


@jax.jit
def _left(weight: jax.Array, packed: Any, adapter: Adapter) -> jax.Array:
    return jnp.sum(jnp.square(weight - packed.dequantize(jnp.float32) - adapter.delta()))
