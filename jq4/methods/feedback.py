"""Rounding with feedback: each row of a weight takes up the errors of the others before it is rounded.

    target_k = w_k + sum_j pull[k, j] * e_j         e_j = w_j - dequantized_j, f32[N], of the other rows j
    code_k   = nearest(target_k)

Two methods are this one sweep, with two matrices `pull` for the error E^T H E that they lower:

    GPTQ                 pull = L^T with row k divided by L_kk, its diagonal removed (H = L L^T, L lower triangular);
                         errors start at zero, so that a row only sees the rows whose turn was before its own
    coordinate descent   pull = H with row k divided by H_kk, its diagonal removed;
                         errors start at those of a first solution, and each row's new code is the best given the others

The first is GPTQ's elimination written as feedback (LDLQ of Chee et al. 2023, who show the two are equal): with
H = L L^T the error is |L^T E|^2, whose row k is L_kk (e_k + sum_{j>k} L_jk / L_kk e_j), and each row in turn makes its
own term as small as the grid allows. That term holds the rows after it: so the last row goes first, and H's own
Cholesky factor serves as it comes.

Rows go by spans within spans (all, section, group, piece, row): on entering a span, a product takes up the errors of
everything outside it, and inside only the span's own remain. These are GPTQ's lazy batch updates, at every level. A
group's scales are found on entering it, so they see the updated weights. Every level is one `lax.scan`: what is
compiled is one product a level, whatever K. `pull` is asked for square by square, a section's rows and columns at a
time: at least 512 of them, or a whole group.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jq4.formats import Format
from jq4.methods.grid import dequantized
from jq4.rounding import Parameters, codes_of_blocks

_SECTION, _BLOCK = 512, 32  # rows


class Rows(NamedTuple):
    """What is known of a span's n rows.

    Attributes:
      weight: f32[n, N].
      importance: f32[n, 1], what a row's squared error costs when it is rounded.
      codes: u8[n, N] of the solution that the sweep starts from.
    """

    weight: jax.Array
    importance: jax.Array
    codes: jax.Array


class Entry(NamedTuple):
    """A group on entering it.

    Attributes:
      rows: see Rows.
      target: f32[g, N], the weight and what other groups' errors pull.
      pull: f32[g, g], among its own rows.
      parameters: of the solution that the sweep starts from, f32[1, N].
      error: f32[g, N], likewise.
    """

    rows: Rows
    target: jax.Array
    pull: jax.Array
    parameters: Parameters
    error: jax.Array


Enter = Callable[[Entry], tuple[Parameters, jax.Array]]
Pull = Callable[[jax.Array, jax.Array], jax.Array]  # numbers of two sections -> f32[s, s], its diagonal zero in the own


class Solution(NamedTuple):
    """Codes u8[P, N], parameters f32[P / g, 1, N] and errors f32[P, N] of P rows."""

    codes: jax.Array
    parameters: Parameters
    error: jax.Array


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One pass over all rows, from the last to the first.

    Attributes:
      form: the number format.
      group: rows that share parameters; divides P.
      enter: the parameters of a group and the errors its rows begin with, on entering it.
      causal: whether rows are pulled by the rows after them alone.
    """

    form: Format
    group: int
    enter: Enter
    causal: bool

    def __call__(self, weight: jax.Array, importance: jax.Array, pull: Pull, start: Solution) -> Solution:
        """weight f32[P, N], importance f32[P, 1]."""
        size = section_of(len(weight), self.group)
        count = len(weight) // size

        def step(error: jax.Array, each: Any) -> Any:
            number, (rows, parameters) = each
            target = self._pulled(number, count, pull, error, rows.weight)
            mine = jax.lax.dynamic_slice_in_dim(error, number * size, size, 0)
            mine, codes, found = self._section(rows, target, pull(number, number), parameters, mine)
            return jax.lax.dynamic_update_slice_in_dim(error, mine, number * size, 0), (codes, found)

        rows = Rows(weight, importance, start.codes)
        error, (codes, parameters) = _last_first(step, start.error, (rows, start.parameters), count)
        return Solution(codes, parameters, error)

    def _pulled(self, number: jax.Array, count: int, pull: Pull, error: jax.Array, weight: jax.Array) -> jax.Array:
        """The weight f32[s, N] of section `number`, and what the errors of other sections pull."""
        size = len(weight)

        def take(other: jax.Array, target: jax.Array) -> jax.Array:
            theirs = jax.lax.dynamic_slice_in_dim(error, other * size, size, 0)
            square = jnp.where(other == number, 0.0, pull(number, other))
            return target + jnp.matmul(square, theirs, precision="highest")

        return jax.lax.fori_loop(number + 1 if self.causal else 0, count, take, weight)

    def _section(
        self, rows: Rows, target: jax.Array, pull: jax.Array, parameters: Parameters, error: jax.Array
    ) -> tuple[jax.Array, jax.Array, Parameters]:
        """Errors, codes and parameters of a section's groups, all of whose outside is in `target` f32[s, N] already."""

        def step(error: jax.Array, each: Any) -> Any:
            number, (rows, target, old) = each
            own, mine, pulled = _enter_piece(number, self.group, pull, error)
            target = target + pulled
            found, mine = self.enter(Entry(rows, target, own, jax.tree.map(lambda part: part[0], old), mine))
            mine, codes = self._rows(rows.weight, target, own, found, mine)
            error = jax.lax.dynamic_update_slice_in_dim(error, mine, number * self.group, 0)
            return error, (codes, jax.tree.map(lambda part: part[None], found))

        error, (codes, parameters) = _last_first(step, error, (rows, target, parameters), len(target) // self.group)
        return error, codes, parameters

    def _rows(
        self, weight: jax.Array, target: jax.Array, pull: jax.Array, parameters: Parameters, error: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Errors and codes of rows under one group's parameters, piece by piece."""
        piece = piece_of(len(target))
        if piece == len(target):
            return self._one_by_one(weight, target, pull, parameters, error)

        def step(error: jax.Array, each: Any) -> Any:
            number, (weight, target) = each
            own, mine, pulled = _enter_piece(number, piece, pull, error)
            mine, codes = self._rows(weight, target + pulled, own, parameters, mine)
            return jax.lax.dynamic_update_slice_in_dim(error, mine, number * piece, 0), codes

        return _last_first(step, error, (weight, target), len(target) // piece)

    def _one_by_one(
        self, weight: jax.Array, target: jax.Array, pull: jax.Array, parameters: Parameters, error: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Errors and codes of a few rows."""

        def step(error: jax.Array, each: Any) -> Any:
            number, (weight, target, pull) = each
            target = target + jnp.matmul(pull, error, precision="highest")  # f32[1, N]
            codes = codes_of_blocks(target, parameters, self.form)
            missed = weight - dequantized(codes, parameters, self.form)
            return jax.lax.dynamic_update_slice_in_dim(error, missed, number, 0), codes

        return _last_first(step, error, (weight, target, pull), len(target))


def section_of(size: int, group: int) -> int:
    """Rows of a section: whole groups, or all there are."""
    return min(size, group * max(1, _SECTION // group))


def piece_of(size: int) -> int:
    """Rows of the pieces that the rows of a group, or of a piece of one, are cut in."""
    return next((piece for piece in (_SECTION, _BLOCK) if size > 2 * piece), size)


def padded_group(group: int) -> int:
    """The group with as many rows of nothing as make it whole pieces."""
    piece = piece_of(group)
    return -(-group // piece) * piece


def padded_groups(count: int, group: int) -> int:
    """The number of groups with as many of nothing as make whole sections."""
    section = max(1, _SECTION // group)
    return count if count <= section else -(-count // section) * section


def _last_first(step: Callable[..., Any], carry: jax.Array, tree: Any, count: int) -> tuple[jax.Array, Any]:
    """`step(carry, (number, piece of the tree))` over `count` pieces, the last first; what it gives, joined again."""
    cut = jax.tree.map(lambda part: part.reshape(count, -1, *part.shape[1:]), tree)
    carry, found = jax.lax.scan(step, carry, (jnp.arange(count, dtype=jnp.int32), cut), reverse=True)
    return carry, jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), found)


def _enter_piece(number: jax.Array, piece: int, pull: jax.Array, error: jax.Array) -> tuple[jax.Array, ...]:
    """Of piece `number`: its own pull f32[p, p], its errors f32[p, N], and what all others pull, f32[p, N]."""
    rows = jax.lax.dynamic_slice_in_dim(pull, number * piece, piece, 0)  # f32[p, n]
    own = jax.lax.dynamic_slice_in_dim(rows, number * piece, piece, 1)
    others = jax.lax.dynamic_update_slice_in_dim(rows, jnp.zeros_like(own), number * piece, 1)
    mine = jax.lax.dynamic_slice_in_dim(error, number * piece, piece, 0)
    return own, mine, jnp.matmul(others, error, precision="highest")
