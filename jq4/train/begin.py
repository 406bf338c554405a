"""Where training starts: quantizers with the scales of a calibrated solution, and weights that round to its codes.

A calibrated solution (GPTQ's, HQQ's, of `best-*`) is scales and codes. The scales begin the quantizers. The codes are
not those that the dense weights round to, so that a training that wants to begin at the solution itself, and not beside
it, begins from weights moved there: each by as little as lets it round to its code, to the edge of what does, or to the
middle of it. Which is better depends on the bits. On TinyStories-656K, `jq4 train distill MODEL --text
calibration_ids.npy --held-out 0.15 --steps 200 --batch-size 2` (JAX 0.10.2, CPU, one seed) gives a held-out KLD of .447
from middles and .408 from edges by gptq-w2g32 (.496 at the start), of .0917 and .1093 by gptq-w3g32 (.0982): from an
edge, the least change of a step throws a weight back to the code that the solution had moved it away from, which is
dear where the start is good. With 8 rows a step that was measured with plain Adam alone, under which edges were better
at 3 bits too (.087 and .093, 200 steps); from the middles, by rates relative to leaves, 100 steps come to .0887.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jq4.activations import is_fixed
from jq4.errors import JQ4Error
from jq4.paths import flatten_with_paths, leaf_path
from jq4.qarray import QArray, dense, is_qarray, spread_groups
from jq4.quantize import quantize
from jq4.quantize_report import LeafReport
from jq4.recipe import Recipe
from jq4.rule import Rule
from jq4.train.plan import activations_of, aligned, planned_leaves, rotation_of
from jq4.train.quantizer import MARGIN, Quantizer, Quantizers
from jq4.tuning.learned import check, shift_to_codes

EDGE_BITS = 2  # with as many, weights begin at the edges


def begin_at(
    params: Any,
    recipe: Recipe | Rule | str,
    start: Any,
    axes: Mapping[str, int] | None = None,
    *,
    margin: float = MARGIN,
) -> tuple[Any, Quantizers]:
    """(params, quantizers) that `harden` to the packed leaves of a calibrated solution: what to train.

    Args:
      params: the dense tree.
      recipe, axes: as `jq4.fake_quantized` is given them.
      start: a tree with the leaves that the recipe means packed by its format. Other leaves of it, norms that were
        changed with the weights say, take the place of the params', dequantized where they are packed.
      margin: as `quantizers` takes it.

    Returns:
      params: masters in float32 at least, where every weight rounds to its code of the start: at the edge of what does
        with 2 bits, in its middle with more, and where inputs are rotated (an edge would not survive the rotation).
      quantizers: with the start's steps.

    Raises:
      JQ4Error: as `quantizers`; and for leaves of the start of other shapes, or that the params do not have.
    """
    learned = quantizers(params, recipe, axes=axes, start=start, margin=margin)
    held = aligned(dict(flatten_with_paths(start)), dict(flatten_with_paths(params)), "the start's leaves")

    def master(keys: Any, weight: Any) -> Any:
        path = leaf_path(keys)
        leaf = held.get(path, weight)
        _check_shape(path, leaf, weight)
        if not is_qarray(leaf):
            return as_master(leaf)
        at_edge = path in learned.by_path and leaf.bits <= EDGE_BITS and not leaf.input_rotation
        return move_to_codes(as_master(weight), leaf) if at_edge else leaf.dequantize(jnp.float32)

    return jax.tree_util.tree_map_with_path(master, params), learned


def as_master(leaf: Any) -> jax.Array:
    """The leaf in float32 at least, which small steps of an optimizer add up in; integers as they are."""
    leaf = jnp.asarray(leaf)
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32
    return leaf.astype(jnp.float32) if narrow else leaf


def quantizers(
    params: Any,
    recipe: Recipe | Rule | str,
    stats: Any = None,
    axes: Mapping[str, int] | None = None,
    *,
    start: Any = None,
    margin: float = MARGIN,
) -> Quantizers:
    """What rounding learns of each leaf that the recipe means: a pytree to go beside the params.

    Args:
      params: the dense tree.
      recipe: as `jq4.fake_quantized` is given it.
      stats, axes: as `jq4.quantize` takes them.
      start: where scales, zeros and steps begin. By default what `jq4.quantize(params, recipe, stats, axes)` finds; a
        tree with the packed leaves of a calibrated solution; or the Quantizers of a training at other bits, of which
        the ranges are kept.
      margin: how far beyond the outermost levels gradients reach a weight, in steps (jq4.train.lsq); 0 is LSQ's.

    Raises:
      JQ4Error: for a start that is not in the recipe's format, groups and axis, and for what cannot be trained.
    """
    recipe = Recipe.of(recipe)
    planned, _ = planned_leaves(params, recipe, axes, stats)
    if start is None:
        start = quantize(params, recipe, stats, axes)
    leaves = dict(flatten_with_paths(params))
    if isinstance(start, Quantizers):
        before = aligned(start.by_path, leaves, "the start's quantizers")
        return Quantizers(
            {path: _from_quantizer(entry, leaves[path], before.get(path), margin) for path, entry in planned.items()}
        )
    packed = aligned(_packed_leaves(start), leaves, "the start's packed leaves")
    return Quantizers({path: _from_packed(entry, packed.get(path), margin) for path, entry in planned.items()})


def move_to_codes(params: Any, start: Any) -> Any:
    """The params with each leaf that `start` holds packed moved, as little as need be, to round to its codes there."""
    packed = aligned(_packed_leaves(start), dict(flatten_with_paths(params)), "the start's packed leaves")

    def moved(keys: Any, leaf: Any) -> Any:
        path = leaf_path(keys)
        q = packed.get(path)
        if q is None:
            return leaf
        _check_plain(q, path)
        if q.input_rotation:
            raise JQ4Error(f"{path}: the start rotates inputs, and its codes are of rotated weights: wanted begin_at")
        _check_shape(path, q, leaf)
        return _moved(leaf, q)

    return jax.tree_util.tree_map_with_path(moved, params)


def _packed_leaves(tree: Any) -> dict[str, QArray]:
    return {path: leaf for path, leaf in flatten_with_paths(tree) if is_qarray(leaf)}


@jax.jit
def _moved(weight: jax.Array, q: QArray) -> jax.Array:
    steps = spread_groups(q.scale.astype(jnp.float32), q.group_size, q.axis, q.shape[q.axis])
    return (weight.astype(jnp.float32) + shift_to_codes(q, weight) * steps).astype(weight.dtype)


def _from_packed(entry: LeafReport, q: QArray | None, margin: float) -> Quantizer:
    if q is None:
        raise JQ4Error(f"{entry.path}: the recipe means it, and the start does not hold it packed: wanted a QArray")
    _check_plain(q, entry.path)
    rule = entry.rule
    assert rule is not None and entry.axis is not None
    encoding = rule.encoding(entry.axis)
    zeros = "no zero points" if encoding.symmetric else "offsets" if encoding.has_offset else "zero points"
    found_zeros = "zero points" if q.zero_point is not None else "offsets" if q.offset is not None else "no zero points"
    found = (q.format, min(q.group_size, q.shape[q.axis]), q.axis, found_zeros)
    wanted = (entry.format, entry.group_size, entry.axis, zeros)
    inputs, own = (activations_of(entry), rotation_of(entry)), (q.activations, q.input_rotation)
    if found != wanted or own != inputs:
        raise JQ4Error(
            f"{entry.path}: the start is {_told(found)}{_of_inputs(*own)}, and the recipe wants "
            f"{_told(wanted)}{_of_inputs(*inputs)}: quantize the start by the same recipe"
        )

    def begun(part: Any) -> Any:
        return None if part is None else jnp.asarray(dense(part), jnp.float32)

    return Quantizer(
        scale=begun(q.scale),
        zero_point=begun(q.zero_point),
        offset=begun(q.offset),
        input_step=begun(q.activation_scale),
        encoding=encoding,
        activations=q.activations,
        input_rotation=q.input_rotation,
        margin=margin,
    )


def _from_quantizer(entry: LeafReport, leaf: Any, before: Quantizer | None, margin: float) -> Quantizer:
    """The same ranges, cut into another number of levels."""
    rule = entry.rule
    assert rule is not None and entry.axis is not None
    encoding = rule.encoding(entry.axis)
    if before is None or before.scale is None:
        raise JQ4Error(f"{entry.path}: the recipe means it, and the start has no learned scale for it")
    length = leaf.shape[entry.axis]
    shared = ("axis", "group_size", "per_tensor", "symmetric", "has_offset")
    differs = [name for name in shared if getattr(encoding, name) != getattr(before.encoding, name)]
    differs += ["input_rotation"] if before.input_rotation != rotation_of(entry) else []
    old, new = before.number_format, encoding.number_format
    if differs or not (old.is_integer and new.is_integer):
        what = ", ".join(differs) or "format"
        raise JQ4Error(
            f"{entry.path}: the start differs from the recipe in {what}, wanted other bits of integers alone: give a "
            "packed start, or none"
        )
    assert before.group_size(length) == entry.group_size
    share = old.max_code / new.max_code if before.zero_point is not None or before.offset is not None else (
        old.max_level / new.max_level
    )  # fmt: skip
    scale = before.scale * share
    offset = before.offset
    if offset is not None:  # the lowest level stays where it is
        offset = offset - old.center * before.scale + new.center * scale
    inputs = activations_of(entry)
    if is_fixed(inputs) and before.activations != inputs:
        raise JQ4Error(f"{entry.path}: the start has no learned step for its inputs: give a packed start, or none")
    return Quantizer(
        scale=scale,
        zero_point=None if before.zero_point is None else before.zero_point / share,
        offset=offset,
        input_step=before.input_step if is_fixed(inputs) else None,
        encoding=encoding,
        activations=inputs,
        input_rotation=before.input_rotation,
        margin=margin,
    )


def _check_shape(path: str, found: Any, leaf: Any) -> None:
    shape, wanted = found.shape if is_qarray(found) else jnp.shape(found), jnp.shape(leaf)
    if shape != wanted:
        raise JQ4Error(f"{path}: the start's leaf has shape {shape}, wanted {wanted}, the params'")


def _check_plain(q: QArray, path: str) -> None:
    """Raises JQ4Error for a packed leaf that training has no form for."""
    check(q, path)
    held = ["input_scale"] if q.input_scale is not None else []
    held += ["packed scales"] if is_qarray(q.scale) or is_qarray(q.offset) else []
    if held:
        raise JQ4Error(
            f"{path}: the start has {held[0]} (of AWQ, or double_quant), which training does not carry: start from a "
            "recipe without it"
        )


def _told(form: tuple[str | None, int | None, int | None, str]) -> str:
    name, group, axis, zeros = form
    return f"{name} in groups of {group} along axis {axis} with {zeros}"


def _of_inputs(activations: str, rotation: int) -> str:
    told = [f"rotated in blocks of {rotation}"] if rotation else []
    told += [activations] if activations else []
    return f" and inputs {', '.join(told)}" if told else ""
