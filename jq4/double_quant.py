"""Double quantization (Dettmers et al. 2023, "QLoRA"): the scales of a weight, packed themselves.

    scale[*B, G, N]  ~  level(code) * absmax + mean        code u8, 256 levels of the format "dynamic8"

With groups of 64 a float32 scale costs half a bit a weight; packed, with one absmax for 256 scales, it costs .127. The
weight's `scale` is then a QArray of its own. Levels, blocks of 256 and the mean are bitsandbytes':

    mean    f32, of all scales of a matrix. Scales are subtracted from it, since dynamic8 is symmetric
    absmax  f32, max |scale - mean| of a block
    blocks  of bitsandbytes run through the scales in the order of [N, G], torch's [out, in]. Ours are cut so that a
            slice of a stacked weight has blocks of its own and a block is a group along one axis: 256 // G whole
            columns where there are at most 256 groups, else 256 groups of one column (the last of them may be short).
            Where G divides 256, or 256 divides G, these are bitsandbytes' own; else ours hold fewer scales each.

What is exact: decoding bitsandbytes' bytes, wherever the blocks are its own, up to the last bit of f32 if XLA fuses the
product and the sum (the weights are equal once they are rounded to bfloat16). Encoding: the codes of the weights are
made with the exact scales, before these are packed, as bitsandbytes does; a group of zeros has the scale 0. Only ties,
and the rounding of the mean, may differ. What is traded: weights are rounded to a grid that is then moved a little, by
at most 1/128 or so of the spread of the scales.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error
from jq4.formats import get_format
from jq4.qarray import QArray, codes_of, is_qarray, spread_groups

FORMAT = "dynamic8"
BLOCK = 256  # scales that share an absmax


def double_quantized(q: QArray) -> QArray:
    """A neutral QArray with the same codes and packed scales."""
    if is_qarray(q.scale):
        return q
    other = -3 - q.axis
    if q.axis not in (-1, -2) or q.ndim < 2 or q.scale.shape[other] != q.shape[other]:
        raise JQ4Error(
            f"double quantization of a weight of shape {q.shape} grouped along axis {q.axis}: wanted the grouped axis "
            "to be one of the last two, with scales along the other"
        )
    used = jnp.where(_is_zero(q), 0.0, q.scale.astype(jnp.float32))
    return dataclasses.replace(q, scale=pack_scales(used, q.axis))


def pack_scales(scale: jax.Array, axis: int) -> QArray:
    """Scales f32[*B, G, N] (G along `axis`, -1 or -2, N along the other) as a QArray of 8-bit codes."""
    groups = scale.shape[axis]
    along, size = (axis, BLOCK) if groups > BLOCK else (-3 - axis, BLOCK // groups)
    mean = jnp.mean(scale, axis=(-2, -1), keepdims=True)  # f32[*B, 1, 1]
    centred = scale - mean
    peak = jnp.abs(centred) if along == axis else jnp.max(jnp.abs(centred), axis=axis, keepdims=True)
    absmax = _block_max(peak, size, along)
    divisor = spread_groups(jnp.where(absmax > 0, absmax, 1.0), size, along, scale.shape[along])
    codes = _nearest(centred / divisor)
    return QArray(
        codes=codes,
        scale=absmax,
        offset=mean,
        format=FORMAT,
        group_size=min(size, scale.shape[along]),
        axis=along,
        dtype="float32",
    )


def _block_max(values: jax.Array, size: int, axis: int) -> jax.Array:
    """The maxima of blocks of `size` along `axis`; values are not negative."""
    length = values.shape[axis]
    blocks = -(-length // size)
    moved = jnp.moveaxis(values, axis, -1)
    padded = jnp.pad(moved, [(0, 0)] * (values.ndim - 1) + [(0, blocks * size - length)])
    return jnp.moveaxis(jnp.max(padded.reshape(*moved.shape[:-1], blocks, size), axis=-1), -1, axis)


def _nearest(values: jax.Array) -> jax.Array:
    """The codes u8[...] of the nearest levels, which are sorted; a tie goes to the lower one."""
    levels = np.asarray(get_format(FORMAT).levels, np.float32)
    return jnp.searchsorted(jnp.asarray((levels[:-1] + levels[1:]) / 2), values, side="left").astype(jnp.uint8)


def _is_zero(q: QArray) -> jax.Array:
    """bool[*B, G, N]: whether all codes of a group stand for zero."""
    form = q.number_format
    levels = np.arange(form.max_code + 1) - form.center if form.levels is None else np.asarray(form.levels)
    codes = codes_of(q)
    if q.offset is not None:
        return jnp.zeros(q.scale.shape, bool)
    if q.zero_point is None:
        zero = jnp.take(jnp.asarray(levels == 0), codes.astype(jnp.int32))
    else:
        zero = codes == spread_groups(q.zero_point, q.group_size, q.axis, q.shape[q.axis])
    axis = q.axis % q.ndim
    short = q.num_groups * q.group_size - zero.shape[axis]
    filled = jnp.pad(zero, [(0, short if i == axis else 0) for i in range(q.ndim)], constant_values=True)
    shape = (*filled.shape[:axis], q.num_groups, q.group_size, *filled.shape[axis + 1 :])
    return jnp.all(filled.reshape(shape), axis=axis + 1)
