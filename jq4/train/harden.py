"""From trained to packed: every trained leaf becomes the QArray that dequantizes to what training multiplied by.

`jq4.quantized(f)` on what `harden` gives is `jq4.fake_quantized(f)` on what it was made from, as far as a backend's
packed product is the dense product of the dequantized weight. The weights are the same to the bit, and so are the
integers that inputs are rounded to; where the packed product sums in another order (on a CPU always: a group at a time)
or sums integers exactly (W8A8), the results differ by rounding of float32 sums.
"""

from collections.abc import Mapping
from typing import Any

import jax

from jq4.paths import leaf_path
from jq4.quantize import check_values
from jq4.recipe import Recipe
from jq4.rounded.record import UnroundedError
from jq4.rule import Rule
from jq4.train.lsq import hardened
from jq4.train.plan import plan_quantizers, planned_leaves
from jq4.train.quantizer import Quantizers

_hardened = jax.jit(hardened)


def harden(
    params: Any, quantizers: Quantizers | None, recipe: Recipe | Rule | str, axes: Mapping[str, int] | None = None
) -> Any:
    """The tree with every leaf that training rounded as a QArray; traces.

    Args:
      params, quantizers: what was trained; None for plain straight-through training, whose scales are the weights'.
      recipe, axes: as `jq4.fake_quantized` was given them.

    Raises:
      UnroundedError: for a leaf that the recipe means and training did not round.
      JQ4Error: for weights that are not finite, and for quantizers that are not those of these params.
    """
    recipe = Recipe.of(recipe)
    found, left = plan_quantizers(params, quantizers, recipe, axes)
    if left:
        path, (_, reason) = next(iter(left.items()))
        raise UnroundedError(
            f"{path}: the recipe means it, and training did not round it: {reason}. Ignore the leaf in the recipe, or "
            "make quantizers by this recipe"
        )
    rules = {path: entry.rule for path, entry in planned_leaves(params, recipe, axes)[0].items()}

    def one(keys: Any, leaf: Any) -> Any:
        path = leaf_path(keys)
        if path not in found:
            return leaf
        if rule := rules.get(path):
            check_values(path, leaf, rule)
        return _hardened(leaf, found[path])

    return jax.tree_util.tree_map_with_path(one, params)
