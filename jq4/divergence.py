"""What a trained model is held to where its teacher, the dense model, is at hand.

    KL(p || q) = sum over v of p(v) (log p(v) - log q(v)),   p = softmax(teacher / t), q = softmax(logits / t)

in nats, times t**2 so that gradients keep their size as the temperature t changes (Hinton et al. 2015). At t = 1 its
mean over tokens is the KLD that `jq4.evaluate` reports.
"""

import jax
import jax.numpy as jnp


def divergence(logits: jax.Array, teacher: jax.Array, temperature: float = 1.0) -> jax.Array:
    """KL(teacher || model) f32[...] of logits [..., V]; float32 whatever they are, and no gradient to the teacher."""
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    possible = log_p > -jnp.inf  # a token that the teacher rules out adds nothing
    each = jnp.exp(log_p) * (jnp.where(possible, log_p, 0.0) - log_q)
    return temperature**2 * jnp.sum(jnp.where(possible, each, 0.0), axis=-1)
