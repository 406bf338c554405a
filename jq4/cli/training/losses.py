"""What `jq4 train` descends: losses of (trained, fixed, part), means over the part's rows (jq4.train.running.loop)."""

from collections.abc import Callable
from typing import Any

Forward = Callable[[Any, Any], Any]  # (tree, tokens i32[B, T]) -> logits f32[B, T, V]
Loss = Callable[[Any, Any, Any], Any]


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


def distilled(forward: Forward, teacher: Forward, temperature: float, perturbed: float) -> Loss:
    """KL(teacher || model) in nats; `fixed` is the teacher's tree. Every other row has a share of tokens drawn anew."""
    import jax
    import jax.numpy as jnp

    from jq4.divergence import divergence
    from jq4.tuning.perturb import drawn_anew

    def loss(trained: Any, fixed: Any, part: Any) -> Any:
        tokens = part["tokens"]
        taught = teacher(fixed, tokens)
        if perturbed:
            keys = jax.random.wrap_key_data(part["key"])
            drawn = jax.vmap(lambda logits, row, key: drawn_anew(logits, row, key, perturbed))(taught, tokens, keys)
            tokens = jnp.where(part["key"][:, 1:] % 2 == 1, drawn, tokens)
            taught = teacher(fixed, tokens)
        return jnp.mean(divergence(forward(trained, tokens), taught, temperature))

    return loss
