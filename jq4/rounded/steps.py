"""A learned step of inputs' codes, and the gradient that LSQ gives to a step (Esser et al. 2020)."""

import jax
import jax.numpy as jnp

from jq4.straight_through import straight_through

_SMALLEST = 1e-30  # a step no smaller than this


def stored_step(step: jax.Array) -> jax.Array:
    """A step of inputs' codes as it is stored and used, f32, never zero; gradients go straight through."""
    return straight_through(step, jnp.maximum(jnp.abs(step), _SMALLEST))


def slowed(value: jax.Array, count: int, largest: float) -> jax.Array:
    """The value, whose gradient is multiplied by 1 / sqrt(count * largest)."""
    return straight_through(value * (max(count, 1) * largest) ** -0.5, value)
