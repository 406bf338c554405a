"""Rounding that is trained through: LSQ (Esser et al. 2020), LSQ+ (Bhalgat et al. 2020), and plain straight-through.

For a group with the weights w, its step s, and its zero point z or offset o (z the format's center without either):

    r = (w - o) / s        level = clip(round(r), -z, 2**b - 1 - z)        rounded = level * s + o

Going back, with "inside" for -z - margin < r < 2**b - 1 - z + margin, and dy the gradient of what is rounded,

    dw = dy inside, else 0
    ds = (level - r) dy inside, level dy outside        summed over the group, times 1 / sqrt(count * Qp)
    do = 0 inside, dy outside                           the same sum, the same factor
    dz = 0 inside, -s dy outside                        the same

which is LSQ's and LSQ+'s at margin 0. There the outermost levels are starved: a weight that rounds to the largest level
from above no longer moves, which at 2 bits is most of them; with a margin of one half they move as long as they round
without being clipped. Codebooks have their nearest level for round(r), and their largest levels for the ends.

`count` is the number of weights that share the step, Qp the largest level. The factor is for plain gradient descent,
under which steps would outrun weights; Adam undoes any such factor.

What is stored is what is used: s and o are rounded to the dtype that scales are stored in (and s kept from zero), z to
an integer, before anything is divided, with gradients straight through. So `hardened` loses nothing: its QArray
dequantizes to what `rounded` gave, to the bit where a level times a step is all there is. Where an offset is added XLA
may fuse the two operations of `level * s + o` into one that rounds once, in one program and not in another: a last bit.

Backward wants the weight and its parameters and nothing of the weight's size beside them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jq4.formats import Format, get_format
from jq4.input_rotation import rotated
from jq4.qarray import QArray, levels_of, spread_groups
from jq4.rounded.steps import slowed, stored_step
from jq4.rounding import Parameters, find_parameters, map_groups, nearest_level, storable, storable_scale
from jq4.straight_through import straight_through
from jq4.train.quantizer import Quantizer
from pallas_kernels import packing


def rounded(weight: jax.Array, quantizer: Quantizer) -> jax.Array:
    """The dense weight [*B, K, N] that its codes stand for, in its own dtype; differentiable."""
    met = rotated_first(weight, quantizer)
    scale, zero, offset = parameters_of(met, quantizer)
    group = quantizer.group_size(weight.shape[quantizer.axis])
    form = (quantizer.encoding.format, group, quantizer.axis, quantizer.margin)
    near = _round(met, scale, zero, offset, form)
    if quantizer.input_rotation:  # the sums of a rotation are those of rounded products, as `dequantize` has them
        near = rotated(lax.optimization_barrier(near), quantizer.input_rotation, quantizer.axis)
    return jnp.asarray(near, weight.dtype)


def rotated_first(weight: jax.Array, quantizer: Quantizer) -> jax.Array:
    """f32[*B, K, N]: what is rounded, W itself or R^T W."""
    wide, block = weight.astype(jnp.float32), quantizer.input_rotation
    return rotated(wide, block, quantizer.axis) if block else wide


def hardened(weight: jax.Array, quantizer: Quantizer) -> QArray:
    """The packed leaf that dequantizes to `rounded(weight, quantizer)`."""
    encoding, form, axis = quantizer.encoding, quantizer.number_format, quantizer.axis
    met = rotated_first(weight, quantizer)
    scale, zero, offset = parameters_of(met, quantizer)
    length, stored = weight.shape[axis], jnp.dtype(encoding.scale_dtype)
    group = quantizer.group_size(length)
    ratio = _ratio(met, scale, offset, group, axis)
    if form.is_integer:
        levels = _levels(ratio, *_ends(zero, form, group, axis, length), form)
        codes = (levels + (form.center if zero is None else spread_groups(zero, group, axis, length))).astype(jnp.uint8)
    else:
        codes = nearest_level(ratio, form)
    return QArray(
        codes=packing.pack(codes, form.bits, axis),
        scale=scale.astype(stored),
        zero_point=None if zero is None else zero.astype(jnp.uint8),
        offset=None if offset is None else offset.astype(stored),
        format=form.name,
        group_size=group,
        axis=axis,
        padding=packing.padding_of(length, form.bits),
        dtype=jnp.dtype(weight.dtype).name,
        activations=quantizer.activations,
        activation_scale=None if quantizer.input_step is None else stored_step(quantizer.input_step),
        input_rotation=quantizer.input_rotation,
    )


def parameters_of(weight: jax.Array, quantizer: Quantizer) -> Parameters:
    """Scale, zero point and offset f32[*B, G, N], as they are stored, of the weight that is rounded."""
    encoding = quantizer.encoding
    if quantizer.scale is None:
        fixed = lax.stop_gradient(weight.astype(jnp.float32))
        group = quantizer.group_size(weight.shape[encoding.axis])
        return map_groups(lambda blocks: find_parameters(blocks, encoding), fixed, encoding.axis, group)
    form, dtype = quantizer.number_format, encoding.scale_dtype
    largest = form.max_level if quantizer.zero_point is None else float(form.max_code)
    slow = functools.partial(slowed, count=weight.size // quantizer.scale.size, largest=largest)
    zero, offset = quantizer.zero_point, quantizer.offset
    if zero is not None:
        zero = straight_through(slow(zero), jnp.clip(jnp.round(zero), 0, form.max_code))
    if offset is not None:
        offset = straight_through(slow(offset), storable(offset, dtype))
    return Parameters(straight_through(slow(quantizer.scale), _stored_scale(quantizer.scale, dtype)), zero, offset)


# ---------------------------------------------------------------------------------------------------------------


def _stored_scale(scale: jax.Array, dtype: str) -> jax.Array:
    """A scale of either sign that `dtype` can hold, never zero."""
    tiny = jnp.finfo(dtype).tiny
    size = storable_scale(jnp.maximum(jnp.abs(scale), float(tiny)), dtype)
    return jnp.where(scale < 0, -size, size)


def _ratio(weight: jax.Array, scale: jax.Array, offset: jax.Array | None, group: int, axis: int) -> jax.Array:
    spread = functools.partial(spread_groups, group_size=group, axis=axis, length=weight.shape[axis])
    scale = lax.optimization_barrier(scale)  # division by a constant would become a product with its reciprocal
    return (weight if offset is None else weight - spread(offset)) / spread(scale)


def _ends(zero: jax.Array | None, form: Format, group: int, axis: int, length: int) -> tuple[Any, Any]:
    """The lowest and the highest level, numbers or f32[*B, K, N]."""
    if not form.is_integer:
        return -form.max_level, form.max_level
    if zero is None:
        return float(-form.center), float(form.max_code - form.center)
    zeros = spread_groups(zero, group, axis, length)
    return -zeros, form.max_code - zeros


def _levels(ratio: jax.Array, low: Any, high: Any, form: Format) -> jax.Array:
    if form.is_integer:
        return jnp.clip(jnp.round(ratio), low, high)
    return levels_of(nearest_level(ratio, form), form)


_Form = tuple[str, int, int, float]  # format, group size, axis, margin


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _round(
    weight: jax.Array, scale: jax.Array, zero: jax.Array | None, offset: jax.Array | None, form: _Form
) -> jax.Array:
    name, group, axis, _ = form
    length, number_format = weight.shape[axis], get_format(name)
    ends = _ends(zero, number_format, group, axis, length)
    levels = _levels(_ratio(weight, scale, offset, group, axis), *ends, number_format)
    dense = levels * spread_groups(scale, group, axis, length)
    return dense if offset is None else dense + spread_groups(offset, group, axis, length)


def _forward(weight: Any, scale: Any, zero: Any, offset: Any, form: _Form) -> tuple[jax.Array, Any]:
    return _round(weight, scale, zero, offset, form), (weight, scale, zero, offset)


def _backward(form: _Form, residuals: Any, dy: jax.Array) -> tuple[Any, ...]:
    weight, scale, zero, offset = residuals
    name, group, axis, margin = form
    length, number_format = weight.shape[axis], get_format(name)
    low, high = _ends(zero, number_format, group, axis, length)
    ratio = _ratio(weight, scale, offset, group, axis)
    levels = _levels(ratio, low, high, number_format)
    inside = (ratio > low - margin) & (ratio < high + margin)

    def over_groups(values: jax.Array, part: jax.Array) -> jax.Array:
        """Values f32[*B, K, N] summed to the shape of a part [*B, G, N]."""
        spread = lambda p: jnp.broadcast_to(spread_groups(p, group, axis, length), weight.shape)  # noqa: E731
        return jax.vjp(spread, part)[1](values)[0]

    of_scale = over_groups(dy * jnp.where(inside, levels - ratio, levels), scale)
    outside = jnp.where(inside, 0.0, dy)
    of_zero = None if zero is None else -scale * over_groups(outside, zero)
    of_offset = None if offset is None else over_groups(outside, offset)
    return dy - outside, of_scale, of_zero, of_offset


_round.defvjp(_forward, _backward)
