"""Signal to quantization noise ratio, the error of one leaf in decibels. Roughly six of them are one bit."""

from typing import Any

import jax
import jax.numpy as jnp

from jq4.errors import JQ4Error
from jq4.qarray import is_qarray


@jax.jit
def sqnr(weight: Any, approximation: Any) -> jax.Array:
    """10 log10(sum w**2 / sum (w - w')**2), f32[] in dB; inf where nothing differs. Both are arrays or QArrays."""
    exact, near = _as_float32(weight), _as_float32(approximation)
    if exact.shape != near.shape:
        raise JQ4Error(f"shapes {exact.shape} and {near.shape} cannot be compared leaf by leaf")
    unit = jnp.maximum(jnp.max(jnp.abs(exact)), jnp.max(jnp.abs(near)))  # so that no square overflows
    unit = jnp.where(unit == 0, jnp.ones_like(unit), unit)
    signal, noise = jnp.sum(jnp.square(exact / unit)), jnp.sum(jnp.square((exact - near) / unit))
    lossless = noise == 0
    return jnp.where(lossless, jnp.inf, 10 * jnp.log10(signal / jnp.where(lossless, jnp.ones_like(noise), noise)))


def _as_float32(weight: Any) -> jax.Array:
    return weight.dequantize(jnp.float32) if is_qarray(weight) else jnp.asarray(weight).astype(jnp.float32)
