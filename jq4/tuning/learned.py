"""A packed leaf as a differentiable weight: what is learned is where each weight rounds to, and the groups' scales.

For a group with the dense weights w, and the start's scale s0 and zero z0 (the format's center without zero points):

    scale   s = stored(s0 * exp(log_scale))                       a positive factor: no sign flips, no scale dies
    zero    z = round(z0 + shift), 0 .. 2**b - 1                  integer zero points
    offset  o = stored(o0 + shift * s0)                           float offsets
    code    c = round((w - o) / s + z + rounding), 0 .. 2**b - 1  codebooks: the nearest level to (w - o)/s + rounding
    weight  (c - z) * s + o                                       codebooks: level(c) * s + o

Rounding, and storing in the scales' dtype, are in the forward pass; the backward pass goes straight through them
(Bengio et al. 2013), and is zero where a code is clipped. So the gradient of a scale is that of LSQ (Esser et al. 2020)
and `rounding` is V of AutoRound (Cheng et al. 2023). Since stored values are rounded where they are used, `harden`
loses nothing: its QArray dequantizes to what the last forward pass computed.

AutoRound starts at V = 0, that is from round-to-nearest, and keeps |V| <= 1/2. Here the start is any packed leaf, such
as GPTQ's: `rounding` begins at the smallest shift that rounds every weight to the start's code, with MARGIN to spare.
What is traded: a start whose codes are far from w / s, as GPTQ's are, leaves V without a bound around zero; how far it
goes from the start is bounded by the rates and their decay alone.

A leaf with a scale of its inputs (AWQ's) is learned as the weight over that scale. Where only scales are learned
(rounding is None) the start's codes are kept, and the weight itself is not looked at. The learned weight is float32
whatever the leaf's dtype, so that the function must cast its weights, as Flax's layers do. Where products round their
inputs too, so do those of the function that is learned from (jq4.tuning.rounded_inputs).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error
from jq4.formats import Format
from jq4.input_rotation import rotated
from jq4.qarray import NEUTRAL, QArray, codes_of, dense, is_qarray, levels_of, spread_groups
from jq4.rounding import nearest_level, storable, storable_scale
from jq4.straight_through import straight_through
from pallas_kernels import packing

MARGIN = 0.01  # how far from the edge of its code's cell a weight starts, in codes


class Variables(NamedTuple):
    """What is learned of one leaf, f32; None for what stays as it is.

    rounding has the weight's shape [*B, K, N], in codes; log_scale and shift have the scale's, [*B, G, N].
    """

    rounding: jax.Array | None = None
    log_scale: jax.Array | None = None
    shift: jax.Array | None = None


class _Parts(NamedTuple):
    """A leaf in f32: codes and levels [*B, K, N]; scale, zero point and offset [*B, G, N]."""

    codes: jax.Array
    levels: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    offset: jax.Array | None


def begin(q: QArray, weight: jax.Array | None, *, rounding: bool = True, scales: bool = True) -> Variables:
    """The variables under which the learned weight is the start `q`, f32[*B, K, N] `weight` being the dense one."""
    scales = scales and not is_qarray(q.scale)
    zeros = jnp.zeros(q.scale.shape, jnp.float32) if scales else None
    has_zero = q.zero_point is not None or (q.offset is not None and not is_qarray(q.offset))
    return Variables(
        rounding=_first_rounding(q, weight) if rounding and weight is not None else None,
        log_scale=zeros,
        shift=zeros if has_zero else None,
    )


def weight_of(variables: Variables, q: QArray, weight: jax.Array | None) -> jax.Array:
    """The dense weight f32[*B, K, N] that the variables stand for: differentiable, and exactly what is stored."""
    return _dense_of(_parts_of(variables, q, weight), q)


def weight_from(levels: jax.Array, variables: Variables, q: QArray) -> jax.Array:
    """The dense weight f32[*B, K, N] of given levels (of codes, where there are zero points) and learned scales."""
    scale, zero_point, offset = _parameters_of(variables, q)
    levels = levels if zero_point is None else levels - _spread(zero_point, q)
    return _dense_of(_Parts(levels, levels, scale, zero_point, offset), q)


def ratio_of_start(q: QArray, weight: jax.Array) -> jax.Array:
    """What the dense weight is among the start's levels (of codes, where there are zero points), f32[*B, K, N]."""
    scale, zero_point, offset = _parameters_of(Variables(), q)
    ratio = _ratio(weight, scale, offset, q)
    return ratio if zero_point is None else ratio + _spread(zero_point, q)


def shift_to_codes(q: QArray, weight: jax.Array) -> jax.Array:
    """The smallest shift f32[*B, K, N], in steps, that lets every weight round to its code in `q`, MARGIN inside."""
    form = q.number_format
    scale, zero_point, offset = _parameters_of(Variables(), q)
    ratio, codes = _ratio(weight, scale, offset, q), codes_of(q)
    if form.is_integer:
        zero = jnp.full_like(ratio, form.center) if zero_point is None else _spread(zero_point, q)
        center, exact = codes.astype(jnp.float32), ratio + zero
        return jnp.clip(exact, center - 0.5 + MARGIN, center + 0.5 - MARGIN) - exact
    low, high = (jnp.take(jnp.asarray(edge), codes.astype(jnp.int32), axis=0) for edge in _cells(form))
    return jnp.clip(ratio, low, high) - ratio


def harden(variables: Variables, q: QArray, weight: jax.Array | None) -> QArray:
    """The packed leaf that the variables stand for, of the static form of the start `q`; traces."""
    codes, _, scale, zero_point, offset = _parts_of(variables, q, weight)
    return dataclasses.replace(
        q,
        codes=packing.pack(codes.astype(jnp.uint8), q.bits, q.axis),
        scale=_stored(scale, q.scale),
        zero_point=None if zero_point is None else zero_point.astype(jnp.uint8),
        offset=None if offset is None else _stored(offset, q.offset),
    )


def check(q: QArray, path: str) -> None:
    """Raises JQ4Error for a packed leaf that has no learned form."""
    if q.layout != NEUTRAL:
        raise JQ4Error(f"{path}: the layout is {q.layout!r}, wanted a neutral one: tune before jq4.prepare")
    if q.permutation is not None:
        raise JQ4Error(
            f"{path}: its rows are permuted (act-order), which tuning does not take: quantize with codes in their "
            "natural order, or leave the step out"
        )


def _parts_of(variables: Variables, q: QArray, weight: jax.Array | None) -> _Parts:
    scale, zero_point, offset = _parameters_of(variables, q)
    if variables.rounding is None:
        codes = codes_of(q)
        levels = levels_of(codes, q.number_format) if zero_point is None else codes.astype(jnp.float32)
    else:
        assert weight is not None
        codes, levels = _rounded(_ratio(weight, scale, offset, q), variables.rounding, zero_point, q)
    if zero_point is not None:
        levels = levels - _spread(zero_point, q)
    return _Parts(codes, levels, scale, zero_point, offset)


def _dense_of(parts: _Parts, q: QArray) -> jax.Array:
    dense = parts.levels * _spread(parts.scale, q)
    dense = dense if parts.offset is None else dense + _spread(parts.offset, q)
    dense = rotated(dense, q.input_rotation, q.axis) if q.input_rotation else dense
    return dense if q.input_scale is None else dense * q.input_scale.astype(jnp.float32)


def _parameters_of(variables: Variables, q: QArray) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """The scale, the zero point and the offset f32[*B, G, N], each as it is stored."""
    first = dense(q.scale).astype(jnp.float32)
    scale = first
    if variables.log_scale is not None:
        factor = jnp.exp(variables.log_scale)
        size = jnp.abs(first) * factor
        scale = straight_through(first * factor, jnp.sign(first) * storable_scale(size, q.scale.dtype.name))
    zero_point = None if q.zero_point is None else q.zero_point.astype(jnp.float32)
    offset = None if q.offset is None else dense(q.offset).astype(jnp.float32)
    if variables.shift is not None and zero_point is not None:
        soft = jnp.clip(zero_point + variables.shift, 0, q.number_format.max_code)
        zero_point = straight_through(soft, jnp.round(soft))
    elif variables.shift is not None and q.offset is not None and offset is not None:
        soft = offset + variables.shift * first
        offset = straight_through(soft, storable(soft, q.offset.dtype.name))
    return scale, zero_point, offset


def _ratio(weight: jax.Array, scale: jax.Array, offset: jax.Array | None, q: QArray) -> jax.Array:
    """(w - o) / s, f32[*B, K, N]; of w over its inputs' own scale, where there is one."""
    target = weight.astype(jnp.float32)
    target = target if q.input_scale is None else target / q.input_scale.astype(jnp.float32)
    target = rotated(target, q.input_rotation, q.axis) if q.input_rotation else target
    target = target if offset is None else target - _spread(offset, q)
    scale = jnp.where(scale == 0, 1.0, scale)  # of groups of nothing but zeros, as files and packed scales have them
    return target / _spread(scale, q)


def _rounded(
    ratio: jax.Array, rounding: jax.Array, zero_point: jax.Array | None, q: QArray
) -> tuple[jax.Array, jax.Array]:
    """Codes, and levels before a zero point is taken off, for ratios (w - o) / s; all f32[*B, K, N]."""
    form = q.number_format
    if form.is_integer:
        zero = jnp.full_like(ratio, form.center) if zero_point is None else _spread(zero_point, q)
        soft = jnp.clip(ratio + zero + rounding, MARGIN - 0.5, form.max_code + 0.5 - MARGIN)
        codes = straight_through(soft, jnp.round(soft))
        return codes, codes - form.center if zero_point is None else codes
    soft = jnp.clip(ratio + rounding * _spacing(form), -form.max_level, form.max_level)
    codes = nearest_level(soft, form)
    return codes, straight_through(soft, levels_of(codes, form))


def _stored(values: jax.Array, like: Any) -> Any:
    """The values as `like` is stored; `like` itself where it is packed too, which nothing learned."""
    return like if is_qarray(like) else values.astype(like.dtype)


def _first_rounding(q: QArray, weight: jax.Array) -> jax.Array:
    """The same in codes, which `rounding` is in: a codebook's are _spacing apart."""
    shift = shift_to_codes(q, weight)
    return shift if q.number_format.is_integer else shift / _spacing(q.number_format)


def _cells(form: Format) -> tuple[np.ndarray, np.ndarray]:
    """The ends f32[2**bits] of the ratios that round to each code of a codebook, MARGIN inside."""
    levels = np.asarray(form.levels, np.float32)
    ordered, rank = np.unique(levels, return_inverse=True)
    middles = (ordered[1:] + ordered[:-1]) / 2
    inside = np.float32(MARGIN * _spacing(form))
    low = np.concatenate([ordered[:1], middles + inside])
    high = np.concatenate([middles - inside, ordered[-1:]])
    return low[rank], high[rank]


def _spacing(form: Format) -> float:
    """The mean distance of a codebook's neighbouring levels: what a code is in an integer format."""
    assert form.levels is not None
    return (max(form.levels) - min(form.levels)) / (len(set(form.levels)) - 1)


def _spread(values: jax.Array, q: QArray) -> jax.Array:
    return spread_groups(values, q.group_size, q.axis, q.shape[q.axis])
