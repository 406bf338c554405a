"""Which leaves of a tree are rounded in training, and how: the recipe's word, and the quantizers that there are."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from jq4.errors import JQ4Error
from jq4.input_rotation import block_of
from jq4.paths import flatten_with_paths
from jq4.quantize import quantize_report
from jq4.quantize_report import LeafReport
from jq4.recipe import Recipe
from jq4.train.quantizer import Quantizer, Quantizers

_LEFT_BY_WISH = ("ignored", "no rule", "dense by rule", "not an array", "packed already")

Left = dict[str, tuple[Any, str]]


def plan_quantizers(
    params: Any, quantizers: Quantizers | None, recipe: Recipe, axes: Mapping[str, int] | None
) -> tuple[dict[str, Quantizer], Left]:
    """Path -> quantizer of what is rounded; path -> (leaf, why not) of what is not though the recipe means it."""
    planned, left = planned_leaves(params, recipe, axes)
    if quantizers is None:
        return {path: found_anew(entry) for path, entry in planned.items()}, left
    leaves = dict(flatten_with_paths(params, is_leaf=None))
    found = aligned(quantizers.by_path, leaves, "the quantizers")
    for path, quantizer in found.items():
        _check_shape(path, leaves[path], quantizer)
    missing = {path: (leaves[path], "there is no quantizer for it") for path in planned if path not in found}
    return found, {path: why for path, why in left.items() if path not in found} | missing


def planned_leaves(
    params: Any, recipe: Recipe, axes: Mapping[str, int] | None, stats: Any = None
) -> tuple[dict[str, LeafReport], Left]:
    """Path -> plan of the leaves that the recipe rounds; path -> (leaf, why not) of those that it means and cannot."""
    if recipe.has_steps:
        names = ", ".join(step.step for step in (*recipe.before, *recipe.after))
        raise JQ4Error(
            f"the recipe has steps ({names}), and training takes rules alone: leave them out, as "
            "dataclasses.replace(recipe, before=(), after=()), or run them first and train from their solution"
        )
    leaves = dict(flatten_with_paths(params))
    planned: dict[str, LeafReport] = {}
    left: Left = {}
    for entry in quantize_report(params, recipe, stats, axes).leaves:
        if entry.is_planned:
            _check_trainable(entry)
            planned[entry.path] = entry
        elif entry.status not in _LEFT_BY_WISH:
            left[entry.path] = (leaves[entry.path], entry.status)
    return planned, left


def aligned(known: Mapping[str, Any], leaves: Mapping[str, Any], called: str) -> dict[str, Any]:
    """What is known by path, by the paths of `leaves`; all of the one or all of the other may have first names more.

    Raises:
      JQ4Error: something is known of a leaf that is not there.
    """
    first = next(iter(known), "")
    longer = [path.removesuffix(first) for path in leaves if path.endswith(f"/{first}")]
    names = first.split("/")
    shorter = ["/".join(names[:count]) + "/" for count in range(1, len(names))]
    ways = [(lambda path: path), *(partial(_lengthened, prefix) for prefix in longer)]
    ways += [partial(_shortened, prefix) for prefix in shorter]
    for way in ways:
        if all(way(path) in leaves for path in known):
            return {way(path): value for path, value in known.items()}
    missing = next(path for path in known if path not in leaves)
    raise JQ4Error(
        f"{missing}: {called} have it, and the params have no such leaf: wanted those that were made for these params"
    )


def _lengthened(prefix: str, path: str) -> str:
    return prefix + path


def _shortened(prefix: str, path: str) -> str:
    return path.removeprefix(prefix)


def found_anew(entry: LeafReport) -> Quantizer:
    """The quantizer that learns nothing: scales from the weights at every call."""
    rule = entry.rule
    assert rule is not None and entry.axis is not None
    if rule.has_fixed_step:
        raise JQ4Error(
            f"{entry.path}: input_activations with dynamic false have a step that is learned: give (params, "
            "quantizers), of jq4.quantizers with stats or start, or make them dynamic"
        )
    return Quantizer(
        encoding=rule.encoding(entry.axis), activations=activations_of(entry), input_rotation=rotation_of(entry)
    )


def activations_of(entry: LeafReport) -> str:
    assert entry.rule is not None
    return "" if entry.rule.input_activations is None else entry.rule.input_activations.name


def rotation_of(entry: LeafReport) -> int:
    """The block in which the inputs of a planned leaf are rotated; 0: they are not."""
    assert entry.rule is not None and entry.axis is not None and entry.shape is not None
    try:
        return block_of(entry.shape[entry.axis]) if entry.rule.input_rotation else 0
    except JQ4Error as error:
        raise JQ4Error(f"{entry.path}: {error}") from None


def _check_trainable(entry: LeafReport) -> None:
    assert entry.rule is not None
    if entry.rule.double_quant:
        raise JQ4Error(f"{entry.path}: double_quant packs the scales, which training learns: leave it out of the rule")


def _check_shape(path: str, leaf: Any, quantizer: Quantizer) -> None:
    if quantizer.scale is None:
        return
    wanted = list(leaf.shape)
    wanted[quantizer.axis] = -(-wanted[quantizer.axis] // quantizer.group_size(wanted[quantizer.axis]))
    found = tuple(quantizer.scale.shape)
    if len(found) != len(wanted) or any(have not in (want, 1) for have, want in zip(found, wanted, strict=True)):
        raise JQ4Error(
            f"{path}: its quantizer has scales of shape {found}, wanted {tuple(wanted)} (or 1 on an axis) for a weight "
            f"of shape {tuple(leaf.shape)}: make quantizers for these params, with jq4.quantizers"
        )
