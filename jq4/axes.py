"""`contraction_axes`: along which axis a function contracts each of its weights, told by a trace.

A bare tree does not say whether a weight [512, 512] is used as x @ w or as x @ w.T. Groups must lie along the axis
that is contracted, or the product cannot stay packed; so the function is asked, without computing anything.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jq4.arguments import Arguments
from jq4.outputs import is_array as is_array
from jq4.statistics import ContractionAxes
from jq4.watch import Watcher
from jq4.watched import Watched


def contraction_axes(function: Callable[..., Any], tree: Any, *args: Any, **kwargs: Any) -> ContractionAxes:
    """The axis (negative) that `function(tree, *args)` contracts, for every leaf of `tree` that it contracts.

    Of several contracted axes of one product it is the last (a DenseGeneral's [H, D, O] contracted over H and D gives
    -2). A table that rows are only looked up in gives its rows' axis. Of several products that contract different
    axes of one leaf, the first counts.

    Args:
      function: any traceable function.
      tree: its first argument, the parameters; arrays or jax.ShapeDtypeStructs, as in the other arguments.

    Returns:
      path -> axis, as `jq4.quantize(..., axes=...)` takes it.
    """
    watcher = Watcher(lambda path: frozenset())
    leaves, run = watched_call(function, watcher, tree, args, kwargs)
    jax.eval_shape(run, leaves)
    return ContractionAxes(watcher.axes, watcher.looked_up, watcher.products)


def watched_call(
    function: Callable[..., Any], watcher: Watcher, tree: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
    """(the array leaves of all arguments, what evaluates `function` on such leaves with those of `tree` watched)."""
    arguments = Arguments((tree, *args), kwargs)
    paths = {place: path for place, path in arguments.paths.items() if is_weight(arguments.leaves[place])}

    def run(arrays: list[Any]) -> list[Any]:
        jaxpr, _ = arguments.trace(function, arrays)
        values = [
            Watched.whole(array, paths[place]) if place in paths else array
            for place, array in zip(arguments.traced, arrays, strict=True)
        ]
        return watcher.evaluate(jaxpr, values)

    return arguments.arrays, run


def is_weight(leaf: Any) -> bool:
    """Whether a leaf can be a weight: a float array of two axes or more."""
    return is_array(leaf) and len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
