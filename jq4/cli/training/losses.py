"""What `jq4 train` descends: losses of (trained, fixed, part), means over the part's rows (jq4.train.running.loop)."""

from collections.abc import Callable
from typing import Any

Forward = Callable[[Any, Any], Any]  # (tree, tokens i32[B, T]) -> logits f32[B, T, V]
Loss = Callable[[Any, Any, Any], Any]
TAUGHT = "taught"  # a batch's predictions of a teacher (jq4.train.Likeliest)


def next_token(forward: Forward) -> Loss:
    """Cross-entropy of the text's own tokens, in nats."""
    import jax.numpy as jnp
    import optax

    def loss(trained: Any, fixed: Any, part: Any) -> Any:
        del fixed
        tokens = part["tokens"]
        logits = forward(trained, tokens)[:, :-1].astype(jnp.float32)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    return loss


def distilled(
    forward: Forward, teacher: Forward, temperature: float, perturbed: float, hidden_weight: float = 0.0
) -> Loss:
    """KL(teacher || model) in nats; `fixed` is the teacher's tree. Every other row has a share of tokens drawn anew.

    Both give (logits, inputs by the paths of leaves): how far these are from the teacher's counts `hidden_weight`.
    """
    import jax
    import jax.numpy as jnp

    from jq4.divergence import divergence
    from jq4.train import hidden_loss
    from jq4.tuning.perturb import drawn_anew

    def loss(trained: Any, fixed: Any, part: Any) -> Any:
        tokens = part["tokens"]
        taught, wanted = teacher(fixed, tokens)
        if perturbed:
            keys = jax.random.wrap_key_data(part["key"])
            drawn = jax.vmap(lambda logits, row, key: drawn_anew(logits, row, key, perturbed))(taught, tokens, keys)
            tokens = jnp.where(part["key"][:, 1:] % 2 == 1, drawn, tokens)
            taught, wanted = teacher(fixed, tokens)
        logits, found = forward(trained, tokens)
        apart = jnp.mean(divergence(logits, taught, temperature))
        return apart + hidden_weight * hidden_loss(found, wanted) if wanted else apart

    return loss


def distilled_from_disk(forward: Forward) -> Loss:
    """KL(teacher || model) in nats, the teacher known by its likeliest tokens and the mass of the rest."""
    import jax.numpy as jnp

    from jq4.train import divergence_from

    def loss(trained: Any, fixed: Any, part: Any) -> Any:
        del fixed
        logits, _ = forward(trained, part["tokens"])
        return jnp.mean(divergence_from(part[TAUGHT], logits))

    return loss
