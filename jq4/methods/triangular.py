"""A Cholesky factor and its solves by squares, in the memory of the matrix.

A matrix of P rows is cut into squares of s. The factor of H = L L^T comes column by column of squares,

    L_jj = chol(H_jj - sum_{k<j} L_jk L_jk^T)         L_ij = (H_ij - sum_{k<j} L_ik L_jk^T) inv(L_jj)^T,  i > j

(Golub & Van Loan, Matrix Computations, 4.2: the left-looking form), each square taking the place of H's. What the
library's own routine would save in code it takes in copies: one f32[P, P] in LAPACK's order of axes, for the factor and
for either solve. Squares above the diagonal keep what they held; nothing here reads them.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames="size", donate_argnames="matrix")
def factored(matrix: jax.Array, size: int) -> jax.Array:
    """L of a symmetric f32[P, P] on and below the diagonal, NaN from where there is none; `size` divides P."""
    count = len(matrix) // size

    def column(j: jax.Array, held: jax.Array) -> jax.Array:
        own = jax.lax.linalg.cholesky(_reduced(held, j, j, size), symmetrize_input=False)
        held = _with_square(held, own, j, j)

        def below(i: jax.Array, held: jax.Array) -> jax.Array:
            square = _solve(own, _reduced(held, i, j, size), left_side=False, transpose_a=True)
            return _with_square(held, square, i, j)

        return jax.lax.fori_loop(j + 1, count, below, held)

    return jax.lax.fori_loop(0, count, column, matrix)


def solved(lower: jax.Array, rows: jax.Array, size: int) -> jax.Array:
    """inv(L L^T) rows, f32[P, N]."""
    count = len(lower) // size
    number = jnp.arange(count)
    own = lower.reshape(count, size, count, size)[number, :, number]  # f32[P / s, s, s], the squares on the diagonal

    def forth(i: jax.Array, held: jax.Array) -> jax.Array:
        def take(k: jax.Array, mine: jax.Array) -> jax.Array:
            return mine - _product(_square(lower, i, k, size), _piece(held, k, size))

        mine = jax.lax.fori_loop(0, i, take, _piece(held, i, size))
        return _with_piece(held, _solve(own[i], mine), i)

    def back(step: jax.Array, held: jax.Array) -> jax.Array:
        i = count - 1 - step

        def take(k: jax.Array, mine: jax.Array) -> jax.Array:
            return mine - _product(_square(lower, k, i, size).T, _piece(held, k, size))

        mine = jax.lax.fori_loop(i + 1, count, take, _piece(held, i, size))
        return _with_piece(held, _solve(own[i], mine, transpose_a=True), i)

    return jax.lax.fori_loop(0, count, back, jax.lax.fori_loop(0, count, forth, rows))


def _reduced(held: jax.Array, i: jax.Array, j: jax.Array, size: int) -> jax.Array:
    """H_ij - sum_{k<j} L_ik L_jk^T."""

    def take(k: jax.Array, square: jax.Array) -> jax.Array:
        return square - _product(_square(held, i, k, size), _square(held, j, k, size).T)

    return jax.lax.fori_loop(0, j, take, _square(held, i, j, size))


def _solve(lower: jax.Array, rows: jax.Array, *, left_side: bool = True, transpose_a: bool = False) -> jax.Array:
    return jax.lax.linalg.triangular_solve(lower, rows, left_side=left_side, lower=True, transpose_a=transpose_a)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _square(matrix: jax.Array, i: jax.Array, j: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice(matrix, (i * size, j * size), (size, size))


def _with_square(matrix: jax.Array, square: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(matrix, square, (i * len(square), j * len(square)))


def _piece(rows: jax.Array, i: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(rows, i * size, size, 0)


def _with_piece(rows: jax.Array, piece: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(rows, piece, i * len(piece), 0)
