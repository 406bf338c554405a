"""The "hopper" layout: codes in the order in which the threads of a warpgroup feed them to Hopper's tensor cores.

    codes   i32[*B, N / 64, 8 * ceil128(K)]     512 words, one tile of 64 columns by 64 rows of W, after another
    scales  [*B, G, N]                          as in the neutral layout

wgmma (m64nMk16) takes its left operand, here 64 columns of W by 16 of its rows, from registers: of each step of 16
rows, thread t = 32 w + 4 g + c holds four registers of two neighbouring elements,

    register h + 2 j    column 16 w + 8 h + g        rows 8 j + 2 c + e,  e = 0 in the low half, 1 in the high one

A thread's four registers are one word of eight codes, that of (e, j, h) in the four bits from 16 e + 8 j + 4 h,
so that shifting the word by 4 (h + 2 j) leaves both codes of a register where one mask finds them. The four steps of a
tile are a thread's four neighbouring words: one load of 16 bytes without bank conflicts, no shuffle between threads, no
permutation of x, and in memory a strip of 64 columns that is read from end to end. Marlin (Frantar et al., 2024) orders
its weights so for the older mma instruction; Machete (vLLM, 2024) for wgmma.

Codes are unsigned. Rows from K up to the next multiple of 128 hold EMPTY, the level zero of symmetric weights; x is
zero there. 64 must divide N.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul.spec import TPU, PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed

STRIP = 64  # columns of W in a tile: the rows of wgmma's left operand
TILE_K = 64  # rows of W in a tile: four steps of wgmma
WORDS = 512  # of a tile: four for each of the 128 threads
MULTIPLE_K = 128  # what rows are filled up to
EMPTY = 8


def padded_length(length: int) -> int:
    """K filled up."""
    return -(-length // MULTIPLE_K) * MULTIPLE_K


def to_fragments(codes: jax.Array) -> jax.Array:
    """i32[*B, N / 64, 8 * ceil128(K)] of u8[*B, K, N]."""
    *batch, k, n = codes.shape
    codes = jnp.pad(codes, [(0, 0)] * len(batch) + [(0, padded_length(k) - k), (0, 0)], constant_values=EMPTY)
    # K as (tile, step, j, c, e), N as (strip, w, h, g)
    split = codes.reshape(-1, padded_length(k) // TILE_K, 4, 2, 4, 2, n // STRIP, 4, 2, 8)
    ordered = split.transpose(0, 6, 1, 7, 9, 4, 2, 5, 3, 8)  # [B, strip, tile, w, g, c, step, e, j, h]
    nibbles = ordered.reshape(*ordered.shape[:7], 8).astype(jnp.uint32)
    words = functools.reduce(jnp.bitwise_or, [nibbles[..., i] << jnp.uint32(4 * i) for i in range(8)])
    return jax.lax.bitcast_convert_type(words.reshape(*batch, n // STRIP, -1), jnp.int32)


def of_fragments(words: jax.Array, length: int) -> jax.Array:
    """Undoes `to_fragments`: u8[*B, length, N]."""
    *batch, strips, columns = words.shape
    unsigned = jax.lax.bitcast_convert_type(words, jnp.uint32).reshape(-1, strips, columns // WORDS, 4, 8, 4, 4)
    nibbles = [((unsigned >> jnp.uint32(4 * i)) & jnp.uint32(15)).astype(jnp.uint8) for i in range(8)]
    ordered = jnp.stack(nibbles, -1).reshape(*unsigned.shape, 2, 2, 2)  # [B, strip, tile, w, g, c, step, e, j, h]
    split = ordered.transpose(0, 2, 6, 8, 5, 7, 1, 3, 9, 4)  # [B, tile, step, j, c, e, strip, w, h, g]
    codes = split.reshape(*batch, columns // 8, strips * STRIP)
    return jax.lax.slice_in_dim(codes, 0, length, axis=-2)


def rows_of(w: Packed, spec: PackedSpec) -> tuple[Packed, PackedSpec]:
    """A weight in the hopper layout as int4[*B, K, N] with scales [*B, G, 1, N], as XLA's forms read it."""
    codes = (of_fragments(w.codes, spec.length).astype(jnp.int8) - jnp.int8(EMPTY)).astype(jnp.int4)
    scales = (None if part is None else jnp.expand_dims(part, -2) for part in w[1:])
    return Packed(codes, *scales), dataclasses.replace(spec, layout=TPU)
