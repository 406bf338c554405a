"""Mixed precision: of each leaf the format that, all together, loses the least within a budget of bits or bytes.

The losses are measured one leaf at a time (jq4.sensitivity) and taken to add up; the choice under that assumption is
exact (jq4.knapsack), or its `gap` is stated. Whether they do add up is for measuring: `predicted` stands beside the KLD
of the mix in whatever is printed. Out comes a Recipe whose rules name their leaves, to be read, changed and used again.
"""

import dataclasses
import math
from typing import Any

from jq4.errors import JQ4Error
from jq4.knapsack import Frontier
from jq4.recipe import Recipe
from jq4.rule import Rule
from jq4.sensitivity import LeafSensitivity, Option, Sensitivity


@dataclasses.dataclass(frozen=True)
class Choice:
    """A mix of formats.

    Attributes:
      recipe: that makes it.
      options: the chosen one of each leaf, by path.
      bytes, bits: held by the chosen leaves, and a weight on average.
      predicted: the sum of their losses.
      gap: how much less a better choice could lose, by the same losses; 0 where this is the best.
    """

    recipe: Recipe
    options: dict[str, Option]
    bytes: int
    bits: float
    predicted: float
    gap: float

    def as_dict(self) -> dict[str, Any]:
        chosen = {path: option.format for path, option in self.options.items()}
        names = ("bytes", "bits", "predicted", "gap")
        return {"chosen": chosen, **{name: getattr(self, name) for name in names}, "recipe": self.recipe.to_dict()}


def choose_formats(found: Sensitivity, *, bits: float | None = None, bytes: int | None = None) -> Choice:
    """The mix of least loss of at most `bits` a weight on average, or `bytes` in all, over the candidate leaves.

    Raises:
      JQ4Error: neither or both budgets, or one that is less than the smallest formats take.
    """
    if (bits is None) == (bytes is None):
        raise JQ4Error("choose_formats: wanted either bits (a weight, on average) or bytes (of the candidate leaves)")
    if bits is not None and not math.isfinite(bits):
        raise JQ4Error(f"choose_formats: bits is {bits}, wanted a number")
    budget = int(bits * found.size / 8 + 1e-6) if bits is not None else int(bytes or 0)
    frontier = _frontier(found)
    least = frontier.points[0][0]
    if budget < least:
        raise JQ4Error(
            f"a budget of {_in_words(budget, found.size)} is less than the smallest of the formats take, "
            f"{_in_words(least, found.size)}: give more, or smaller formats"
        )
    solution = frontier.at(budget)
    options = {leaf.path: leaf.options[i] for leaf, i in zip(found.leaves, solution.options, strict=True)}
    recipe = recipe_of(options, f"mixed-{8 * solution.cost / found.size:.3g}-bits")
    return Choice(recipe, options, solution.cost, 8 * solution.cost / found.size, solution.loss, solution.gap)


def frontier_of(found: Sensitivity, most: int = 40) -> list[dict[str, float]]:
    """The best mixes, from the fewest bytes to the least predicted loss; at most about `most` of them."""
    points = _frontier(found).points
    step = max(1, -(-len(points) // most))
    kept = points[::step] + ([points[-1]] if (len(points) - 1) % step else [])
    return [{"bytes": cost, "bits": 8 * cost / found.size, "predicted": loss} for cost, loss in kept]


def uniform_choices(found: Sensitivity) -> dict[str, Choice]:
    """Each format for all leaves, where all leaves have it."""
    names = [option.format for option in found.leaves[0].options]
    chosen = {}
    for name in names:
        options = {leaf.path: option for leaf in found.leaves if (option := _named(leaf, name)) is not None}
        if len(options) == len(found.leaves):
            held = sum(option.bytes for option in options.values())
            loss = sum(option.loss for option in options.values())
            chosen[name] = Choice(recipe_of(options, name), options, held, 8 * held / found.size, loss, 0.0)
    return chosen


def recipe_of(options: dict[str, Option], name: str) -> Recipe:
    """One rule for each format, that names the leaves it means."""
    rules: dict[Rule, list[str]] = {}
    for option in options.values():
        same = dataclasses.replace(option.rule, targets=("Linear",))
        rules.setdefault(same, []).extend(option.rule.targets)
    return Recipe(tuple(dataclasses.replace(rule, targets=tuple(paths)) for rule, paths in rules.items()), (), name)


def _frontier(found: Sensitivity) -> Frontier:
    return Frontier(
        [[option.bytes for option in leaf.options] for leaf in found.leaves],
        [[option.loss for option in leaf.options] for leaf in found.leaves],
    )


def _named(leaf: LeafSensitivity, name: str) -> Option | None:
    return next((option for option in leaf.options if option.format == name), None)


def _in_words(count: int, size: int) -> str:
    return f"{count} bytes ({8 * count / size:.4g} bits a weight)"
