"""The oracle: unpack everything, multiply. Every other implementation is tested against this and a numpy twin of it."""

import jax
import jax.numpy as jnp

from pallas_kernels import packing
from pallas_kernels.int4_matmul.spec import NEUTRAL, PackedSpec
from pallas_kernels.int4_matmul.words import words_to_int4


def dequantize(codes, scale, zero_point, offset, spec: PackedSpec) -> jax.Array:
    """The dense weight f32[*B, K, N] of packed arrays in any layout (see spec.py)."""
    zero_point = None if zero_point is None else _spread(zero_point, spec)
    levels = _levels(codes, zero_point, spec)
    weight = levels * _spread(scale, spec)
    if offset is not None:
        weight = weight + _spread(offset, spec)
    return weight if spec.orientation == "kn" else jnp.swapaxes(weight, -1, -2)


def int4_matmul_reference(x, codes, scale, zero_point, offset, *, spec: PackedSpec, precision=None) -> jax.Array:
    """f32[*B, M, N] = x[*B, M, K] @ dequantize(...)[*B, K, N]."""
    weight = dequantize(codes, scale, zero_point, offset, spec)
    return jnp.matmul(x.astype(jnp.float32), weight, precision=precision or jax.lax.Precision.HIGHEST)


def _levels(codes, zero_point, spec: PackedSpec) -> jax.Array:
    if spec.layout == NEUTRAL:
        codes = packing.unpack(codes, spec.bits, spec.k_axis, spec.length).astype(jnp.int32)
    else:
        codes = words_to_int4(codes, spec.length) if codes.dtype == jnp.int32 else codes
        codes = codes.astype(jnp.int32) + spec.center
    if spec.levels is not None:
        return jnp.take(jnp.asarray(spec.levels, jnp.float32), codes, axis=0)
    return codes.astype(jnp.float32) - (float(spec.center) if zero_point is None else zero_point)


def _spread(values, spec: PackedSpec) -> jax.Array:
    """One value a group to one a row of K."""
    if spec.layout == "tpu":
        values = jnp.squeeze(values, -2)  # [*B, G, 1, N] -> [*B, G, N]
    values = jnp.repeat(values.astype(jnp.float32), spec.group_size, axis=spec.k_axis)
    return jax.lax.slice_in_dim(values, 0, spec.length, axis=spec.k_axis)
