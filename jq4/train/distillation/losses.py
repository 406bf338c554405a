"""What a student is held to, as pure functions that compose: a figure a position, a mean over those that count, a sum.

    p = softmax(teacher / t), q = softmax(student / t), m = s p + (1 - s) q

    divergence            KL(p || q) t^2                         covers what the teacher may say   (Hinton et al. 2015)
    reverse_divergence    KL(q || p) t^2                         keeps to what the teacher would say
    jensen_shannon        (s KL(p || m) + (1 - s) KL(q || m)) t^2   between them, and bounded      (Agarwal et al. 2024)
    divergence_from       KL at t = 1 from a teacher's k likeliest tokens, kept small (jq4.train.distillation.teacher)
    next_token            -log q(the token that follows), t = 1
    relative_error        |x - y|^2 / |y|^2, cosine_distance  1 - cos(x, y): of hidden states

Each gives f32[...], a figure a position, so that masks and weights stay the user's: `mean_over(values, mask)` is the
mean where the mask holds, and a mixture is a sum, as `distillation_loss` is Hinton's. Gradients reach the student
alone; the factors t^2 keep their size as t changes. A token that the teacher rules out adds nothing to KL(p || q).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jq4.divergence import divergence
from jq4.errors import JQ4Error
from jq4.train.distillation.teacher import Likeliest, divergence_from

Distance = Callable[[jax.Array, jax.Array], jax.Array]  # (student's [..., K], teacher's [..., K]) -> f32[...]


def reverse_divergence(logits: jax.Array, teacher: jax.Array, temperature: float = 1.0) -> jax.Array:
    """KL(student || teacher) f32[...] in nats, of logits [..., V]."""
    log_p, log_q = _both(logits, teacher, temperature)
    return temperature**2 * _kl(log_q, log_p)


def jensen_shannon(logits: jax.Array, teacher: jax.Array, share: float = 0.5, temperature: float = 1.0) -> jax.Array:
    """The generalized Jensen-Shannon divergence f32[...] in nats; `share`, the teacher's in the mixture, in (0, 1).

    Divided by `share` it tends to KL(p || q) for small ones, and by 1 - share to KL(q || p) for those near 1.
    """
    if not 0 < share < 1:
        raise JQ4Error(f"jensen_shannon: share is {share}, wanted between 0 and 1; at its ends it is 0 everywhere")
    log_p, log_q = _both(logits, teacher, temperature)
    possible = (log_p > -jnp.inf) | (log_q > -jnp.inf)
    of_p, of_q = (jnp.where(possible, each, 0.0) for each in (log_p, log_q))
    log_m = jnp.logaddexp(of_p + jnp.log(share), of_q + jnp.log1p(-share))
    return temperature**2 * (share * _kl(log_p, log_m) + (1 - share) * _kl(log_q, log_m))


def next_token(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """-log of what logits [..., T, V] give the token that follows, f32[..., T-1], for tokens i32[..., T]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[..., :-1, :].astype(jnp.float32), tokens[..., 1:])


def relative_error(found: jax.Array, wanted: jax.Array) -> jax.Array:
    """|found - wanted|^2 / |wanted|^2 over the last axis, f32[...]: 1 is no better than zeros; 0 for a row of zeros."""
    found, wanted = found.astype(jnp.float32), jax.lax.stop_gradient(wanted).astype(jnp.float32)
    size = jnp.sum(jnp.square(wanted), axis=-1)
    error = jnp.sum(jnp.square(found - wanted), axis=-1)
    return jnp.where(size > 0, error / jnp.where(size > 0, size, 1), 0)


def cosine_distance(found: jax.Array, wanted: jax.Array) -> jax.Array:
    """1 - cos of the angle between them, f32[...]: blind to size, which a norm that follows takes out."""
    wanted = jax.lax.stop_gradient(wanted).astype(jnp.float32)
    return optax.losses.cosine_distance(found.astype(jnp.float32), wanted, epsilon=1e-12)


def mean_over(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The mean f32[] of values [*L, *M] where a mask [*M], the same for all of L, holds; 0 where it never does."""
    if mask is None:
        return jnp.mean(values)
    if values.shape[values.ndim - mask.ndim :] != mask.shape:
        raise JQ4Error(f"the mask has shape {mask.shape}, and what it is for {values.shape}: wanted its last axes")
    counted = jnp.broadcast_to(mask.astype(bool), values.shape)
    return jnp.sum(jnp.where(counted, values, 0)) / jnp.maximum(jnp.sum(counted, dtype=values.dtype), 1)


def hidden_loss(
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    mask: jax.Array | None = None,
    distance: Distance = relative_error,
) -> jax.Array:
    """How far hidden states are apart, f32[]: the mean over leaves, their layers and positions of `distance`.

    Args:
      found, wanted: the student's and the teacher's inputs by path, as `jq4.train.inputs_of` gives them. A teacher of
        another depth or width is matched by a dict of the pairs that are meant.
      mask: bool[B, T], of the positions that count.
    """
    if set(found) != set(wanted) or not found:
        told = ", ".join(sorted(set(found) ^ set(wanted))) or "none"
        raise JQ4Error(f"hidden_loss: wanted the same leaves of student and teacher, at least one; not in both: {told}")
    each = jax.tree.map(lambda x, y: mean_over(distance(x, y), mask), dict(found), dict(wanted))
    return jnp.mean(jnp.stack(jax.tree.leaves(each)))


def distillation_loss(
    logits: jax.Array,
    tokens: jax.Array,
    teacher: jax.Array | Likeliest | None,
    mask: jax.Array | None = None,
    *,
    share: float = 1.0,
    temperature: float = 1.0,
) -> jax.Array:
    """share * t^2 KL(teacher || student) + (1 - share) * next-token loss, f32[] (Hinton et al. 2015).

    Args:
      logits: the student's, [B, T, V], for tokens i32[B, T].
      teacher: logits [B, T, V], or what is kept of them (then t is 1: a tail's mass has no temperature). None where
        the share is 0.
      mask: bool[B, T], True where there is text; padding counts for neither loss.
    """
    if isinstance(teacher, Likeliest) and temperature != 1:
        raise JQ4Error(f"temperature is {temperature}, and the teacher's likeliest tokens are kept at 1: wanted 1")
    loss = jnp.float32(0)
    if share:
        if teacher is None:
            raise JQ4Error(f"there is no teacher, and its share is {share}: wanted 0")
        kept = isinstance(teacher, Likeliest)
        apart = divergence_from(teacher, logits) if kept else divergence(logits, teacher, temperature)
        loss += share * mean_over(apart, mask)
    if share != 1:
        both = None if mask is None else mask[..., :-1] & mask[..., 1:]
        loss += (1 - share) * mean_over(next_token(logits, tokens), both)
    return loss


def _both(logits: jax.Array, teacher: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature)
    return log_p, jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) over the last axis; what p rules out adds nothing, whether or not q does."""
    possible = log_p > -jnp.inf
    apart = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(log_p) * apart, 0.0), axis=-1)
