"""New rows from old ones: some tokens of each are drawn anew from the model's own prediction at their place.

    t'[i] ~ p(. | t[0 .. i-1])  with probability `share`, else t[i];  the first token stays

All draws of a row look at the old row, so one forward pass makes as many rows as there are in a batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error

_BATCH = 8


def perturb(
    logits: Callable[[Any, jax.Array], jax.Array], tree: Any, rows: np.ndarray, count: int, share: float, seed: int
) -> np.ndarray:
    """i32[count, T], each from a row of `rows` i32[R, T]: all of them once before any again."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise JQ4Error(f"perturbed_rows is {count!r}, wanted an integer, 0 or more")
    if isinstance(share, bool | str) or not 0 < share <= 1:
        raise JQ4Error(f"perturbed_share is {share!r}, wanted above 0 and at most 1")
    made = [rows[:0]]
    for start in range(0, count, _BATCH):
        taken = np.arange(start, start + _BATCH) % len(rows)
        key = jax.random.fold_in(jax.random.key(seed), start)
        made.append(np.asarray(_draw(tree, jnp.asarray(rows[taken]), key, jnp.float32(share), logits=logits)))
    return np.concatenate(made)[:count]


@functools.partial(jax.jit, static_argnames="logits")
def _draw(tree: Any, rows: jax.Array, key: jax.Array, share: jax.Array, *, logits: Any) -> jax.Array:
    return drawn_anew(logits(tree, rows), rows, key, share)


def drawn_anew(logits: jax.Array, rows: jax.Array, key: jax.Array, share: jax.Array | float) -> jax.Array:
    """Rows i32[..., T] with a share of their tokens drawn from the logits [..., T, V] that they were given."""
    of_token, of_place = jax.random.split(key)
    drawn = jax.random.categorical(of_token, logits[..., :-1, :].astype(jnp.float32))  # i32[..., T-1]
    replaced = jax.random.bernoulli(of_place, share, drawn.shape)
    return rows.at[..., 1:].set(jnp.where(replaced, drawn.astype(rows.dtype), rows[..., 1:]))
