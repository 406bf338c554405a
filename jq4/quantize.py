"""A tree of dense weights to a tree with QArray leaves, one leaf at a time, and back.

    for each leaf:  rule = the first of the recipe's that means its path       (jq4.recipe, jq4.targets)
                    axis = axes[path], or stats.axes[path], or rule.axis, or what the leaf's name says
                    leaf = method(leaf, stats[path], rule.encoding(axis))      (jq4.methods)

Nothing but the leaf in hand is in memory twice, and its work space is bounded (jq4.quantize_leaf). With `donate` the
dense leaf is freed as soon as its codes exist. The functions trace: under `jit` and `jax.eval_shape` they do the same
and leave out only the checks of values.

Which axis is grouped? That which the weight's function contracts, and a tree does not tell it. `axes` (of
jq4.contraction_axes) or `stats` (of jq4.observe) do. Without them names decide: Flax `kernel` and `w` along -2 (right
for Dense, Conv [*spatial, Cin, Cout], scanned and expert stacks; the kernels of DenseGeneral and of attention, with
three axes, want `axes`), `weight` of Equinox and torch along -1, `embedding` along -1. A leaf without an axis stays
dense, and is listed.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jq4.activations import rounding_inputs
from jq4.double_quant import double_quantized
from jq4.errors import JQ4Error
from jq4.freed_pages import give_back_freed_pages
from jq4.input_rotation import rotate_leaf, rotating_inputs
from jq4.methods import get_method
from jq4.paths import find_path, leaf_path
from jq4.qarray import QArray, is_qarray
from jq4.quantize_leaf import quantize_leaf
from jq4.quantize_report import LeafReport, QuantizeReport
from jq4.recipe import Recipe
from jq4.rule import Rule
from jq4.sqnr import sqnr
from jq4.statistics import check_finite
from jq4.targets import EMBEDDING, LINEAR, axis_by_name
from jq4.upper_squares import UpperSquares

_DONATED = ("cross_total", "way_total", "outer_total")


class IdleRuleWarning(UserWarning):
    """A rule of the recipe quantized no leaf."""


class CalibrationWarning(UserWarning):
    """The statistics of some leaves did not suffice for their method, which did what its essay says."""


def quantize(
    params: Any,
    recipe: Recipe | Rule | str,
    stats: Any = None,
    axes: Mapping[str, int] | None = None,
    *,
    report: QuantizeReport | None = None,
    progress: Callable[[LeafReport], None] | None = None,
    donate: bool = False,
    donate_stats: bool = False,
) -> Any:
    """The same tree with the leaves that the recipe means as QArrays; pure, unless `donate`.

    Args:
      params: any tree: Linen's {"params": ...}, an NNX State or module, an Equinox module, dicts, lists, tuples. Leaves
        that are no float arrays pass through, as do leaves that are packed already just as the recipe says.
      recipe: a Recipe, a single Rule, or a preset's name such as "hqq-w4g64-asym".
      stats: of jq4.observe, for the methods that need them; they also tell the contraction axes.
      axes: of jq4.contraction_axes: path -> negative axis; wins over `stats`, the rule's axis and the leaf's name.
      report: a QuantizeReport to fill with what became of each leaf, SQNR included.
      progress: called with the LeafReport of each leaf, packed or not, as soon as it is done.
      donate: delete each dense jax.Array once its QArray exists; `params` must not be used afterwards.
      donate_stats: delete each cross-correlation of `stats` (jq4.observe_pair) once the last leaf that it serves has
        been corrected by it, and each Hessian once GPTQ has no more use for it; `stats` must not be used again.

    Raises:
      JQ4Error: for a NaN, an Inf, an empty leaf, one packed already in another way, or an impossible rule; it names
        the leaf.

    Warns:
      IdleRuleWarning: for a rule that quantized no leaf, saying why.
      CalibrationWarning: where there is no `report` to say it, for leaves whose statistics did not suffice: experts
        that saw too few rows, a Hessian that took more damping than was asked for.
    """
    reported = report is not None
    report = QuantizeReport(measure=False) if report is None else report
    measured = report.measure
    keyed, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qarray)
    uses = Counter(id(leaf) for _, leaf in keyed)
    plan = quantize_report(params, recipe, stats, axes)
    out = []
    releases = _releases(plan, stats) if donate_stats else {}
    for (_, leaf), entry in zip(keyed, plan.leaves, strict=True):
        result = leaf
        if entry.is_planned:
            result, findings = quantize_planned(leaf, entry, stats, releases.get(entry.path))
            entry = entry.packed_as(result, sqnr(leaf, result) if measured else None, findings)
            uses[id(leaf)] -= 1
            if donate and not uses[id(leaf)]:
                _delete(leaf, result)
        out.append(result)
        report.leaves.append(entry)
        if progress is not None:
            progress(entry)
    report.recipe = plan.recipe
    warn_of_idle_rules(report)
    if not reported:
        _warn_of_notes(report)
    return jax.tree_util.tree_unflatten(treedef, out)


def quantize_report(
    params: Any, recipe: Recipe | Rule | str, stats: Any = None, axes: Mapping[str, int] | None = None
) -> QuantizeReport:
    """What `quantize` would do, leaf by leaf, from shapes and dtypes alone: ShapeDtypeStructs are enough."""
    recipe = Recipe.of(recipe)
    if recipe.has_steps:
        names = ", ".join(step.step for step in (*recipe.before, *recipe.after))
        raise JQ4Error(
            f"the recipe has steps ({names}), which need to know the model's blocks, and quantize sees a tree alone: "
            "use jq4.quantize_blocks or `jq4 quantize`, or leave the steps out"
        )
    keyed = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qarray)
    report = QuantizeReport(recipe)
    report.leaves.extend(_plan_leaf(leaf_path(keys), leaf, recipe, stats, axes) for keys, leaf in keyed)
    return report


def dequantize(params: Any, dtype: Any = None) -> Any:
    """The tree with every QArray dense again, in `dtype` or the dtype it had before it was quantized."""
    return jax.tree.map(lambda leaf: leaf.dequantize(dtype) if is_qarray(leaf) else leaf, params, is_leaf=is_qarray)


def contraction_axis(path: str, ndim: int, rule: Rule, stats: Any, axes: Mapping[str, int] | None) -> int | None:
    """The negative axis that a leaf is grouped along, or None if nothing tells it."""
    known = find_path(axes or {}, path)
    known = find_path(getattr(stats, "axes", {}), path) if known is None else known
    known = rule.axis if known is None else known
    known = axis_by_name(path) if known is None else known
    if known is None:
        return None
    if not -ndim <= known < 0:
        raise JQ4Error(f"{path}: contraction axis {known} of a {ndim}-d weight, wanted one of -{ndim}..-1")
    return known


def role_of(path: str, stats: Any, axes: Mapping[str, int] | None) -> str | None:
    """What the function was seen to do with a leaf: multiply by it (Linear) or look rows up in it (Embedding)."""
    for known in (axes or {}, getattr(stats, "axes", {})):
        if find_path(known, path) is not None:
            tables = getattr(known, "looked_up", ())
            return EMBEDDING if find_path(dict.fromkeys(tables, True), path) else LINEAR
    return None


def _plan_leaf(path: str, leaf: Any, recipe: Recipe, stats: Any, axes: Mapping[str, int] | None) -> LeafReport:
    if not (is_qarray(leaf) or (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))):
        return LeafReport(path, status="not an array")
    entry = LeafReport.of(path, leaf)
    role = role_of(path, stats, axes)
    if recipe.ignores(path, role):
        return entry.with_status("ignored")
    index = recipe.index_of_rule(path, role)
    if index is None:
        return entry.with_status("packed already" if is_qarray(leaf) else "no rule")
    rule = recipe.rules[index]
    entry = entry.with_rule(index, rule)
    if is_qarray(leaf):
        return _plan_packed(leaf, entry, rule, contraction_axis(path, leaf.ndim, rule, stats, axes))
    if rule.is_dense:
        return entry.with_status("dense by rule")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return entry.with_status(f"not a float array ({leaf.dtype})")
    if len(leaf.shape) < 2:
        return entry.with_status("fewer than two axes")
    axis = contraction_axis(path, len(leaf.shape), rule, stats, axes)
    if axis is None:
        return entry.with_status("contraction axis unknown: pass axes, stats, or the rule's axis")
    if 0 in leaf.shape:
        raise JQ4Error(
            f"{path}: the leaf is empty, shape {tuple(leaf.shape)}: ignore it in the recipe, or leave it out"
        )
    return entry.planned(axis)


def _plan_packed(leaf: QArray, entry: LeafReport, rule: Rule, axis: int | None) -> LeafReport:
    if rule.is_dense:
        return entry.with_status("packed already")
    length = leaf.shape[leaf.axis]
    wanted = (rule.format, min(rule.group_size or length, length), leaf.axis if axis is None else axis)
    found = (leaf.format, min(leaf.group_size, length), leaf.axis)
    inputs = "" if rule.input_activations is None else rule.input_activations.name
    if wanted == found and inputs != leaf.activations:
        raise JQ4Error(
            f"{entry.path}: packed already with activations {leaf.activations or 'none'}, and the recipe wants "
            f"{inputs or 'none'}: quantize the dense weights, or jq4.dequantize first"
        )
    if wanted == found:
        return entry.with_status("packed already")
    raise JQ4Error(
        f"{entry.path}: packed already as {found[0]} in groups of {found[1]} along axis {found[2]}, and the recipe "
        f"wants {wanted[0]} in groups of {wanted[1]} along axis {wanted[2]}: quantize the dense weights, or "
        "jq4.dequantize first"
    )


def _releases(plan: QuantizeReport, stats: Any) -> dict[str, Callable[[str], None]]:
    """Path -> what deletes the sums, called by their names, that no leaf after this one is served by."""
    last: dict[int, tuple[str, str, jax.Array | UpperSquares]] = {}
    kept: set[int] = set()
    least: dict[int, Any] = {}
    for entry in plan.leaves:
        known = find_path(stats or {}, entry.path)
        sums = {name: getattr(known, name, None) for name in _DONATED} if entry.is_planned else {}
        for name, total in sums.items():
            if isinstance(total, jax.Array | UpperSquares) and not any(map(_is_traced, jax.tree.leaves(total))):
                last[id(total)] = entry.path, name, total
                rows = _rows_wanted(entry)  # leaves that saw fewer are to be measured by a Hessian, also afterwards
                is_asked_again = name == "outer_total" and least.setdefault(id(total), rows) != rows
                if not _is_done_with(entry, name) or is_asked_again or sum(each is total for each in sums.values()) > 1:
                    kept.add(id(total))
    found: dict[str, dict[str, jax.Array | UpperSquares]] = {}
    for key, (path, name, total) in last.items():
        if key not in kept:
            found.setdefault(path, {})[name] = total
    return {path: functools.partial(_delete_sum, sums) for path, sums in found.items()}


def _is_done_with(entry: LeafReport, name: str) -> bool:
    """Whether a leaf's sum is of no use once it is packed: a Hessian is, where its method says what it lost."""
    return name != "outer_total" or (entry.rule is not None and get_method(entry.rule.method).diagnosed is not None)


def _rows_wanted(entry: LeafReport) -> Any:
    return None if entry.rule is None else entry.rule.method_options.get("min_rows")


def _delete_sum(sums: Mapping[str, jax.Array | UpperSquares], name: str) -> None:
    if name in sums:
        sums[name].delete()
        give_back_freed_pages()


def quantize_planned(
    leaf: Any, entry: LeafReport, stats: Any, release: Callable[[str], None] | None = None
) -> tuple[QArray, Any]:
    """The packed leaf, and the findings of its method, if it has some."""
    rule, axis = entry.rule, entry.axis
    assert rule is not None and axis is not None
    method = get_method(rule.method)
    statistics = find_path(stats or {}, entry.path)
    if method.needs_statistics and statistics is None:
        raise JQ4Error(f"{entry.path}: method {rule.method} needs statistics: pass stats=jq4.observe(...)")
    if statistics is not None and (method.needs_statistics or rule.has_fixed_step):
        check_finite(entry.path, statistics)
        if method.needs_statistics:
            _check_axes(entry.path, leaf.shape, axis, statistics)
    check_values(entry.path, leaf, rule)
    try:
        looked_at = statistics if method.needs_statistics else None
        block = 0
        if rule.input_rotation:
            block, leaf, looked_at = rotate_leaf(leaf, looked_at, axis)
        packed, findings = quantize_leaf(
            leaf, looked_at, rule.method, rule.encoding(axis), rule.method_options, release
        )
        packed = _double_quantized(packed) if rule.double_quant else packed
        packed = rotating_inputs(packed, block)
        return _with_activations(packed, rule, statistics), findings
    except JQ4Error as error:
        raise JQ4Error(f"{entry.path}: {error}") from None


def _check_axes(path: str, shape: tuple[int, ...], axis: int, statistics: Any) -> None:
    if not statistics.tells_axes(shape, axis):
        leading, features = statistics.leaf_axes
        raise JQ4Error(
            f"{path}: shape {tuple(shape)}, observed contracted along axes {list(features)} and stacked along "
            f"{list(leading)}: wanted axes beside each other that end with {axis}, the grouped one, behind the stacked "
            "ones; give it a method that looks at no data, such as hqq, or leave it dense"
        )


_double_quantized = jax.jit(double_quantized)


def _with_activations(packed: QArray, rule: Rule, statistics: Any) -> QArray:
    wanted = rule.input_activations
    if wanted is None:
        return packed
    absmax = getattr(statistics, "absmax", None)
    if absmax is None and rule.has_fixed_step:
        raise JQ4Error(
            "input_activations with dynamic false want max |x| of the inputs: pass stats=jq4.observe(...) with absmax"
        )
    return rounding_inputs(packed, wanted.name, absmax)


def check_values(path: str, leaf: Any, rule: Rule) -> None:
    """Raises JQ4Error for a NaN, an Inf, or more than scales can hold; a tracer has no values to look at."""
    if _is_traced(leaf):
        return
    finite, largest = map(float, _finite_and_largest(leaf))
    if finite:
        limit = float(jnp.finfo(rule.scale_dtype).max)
        if largest > limit:
            raise JQ4Error(
                f"{path}: a weight of magnitude {largest:.4g} may need a scale that {rule.scale_dtype} cannot hold (at "
                f"most {limit:.4g}): wanted scale_dtype bfloat16 or float32 in the recipe"
            )
        return
    values = np.asarray(leaf).astype(np.float32)
    bad = ~np.isfinite(values)
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    raise JQ4Error(
        f"{path}: {int(bad.sum())} of {bad.size} weights are not finite, the first {values[first]} at {first}: "
        "wanted finite weights; repair the checkpoint, or ignore the leaf in the recipe"
    )


@jax.jit
def _finite_and_largest(leaf: Any) -> tuple[jax.Array, jax.Array]:
    """Whether all weights are finite, and max |w|, f32[] (which XLA may compute without regard to a NaN)."""
    return jnp.all(jnp.isfinite(leaf)), jnp.max(jnp.abs(leaf)).astype(jnp.float32)


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, Tracer)


def _delete(leaf: Any, result: QArray) -> None:
    if isinstance(leaf, jax.Array) and not _is_traced(leaf):
        jax.block_until_ready(result.codes)
        leaf.delete()


def warn_of_idle_rules(report: QuantizeReport) -> None:
    """Warns, at the caller's caller, of each rule that quantized no leaf."""
    for index, rule, why in report.idle_rules():
        warnings.warn(
            f"rule {index} of the recipe, for targets {list(rule.targets)}, quantized no leaf: {why}",
            IdleRuleWarning,
            stacklevel=3,
        )


def _warn_of_notes(report: QuantizeReport) -> None:
    for leaf in report.leaves:
        if leaf.is_short_of_calibration:
            warnings.warn(f"{leaf.path}: {leaf.note}", CalibrationWarning, stacklevel=3)
