"""Text from a decoder: prompts in, new tokens out, in one compiled program.

The prompts are read at once (prefill), then a `lax.while_loop` makes a token at a time from a key-value cache until
every row has ended or the limit is reached. A row's positions count its own tokens, so that prompts of unequal lengths
may be padded on either side. The weights are arguments of the program, dense or packed; it is compiled once for each
shape of the batch, limit and kind of sampling, and kept by JAX's own cache.

Sampling: the logits are divided by the temperature, the top_k largest are kept, then the fewest that together have
probability top_p (Holtzman et al. 2020), and one is drawn. Row and step have their own random key.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error
from models.config import DecoderConfig
from models.kv_cache import KVCache, empty_cache

_NEVER = jnp.finfo(jnp.float32).min
_LEAST = float(jnp.finfo(jnp.float32).tiny)  # a smaller temperature or top_p is zero in f32: the likeliest token


class _State(NamedTuple):
    """step i32[], the tokens made so far i32[B, max_new], the rows that have ended bool[B], the last token i32[B]."""

    step: jax.Array
    made: jax.Array
    ended: jax.Array
    last: jax.Array
    cache: KVCache


def generate(
    apply: Callable[..., Any],
    params: Any,
    config: DecoderConfig,
    tokens: Any,
    mask: Any = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: tuple[int, ...] = (),
    dtype: Any = jnp.float32,
) -> jax.Array:
    """New tokens i32[B, max_new_tokens] for the prompts tokens i32[B, T], of which mask bool[B, T] says what is text.

    apply has the signature of Decoder.apply; hand over the same function again to reuse what was compiled.
    temperature 0 takes the likeliest token; top_k 0 and top_p 1 keep all. A row that ended at one of eos_ids repeats
    that token to the end. dtype is the cache's: what the decoder computes in.
    Raises JQ4Error for an empty prompt and for options out of range.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
    _check(tokens, mask, max_new_tokens, temperature, top_k, top_p, seed)
    return _generate(
        params,
        tokens,
        mask,
        jnp.float32(temperature),
        jnp.float32(max(top_p, _LEAST)),
        jax.random.key(seed),
        apply=apply,
        config=config,
        max_new_tokens=max_new_tokens,
        sample=temperature >= _LEAST,
        top_k=min(top_k, config.vocab_size),
        nucleus=top_p < 1,
        eos_ids=tuple(eos_ids),
        dtype=jnp.dtype(dtype),
    )


@functools.partial(
    jax.jit,
    static_argnames=("apply", "config", "max_new_tokens", "sample", "top_k", "nucleus", "eos_ids", "dtype"),
)
def _generate(
    params: Any,
    tokens: jax.Array,
    mask: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    key: jax.Array,
    *,
    apply: Callable[..., Any],
    config: DecoderConfig,
    max_new_tokens: int,
    sample: bool,
    top_k: int,
    nucleus: bool,
    eos_ids: tuple[int, ...],
    dtype: Any,
) -> jax.Array:
    batch, length = tokens.shape

    def choose(logits: jax.Array, step: jax.Array) -> jax.Array:  # f32[B, V] -> i32[B]
        if not sample:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        below = logits - jnp.max(logits, axis=-1, keepdims=True)  # a low temperature must not overflow the likeliest
        kept = keep_likeliest(below / temperature, top_k, top_p if nucleus else None)
        keys = jax.random.split(jax.random.fold_in(key, step), batch)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    def advance(state: _State, logits: jax.Array, cache: KVCache) -> _State:  # logits f32[B, 1, V]
        chosen = jnp.where(state.ended, state.last, choose(logits[:, 0], state.step))  # i32[B]
        made = jax.lax.dynamic_update_slice(state.made, chosen[:, None], (jnp.int32(0), state.step))
        ended = state.ended | jnp.isin(chosen, jnp.asarray(eos_ids, jnp.int32))
        return _State(state.step + 1, made, ended, chosen, cache)

    def step(state: _State) -> tuple[jax.Array, KVCache]:
        return apply({"params": params}, state.last[:, None], cache=state.cache)

    def reread(state: _State) -> tuple[jax.Array, KVCache]:
        text = jnp.concatenate([tokens, state.made], axis=1)
        made = jnp.broadcast_to(jnp.arange(max_new_tokens)[None, :] < state.step, (batch, max_new_tokens))
        end = length + state.step
        last = jnp.broadcast_to(end - 1, (batch,))
        logits, cache = apply(
            {"params": params}, text, mask=jnp.concatenate([mask, made], axis=1), cache=nothing_seen, select=last
        )
        return logits, cache._replace(used=end)

    def decode(state: _State) -> _State:
        if config.rope.rereads_at is None:
            return advance(state, *step(state))
        seen = jnp.sum(state.cache.valid, axis=-1, dtype=jnp.int32)  # i32[B]
        return advance(state, *jax.lax.cond(jnp.any(seen == config.rope.rereads_at), reread, step, state))

    nothing_seen = empty_cache(config, batch, length + max_new_tokens, dtype)
    last_of_prompt = length - 1 - jnp.argmax(mask[:, ::-1], axis=-1).astype(jnp.int32)  # i32[B]
    logits, cache = apply({"params": params}, tokens, mask=mask, cache=nothing_seen, select=last_of_prompt)
    none_made = jnp.zeros((batch, max_new_tokens), jnp.int32)
    start = _State(jnp.int32(0), none_made, jnp.zeros((batch,), bool), jnp.zeros((batch,), jnp.int32), cache)
    state = advance(start, logits, cache)
    state = jax.lax.while_loop(lambda s: (s.step < max_new_tokens) & ~jnp.all(s.ended), decode, state)
    unmade = jnp.arange(max_new_tokens)[None, :] >= state.step
    return jnp.where(unmade, state.last[:, None], state.made)


def keep_likeliest(logits: jax.Array, top_k: int, top_p: jax.Array | None) -> jax.Array:
    """f32[B, V] with the logits outside of the top k, and then outside of the top p, set to the least number."""
    if top_k:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]  # f32[B, 1]
        logits = jnp.where(logits < least, _NEVER, logits)
    if top_p is not None:
        order = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(order, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # of all tokens likelier than this one
        least = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, _NEVER, logits)
    return logits


def _check(
    tokens: jax.Array, mask: jax.Array, limit: int, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    if tokens.ndim != 2 or mask.shape != tokens.shape:
        raise JQ4Error(f"tokens {tokens.shape} and mask {mask.shape}: wanted two of one shape [batch, length].")
    empty = np.flatnonzero(~np.asarray(mask).any(axis=-1))
    if empty.size or not tokens.size:
        raise JQ4Error(f"prompt {empty[0] if empty.size else 0} is empty; begin it with at least one token.")
    for name, value, sound, wanted in (
        ("max_new_tokens", limit, 1 <= limit < 2**31 - tokens.shape[1], "at least 1, and a text below 2**31 tokens"),
        ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
        ("top_k", top_k, top_k >= 0, "0 (all) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "more than 0, at most 1"),
        ("seed", seed, -(2**31) <= seed < 2**32, "32 bits"),
    ):
        if not sound:
            raise JQ4Error(f"{name} is {value}, wanted {wanted}.")
