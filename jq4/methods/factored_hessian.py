"""A Hessian and its Cholesky factor in the memory of one matrix, asked for square by square.

    squares[a, b]   f32[P, P] cut into squares of s:  L's where a >= b,  H's where a < b
    own[a]          f32[P / s, s, s]:                 H's where a = b

The factor takes the place of H (jq4.methods.triangular), and of squares above the diagonal nothing is written; H is
symmetric, so those and the few on the diagonal are all of it. GPTQ's sweep asks for L, its refinements and its error
for H: the matrix that both were made of may go as soon as they are. What is traded: where one square is all of H (one
scale a channel), they are two matrices after all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jq4.methods.feedback import Pull


class FactoredHessian(NamedTuple):
    """H, whose diagonal is not looked at, and the factor L of it with a damped one."""

    squares: jax.Array
    own: jax.Array

    @property
    def pivots(self) -> jax.Array:
        """L's diagonal, f32[P]."""
        return jnp.diagonal(self.squares)

    def pull_of_factor(self) -> Pull:
        """L^T with row k divided by L_kk, its diagonal removed."""

        def pull(mine: jax.Array, other: jax.Array) -> jax.Array:
            own = self._square(mine, mine)
            return _without_diagonal(self._square(other, mine).T / jnp.diagonal(own)[:, None], mine == other)

        return pull

    def pull_of_hessian(self, diagonal: jax.Array) -> Pull:
        """H with row k divided by H_kk, f32[P], its diagonal removed."""
        size = self.own.shape[-1]

        def pull(mine: jax.Array, other: jax.Array) -> jax.Array:
            first, second = jnp.minimum(mine, other), jnp.maximum(mine, other)
            above = self._square(first, second)
            above = jnp.where(mine > other, above.T, above)
            square = jnp.where(mine == other, self.own[mine], above)
            curvature = jax.lax.dynamic_slice_in_dim(diagonal, mine * size, size, 0)
            return _without_diagonal(square / curvature[:, None], mine == other)

        return pull

    def energies(self, rows: jax.Array, diagonal: jax.Array) -> jax.Array:
        """r^T H r of each column r of f32[P, n], H with this diagonal f32[P]: f32[n]."""
        size = self.own.shape[-1]
        count = len(rows) // size

        def piece(values: jax.Array, number: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(values, number * size, size, 0)

        def of_row(a: jax.Array, total: jax.Array) -> jax.Array:
            mine = piece(rows, a)
            inside = _product(_without_diagonal(self.own[a], jnp.bool(True)), mine) + piece(diagonal, a)[:, None] * mine

            def take(b: jax.Array, pulled: jax.Array) -> jax.Array:
                return pulled + 2.0 * _product(self._square(a, b), piece(rows, b))

            return total + jnp.sum(mine * jax.lax.fori_loop(a + 1, count, take, inside), axis=0)

        return jax.lax.fori_loop(0, count, of_row, jnp.zeros(rows.shape[1], jnp.float32))

    def _square(self, row: jax.Array, column: jax.Array) -> jax.Array:
        size = self.own.shape[-1]
        return jax.lax.dynamic_slice(self.squares, (row * size, column * size), (size, size))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _without_diagonal(square: jax.Array, is_own: jax.Array) -> jax.Array:
    places = jnp.arange(len(square))
    return jnp.where((places[:, None] == places[None, :]) & is_own, 0.0, square)
