"""In which order a matrix's K rows are rounded: slots, whole groups of them, each holding a row or nothing.

The row in the last slot goes first (jq4.methods.feedback). A short last group is filled up with slots of nothing, and
so is a group to whole pieces and all groups to whole sections: then every group has one shape, and what holds nothing
takes no part, having a weight of 0, an importance of 0 and a 1 on the Hessian's diagonal.

`static` order takes inputs of a large H_kk first, while there are many rows left to make up for their errors. Rows move
within their group, and groups move as wholes, so that a group is still entered once and codes are stored in natural
order: no permutation is written. (GPTQ's own act-order sorts rows across groups, and then either writes each row's
group or has to fix all scales beforehand; GPTQModel's group-aware order is this one.)
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.methods.canonical import Canonical
from jq4.methods.feedback import padded_group, padded_groups, section_of
from jq4.rounding import Parameters
from jq4.upper_squares import entries


@functools.partial(jax.tree_util.register_dataclass, data_fields=("row", "slot"), meta_fields=("canonical",))
@dataclasses.dataclass(frozen=True)
class Slots:
    """Attributes:
    row: i32[P], the row in each slot; K where there is none.
    slot: i32[K], where each row is.
    canonical: of the weight.
    """

    row: jax.Array
    slot: jax.Array
    canonical: Canonical

    @property
    def group(self) -> int:
        """Slots in a group."""
        return padded_group(self.canonical.group_size)

    @property
    def section(self) -> int:
        """Slots in a section."""
        return section_of(len(self.row), self.group)

    @property
    def holds(self) -> jax.Array:
        """bool[P, 1]: whether there is a row in a slot."""
        return (self.row < self.slot.shape[0])[:, None]

    def spread(self, values: jax.Array) -> jax.Array:
        """[K, N] as [P, N], zeros where there is no row."""
        return jnp.take(values, self.row, axis=0, mode="fill", fill_value=0)

    def square(self, matrix: Any, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """[K, K] in either form (jq4.upper_squares) as [p, q], p and q given as rows in slots; zeros for none."""
        held = (rows < len(self.slot))[:, None] & (columns < len(self.slot))[None, :]
        return jnp.where(held, entries(matrix, rows, columns), 0.0)

    def natural(self, codes: jax.Array, parameters: Parameters) -> tuple[jax.Array, Parameters]:
        """Codes [P, N] and parameters [P/group, 1, N] of slots as those of rows [K, N] and groups [G, N]."""
        groups = jnp.take(self.slot, _first_rows(self.canonical), axis=0) // self.group
        return jnp.take(codes, self.slot, axis=0), jax.tree.map(lambda part: part[groups, 0], parameters)


def slots_of(canonical: Canonical, diagonal: jax.Array, actorder: str) -> Slots:
    """The slots of f32[K] rows' H_kk: the first row in the last, or, for "static", the largest."""
    natural = _natural(canonical)  # i32[G', g']
    row = jnp.asarray(natural)
    if actorder == "static":
        size = jnp.take(diagonal, row, mode="fill", fill_value=-1.0)  # f32[G', g']
        row = jnp.take_along_axis(row, jnp.argsort(-size, axis=1), axis=1)
        row = row[jnp.argsort(-jnp.max(size, axis=1))]
    row = row.reshape(-1)[::-1]
    rows = diagonal.shape[0]
    slot = jnp.zeros(rows + 1, jnp.int32).at[row].set(jnp.arange(row.size, dtype=jnp.int32))[:rows]
    return Slots(row, slot, canonical)


def _natural(canonical: Canonical) -> np.ndarray:
    """The rows of each group in natural order, i32[G', g'], filled up with K."""
    nothing = canonical.runs * canonical.length
    group, count = canonical.group_size, canonical.runs * canonical.groups
    rows = np.arange(nothing, dtype=np.int32).reshape(canonical.runs, canonical.length)
    short = canonical.groups * group - canonical.length
    rows = np.pad(rows, ((0, 0), (0, short)), constant_values=nothing).reshape(count, group)
    size = padded_group(group)
    more = padded_groups(count, size) - count
    return np.pad(rows, ((0, more), (0, size - group)), constant_values=nothing)


def _first_rows(canonical: Canonical) -> np.ndarray:
    starts = np.arange(0, canonical.length, canonical.group_size, dtype=np.int32)
    return (np.arange(canonical.runs, dtype=np.int32)[:, None] * canonical.length + starts).reshape(-1)
