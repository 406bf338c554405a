"""Eight int4 codes as one 32-bit word: the tpu layout's codes, lossless both ways.

XLA's TPU compiler copies int4 layers out of a stack, and reads 32-bit ones in place (tpu.py's essay says when).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def int4_to_words(codes: jax.Array) -> jax.Array:
    """i32[*B, ceil(K / 8), N] of int4[*B, K, N]: row 8r + j in bits 4j to 4j + 3 of word r, zeros after the last."""
    codes = jnp.pad(codes.astype(jnp.int8), [(0, 0)] * (codes.ndim - 2) + [(0, -codes.shape[-2] % 8), (0, 0)])
    rows = codes.reshape(*codes.shape[:-2], -1, 8, codes.shape[-1])
    fields = [(rows[..., j, :].astype(jnp.int32) & 15) << (4 * j) for j in range(8)]
    return functools.reduce(jnp.bitwise_or, fields)


def words_to_int4(words: jax.Array, length: int) -> jax.Array:
    """Undoes `int4_to_words`: int4[*B, length, N]."""
    return words_to_integers(words, length).astype(jnp.int4)


def words_to_integers(words: jax.Array, length: int) -> jax.Array:
    """The same as i32[*B, length, N], which XLA fuses into what reads it (an int4 array it would write to memory)."""
    rows = jnp.expand_dims(words, -2)  # i32[*B, K / 8, 1, N]
    shifts = jnp.arange(28, -4, -4, dtype=jnp.int32).reshape(*(1,) * (rows.ndim - 2), 8, 1)
    fields = (rows << shifts) >> 28  # i32[*B, K / 8, 8, N]
    codes = fields.reshape(*words.shape[:-2], -1, words.shape[-1])
    return lax.slice_in_dim(codes, 0, length, axis=-2)
