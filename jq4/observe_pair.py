"""`observe_pair`: statistics of a weight's inputs behind layers that are quantized already, and against the dense ones.

    x    a row of inputs of a weight W in the dense model
    y    the same row in the model whose preceding layers are quantized

A method that minimises E|y^T W' - x^T W|^2 undoes some of the damage that the prefix has done (QEP, Arai & Ichikawa
2025; GPTAQ, Li et al. 2025; Qronos, Zhang et al. 2025). It needs E[y y^T], which takes the place of the Hessian, and
E[x y^T], the cross-correlation. So both models must run at once, row for row.

They do in one jitted program, one after the other, and the rows of both are kept until they are multiplied. Where rows
cannot be kept, in loops and for layers picked out of a stack, the function is vmapped over an axis of two instead, on
which every weight and every input has its dense and its quantized self, and `jq4.observe`'s interpreter watches the
product. What is traded there: the weights of both models are copied side by side, convolutions, which vmap rewrites,
are not seen, and the function is traced once more for each side.
Experts that rows are routed to (ragged_dot) get the statistics of y alone, since the two routers may send them other
rows.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jq4.axes import is_array, watched_call
from jq4.beside import beside
from jq4.errors import JQ4Error
from jq4.observe import Collect, Programs, accumulate, as_arguments, collector
from jq4.outer_rows import OuterRows
from jq4.paths import flatten_with_paths
from jq4.qarray import is_qarray
from jq4.statistics import Statistics, WeightStatistics, settled
from jq4.watch import Key, Watcher


def observe_pair(
    function: Callable[..., Any],
    dense_tree: Any,
    quantized_tree: Any,
    batches_of_pairs: Iterable[tuple[Any, Any]],
    *,
    collect: Collect = ("hessian",),
    alone: Collection[str] = (),
    programs: Programs | None = None,
) -> Statistics:
    """Statistics of every weight's inputs in `function(quantized_tree, y)`, with `cross_total` where they pair.

    Args:
      function: any traceable function; called as function(tree, batch), or function(tree, *batch) for a tuple.
      dense_tree: the parameters, dense.
      quantized_tree: the same tree with what is quantized so far as QArrays or dequantized; its leaves are taken in the
        dense ones' dtype.
      batches_of_pairs: pairs (batch of the dense model, batch of the quantized one), of one structure and equal shapes,
        row for row; may be a generator, of which one pair is held at a time.
      collect: as in jq4.observe. "hessian" brings the cross-correlation along.
      alone: paths of weights [K, N] whose statistics serve no other: "hessian" brings sum y (x - y)^T W along, which
        is what a method makes of the cross-correlation, f32[K, N]; of other weights the latter. Their Hessians may be
        kept in half the memory (jq4.upper_squares).
      programs: as in jq4.observe; of a call with this `alone`.

    Returns:
      Statistics of the quantized side's inputs y (count, absmax, ..., outer_total = sum y y^T), and
      cross_total = sum x y^T or way_total = sum y (x - y)^T W; paths and `.axes` as jq4.observe gives them.

    Raises:
      JQ4Error: no batches, trees or batches that do not pair, or a name in `collect` that cannot be collected.
    """
    collects = collector(collect)

    def gather(arguments: Any) -> Watcher:
        (dense, quantized), (x, y) = arguments
        plain = _dequantized_like(dense, quantized)
        _check_alike((dense, as_arguments(x)), (plain, as_arguments(y)))
        apart = _one_after_the_other(function, collects, (dense, x), (plain, y), alone)
        if apart is not None:
            return apart
        stacked = _side_by_side((dense, as_arguments(x)), (plain, as_arguments(y)))
        tree, args = stacked
        weights = flatten_with_paths(tree)
        watcher = Watcher(collects, {path: -leaf.ndim for path, leaf in weights if is_array(leaf)})
        leaves, run = watched_call(_over_pairs(function), watcher, tree, args, {})
        run(leaves)
        watcher.frame |= _ways(watcher, _matrices(dense, alone))
        return watcher

    here = beside((dense_tree, quantized_tree))
    calls = ((here(pair), _pair_of(pair)) for pair in batches_of_pairs)
    return accumulate(gather, calls, "observe_pair", programs, frozenset(alone))


def _one_after_the_other(
    function: Callable[..., Any],
    collects: Callable[[str], frozenset[str]],
    dense: Any,
    quantized: Any,
    alone: Collection[str],
) -> Watcher | None:
    """What was seen of the quantized side, with the cross-correlations; None where some rows were not kept."""

    def watched(pair: Any, collects: Callable[[str], frozenset[str]]) -> Watcher:
        tree, batch = pair
        watcher = Watcher(collects)
        leaves, run = watched_call(function, watcher, tree, as_arguments(batch), {})
        run(leaves)
        return watcher

    mine = watched(quantized, collects)
    theirs = watched(dense, lambda path: collects(path) & {"hessian"})
    weights = _matrices(dense[0], alone)
    for key, statistics in mine.frame.items():
        if "hessian" in collects(key.path):
            x, y = (getattr(side.frame.get(key), "outer_total", None) for side in (theirs, mine))
            if not isinstance(x, OuterRows) or not isinstance(y, OuterRows) or x.x.shape != y.x.shape:
                return None
            mine.frame[key] = dataclasses.replace(statistics, **_across(x.x, y.x, _weight_of(key, weights)))
    return mine


def _matrices(tree: Any, alone: Collection[str]) -> dict[str, jax.Array]:
    return {path: leaf for path, leaf in flatten_with_paths(tree) if path in alone and leaf.ndim == 2}


def _weight_of(key: Key, weights: Mapping[str, jax.Array]) -> jax.Array | None:
    """The weight [K, N] that rows [M, K] are multiplied by, if it is one whose statistics serve no other."""
    return weights.get(key.path) if not key.leading and key.features == (-2,) else None


def _ways(watcher: Watcher, weights: Mapping[str, jax.Array]) -> dict[Key, WeightStatistics]:
    """What the cross-correlations make of these weights, in place of them."""
    found = {}
    for key, statistics in watcher.frame.items():
        weight, summed = _weight_of(key, weights), settled(statistics)
        if weight is not None and summed.cross_total is not None:
            turned = jnp.transpose(summed.cross_total - summed.outer_total)
            way = jnp.matmul(turned, weight.astype(jnp.float32), precision="highest")
            found[key] = dataclasses.replace(summed, cross_total=None, way_total=way)
    return found


def _across(x: jax.Array, y: jax.Array, weight: jax.Array | None) -> dict[str, OuterRows]:
    """The cross-correlation of rows f32[M, K], or what it makes of a weight [K, N]."""
    if weight is None:
        return {"cross_total": OuterRows(x, y)}
    return {"way_total": OuterRows(y, jnp.matmul(x - y, weight.astype(jnp.float32), precision="highest"))}


def _pair_of(batches: Any) -> tuple[Any, Any]:
    if not isinstance(batches, tuple) or len(batches) != 2:
        raise JQ4Error(f"observe_pair: a batch is {type(batches).__name__}, wanted a pair (dense, quantized)")
    return batches


def _dequantized_like(dense: Any, quantized: Any) -> Any:
    """The quantized tree, dense and in the dense one's dtypes."""
    plain = jax.tree.map(lambda leaf: leaf.dequantize() if is_qarray(leaf) else leaf, quantized, is_leaf=is_qarray)
    if jax.tree.structure(plain) != jax.tree.structure(dense):
        raise JQ4Error("observe_pair: the dense and the quantized tree differ in structure: wanted the same leaves")
    return jax.tree.map(lambda mine, like: mine.astype(like.dtype) if is_array(like) else mine, plain, dense)


def _check_alike(dense: Any, quantized: Any) -> None:
    """Raises JQ4Error where the two sides' trees and batches are not of one structure, shapes and dtypes."""
    if jax.tree.structure(dense) != jax.tree.structure(quantized):
        raise JQ4Error("observe_pair: the dense and the quantized side differ in structure: wanted the same leaves")

    def check(path: Any, x: Any, y: Any) -> None:
        if is_array(x) and (x.shape != y.shape or x.dtype != y.dtype):
            raise JQ4Error(
                f"observe_pair: {jax.tree_util.keystr(path)} is {x.dtype}{list(x.shape)} on the dense side and "
                f"{y.dtype}{list(y.shape)} on the quantized one, wanted the same"
            )

    jax.tree_util.tree_map_with_path(check, dense, quantized)


def _side_by_side(dense: Any, quantized: Any) -> Any:
    """The tree with each array [2, ...]: the dense one's first; other leaves as the dense tree has them."""
    return jax.tree.map(lambda x, y: jnp.stack([x, y]) if is_array(x) else x, dense, quantized)


def _over_pairs(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` vmapped over the first axis of all arrays among its arguments' leaves."""

    def call(*arguments: Any) -> list[Any]:
        leaves, structure = jax.tree.flatten(arguments)
        dynamic = [place for place, leaf in enumerate(leaves) if is_array(leaf)]

        def one(arrays: list[Any]) -> list[Any]:
            merged = list(leaves)
            for place, array in zip(dynamic, arrays, strict=True):
                merged[place] = array
            outputs = function(*jax.tree.unflatten(structure, merged))
            return [leaf for leaf in jax.tree.leaves(outputs) if is_array(leaf)]

        return jax.vmap(one)([leaves[place] for place in dynamic])

    return call
