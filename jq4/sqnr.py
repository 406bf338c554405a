"""Signal to quantization noise ratio, the error of one leaf in decibels. Roughly six of them are one bit."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error
from jq4.qarray import is_qarray


@jax.jit
def sqnr(weight: Any, approximation: Any) -> jax.Array:
    """10 log10(sum w**2 / sum (w - w')**2), f32[] in dB; inf where nothing differs. Both are arrays or QArrays."""
    exact, near = as_float32(weight), as_float32(approximation)
    if exact.shape != near.shape:
        raise JQ4Error(f"shapes {exact.shape} and {near.shape} cannot be compared leaf by leaf")
    unit = common_unit(exact, near)
    signal, noise = jnp.sum(jnp.square(exact / unit)), jnp.sum(jnp.square((exact - near) / unit))
    lossless = noise == 0
    return jnp.where(lossless, jnp.inf, 10 * jnp.log10(signal / jnp.where(lossless, jnp.ones_like(noise), noise)))


def decibels(signal: float, noise: float) -> float:
    """Of two energies on the host; inf where there is no noise."""
    with np.errstate(divide="ignore"):
        return math.inf if noise == 0 else float(10 * np.log10(signal / noise))


def common_unit(exact: jax.Array, near: jax.Array) -> jax.Array:
    """The largest magnitude of both, f32[], or 1: what they are divided by so that no square overflows."""
    unit = jnp.maximum(jnp.max(jnp.abs(exact)), jnp.max(jnp.abs(near)))
    return jnp.where(unit == 0, jnp.ones_like(unit), unit)


def as_float32(weight: Any) -> jax.Array:
    """The array, or what the QArray dequantizes to, in float32."""
    return weight.dequantize(jnp.float32) if is_qarray(weight) else jnp.asarray(weight).astype(jnp.float32)
