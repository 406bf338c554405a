"""Rows of text that a teacher wrote itself, to learn from where there is no data (LLM-QAT, Liu et al. 2023).

A row begins with a token drawn from the vocabulary, goes on with the few likeliest tokens, so that it finds into some
text, and is sampled from the teacher's own prediction from there on: text that is only likely repeats itself.

    rows = generated_rows(generator(model.apply, params), count, length, np.arange(vocabulary))

What writes is any function (tokens i32[B, t], how many more, temperature, seed) -> i32[B, more]. `generator` makes one
of a function that gives logits, which knows no key-value cache and so reads the row anew for each token: T passes of T
tokens. A decoder with a cache does with T passes of one; that of `models`, say:

    lambda tokens, more, temperature, seed: models.generate.generate(
        model.apply, params, config, tokens, max_new_tokens=more, temperature=temperature, seed=seed)

Where there is some text, drawing some of its tokens anew (jq4.tuning.perturb) takes one pass for a whole row.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error

Generate = Callable[[jax.Array, int, float, int], Any]


def generated_rows(
    generate: Generate,
    count: int,
    length: int,
    first_tokens: Any,
    *,
    prefix: Sequence[int] = (),
    likeliest: int = 4,
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
) -> np.ndarray:
    """Rows of text i32[count, length].

    Args:
      generate: see above; temperature 0 asks for the likeliest tokens.
      first_tokens: the ids that a row's first token is drawn from.
      prefix: ids before it, such as that of the beginning of a text.
      likeliest: how many tokens after the first are the likeliest ones (3 to 5 in the paper).
      temperature: of the others.
    """
    sampled = length - len(prefix) - 1 - likeliest
    first_tokens = np.asarray(first_tokens, np.int32).reshape(-1)
    if count < 1 or likeliest < 0 or sampled < 1 or batch_size < 1 or temperature <= 0 or not first_tokens.size:
        raise JQ4Error(
            f"generated_rows: {count} rows of {length} tokens, {len(prefix)} of them given, {likeliest} likeliest, "
            f"{first_tokens.size} first tokens, temperature {temperature}, batches of {batch_size}: wanted at least "
            "one token that is sampled, at a temperature above 0"
        )
    random, made = np.random.default_rng(seed), []
    for _ in range(0, count, batch_size):
        begun = np.broadcast_to(np.asarray(prefix, np.int32), (batch_size, len(prefix)))
        rows = np.concatenate([begun, random.choice(first_tokens, (batch_size, 1))], axis=1)
        for more, warmth in ((likeliest, 0.0), (sampled, temperature)):
            if more:
                written = generate(jnp.asarray(rows), more, warmth, int(random.integers(2**31)))
                rows = np.concatenate([rows, np.asarray(written, np.int32)], axis=1)
        made.append(rows)
    return np.concatenate(made)[:count]


def generator(logits: Callable[[Any, jax.Array], jax.Array], tree: Any) -> Generate:
    """What writes by a causal function (tree, tokens i32[B, T]) -> logits [B, T, V], without a cache."""

    def generate(tokens: jax.Array, more: int, temperature: float, seed: int) -> jax.Array:
        key, warmth = jax.random.key(seed), jnp.float32(temperature or 1)
        return _written(tree, tokens, warmth, key, logits=logits, more=more, sample=temperature > 0)

    return generate


@functools.partial(jax.jit, static_argnames=("logits", "more", "sample"))
def _written(
    tree: Any, tokens: jax.Array, temperature: jax.Array, key: jax.Array, *, logits: Any, more: int, sample: bool
) -> jax.Array:
    length = tokens.shape[1]

    def step(place: jax.Array, rows: jax.Array) -> jax.Array:
        predicted = jax.lax.dynamic_index_in_dim(logits(tree, rows), place - 1, 1, keepdims=False)  # [B, V]
        predicted = predicted.astype(jnp.float32) / temperature
        drawn = jax.random.categorical(jax.random.fold_in(key, place), predicted) if sample else predicted.argmax(-1)
        return jax.lax.dynamic_update_index_in_dim(rows, drawn.astype(rows.dtype), place, 1)

    rows = jnp.pad(tokens, ((0, 0), (0, more)))
    return jax.lax.fori_loop(length, length + more, step, rows)[:, length:]
