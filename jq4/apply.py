"""`quantized(f)`: the function that takes packed weights where `f` takes dense ones.

`f` is traced once with dense shapes standing in for its packed leaves, so that every shape check of a model passes,
and the jaxpr is evaluated with the packed values (jq4.interpret). An equation that meets a packed leaf has a rule
that keeps it packed (RULES below), or the leaf is dequantized there and then, which is recorded, warned of, and with
`strict=True` refused.

What was rejected, having been measured: intercepting Flax's methods or `dot_general` (fails under Linen's `nn.scan`),
a leaf with `__jax_array__` (Linen's shape check refuses it), hijax types (their API changes between versions),
dequantizing the tree before the call (with stacked layers the whole dense model appears at once).
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4 import jax_compat, qarray_ops, rules_convolution, rules_product, rules_sharding, rules_structure
from jq4.arguments import Arguments
from jq4.errors import DensifiedError
from jq4.interpret import Interpreter, Values
from jq4.outputs import Outputs
from jq4.packed_leaf import PackedLeaf, is_packed
from jq4.partition import partition_of
from jq4.paths import leaf_path
from jq4.qarray import QArray, holds_qarrays, is_qarray
from jq4.qarray_ops import NoPackedForm
from jq4.record import DENSE, DensifiedWarning, Record, recording
from jq4.shardings import Shardings, check_used, chooser, is_chooser

RULES: dict[str, Callable[[Any, Values], Values]] = {
    **rules_product.RULES,
    **rules_convolution.RULES,
    **rules_structure.RULES,
    **rules_sharding.RULES,
}


class PackedInterpreter(Interpreter):
    """Evaluates a jaxpr with PackedLeafs among its values."""

    def __init__(self, record: Record, strict: bool = False) -> None:
        self.record = record
        self.strict = strict
        self.tangents = False

    def is_special(self, value: Any) -> bool:
        return is_packed(value)

    def rule(self, eqn: Any, values: Values) -> Values | None:
        apply = RULES.get(eqn.primitive.name)
        if apply is None:
            return None
        path = next(value.path for value in values if is_packed(value))
        if self.tangents and apply not in rules_structure.RULES.values():
            return jax_compat.bind(eqn, self.dense(values, eqn, "a custom_jvp's tangents need a transposable product"))
        try:
            with recording(self.record, path, eqn.primitive.name):
                return apply(eqn, values)
        except NoPackedForm as error:
            return jax_compat.bind(eqn, self.dense(values, eqn, str(error)))

    def for_tangents(self) -> "PackedInterpreter":
        """Packed products have a custom_vjp, which cannot be transposed: under a custom_jvp's rule they go dense."""
        inner = PackedInterpreter(self.record, self.strict)
        inner.tangents = True
        return inner

    def before_slicing(self, value: PackedLeaf, eqn: Any) -> Any:
        """Every part with the leading axis of the weight, which no pending transpose moves."""
        leaf = value if len(value.order) < value.ndim else value.holding(value.settle())
        if leaf.grouped_axis == 0:
            return self.densify(value, eqn, "the scan slices it along its grouped axis")
        q = qarray_ops.sliceable_scales(leaf.q)
        length = q.shape[0]
        if q.permutation is not None and q.permutation.ndim == 1:
            q = dataclasses.replace(q, permutation=q.permutation[None])
        spread = jax.tree.map(lambda part: jnp.broadcast_to(part, (length, *part.shape[1:])), q)
        return dataclasses.replace(leaf, q=spread)

    def enter_shard_map(self, value: PackedLeaf, spec: Any, mesh: Any) -> tuple[PackedLeaf, PackedLeaf]:
        return rules_sharding.leaf_specs(value, spec, mesh)

    def constrain(self, value: Any, sharding: Any) -> Any:
        if not is_packed(value):
            return super().constrain(value, sharding)
        try:
            return rules_sharding.constrained(value, sharding, jax.lax.with_sharding_constraint)
        except NoPackedForm:
            return value

    def densify(self, value: PackedLeaf, eqn: Any, reason: str = "") -> jax.Array:
        primitive = eqn.primitive.name
        reason = reason or f"{primitive} has no packed rule"
        nbytes = int(np.prod(value.shape)) * np.dtype(value.dtype).itemsize
        first = self.record.note(DENSE, value.path, primitive, reason, nbytes)
        if self.strict:
            raise DensifiedError(_refusal(value, primitive, reason, nbytes))
        if first:
            warnings.warn(f"{value.path} went dense at {primitive} ({nbytes} bytes): {reason}", DensifiedWarning, 2)
        return value.dequantize()


def _refusal(value: PackedLeaf, primitive: str, reason: str, nbytes: int) -> str:
    return (
        f"{value.path}: {primitive} would dequantize this {value.q.format} weight of shape {value.shape} "
        f"({nbytes} bytes): {reason}. Keep this leaf dense (add it to the recipe's `ignore`), quantize it along the "
        "axis that the function contracts (jq4.contraction_axes tells it), or call jq4.quantized without strict=True"
    )


class Quantized:
    """What `quantized(f)` returns: calls `f` on packed weights. `record` holds what went dense in the last trace."""

    def __init__(self, function: Callable[..., Any], strict: bool, shardings: Shardings = None) -> None:
        functools.update_wrapper(self, function, updated=())
        self.function = function
        self.strict = strict
        self.shardings = shardings
        self._sharding_of = chooser(shardings)
        self.record = Record()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.record.clear()
        if not holds_qarrays((args, kwargs)):
            return self.function(*args, **kwargs)
        outputs, results = self.run(
            PackedInterpreter(self.record, self.strict), self.values(args, kwargs), args, kwargs
        )
        return outputs.rebuild([unwrapped(value) for value in results])

    def values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The leaves of the arguments, packed ones with their paths and partitions."""
        leaves = jax.tree.leaves((args, kwargs), is_leaf=is_qarray)
        within, named = _paths_within(args, kwargs)
        check_used(self.shardings, [*within, *named], "the arguments")
        return [self._placed(*each) for each in zip(_name_packed(args, kwargs, leaves), within, named, strict=True)]

    def run(
        self, interpreter: Interpreter, values: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Outputs, list[Any]]:
        """(the tree of the results, the results) of the function on `values` in the place of its arguments' leaves."""
        arguments = Arguments(args, kwargs, is_qarray)
        inputs = [values[place] for place in arguments.traced]
        jaxpr, outputs = arguments.trace(self.function, [interpreter.aval(value) for value in inputs])
        return outputs, interpreter.evaluate(jaxpr, inputs)

    def _placed(self, value: Any, within: str, named: str) -> Any:
        """A packed value with its partition; a tree may name it within its argument, or with the argument's name."""
        if not is_packed(value):
            return value
        paths = [value.path] if is_chooser(self.shardings) else [value.path, named, within]
        found = (self._sharding_of(path, value.shape) for path in paths)
        sharding = next((one for one in found if one is not None), None)
        return dataclasses.replace(value, partition=partition_of(value.path, value.shape, sharding))

    def __repr__(self) -> str:
        return f"jq4.quantized({self.function!r})"


def quantized(function: Callable[..., Any], strict: bool = False, shardings: Shardings = None) -> Quantized:
    """A function like `function` that also takes packed weights (QArray leaves) in its arguments.

    Arrays and QArrays are traced; every other leaf (numbers, strings, functions) is passed as it is. It composes
    with jit, grad, vmap, checkpoint, scan, shard_map, eval_shape and export; gradients reach every float array.

    Args:
      function: any traceable function of pytrees: a Flax `apply`, an Equinox model's call, bare JAX.
      strict: raise where a packed leaf would be dequantized, instead of warning.
      shardings: how the packed weights lie on several devices, as `jq4.restore` takes it; their products are then cut
        accordingly. What is sharded and not told runs by XLA's forms, since XLA cuts no kernel.

    Returns:
      The function. Its `record` lists the leaves that went dense in the last trace, where, why and at what cost.

    Raises:
      DensifiedError: `strict`, and an operation has no packed form.
    """
    return Quantized(function, strict, shardings)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Record:
    """The record of `quantized(function)(*args, **kwargs)` without computing anything; arrays may be shapes only."""
    transformed = function if isinstance(function, Quantized) else Quantized(function, strict=False)
    arguments = Arguments(args, kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DensifiedWarning)
        arguments.trace(transformed, arguments.arrays)
    return transformed.record


def unwrapped(value: Any) -> Any:
    return value.settle() if is_packed(value) else value


def _paths_within(args: Any, kwargs: Any) -> tuple[list[str], list[str]]:
    """The paths of all leaves, packed or dense: in their arguments, and with the arguments' names before."""
    keyed, _ = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_qarray)
    names = [f"argument {keys[1].idx}" if keys[0].idx == 0 else keys[1].key for keys, _ in keyed]  # type: ignore[attr-defined]
    within = [leaf_path(keys[2:]) for keys, _ in keyed]
    return within, ["/".join(filter(None, pair)) for pair in zip(names, within, strict=True)]


def _name_packed(args: Any, kwargs: Any, leaves: list[Any]) -> list[Any]:
    """The leaves, each QArray wrapped with its path in its argument (and the argument's name, if several have some)."""
    arguments = {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
    holders = [name for name, value in arguments.items() if holds_qarrays(value)]
    keyed, _ = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_qarray)
    named = []
    for (keys, _), leaf in zip(keyed, leaves, strict=True):
        if not isinstance(leaf, QArray):
            named.append(leaf)
            continue
        which = list(arguments)[keys[1].idx] if keys[0].idx == 0 else keys[1].key  # type: ignore[attr-defined]
        path = leaf_path(keys[2:])
        named.append(PackedLeaf(leaf, path if path and len(holders) == 1 else "/".join(filter(None, (which, path)))))
    return named
