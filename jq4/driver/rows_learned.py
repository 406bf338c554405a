"""The report's rows of leaves that were learned after their method was done with them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from jq4.driver.plan import paths_of
from jq4.driver.report import LeafRow
from jq4.sqnr import sqnr

LEARNED = "learned: what its outputs lose was not measured again"


def rows_learned(rows: Sequence[LeafRow], dense: Any, packed: Any) -> list[LeafRow]:
    """The rows with the SQNR that the leaves have now. The trees are one block's, or of all blocks, stacked."""
    exact, near = paths_of(dense), paths_of(packed)

    def sqnr_of(row: LeafRow) -> float | None:
        weight, q = exact[row.path], near[row.path]
        if row.block is not None and weight.ndim > len(row.shape):
            weight, q = weight[row.block], jax.tree.map(lambda part: part[row.block], q)
        found = float(sqnr(weight, q))
        return found if math.isfinite(found) else None

    def note_of(row: LeafRow) -> str:
        return row.note if LEARNED in row.note else "; ".join(filter(None, (row.note, LEARNED)))

    return [dataclasses.replace(row, sqnr_db=sqnr_of(row), weighted_error=None, note=note_of(row)) for row in rows]
