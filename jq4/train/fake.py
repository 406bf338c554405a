"""`fake_quantized(f, recipe)`: f as it will be with its weights packed, and differentiable by them.

    recipe = jq4.Recipe.preset("rtn-w4g32-a8")
    forward = jq4.fake_quantized(model.apply, recipe)

    forward(params, x)                   plain straight-through: scales are found anew from the weights at every call
    forward((params, quantizers), x)     learned scales, offsets and steps of inputs, of jq4.quantizers

The first argument of f is its params, and what takes their place is that tree or the pair, so that a pair goes where
params went: `jax.grad(loss)(pair, batch)`, `optimizer.init(pair)`, `TrainState(params=pair)`. f keeps its arity, and
what is returned composes with jit, grad, vmap, remat, scan and shard_map as f does.

A weight is rounded where it is used, by the interpreter of jq4.rounded.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jq4.arguments import Arguments
from jq4.paths import flatten_with_paths
from jq4.recipe import Recipe
from jq4.rounded.interpreter import RoundingInterpreter
from jq4.rounded.record import UNROUNDED, UNUSED, RoundingRecord
from jq4.rule import Rule
from jq4.train.plan import plan_quantizers
from jq4.train.quantizer import split_pair
from jq4.train.traced import Unrounded


class FakeQuantized:
    """What `fake_quantized(f, recipe)` returns. `record` holds what was not rounded in the last trace."""

    def __init__(
        self, function: Callable[..., Any], recipe: Recipe, axes: Mapping[str, int] | None, strict: bool
    ) -> None:
        functools.update_wrapper(self, function, updated=())
        self.function = function
        self.recipe = recipe
        self.axes = axes
        self.strict = strict
        self.record = RoundingRecord()

    def __call__(self, tree: Any, *args: Any, **kwargs: Any) -> Any:
        params, quantizers = split_pair(tree)
        self.record.clear()
        interpreter = RoundingInterpreter(self.record, self.strict)
        found, left = plan_quantizers(params, quantizers, self.recipe, self.axes)
        for path, (leaf, reason) in left.items():
            interpreter.tell(UNROUNDED, path, "", reason, leaf)

        def special(path: str, leaf: Any) -> Any:
            return Unrounded(leaf, found[path], path) if path in found else leaf

        results = interpreter.run(self.function, Arguments((params, *args), kwargs), special)
        leaves = dict(flatten_with_paths(params))
        for path in found:
            if path not in interpreter.rounded:
                interpreter.tell(UNUSED, path, "", "the function does not look at it", leaves[path])
        return results

    def __repr__(self) -> str:
        return f"jq4.fake_quantized({self.function!r})"


def fake_quantized(
    function: Callable[..., Any],
    recipe: Recipe | Rule | str,
    axes: Mapping[str, int] | None = None,
    strict: bool = False,
) -> FakeQuantized:
    """A function like `function` whose weights are rounded as the recipe says, with gradients straight through.

    Args:
      function: any traceable function whose first argument is a tree of params: a Flax `apply`, bare JAX, ...
      recipe: what `jq4.quantize` takes. Of each leaf's rule the format, the groups and `input_activations` count; how
        its method finds codes does not, for codes are the nearest ones here, and are trained.
      axes: as `jq4.quantize` takes them, for params without quantizers.
      strict: raise where something that the recipe means is not rounded, instead of warning.

    Returns:
      The function, of (params, ...) or ((params, quantizers), ...). Its `record` tells what was not rounded.

    Raises:
      JQ4Error: for quantizers that are not those of these params, or a recipe that cannot be trained for.
      UnroundedError: `strict`, and a leaf has no quantizer, is not used, or has inputs that were not rounded.
    """
    return FakeQuantized(function, Recipe.of(recipe), axes, strict)
