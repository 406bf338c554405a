"""Rounding with feedback: each row of a weight takes up the errors of the others before it is rounded.

    target_k = w_k + sum_j pull[k, j] * e_j         e_j = w_j - dequantized_j, f32[N], of the other rows j
    code_k   = nearest(target_k)

Two methods are this one sweep, with two matrices `pull` for the error E^T H E that they lower:

    GPTQ                 pull = R^T with row k divided by R_kk, its diagonal removed (H = R R^T, R upper triangular);
                         errors start at zero, so that a row only sees the rows before it
    coordinate descent   pull = H with row k divided by H_kk, its diagonal removed;
                         errors start at those of a first solution, and each row's new code is the best given the others

The first is GPTQ's elimination written as feedback (LDLQ of Chee et al. 2023, who show the two are equal): with
H = R R^T the error is |R^T E|^2, whose row k is R_kk (e_k + sum_{j<k} R_jk / R_kk e_j), and each row in turn makes its
own term as small as the grid allows.

Rows go by spans within spans (all, section, group, block, row): on entering a span, one product takes up the errors of
everything outside it, and inside only the span's own remain. These are GPTQ's lazy batch updates, at every level. A
group's scales are found on entering it, so they see the updated weights. Every level is one `lax.scan`: what is
compiled is one product a level, whatever K.
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


class Solution(NamedTuple):
    """Codes u8[K, N], parameters f32[G, 1, N] and errors f32[K, N]."""

    codes: jax.Array
    parameters: Parameters
    error: jax.Array


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One pass over all rows.

    Attributes:
      form: the number format.
      group: rows that share parameters; divides K.
      enter: the parameters of a group and the errors its rows begin with, on entering it.
    """

    form: Format
    group: int
    enter: Enter

    def __call__(self, weight: jax.Array, importance: jax.Array, pull: jax.Array, start: Solution) -> Solution:
        """weight f32[K, N], importance f32[K, 1], pull f32[K, K] with a diagonal of zeros."""
        rows = Rows(weight, importance, start.codes)
        error, codes, parameters = self._span(rows, weight, pull, start.parameters, start.error)
        return Solution(codes, parameters, error)

    def _span(
        self, rows: Rows, target: jax.Array, pull: jax.Array, parameters: Parameters, error: jax.Array
    ) -> tuple[jax.Array, jax.Array, Parameters]:
        """Errors, codes and parameters of n rows, all of whose outside is in `target` f32[n, N] already."""
        size = target.shape[0]
        if size == self.group:
            first = jax.tree.map(lambda part: part[0], parameters)
            found, error = self.enter(Entry(rows, target, pull, first, error))
            error, codes = self._group(rows.weight, target, pull, found, error)
            return error, codes, jax.tree.map(lambda part: part[None], found)
        piece = section_of(size, self.group)
        pieces = size // piece

        def step(error: jax.Array, each: Any) -> Any:
            number, rows, target, parameters = each
            own, mine, pulled = _enter_piece(number, piece, pull, error)
            mine, codes, parameters = self._span(rows, target + pulled, own, parameters, mine)
            return jax.lax.dynamic_update_slice_in_dim(error, mine, number * piece, 0), (codes, parameters)

        cut = jax.tree.map(lambda part: part.reshape(pieces, -1, *part.shape[1:]), (rows, target, parameters))
        error, found = jax.lax.scan(step, error, (jnp.arange(pieces, dtype=jnp.int32), *cut))
        codes, parameters = jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), found)
        return error, codes, parameters

    def _group(
        self, weight: jax.Array, target: jax.Array, pull: jax.Array, parameters: Parameters, error: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Errors and codes of a group's rows, block by block."""
        size = target.shape[0]
        piece = block_of(size)
        if piece == size:
            return self._block(weight, target, pull, parameters, error)

        def step(error: jax.Array, each: Any) -> Any:
            number, weight, target = each
            own, mine, pulled = _enter_piece(number, piece, pull, error)
            mine, codes = self._block(weight, target + pulled, own, parameters, mine)
            return jax.lax.dynamic_update_slice_in_dim(error, mine, number * piece, 0), codes

        cut = (part.reshape(size // piece, piece, -1) for part in (weight, target))
        error, codes = jax.lax.scan(step, error, (jnp.arange(size // piece, dtype=jnp.int32), *cut))
        return error, codes.reshape(size, -1)

    def _block(
        self, weight: jax.Array, target: jax.Array, pull: jax.Array, parameters: Parameters, error: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Errors and codes of a block's rows, one by one."""

        def step(error: jax.Array, each: Any) -> Any:
            number, weight, target, pull = each
            target = (target + jnp.matmul(pull, error, precision="highest"))[None]  # f32[1, N]
            codes = codes_of_blocks(target, parameters, self.form)
            missed = weight[None] - dequantized(codes, parameters, self.form)
            return jax.lax.dynamic_update_slice_in_dim(error, missed, number, 0), codes[0]

        numbers = jnp.arange(target.shape[0], dtype=jnp.int32)
        return jax.lax.scan(step, error, (numbers, weight, target, pull))


def section_of(size: int, group: int) -> int:
    """Rows of the spans that a span of whole groups is cut in: sections, then groups."""
    section = group * max(1, _SECTION // group)
    return section if size > section else group


def block_of(group: int) -> int:
    """Rows of the blocks that a group is cut in."""
    return _BLOCK if group > 2 * _BLOCK else group


def padded_group(group: int) -> int:
    """The group with as many rows of nothing as make it whole blocks."""
    block = block_of(group)
    return -(-group // block) * block


def padded_groups(count: int, group: int) -> int:
    """The number of groups with as many of nothing as make whole sections."""
    section = max(1, _SECTION // group)
    return count if count <= section else -(-count // section) * section


def _enter_piece(number: jax.Array, piece: int, pull: jax.Array, error: jax.Array) -> tuple[jax.Array, ...]:
    """Of piece `number`: its own pull f32[p, p], its errors f32[p, N], and what all others pull, f32[p, N]."""
    rows = jax.lax.dynamic_slice_in_dim(pull, number * piece, piece, 0)  # f32[p, n]
    own = jax.lax.dynamic_slice_in_dim(rows, number * piece, piece, 1)
    mine = jax.lax.dynamic_slice_in_dim(error, number * piece, piece, 0)
    others = jax.lax.dynamic_update_slice_in_dim(error, jnp.zeros_like(mine), number * piece, 0)
    return own, mine, jnp.matmul(rows, others, precision="highest")
