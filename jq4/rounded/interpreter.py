"""The interpreter of `jq4.quantized` with another set of rules: jq4.rounded.products, and jq4.watch_rules for moves.

Where is a weight rounded? At its use: a scan over layers rounds a layer's slice in its body, so that one layer's copy
is alive, and under remat none is kept for the backward pass. What a loop does not slice is rounded once, before the
loop; so is what enters a shard_map, where a group may lie on several devices. A user's own custom derivative gets the
rounded weight as a plain array, gradients pass through its rule to the weight, and inputs of products inside are not
rounded, which is told.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jq4 import jax_compat, watch_rules
from jq4.arguments import Arguments
from jq4.interpret import Interpreter, Values
from jq4.record import DENSE
from jq4.rounded import products
from jq4.rounded.products import NotFollowed
from jq4.rounded.record import INPUTS, UNROUNDED, RoundingRecord, UnroundedError, UnroundedWarning
from jq4.rounded.value import Rounded, ToRound

_MOVES = {name: rule for name, rule in watch_rules.RULES.items() if name not in watch_rules.PRODUCTS}
_CUTS = ("slice", "dynamic_slice", "split")
_ENTERED_WHOLE = ("eval_jit", "eval_call", "eval_remat", "eval_cond", "eval_scan")


class RoundingInterpreter(Interpreter):
    """Evaluates a jaxpr with weights that are rounded where they are used."""

    def __init__(self, record: RoundingRecord, strict: bool) -> None:
        self.record = record
        self.strict = strict
        self.rounded: set[str] = set()
        self.looked_up: dict[str, int] = {}

    def is_special(self, value: Any) -> bool:
        return isinstance(value, ToRound | Rounded)

    def equation(self, eqn: Any, values: Values) -> Values:
        if jax_compat.method_of(eqn) not in _ENTERED_WHOLE:
            values = [self.round(value) for value in values]
        return super().equation(eqn, values)

    def round(self, value: Any) -> Any:
        if not isinstance(value, ToRound):
            return value
        self.rounded.add(value.path)
        return value.round()

    def rule(self, eqn: Any, values: Values) -> Values | None:
        name = eqn.primitive.name
        if product := products.RULES.get(name):
            try:
                return product(eqn, values)
            except NotFollowed as reason:
                return jax_compat.bind(eqn, self.dense(values, eqn, str(reason)))
        outputs = self._narrowed(eqn, values) if name in _CUTS else None
        if outputs is None and name in _MOVES:
            outputs = _MOVES[name](self, eqn, values)
        if outputs is None:
            return None
        if not any(isinstance(output, Rounded) for output in outputs) and not _looks_rows_up(eqn, values):
            self.dense(values, eqn)
        return outputs

    def _narrowed(self, eqn: Any, values: Values) -> Values | None:
        """A weight cut along axes of its outputs (q, k and v in one) is still the weight to its inputs; else None."""
        weight = values[0]
        if not isinstance(weight, Rounded):
            return None
        sizes = [part.aval.shape for part in eqn.outvars]
        cut = [axis for axis, size in enumerate(weight.shape) if any(shape[axis] != size for shape in sizes)]
        if not all(_is_of_outputs(weight, axis) and min(shape[axis] for shape in sizes) > 1 for axis in cut):
            return None
        results = []
        for part in self.compute(eqn, values):
            axes = list(weight.axes)
            for axis in cut:
                axes[axis] = (axes[axis][0]._replace(size=part.shape[axis]),)
            results.append(weight.moved(part, tuple(axes)))
        return results

    def compute(self, eqn: Any, values: Values) -> Values:
        """The equation on the arrays, for the rules that move axes."""
        return jax_compat.bind(eqn, [value.array if isinstance(value, Rounded) else value for value in values])

    def densify(self, value: Any, eqn: Any, reason: str = "") -> jax.Array:
        value, primitive = self.round(value), eqn.primitive.name
        reason = reason or f"{primitive} has no packed rule"
        kind = INPUTS if value.activations else DENSE
        self.tell(kind, value.path, primitive, reason, value)
        return value.array

    def tell(self, kind: str, path: str, primitive: str, reason: str, leaf: Any) -> None:
        """Notes it; where something is not what the recipe says, raises or warns as well."""
        first = self.record.note_leaf(kind, path, primitive, reason, leaf)
        if kind == DENSE:
            return
        text = _told(kind, path, primitive, reason)
        if self.strict:
            raise UnroundedError(text)
        if first:
            warnings.warn(text, UnroundedWarning, stacklevel=2)

    # What enters loops, meshes and rules of the user's own ------------------------------------------------------

    def eval_scan(self, eqn: Any, values: Values) -> Values:
        num_consts, num_carry = jax_compat.scan_counts(eqn)
        whole = num_consts + num_carry
        return super().eval_scan(eqn, [*(self.round(value) for value in values[:whole]), *values[whole:]])

    def before_slicing(self, value: Any, eqn: Any) -> Any:
        if isinstance(value, ToRound):
            if value.can_be_sliced():
                return value.with_whole_leading_axis()
            value = self.round(value)
        leading = value.axes[0]
        if not value.can_be_scanned():
            return self.densify(value, eqn, "the scan slices it along a part of its axis")
        for name, part in value.beside.items():
            if leading[0].axis != -part.ndim:
                return self.densify(value, eqn, "the scan slices it along another axis than what its inputs meet")
            whole = jax.numpy.broadcast_to(part, (len(value.array), *part.shape[1:]))
            value = dataclasses.replace(value, **{name: whole})
        return value

    def inside_loop(self, value: Any) -> Any:
        return value if isinstance(value, ToRound) else dataclasses.replace(value, axes=value.axes[1:])

    def enter_shard_map(self, value: Rounded, spec: Any, mesh: Any) -> tuple[Any, Any]:
        del mesh
        parts = jax.tree.map(lambda _: PartitionSpec(), value)
        along = {atoms[0].axis: entry for atoms, entry in zip(value.axes, spec, strict=False) if atoms}
        for name, part in value.beside.items():  # each device its own experts' steps, and its own inputs' scales
            entries = [along.get(axis) if part.shape[axis] > 1 else None for axis in range(-part.ndim, 0)]
            parts = dataclasses.replace(parts, **{name: PartitionSpec(*entries)})
        return value, dataclasses.replace(parts, array=spec)

    def inside_shard_map(self, value: Rounded) -> Any:
        return value.localised()

    def constrain(self, value: Any, sharding: Any) -> Any:
        if isinstance(value, ToRound):
            return dataclasses.replace(value, weight=super().constrain(value.weight, sharding))  # type: ignore[type-var]
        if isinstance(value, Rounded):
            return value.holding(super().constrain(value.array, sharding))
        return super().constrain(value, sharding)

    def eval_custom_jvp(self, eqn: Any, values: Values) -> Values:
        return jax_compat.bind(eqn, self.dense(values, eqn, "a function with a derivative of the user's own"))

    def eval_custom_vjp(self, eqn: Any, values: Values) -> Values:
        return self.eval_custom_jvp(eqn, values)

    def run(self, function: Callable[..., Any], arguments: Arguments, special: Callable[[str, Any], Any]) -> Any:
        """What the function returns, with `special(path, leaf)` in the place of each leaf of its first argument."""
        paths = [arguments.paths.get(place) for place in arguments.traced]
        values = [
            leaf if path is None else special(path, leaf) for path, leaf in zip(paths, arguments.arrays, strict=True)
        ]
        jaxpr, outputs = arguments.trace(function, arguments.arrays)
        return outputs.rebuild([_unwrapped(self.round(value)) for value in self.evaluate(jaxpr, values)])


def _told(kind: str, path: str, primitive: str, reason: str) -> str:
    remedy = "Ignore the leaf in the recipe, or see jq4.fake_quantized's record"
    if kind == INPUTS:
        return f"{path}: inputs are not rounded at {primitive}, though the recipe says so: {reason}. {remedy}"
    what = "it is not rounded, though the recipe means it" if kind == UNROUNDED else "the recipe means it for nothing"
    return f"{path}: {what}: {reason}. {remedy}"


def _is_of_outputs(weight: Rounded, axis: int) -> bool:
    """Whether an axis of the value is one of the leaf that its inputs, and what is done to them, know nothing of."""
    run = weight.axes[axis]
    if len(run) != 1 or len(run[0].id) != 1 or run[0].axis == weight.grouped:
        return False
    return all(part.shape[run[0].axis] == 1 for part in weight.beside.values())


def _looks_rows_up(eqn: Any, values: Values) -> bool:
    """Whether single rows of a table are taken, which have no product and no inputs."""
    return (
        eqn.primitive.name == "gather"
        and isinstance(values[0], Rounded)
        and sum(size > 1 for size in eqn.params["slice_sizes"]) <= 1
    )


def _unwrapped(value: Any) -> Any:
    return value.array if isinstance(value, Rounded) else value
