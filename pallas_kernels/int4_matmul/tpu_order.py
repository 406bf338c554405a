"""The order in which a form of the TPU kernels wants the columns of x, where that is not the codes' own.

Words hold eight codes of rows 8r to 8r + 7, and what is unpacked of them by shifts comes nibble by nibble: row 8r + j
of a chunk of a group at (j, r), or, where two nibbles become the bf16 halves of a word at a time, row 8r + 4h + j at
(j, r, h). Moving the rows of W back would cost more than the product; the columns of x are moved once, before the
kernel.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LANES = 128


def in_order(x: jax.Array, group: int, form: str, *, from_table: bool = False) -> jax.Array:
    """x[M, K] with its columns as a form wants them."""
    if form == "magic":
        return magic_order(x, rows_at_a_time(group))
    if from_table:
        return magic_order(x, group)
    return shifted_order(x, group) if form == "shifted" else x


def magic_order(x: jax.Array, group: int) -> jax.Array:
    """bf16[M, K], K a multiple of LANES, with the columns of a chunk as `magic` wants them: 8r + 4h + j at (j, r, h).

    A product with a permutation matrix is exact, and moves columns where a TPU moves them fastest.
    """
    chunk = chunk_of(group)
    return _ordered(x, np.arange(LANES).reshape(LANES // chunk, chunk // 8, 2, 4).transpose(0, 3, 1, 2))


def shifted_order(x: jax.Array, group: int) -> jax.Array:
    """The same for `shifted`: column 8r + j of a chunk at (j, r)."""
    chunk = chunk_of(rows_at_a_time(group))
    return _ordered(x, np.arange(LANES).reshape(LANES // chunk, chunk // 8, 8).transpose(0, 2, 1))


def _ordered(x: jax.Array, places: np.ndarray) -> jax.Array:
    matrix = np.zeros((LANES, LANES), np.float32)
    matrix[places.reshape(-1), np.arange(LANES)] = 1
    contract = (((1,), (0,)), ((), ()))
    moved = lax.dot_general(
        x.reshape(-1, LANES), jnp.asarray(matrix, jnp.bfloat16), contract, preferred_element_type=jnp.float32
    )
    return moved.astype(jnp.bfloat16).reshape(x.shape)


def rows_at_a_time(group: int) -> int:
    """Rows that `magic` and `shifted` unpack together: two groups of 32 fill the registers that one half fills."""
    return 2 * group if group == 32 else group


def chunk_of(group: int) -> int:
    """Rows that are reordered among themselves."""
    return math.gcd(group, LANES)
