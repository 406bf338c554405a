"""Products with a rounded weight, whose inputs are rounded too where the recipe says so (jq4.activations).

    x W  ~  step * (round(x / step) W)

The numbers are what is multiplied, and the step follows, as in the products of packed weights: in bfloat16 they are
exact, and x rounded to a step would not be. (A convolution sums over pixels of different steps, and does multiply
those. So do products whose inputs are scaled or rotated before they are rounded: the weight has both in it, and the
rounded inputs come back from them.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jq4 import jax_compat
from jq4.activations import in_steps, most_of
from jq4.input_rotation import rotated
from jq4.product_inputs import expert_of_rows, placed, scaled_and_rotated
from jq4.rounded.steps import slowed, stored_step
from jq4.rounded.value import Rounded

Values = list[Any]


class NotFollowed(Exception):  # noqa: N818  it is caught, and told to the user as the reason
    """This product is none that a packed weight could take part in; the message says why."""


def dot_general(eqn: Any, values: Values) -> Values:
    side = 1 if isinstance(values[1], Rounded) else 0
    weight, x = values[side], values[1 - side]
    if isinstance(x, Rounded):
        raise NotFollowed("a product of two weights")
    contract, batch = eqn.params["dimension_numbers"]
    _check_contracted(weight, contract[side])
    if not weight.activations:
        return _bind(eqn, values)
    x_contract, x_batch = contract[1 - side], batch[1 - side]
    partner = dict(zip((*contract[side], *batch[side]), (*x_contract, *x_batch), strict=True))
    parts = {name: _beside_inputs(part, weight, x, partner) for name, part in weight.beside.items()}
    numbers, step = _in_steps(x, weight, x_contract, parts, partner.get(_run_of(weight, weight.grouped)))
    (sums,) = _bind_wide(eqn, [weight.array, numbers] if side == 0 else [numbers, weight.array])
    free = [axis for axis in range(x.ndim) if axis not in (*x_contract, *x_batch)]
    kept = [axis for axis in range(weight.array.ndim) if axis not in (*contract[side], *batch[side])]
    rows = jnp.broadcast_to(step, [1 if axis in x_contract else size for axis, size in enumerate(x.shape)])
    rows = lax.transpose(rows, (*x_batch, *free, *x_contract))
    sizes, ones = [x.shape[axis] for axis in free], [1] * len(kept)
    shape = [*(x.shape[axis] for axis in x_batch), *([*ones, *sizes] if side == 0 else [*sizes, *ones])]
    return [(sums * rows.reshape(shape).astype(sums.dtype)).astype(eqn.outvars[0].aval.dtype)]


def ragged_dot(eqn: Any, values: Values) -> Values:
    """Rows x[M, K] sorted by expert, by their experts' matrices [E, K, N]."""
    x, weight = values[:2]
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_contract, w_contract), batch = numbers.dot_dimension_numbers
    if isinstance(x, Rounded) or any(map(len, batch)) or x.ndim != 2 or len(x_contract) != 1:
        raise NotFollowed("a ragged product other than [M, K] by [E, K, N]")
    _check_contracted(weight, w_contract)
    if not weight.activations:
        return _bind(eqn, values)

    def of_rows(part: jax.Array) -> jax.Array:
        """A part as it broadcasts to x, each row with its expert's."""
        part = _at_indices(part, weight)
        whole = jnp.moveaxis(part, weight.grouped, -1).reshape(-1, part.shape[weight.grouped])  # [E or 1, K or 1]
        if len(whole) > 1:
            expert = expert_of_rows(values[2], x.shape[1 - x_contract[0]])
            whole = jnp.take(whole, expert, axis=0, mode="clip")
        return jnp.moveaxis(whole, 1, x_contract[0])

    parts = {name: of_rows(part) for name, part in weight.beside.items()}
    numbers, step = _in_steps(x, weight, x_contract, parts, x_contract[0])
    (sums,) = _bind_wide(eqn, [numbers, weight.array, *values[2:]])
    return [(sums * step.reshape(-1, 1).astype(sums.dtype)).astype(eqn.outvars[0].aval.dtype)]


def convolution(eqn: Any, values: Values) -> Values:
    x, kernel = values
    in_axis = eqn.params["dimension_numbers"].rhs_spec[1]
    if isinstance(x, Rounded) or eqn.params["feature_group_count"] > 1 or eqn.params["batch_group_count"] > 1:
        raise NotFollowed("a convolution of a weight, or in groups")
    _check_contracted(kernel, (in_axis,))
    if not kernel.activations:
        return _bind(eqn, values)
    channels = (eqn.params["dimension_numbers"].lhs_spec[1],)
    parts = {name: _beside_inputs(part, kernel, x, {in_axis: channels[0]}) for name, part in kernel.beside.items()}
    numbers, step = _in_steps(x, kernel, channels, parts, channels[0])  # a pixel is a token
    return _bind(eqn, [(numbers.astype(jnp.float32) * step).astype(x.dtype), kernel])


RULES: dict[str, Callable[[Any, Values], Values]] = {
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot,
    "conv_general_dilated": convolution,
}


# ---------------------------------------------------------------------------------------------------------------


def _bind(eqn: Any, values: Values) -> Values:
    return jax_compat.bind(eqn, [value.array if isinstance(value, Rounded) else value for value in values])


def _bind_wide(eqn: Any, values: Values) -> Values:
    """The product summed in float32 at least."""
    wide = jnp.promote_types(eqn.outvars[0].aval.dtype, jnp.float32)
    parameters = {**eqn.params, "preferred_element_type": wide}
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(parameters))
    return list(out) if eqn.primitive.multiple_results else [out]


def _check_contracted(weight: Rounded, contracted: Any) -> None:
    """Raises NotFollowed unless the grouped axis of the leaf is contracted."""
    found = {atom.axis for axis in contracted for atom in weight.axes[axis]}
    if weight.grouped not in found:
        named = ", ".join(map(str, sorted(found))) or "none"
        raise NotFollowed(f"its product contracts axis {named} of the leaf, and groups lie along {weight.grouped}")


def _in_steps(
    x: jax.Array, weight: Rounded, contracted: Any, parts: dict[str, jax.Array], grouped: int | None
) -> tuple[jax.Array, jax.Array]:
    """Numbers and the step that the product is times, as jq4.activations has them; `parts` broadcast to x.

    Of inputs that are scaled or rotated first, along the axis `grouped` of x, the numbers are the rounded inputs.
    """
    fixed, scale, block = parts.get("step"), parts.get("input_scale"), weight.input_rotation
    fixed = None if fixed is None else _slowed(fixed, weight, x, contracted)
    if scale is None and not block:
        return in_steps(x, weight.activations, contracted, fixed)
    if grouped is None:
        raise NotFollowed("inputs that are rotated along an axis which the product splits")
    met = scaled_and_rotated(x, scale, block, grouped)
    numbers, step = in_steps(met, weight.activations, contracted, fixed)
    near = numbers.astype(jnp.float32) * step
    near = rotated(near, block, grouped) if block else near
    if scale is not None:
        near = near / jnp.where(scale == 0, 1, scale).astype(jnp.float32)  # where it is 0 the weight is
    return near.astype(x.dtype), jnp.ones_like(step)


def _run_of(weight: Rounded, axis: int) -> int | None:
    """Which axis of the value is a whole axis of the leaf, alone."""
    return next((i for i, atoms in enumerate(weight.axes) if [atom.id for atom in atoms] == [(axis,)]), None)


def _at_indices(part: jax.Array, weight: Rounded) -> jax.Array:
    """The part of the slice that the value is: one long along the axes that were indexed."""
    for index, atom in zip(weight.indices, weight.indexed, strict=True):
        if part.shape[atom.axis] > 1:
            part = lax.dynamic_index_in_dim(part, index, axis=atom.axis % part.ndim, keepdims=True)
    return part


def _beside_inputs(part: jax.Array, weight: Rounded, x: jax.Array, partner: dict[int, int]) -> jax.Array:
    """A part with the leaf's axes as one that broadcasts to x: each axis where x has its partner."""
    part = _at_indices(part, weight)
    places = {}
    for axis in range(part.ndim):
        if part.shape[axis] == 1:
            continue
        run = _run_of(weight, axis - part.ndim)
        if run is None or run not in partner:
            raise NotFollowed(
                f"a step or scale of inputs that varies along axis {axis - part.ndim}, which its product has not whole"
            )
        places[axis] = partner[run]
    return placed(part, places, x.ndim)


def _slowed(step: jax.Array, weight: Rounded, x: jax.Array, contracted: Any) -> jax.Array:
    """The step as it is stored; its gradient as LSQ has it, by the features that share it and the largest level."""
    features = 1
    for axis in contracted:
        features *= x.shape[axis]
    return slowed(stored_step(step), features, most_of(weight.activations))
