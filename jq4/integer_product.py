"""Integers by integers: rows of activations' codes times a weight's, int8 by int8 into exact int32 sums.

    out[m, n] = scale[n] * sum over k of  x[m, k] * (code[k, n] - 2**(b-1))

for weights whose codes have one scale an output channel and no zero point: the scale comes out of the sum. The TPU and
the GPU multiply int8 at twice bf16's speed, and a CPU at least as fast as float32. The gradient is that of the same
product in floats (the integers of x came through a straight-through rounding, which sees to the rest).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jq4.qarray import NEUTRAL, QArray, dequantize_array, is_qarray
from pallas_kernels import packing

_MOST = 127  # of the integers of x


def has_integer_product(q: QArray) -> bool:
    """Whether a weight [*B, K, N] or [*B, N, K] has codes that can be summed as they are."""
    plain = q.zero_point is None and q.offset is None and not is_qarray(q.scale)
    form = q.number_format
    if q.layout != NEUTRAL or not form.is_integer or q.num_groups > 1 or not plain:
        return False
    return q.shape[q.axis] * _MOST * form.center < 2**31  # else int32 sums might overflow: K of 132,104 at 8 bits


@jax.custom_vjp
def integer_product(x: jax.Array, q: QArray) -> jax.Array:
    """x[*B, M, K], whole numbers of at most 127, by q [*B, K, N] or [*B, N, K] -> f32[*B, M, N]."""
    batch = tuple(range(q.ndim - 2))
    codes = packing.unpack(q.codes, q.bits, q.axis, q.shape[q.axis])
    levels = lax.bitcast_convert_type(codes ^ jnp.uint8(128), jnp.int8) if q.bits == 8 else _small_levels(codes, q)
    numbers = (((x.ndim - 1,), (q.ndim + q.axis,)), (batch, batch))
    sums = lax.dot_general(x.astype(jnp.int8), levels, numbers, preferred_element_type=jnp.int32)  # [*B, M, N]
    scale = q.scale.astype(jnp.float32)
    return sums.astype(jnp.float32) * (scale if q.axis == -2 else jnp.swapaxes(scale, -1, -2))


def _small_levels(codes: jax.Array, q: QArray) -> jax.Array:
    return codes.astype(jnp.int8) - jnp.int8(q.number_format.center)


def _forward(x: jax.Array, q: QArray) -> tuple[jax.Array, Any]:
    return integer_product(x, q), (x, q)


def _backward(residuals: Any, dy: jax.Array) -> Any:
    x, q = residuals
    return jax.vjp(_in_floats, x, q)[1](dy)


def _in_floats(x: jax.Array, q: QArray) -> jax.Array:
    weight = dequantize_array(q, jnp.float32)
    weight = weight if q.axis == -2 else jnp.swapaxes(weight, -1, -2)
    return jnp.matmul(x.astype(jnp.float32), weight, precision="highest")


integer_product.defvjp(_forward, _backward)
