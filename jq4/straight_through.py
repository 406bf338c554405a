"""The straight-through estimator (Bengio et al. 2013): rounded going forward, the identity going back."""

import jax


def straight_through(soft: jax.Array, hard: jax.Array) -> jax.Array:
    """`hard`, to the bit, with the gradient of `soft`."""
    return jax.lax.stop_gradient(hard) + (soft - jax.lax.stop_gradient(soft))
