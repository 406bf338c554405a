"""The "hopper" layout: codes in the order in which the threads of a warpgroup feed them to Hopper's tensor cores.

    codes   i32[*B, N / 64, 2 * bits * ceil128(K)]      one tile of 64 columns by 64 rows of W after another
    scales  [*B, G, N]                                  as in the neutral layout

wgmma (m64nMk16) takes its left operand, here 64 columns of W by 16 of its rows, from registers: of each step of 16
rows, thread t = 32 w + 4 g + c holds four registers of two neighbouring elements,

    register h + 2 j    column 16 w + 8 h + g        rows 8 j + 2 c + e,  e = 0 in the low half, 1 in the high one

and the codes of its registers are where one shift and one mask find both codes of a register:

    4 bits    one word, that of (e, j, h) in the four bits from 16 e + 8 j + 4 h; shifted by 4 (h + 2 j)
    8 bits    a word for each j, that of (e, h) in the eight bits from 16 e + 8 h; shifted by 8 h

The words of all four steps of a tile (8 bits: of two and two) are neighbours in memory: loads of 16 bytes without bank
conflicts, no shuffle between threads, no permutation of x, and a strip of 64 columns that is read from end to end.
Marlin (Frantar et al., 2024) orders its weights so for the older mma instruction; Machete (vLLM, 2024) for wgmma. Both
want the same here: mma (m16n8k16) takes of one warp the registers above, of its 16 columns.

Codes are unsigned. Rows from K up to the next multiple of 128 hold the level zero of symmetric weights; x is zero
there. 64 must divide N.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul.spec import TPU, PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed

STRIP = 64  # columns of W in a tile: the rows of wgmma's left operand
TILE_K = 64  # rows of W in a tile: four steps of wgmma
MULTIPLE_K = 128  # what rows are filled up to

# Codes [B, K, N]: K is (Tile, Pair of steps, Q of the pair, j, c, e), N is (Strip, w, h, g), as drawn above.
_SPLIT = "BTPQjceSwhg"
_SIZES = {"P": 2, "Q": 2, "j": 2, "c": 4, "e": 2, "w": 4, "h": 2, "g": 8}
# By bits: the order of words, and that of the codes within one, the last letter's neighbours lowest.
_ORDER = {4: ("BSTwgcPQ", "ejh"), 8: ("BSTPwgcQj", "eh")}


def padded_length(length: int) -> int:
    """K filled up."""
    return -(-length // MULTIPLE_K) * MULTIPLE_K


def to_fragments(codes: jax.Array, bits: int = 4) -> jax.Array:
    """i32[*B, N / 64, 2 * bits * ceil128(K)] of u8[*B, K, N]."""
    *batch, k, n = codes.shape
    widths = [(0, 0)] * len(batch) + [(0, padded_length(k) - k), (0, 0)]
    split = jnp.pad(codes, widths, constant_values=2 ** (bits - 1)).reshape(_sizes(padded_length(k), n))
    order = "".join(_ORDER[bits])
    ordered = split.transpose([_SPLIT.index(letter) for letter in order])
    fields = ordered.reshape(-1, 32 // bits).astype(jnp.uint32)
    words = functools.reduce(jnp.bitwise_or, [fields[:, i] << jnp.uint32(bits * i) for i in range(32 // bits)])
    return jax.lax.bitcast_convert_type(words.reshape(*batch, n // STRIP, -1), jnp.int32)


def of_fragments(words: jax.Array, length: int, bits: int = 4) -> jax.Array:
    """Undoes `to_fragments`: u8[*B, length, N]."""
    *batch, strips, columns = words.shape
    k, n, mask = columns // (2 * bits), strips * STRIP, jnp.uint32(2**bits - 1)
    unsigned = jax.lax.bitcast_convert_type(words, jnp.uint32)
    fields = [((unsigned >> jnp.uint32(bits * i)) & mask).astype(jnp.uint8) for i in range(32 // bits)]
    order = "".join(_ORDER[bits])
    sizes = dict(zip(_SPLIT, _sizes(k, n), strict=True))
    ordered = jnp.stack(fields, -1).reshape([sizes[letter] for letter in order])
    codes = ordered.transpose([order.index(letter) for letter in _SPLIT]).reshape(*batch, k, n)
    return jax.lax.slice_in_dim(codes, 0, length, axis=-2)


def _sizes(k: int, n: int) -> list[int]:
    own = {**_SIZES, "B": -1, "T": k // TILE_K, "S": n // STRIP}
    return [own[letter] for letter in _SPLIT]


def in_order_of_bytes(x: jax.Array) -> jax.Array:
    """x[M, K], 16 dividing K, with column 8 j + 2 c + e of each 16 at 4 c + 2 e + j (mosaic_gpu_bytes.py)."""
    split = x.reshape(*x.shape[:-1], -1, 2, 4, 2)  # [M, K / 16, j, c, e]
    return jnp.moveaxis(split, -3, -1).reshape(x.shape)


def rows_of(w: Packed, spec: PackedSpec) -> tuple[Packed, PackedSpec]:
    """A weight in the hopper layout as int4 or int8[*B, K, N] with scales [*B, G, 1, N], as XLA's forms read it."""
    codes = of_fragments(w.codes, spec.length, spec.bits).astype(jnp.int16) - jnp.int16(spec.center)
    codes = codes.astype(jnp.int4 if spec.bits == 4 else jnp.int8)
    scales = (None if part is None else jnp.expand_dims(part, -2) for part in w[1:])
    return Packed(codes, *scales), dataclasses.replace(spec, layout=TPU)
