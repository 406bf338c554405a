"""Progressive training: fewer bits a stage, or weights before inputs, each stage from where the one before ended.

for stage in jq4.train.stages(recipe, steps=400, bits=(8, 6, 4)):
    quantizers = jq4.quantizers(params, stage.recipe, start=quantizers)     # the ranges stay, the steps grow
    forward = jq4.fake_quantized(model.apply, stage.recipe)
    for step in range(stage.start, stage.stop): ...
"""

import dataclasses
from collections.abc import Callable, Sequence

from jq4.errors import JQ4Error
from jq4.recipe import Recipe
from jq4.rule import Rule


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps `start` to `stop` of a training, by a recipe."""

    start: int
    stop: int
    recipe: Recipe


def stages(
    recipe: Recipe | Rule | str, steps: int, bits: Sequence[int] = (), *, weights_first: bool = False
) -> tuple[Stage, ...]:
    """The stages of a training of `steps` that ends with the recipe, of equal length but for what does not divide.

    Args:
      recipe: what is trained for.
      bits: of the weights, a stage each, falling; a rule that has fewer bits or as many keeps its own. The recipe's own
        bits need not be named.
      weights_first: a stage without rounded inputs before the last.
    """
    recipe = Recipe.of(recipe)
    if any(isinstance(each, bool) or each not in range(2, 9) for each in bits) or list(bits) != sorted(bits)[::-1]:
        raise JQ4Error(f"stages: bits are {tuple(bits)}, wanted falling numbers from 8 to 2")
    recipes = [_at_least(recipe, each) for each in bits]
    plain = _map_rules(recipe, lambda rule: dataclasses.replace(rule, input_activations=None))
    if weights_first and plain != recipe:
        recipes = [_map_rules(each, lambda rule: dataclasses.replace(rule, input_activations=None)) for each in recipes]
        recipes.append(plain)
    recipes = [each for each in dict.fromkeys(recipes) if each != recipe] + [recipe]
    if steps < len(recipes):
        raise JQ4Error(f"stages: {steps} steps for {len(recipes)} stages, wanted as many or more")
    ends = [steps * (i + 1) // len(recipes) for i in range(len(recipes))]
    return tuple(Stage(*each) for each in zip([0, *ends], ends, recipes, strict=False))


def _at_least(recipe: Recipe, bits: int) -> Recipe:
    def widened(rule: Rule) -> Rule:
        narrow = not rule.is_dense and rule.type == "int" and rule.num_bits < bits
        return dataclasses.replace(rule, num_bits=bits) if narrow else rule

    return _map_rules(recipe, widened)


def _map_rules(recipe: Recipe, change: Callable[[Rule], Rule]) -> Recipe:
    return dataclasses.replace(recipe, rules=tuple(map(change, recipe.rules)))
