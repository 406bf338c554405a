"""`with_lora(f)`: f with low-rank adapters beside its weights (Hu et al. 2021), packed ones (QLoRA, Dettmers et al.
2023) or dense ones (LoRA), no module of it rewritten.

    adapters = jq4.lora(qparams, rank=16)                 # a pytree, trained by any optax optimizer
    forward = jq4.with_lora(model.apply)

    def loss(adapters, batch):                            # the pair goes where params went
        return cross_entropy(forward((qparams, adapters), batch["x"]), batch["y"])

    gradients = jax.grad(loss)(adapters, batch)

The first argument of f is its params, and what takes their place is that tree, packed or dense, and adapters. It is the
interpreter of `jq4.quantized` with another set of rules: a weight that has an adapter keeps it on its way through
casts, transposes, loops and meshes (adapted.py), and a product with it is the product with the weight, by the rules of
`jq4.quantized`, plus the adapter's (adapted_products.py). Going back, the gradient of x comes from the packed product's
own transpose, block by block, and those of A and B from two thin products: the dense weight is made in neither
direction. What no rule follows gets W + AB as a dense matrix, which is right, and recorded.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4 import watch_rules
from jq4.apply import PackedInterpreter, Quantized, unwrapped
from jq4.errors import DensifiedError, JQ4Error
from jq4.interpret import Values
from jq4.outputs import is_array
from jq4.paths import leaf_path
from jq4.qarray import is_qarray
from jq4.record import MERGED, UNUSED, DensifiedWarning, Record
from jq4.shardings import Shardings
from jq4.train.adapters import adapted_products
from jq4.train.adapters.adapted import Adapted
from jq4.train.adapters.adapted_products import NotFollowed
from jq4.train.adapters.adapter import Adapter, split_pair
from jq4.train.plan import aligned


class IdleAdapterWarning(UserWarning):
    """An adapter's weight multiplies nothing in the function, so that the adapter cannot learn."""


class AdaptingInterpreter(PackedInterpreter):
    """Evaluates a jaxpr with PackedLeafs and Adapted weights among its values."""

    def __init__(self, record: Record, strict: bool) -> None:
        super().__init__(record, strict)
        self.used: set[str] = set()

    def is_special(self, value: Any) -> bool:
        return isinstance(value, Adapted) or super().is_special(value)

    def rule(self, eqn: Any, values: Values) -> Values | None:
        if not any(isinstance(value, Adapted) for value in values):
            return super().rule(eqn, values)
        name = eqn.primitive.name
        if share := adapted_products.RULES.get(name):
            try:
                return self._product(eqn, values, share)
            except NotFollowed as reason:
                return super().equation(eqn, self._merged(values, eqn, str(reason)))
        if (move := MOVES.get(name)) is None:
            return super().equation(eqn, self._merged(values, eqn))
        outputs = move(self, eqn, values)
        if outputs is None or not any(isinstance(output, Adapted) for output in outputs):
            return super().equation(eqn, self._merged(values, eqn, _not_moved(eqn)))
        return outputs

    def _product(self, eqn: Any, values: Values, share: Callable[[Any, Values], jax.Array]) -> Values:
        of_adapter = share(eqn, values)
        (of_weight,) = self.compute(eqn, values)
        self.used |= {value.path for value in values if isinstance(value, Adapted)}
        out = of_weight.astype(of_adapter.dtype) + of_adapter
        return [out.astype(of_weight.dtype)]

    def compute(self, eqn: Any, values: Values) -> Values:
        """The equation on the weights alone, packed as they are."""
        return super().equation(eqn, [value.array if isinstance(value, Adapted) else value for value in values])

    def densify(self, value: Any, eqn: Any, reason: str = "") -> jax.Array:
        if not isinstance(value, Adapted):
            return super().densify(value, eqn, reason)
        reason = reason or f"{eqn.primitive.name} has no rule for an adapted weight"
        if value.is_packed:
            dense = super().densify(value.array, eqn, reason)
        else:
            self.tell_merged(value, eqn.primitive.name, reason)
            dense = value.array
        self.used.add(value.path)
        return (dense.astype(jnp.float32) + value.delta()).astype(dense.dtype)

    def tell_merged(self, value: Adapted, primitive: str, reason: str) -> None:
        """Notes that a dense weight takes its adapter as a dense matrix; warns, or raises."""
        nbytes = int(np.prod(value.shape)) * np.dtype(value.dtype).itemsize
        first = self.record.note(MERGED, value.path, primitive, reason, nbytes)
        told = f"{value.path}: {primitive} takes the weight and its adapter as one dense matrix ({nbytes} bytes)"
        if self.strict:
            raise DensifiedError(f"{told}: {reason}. Leave the leaf out of the adapters' targets")
        if first:
            warnings.warn(f"{told}: {reason}", DensifiedWarning, stacklevel=2)

    def _merged(self, values: Values, eqn: Any, reason: str = "") -> Values:
        """The values with the adapted ones as plain arrays; packed ones stay."""
        return [self.densify(value, eqn, reason) if isinstance(value, Adapted) else value for value in values]

    # What enters loops, meshes and rules of the user's own ------------------------------------------------------

    def before_slicing(self, value: Any, eqn: Any) -> Any:
        if not isinstance(value, Adapted):
            return super().before_slicing(value, eqn)
        if value.whole_axis(0) is None:
            return self.densify(value, eqn, "the scan slices it along a part of its axis")
        base = super().before_slicing(value.array, eqn) if value.is_packed else value.array
        return dataclasses.replace(value.leading_first(), array=base)

    def inside_loop(self, value: Any) -> Any:
        if not isinstance(value, Adapted):
            return super().inside_loop(value)
        base = super().inside_loop(value.array) if value.is_packed else value.array
        return dataclasses.replace(value.without_leading(), array=base)

    def enter_shard_map(self, value: Any, spec: Any, mesh: Any) -> tuple[Any, Any]:
        if not isinstance(value, Adapted):
            return super().enter_shard_map(value, spec, mesh)
        base, specs = super().enter_shard_map(value.array, spec, mesh) if value.is_packed else (value.array, spec)
        parts = value.specs(spec, specs)
        if parts is None:
            self.tell_merged(value, "shard_map", "it cuts an axis that the function split or merged")
            return (value.dense().astype(jnp.float32) + value.delta()).astype(value.dtype), spec
        return dataclasses.replace(value, array=base), parts

    def inside_shard_map(self, value: Any) -> Any:
        return value.localised() if isinstance(value, Adapted) else super().inside_shard_map(value)

    def constrain(self, value: Any, sharding: Any) -> Any:
        if not isinstance(value, Adapted):
            return super().constrain(value, sharding)
        return dataclasses.replace(value, array=super().constrain(value.array, sharding))

    def eval_custom_jvp(self, eqn: Any, values: Values) -> Values:
        return super().eval_custom_jvp(eqn, self._merged(values, eqn, _OWN_DERIVATIVE))

    def eval_custom_vjp(self, eqn: Any, values: Values) -> Values:
        return super().eval_custom_vjp(eqn, self._merged(values, eqn, _OWN_DERIVATIVE))


def _not_moved(eqn: Any) -> str:
    name = eqn.primitive.name
    if name == "convert_element_type":
        return f"it rounds to {eqn.params['new_dtype']}"
    return f"{name} takes a part of an axis, or splits it"


_OWN_DERIVATIVE = "a function with a derivative of the user's own, through whose rule alone gradients come"


# Rules for what moves a weight's axes, and brings its adapter along -----------------------------------------------


def _cast(interpreter: AdaptingInterpreter, eqn: Any, values: Values) -> Values | None:
    """To another float: A and B stay in theirs. As integers W + AB is no sum of two."""
    floats = jnp.issubdtype(eqn.params["new_dtype"], jnp.floating)
    return watch_rules.same_axes(interpreter, eqn, values) if floats else None


def _scaled(interpreter: AdaptingInterpreter, eqn: Any, values: Values) -> Values | None:
    """The weight times or over a number."""
    divided = eqn.primitive.name == "div"
    weight, number = values if isinstance(values[0], Adapted) else reversed(values)
    if interpreter.is_special(number) or jnp.ndim(number) or (divided and weight is values[1]):
        return None
    (out,) = interpreter.compute(eqn, values)
    return [weight.times(out, 1 / number if divided else number)]


def _negated(interpreter: AdaptingInterpreter, eqn: Any, values: Values) -> Values:
    (out,) = interpreter.compute(eqn, values)
    return [values[0].times(out, -1)]


def _stopped(interpreter: AdaptingInterpreter, eqn: Any, values: Values) -> Values:
    (out,) = interpreter.compute(eqn, values)
    return [values[0].stopped(out)]


def _sliced(interpreter: AdaptingInterpreter, eqn: Any, values: Values) -> Values | None:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    weight = values[0]
    for axis, bounds in enumerate(zip(starts, limits, strides, strict=True)):
        start, limit, stride = bounds
        if bounds == (0, weight.shape[axis], 1):
            continue
        if weight.whole_axis(axis) is None:
            return None
        take = lambda part, at, i=start, j=limit, s=stride: jax.lax.slice_in_dim(part, i, j, s, at)  # noqa: E731
        weight = weight.cut(axis, -(-(limit - start) // stride), take)
    (out,) = interpreter.compute(eqn, values)
    return [weight.holding(out)]


def _dynamically_sliced(interpreter: AdaptingInterpreter, eqn: Any, values: Values) -> Values | None:
    weight, starts, sizes = values[0], values[1:], eqn.params["slice_sizes"]
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if size == weight.shape[axis]:
            continue
        if weight.whole_axis(axis) is None:
            return None
        take = lambda part, at, i=start, n=size: jax.lax.dynamic_slice_in_dim(part, i, n, at)  # noqa: E731
        weight = weight.cut(axis, size, take)
    (out,) = interpreter.compute(eqn, values)
    return [weight.holding(out)]


def _split(interpreter: AdaptingInterpreter, eqn: Any, values: Values) -> Values | None:
    weight, axis, start, pieces = values[0], eqn.params["axis"], 0, []
    if weight.whole_axis(axis) is None:
        return None
    for size, out in zip(eqn.params["sizes"], interpreter.compute(eqn, values), strict=True):
        take = lambda part, at, i=start, n=size: jax.lax.slice_in_dim(part, i, i + n, axis=at)  # noqa: E731
        pieces.append(weight.cut(axis, size, take).holding(out))
        start += size
    return pieces


_WITHOUT = ("dot_general", "ragged_dot_general", "ragged_dot", "conv_general_dilated", "gather")
MOVES: dict[str, Callable[[Any, Any, Values], Values | None]] = {
    **{name: rule for name, rule in watch_rules.RULES.items() if name not in _WITHOUT},
    "convert_element_type": _cast,
    "mul": _scaled,
    "div": _scaled,
    "neg": _negated,
    "stop_gradient": _stopped,
    "slice": _sliced,
    "dynamic_slice": _dynamically_sliced,
    "split": _split,
    "reshard": watch_rules.same_axes,
    "device_put": watch_rules.each_same_axes,
}


# The function -----------------------------------------------------------------------------------------------------


class WithLora(Quantized):
    """What `with_lora(f)` returns. `record` holds what went dense in the last trace, and adapters that met nothing."""

    def __call__(self, tree: Any, *args: Any, **kwargs: Any) -> Any:
        params, adapters = split_pair(tree)
        if adapters is None or not adapters.by_path:
            return super().__call__(params, *args, **kwargs)
        self.record.clear()
        arguments = (params, *args)
        values = self.values(arguments, kwargs)
        found = self._adapters_by_place(adapters.by_path, params)
        for place, (path, adapter) in found.items():
            values[place] = Adapted.of(values[place], adapter, path)
        interpreter = AdaptingInterpreter(self.record, self.strict)
        outputs, results = self.run(interpreter, values, arguments, kwargs)
        plain = [self._returned(interpreter, value) for value in results]
        for place, (path, _) in found.items():
            if path not in interpreter.used:
                self._tell_unused(path, values[place])
        return outputs.rebuild(plain)

    def _adapters_by_place(self, known: dict[str, Adapter], params: Any) -> dict[int, tuple[str, Adapter]]:
        """Number of a leaf of params, which are the first of all leaves -> its path and adapter."""
        keyed = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qarray)
        leaves = {leaf_path(keys): (place, leaf) for place, (keys, leaf) in enumerate(keyed)}
        placed = {}
        for path, adapter in aligned(known, leaves, "the adapters").items():
            place, leaf = leaves[path]
            _check_fits(path, leaf, adapter)
            placed[place] = (path, adapter)
        return placed

    def _returned(self, interpreter: AdaptingInterpreter, value: Any) -> Any:
        if not isinstance(value, Adapted):
            return unwrapped(value)
        interpreter.used.add(value.path)
        interpreter.tell_merged(value, "return", "the function returns it")
        return (value.dense().astype(jnp.float32) + value.delta()).astype(value.dtype)

    def _tell_unused(self, path: str, value: Adapted) -> None:
        self.record.note(UNUSED, path, "", "the function multiplies nothing by it", 0)
        told = f"{path}: has an adapter, and the function multiplies nothing by it, so that it cannot learn"
        if self.strict:
            raise JQ4Error(f"{told}. Leave the leaf out of the adapters' targets")
        warnings.warn(told, IdleAdapterWarning, stacklevel=3)

    def __repr__(self) -> str:
        return f"jq4.with_lora({self.function!r})"


def with_lora(function: Callable[..., Any], strict: bool = False, shardings: Shardings = None) -> WithLora:
    """A function like `function` that also takes (params, adapters) in the place of its params, packed or dense.

    Without adapters it is `jq4.quantized(function)`. It composes with jit, grad, vmap, remat, scan and shard_map
    as that does. Adapters may have been made for the params alone, and the function take them as {"params": params}.

    Args:
      function: any traceable function whose first argument is a tree of params: a Flax `apply`, bare JAX, ...
      strict: raise where a weight would go dense or an adapter meets no product, instead of warning.
      shardings: as `jq4.quantized` takes them.

    Returns:
      The function. Its `record` tells what went dense in the last trace, and which adapters met nothing.

    Raises:
      DensifiedError: `strict`, and an operation wants the weight and its adapter as one dense matrix.
      JQ4Error: for adapters that are not those of these params.
    """
    return WithLora(function, strict, shardings)


def _check_fits(path: str, leaf: Any, adapter: Adapter) -> None:
    if not is_array(leaf) and not is_qarray(leaf):
        raise JQ4Error(f"{path}: has an adapter, and is a {type(leaf).__name__}: wanted an array or a QArray")
    if tuple(leaf.shape) != adapter.shape:
        raise JQ4Error(
            f"{path}: its adapter is for a leaf of shape {adapter.shape}, found {tuple(leaf.shape)}: make adapters for "
            "these params, with jq4.lora"
        )
