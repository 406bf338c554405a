"""A sum of x x^T as its squares on and above the diagonal: a Hessian in half the memory.

    H f32[K, K], cut into squares of s = 256:   squares[0] = H_00,  [1] = H_01, ...,  [n] = H_11, ...   f32[m, s, s]

for n = K / s, rounded up (zeros beyond K), and m = n (n + 1) / 2. H is symmetric, so that is all of it, and half of the
products make it. GPTQ copies a Hessian into a matrix of its own order before it works on it, and reads this one as
well; whoever wants it whole has it from `whole`. It is for weights of many inputs, whose Hessian takes more than they.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SIDE = 256


@functools.partial(jax.tree_util.register_dataclass, data_fields=("squares",), meta_fields=("features",))
@dataclasses.dataclass(frozen=True)
class UpperSquares:
    """A symmetric f32[K, K] of K = `features`."""

    squares: jax.Array
    features: int

    @classmethod
    def zeros(cls, features: int) -> "UpperSquares":
        return cls(jnp.zeros((_squares_of(features), _SIDE, _SIDE), jnp.float32), features)

    @classmethod
    def are_less(cls, features: int) -> bool:
        """Whether they take less memory than all of a f32[K, K], and have an i32 for each element's place."""
        return _squares_of(features) * _SIDE**2 < min(features**2, 2**31)

    @property
    def shape(self) -> tuple[int, int]:
        return self.features, self.features

    def added(self, x: jax.Array) -> "UpperSquares":
        """With x^T x of rows f32[M, K]; in its own memory under `jit` that takes it over."""
        x = jnp.pad(x, ((0, 0), (0, -self.features % _SIDE)))
        first, second = (jnp.asarray(part, jnp.int32) for part in np.triu_indices(self._count))

        def piece(number: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, number * _SIDE, _SIDE, 1)

        def add(number: jax.Array, squares: jax.Array) -> jax.Array:
            product = jnp.matmul(piece(first[number]).T, piece(second[number]), precision="highest")
            product = jax.lax.optimization_barrier(product)  # one rounding, wherever it is added
            held = jax.lax.dynamic_index_in_dim(squares, number, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(squares, held + product, number, 0)

        return UpperSquares(jax.lax.fori_loop(0, len(first), add, self.squares), self.features)

    def entries(self, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """H at these places, i32 each, broadcast against each other; of places outside, anything."""
        (low, high), (other_low, other_high) = self._shares(rows), self._shares(columns)
        place = jnp.where(rows < columns, low + other_high, other_low + high)
        return self.squares.reshape(-1).at[place].get(mode="clip")

    def diagonal(self) -> jax.Array:
        """f32[K]."""
        own = np.cumsum([0, *range(self._count, 1, -1)])
        return jnp.diagonal(self.squares[own], axis1=1, axis2=2).reshape(-1)[: self.features]

    def whole(self) -> jax.Array:
        """f32[K, K]."""
        return _whole(self)

    def delete(self) -> None:
        self.squares.delete()

    def _shares(self, places: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the lower and the higher of an entry's two places add to where it lies among all squares' elements."""
        square, inside = places // _SIDE, places % _SIDE
        first = square * (2 * self._count - square - 1) // 2  # [square, square] is number first + square
        return (first * _SIDE + inside) * _SIDE, square * _SIDE**2 + inside

    @property
    def _count(self) -> int:
        return -(-self.features // _SIDE)


def _squares_of(features: int) -> int:
    count = -(-features // _SIDE)
    return count * (count + 1) // 2


@jax.jit
def _whole(upper: UpperSquares) -> jax.Array:
    place = jnp.arange(upper.features, dtype=jnp.int32)
    return upper.entries(place[:, None], place[None, :])


def whole(total: Any) -> Any:
    """A sum of outer products as an array, whichever form it has."""
    return total.whole() if isinstance(total, UpperSquares) else total


def entries(matrix: Any, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """[p, q] at rows i32[p] and columns i32[q] of a matrix in either form; of places outside, anything."""
    places = rows[:, None], columns[None, :]
    return matrix.entries(*places) if isinstance(matrix, UpperSquares) else matrix.at[places].get(mode="clip")


def diagonal(matrix: Any) -> jax.Array:
    """f32[K] of a matrix in either form."""
    return matrix.diagonal() if isinstance(matrix, UpperSquares) else jnp.diagonal(matrix)
