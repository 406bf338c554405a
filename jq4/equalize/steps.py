"""The steps before the rules, as whoever drives a model block by block calls them.

    recipe  = for_model(recipe, folds)                        first of all
    outside = rotate_outside(outside, folds, recipe)          embedding, final norm, head; once
    block   = rotate_block(block, folds, recipe)              each block, before its inputs are observed
    stats   = observe(..., collect=collects(recipe, folds))   of the dense block, as it is now
    block   = scale_block(block, folds, recipe, stats)        then by the rules, with new statistics

All of them return what they were given where the recipe has no step for them, and are pure; leaves may have any
leading axes, so that a whole stacked model is prepared like one block. After `scale_block` the inputs of the weights
are others: statistics of them must be taken anew.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jq4.equalize import rotate
from jq4.equalize.awq import awq_scale
from jq4.equalize.folds import Fold, Folds, leaf_at, scale_inputs
from jq4.equalize.smoothquant import ALPHA, smooth_scale
from jq4.errors import JQ4Error
from jq4.input_rotation import HADAMARD
from jq4.paths import find_path
from jq4.statistics import WeightStatistics
from jq4.steps import STEPS, Step
from jq4.targets import LINEAR

if TYPE_CHECKING:  # rules know the methods, and one of those searches as a step of this package does
    from jq4.recipe import Recipe
    from jq4.rule import Rule

_ROTATE = "rotate"


def for_model(recipe: "Recipe", folds: Folds | None) -> "Recipe":
    """The recipe for a model that has folds: what method "awq" would keep beside the codes goes into the folds.

    A head keeps its multiplier, since nothing before it takes scales.

    Raises:
      JQ4Error: the recipe has a step that this model has no folds for, or a rotation that is not its first step.
    """
    wanted = [step.step for step in recipe.before]
    if folds is None:
        if wanted:
            raise JQ4Error(
                f"the recipe has the step {wanted[0]}, and the model does not say where scales can go (folds)"
            )
        return recipe
    if _ROTATE in wanted[1:]:
        raise JQ4Error(f"the recipe's steps before its rules are {', '.join(wanted)}: wanted rotate first, and once")
    recipe = _turned_inside(recipe, folds)
    searching = [rule for rule in recipe.rules if _searches(rule)]
    if not searching:
        return recipe
    rules = tuple(one for rule in recipe.rules for one in _folded(rule, recipe, folds))
    options = {name: value for name, value in searching[0].options if name in STEPS["awq"].options}
    before = recipe.before if "awq" in wanted else (*recipe.before, Step("awq", tuple(options.items())))
    return dataclasses.replace(recipe, rules=rules, before=before)


def collects(recipe: "Recipe", folds: Folds | None) -> Callable[[str], frozenset[str]]:
    """What `scale_block` wants observed: path -> some of jq4.statistics.COLLECTABLE (empty: nothing)."""
    wanted: set[str] = set()
    for step in recipe.before:
        options = dict(step.options)
        wanted |= {"absmax"} if step.step == "smoothquant" else set()
        wanted |= {"mean_square"} if step.step == "awq" else set()
        wanted |= {"hessian"} if step.step == "awq" and options.get("finalists", 1) else set()
    first = {fold.consumers[0]: True for fold in (folds.scaled if folds else ())}
    return lambda path: frozenset(wanted if find_path(first, path) else ())


def rotate_outside(outside: Any, folds: Folds | None, recipe: "Recipe") -> Any:
    """The params outside of the blocks, rotated if the recipe says so."""
    options = _rotation(recipe)
    return outside if options is None or folds is None else rotate.rotate_outside(outside, folds, options)


def rotate_block(tree: Any, folds: Folds | None, recipe: "Recipe") -> Any:
    """A block's params (or all blocks' stacked ones), rotated if the recipe says so."""
    options = _rotation(recipe)
    return tree if options is None or folds is None else rotate.rotate_block(tree, folds, options)


def scale_block(tree: Any, folds: Folds | None, recipe: "Recipe", statistics: Mapping[str, Any]) -> Any:
    """A block's params with scales moved as the recipe's steps say, by the statistics of its weights' inputs.

    Args:
      tree: the dense params that `statistics` were taken of.
      statistics: path -> WeightStatistics, of at least the first consumer of every fold (see `collects`).
    """
    moved: dict[Fold, jax.Array] = {}  # what the steps so far have divided a fold's inputs by
    for step in recipe.before:
        for fold in folds.scaled if folds is not None and step.step != _ROTATE else ():
            rules = {path: rule for path in fold.consumers if (rule := _rule_of(recipe, path))}
            if not rules:
                continue
            found = _statistics(statistics, fold, step)
            scale = _scale_of(step, fold, tree, rules, _moved(found, fold, moved.get(fold)))
            tree = scale_inputs(tree, fold, scale)
            moved[fold] = scale * moved.get(fold, jnp.ones_like(scale))
    return tree


def prepare_tree(params: Any, folds: Folds | None, recipe: "Recipe", observe: Callable[..., Mapping[str, Any]]) -> Any:
    """All of it for a tree in memory; `observe(params, collect)` gives the statistics of dense params."""
    params = rotate_block(rotate_outside(params, folds, recipe), folds, recipe)
    if all(step.step == _ROTATE for step in recipe.before):
        return params
    return scale_block(params, folds, recipe, observe(params, collects(recipe, folds)))


def _scale_of(step: Step, fold: Fold, tree: Any, rules: "dict[str, Rule]", statistics: WeightStatistics) -> jax.Array:
    """The s of a fold; of its consumers, those that stay dense have no say."""
    weights = [leaf_at(tree, path) for path in rules]
    options = dict(step.options)
    if step.step == "smoothquant":
        if statistics.absmax is None:
            raise JQ4Error(f"step smoothquant: no max |x| of {fold.consumers[0]}, wanted the statistics of collects()")
        return smooth_scale(fold, weights, statistics.absmax, options.get("alpha", ALPHA))
    encodings = [dataclasses.replace(rule.encoding(-2), observer=_quick(rule)) for rule in rules.values()]
    return awq_scale(fold, weights, encodings, statistics, **options)


def _quick(rule: "Rule") -> str:
    """The search rounds by the extremes: what the rule's own observer shrinks, it shrinks at any scale."""
    return "absmax" if rule.symmetric else "minmax"


def _rule_of(recipe: "Recipe", path: str) -> "Rule | None":
    index = recipe.index_of_rule(path, LINEAR)
    return None if index is None or recipe.rules[index].is_dense else recipe.rules[index]


def _statistics(statistics: Mapping[str, Any], fold: Fold, step: Step) -> WeightStatistics:
    found = next((known for path in fold.consumers if (known := find_path(statistics, path)) is not None), None)
    if found is None:
        raise JQ4Error(
            f"step {step.step}: no statistics of the inputs of {fold.consumers[0]}, wanted those of collects()"
        )
    return found


def _moved(statistics: WeightStatistics, fold: Fold, scale: jax.Array | None) -> WeightStatistics:
    """Statistics of x / s."""
    if scale is None:
        return statistics
    rows = fold.spread(scale)  # f32[*B, K]

    def divided(total: Any, power: int) -> Any:
        return None if total is None else total / rows**power

    outer = statistics.outer_total
    return dataclasses.replace(
        statistics,
        absmax=divided(statistics.absmax, 1),
        total=divided(statistics.total, 1),
        square_total=divided(statistics.square_total, 2),
        outer_total=None if outer is None else outer / (rows[..., None, :] * rows[..., :, None]),
    )


def _rotation(recipe: "Recipe") -> dict[str, Any] | None:
    return next((dict(step.options) for step in recipe.before if step.step == _ROTATE), None)


def _turned_inside(recipe: "Recipe", folds: Folds) -> "Recipe":
    """The recipe with a rule for the weights behind a gate, which rotates their inputs, where a rotation says so."""
    if not rotate.is_wanted(_rotation(recipe) or {}, "inner", False):
        return recipe
    if not folds.inner:
        raise JQ4Error("step rotate: inner is true, and the model does not say which weights lie behind a gate")
    rules: list[Rule] = []
    for rule in recipe.rules:
        mine = tuple(path for path in folds.inner if not rule.input_rotation and _rule_of(recipe, path) == rule)
        turned = dataclasses.replace(rule, targets=mine, ignore=(), input_rotation=HADAMARD) if mine else None
        rules += [rule] if turned is None else [turned, rule]
    return dataclasses.replace(recipe, rules=tuple(rules))


def _searches(rule: "Rule") -> bool:
    return rule.method == "awq" and bool(rule.method_options.get("multiplier", 1))


def _folded(rule: "Rule", recipe: "Recipe", folds: Folds) -> "tuple[Rule, ...]":
    """The rule without multipliers; and, before it, one for the head if it means that, which no scaled fold feeds."""
    if not _searches(rule):
        return (rule,)
    heads = () if folds.residual is None else folds.residual.final_norm.consumers
    mine = tuple(path for path in heads if path not in folds.consumers and _rule_of(recipe, path) == rule)
    if mine == rule.targets:
        return (rule,)
    without = dataclasses.replace(rule, options=tuple((dict(rule.options) | {"multiplier": 0}).items()))
    return (dataclasses.replace(rule, targets=mine, ignore=()), without) if mine else (without,)
