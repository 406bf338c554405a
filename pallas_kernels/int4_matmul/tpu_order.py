"""The order in which a form of the TPU kernels wants the columns of x, where that is not the codes' own.

Words hold eight codes of rows 8r to 8r + 7. Where two nibbles at a time become the bf16 halves of a word, row
8r + 4h + j of a chunk of a group comes at (j, r, h). Moving the rows of W back would cost more than the product; the
columns of x are moved once, before the kernel.
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
        return magic_order(x, group * groups_at_a_time(group))
    return magic_order(x, group) if from_table else x


def magic_order(x: jax.Array, group: int) -> jax.Array:
    """bf16[M, K], K a multiple of LANES, with the columns of a chunk as `magic` wants them: 8r + 4h + j at (j, r, h).

    A product with a permutation matrix is exact, and moves columns where a TPU moves them fastest.
    """
    chunk = chunk_of(group)
    places = np.arange(LANES).reshape(LANES // chunk, chunk // 8, 2, 4).transpose(0, 3, 1, 2)
    matrix = np.zeros((LANES, LANES), np.float32)
    matrix[places.reshape(-1), np.arange(LANES)] = 1
    contract = (((1,), (0,)), ((), ()))
    moved = lax.dot_general(
        x.reshape(-1, LANES), jnp.asarray(matrix, jnp.bfloat16), contract, preferred_element_type=jnp.float32
    )
    return moved.astype(jnp.bfloat16).reshape(x.shape)


def groups_at_a_time(group: int) -> int:
    """Groups that `magic` unpacks together: two of 32 rows fill the registers that one half fills."""
    return 2 if group == 32 else 1


def chunk_of(group: int) -> int:
    """Rows that are reordered among themselves."""
    return math.gcd(group, LANES)
