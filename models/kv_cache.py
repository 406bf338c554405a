"""The keys and values of the tokens seen so far, and who may look at whom.

Every row of a batch writes to the same slots, padding included, so that one slice update serves all rows; what a slot
holds is told by `positions` and `valid`. A token sees the valid slots whose position is not after its own and, in a
sliding layer, less than a window before it. Positions count valid tokens only: a text's answer does not depend on
whether it is padded on the left, on the right, or not at all.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.config import DecoderConfig


class KVCache(NamedTuple):
    """S slots for L layers: keys and values [L, B, S, Hkv, hd], positions i32[B, S], valid bool[B, S], used i32[]."""

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    valid: jax.Array
    used: jax.Array


class Sight(NamedTuple):
    """What the T queries of a call may see: their positions i32[B, T], and the S slots' positions and validity."""

    query_positions: jax.Array
    key_positions: jax.Array
    key_valid: jax.Array

    @property
    def length(self) -> jax.Array:
        """i32[B]: the length of each row's text so far."""
        return jnp.max(jnp.where(self.key_valid, self.key_positions, -1), axis=-1) + 1

    def visible(self, window: jax.Array) -> jax.Array:
        """bool[B, T, S] for a layer that looks back over `window` i32[] tokens, its own included."""
        distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]  # i32[B, T, S]
        return self.key_valid[:, None, :] & (distance >= 0) & (distance < window)


def empty_cache(config: DecoderConfig, batch: int, slots: int, dtype: Any = jnp.float32) -> KVCache:
    """A cache of `slots` tokens for each of `batch` rows, of the dtype that the decoder computes in."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    return KVCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        positions=jnp.zeros((batch, slots), jnp.int32),
        valid=jnp.zeros((batch, slots), bool),
        used=jnp.zeros((), jnp.int32),
    )


def look(
    shape: tuple[int, ...], positions: jax.Array | None, mask: jax.Array | None, cache: KVCache | None
) -> tuple[Sight, KVCache | None]:
    """Places the tokens [B, T] of a call: after those in the cache, padding not counted. Also notes them in the cache.

    The returned cache has the new positions and validity; its keys and values are still to be written.
    """
    mask = jnp.ones(shape, bool) if mask is None else mask.astype(bool)
    if positions is None:
        earlier = jnp.zeros((shape[0],), jnp.int32) if cache is None else jnp.sum(cache.valid, axis=-1, dtype=jnp.int32)
        counted = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
        positions = jnp.maximum(earlier[:, None] + counted - 1, 0)
    positions = positions.astype(jnp.int32)
    if cache is None:
        return Sight(positions, positions, mask), None
    zero = jnp.zeros((), jnp.int32)
    cache = cache._replace(
        positions=jax.lax.dynamic_update_slice(cache.positions, positions, (zero, cache.used)),
        valid=jax.lax.dynamic_update_slice(cache.valid, mask, (zero, cache.used)),
    )
    return Sight(positions, cache.positions, cache.valid), cache
