"""What became of every leaf of every block, and of the whole model; plain enough for JSON and for a journal."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jq4.quantize_report import LeafReport, QuantizeReport
from jq4.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class LeafRow:
    """One packed leaf of one block.

    Attributes:
      block: the block's number; None for a leaf outside of the blocks.
      path, shape, format, group_size: of the packed leaf; shape without the axis of blocks.
      sqnr_db: signal to quantization noise of the weight in dB; None where it is exact.
      weighted_error: E|x W - x Q|**2 / E|x W|**2 over calibration; None where no statistics were taken.
      note: what the method or the driver has to say of it: damping that was raised, experts that saw too little.
      seconds: that the method took.
      nbytes: of the packed leaf.
      energy: sum w**2, by which the rows of one leaf are put together.
    """

    block: int | None
    path: str
    shape: tuple[int, ...]
    format: str
    group_size: int
    sqnr_db: float | None
    weighted_error: float | None
    note: str
    seconds: float
    nbytes: int
    energy: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "LeafRow":
        """The row that `as_dict` gave, after JSON has made lists of its tuples."""
        value["shape"] = tuple(value["shape"])
        return cls(**value)


@dataclasses.dataclass(frozen=True)
class BlocksResult:
    """What `quantize_blocks` gives.

    Attributes:
      params: the packed tree; None where it was saved to a destination instead.
      report: leaf by leaf as jq4.quantize reports them, the blocks of a leaf together.
      rows: leaf by leaf and block by block.
      resumed_blocks: how many blocks were found done by an earlier, killed run.
      calibration_rows, context: the shape of the calibration rows; None without any.
      seconds: of this run.
      peak_memory: bytes, the most that this process ever held.
    """

    params: Any
    report: QuantizeReport
    rows: tuple[LeafRow, ...]
    resumed_blocks: int
    calibration_rows: int | None
    context: int | None
    seconds: float
    peak_memory: int

    def as_dict(self) -> dict[str, Any]:
        """Everything but the params, as plain data."""
        return {
            "rows": [row.as_dict() for row in self.rows],
            "resumed_blocks": self.resumed_blocks,
            "calibration_rows": self.calibration_rows,
            "context": self.context,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
        }


def whole_report(
    recipe: Recipe, block: Sequence[LeafReport], outside: Sequence[LeafReport], rows: Iterable[LeafRow], num_blocks: int
) -> QuantizeReport:
    """The report of the stacked tree, from that of one block's plan, the leaves outside, and the rows of all."""
    by_path: dict[str, list[LeafRow]] = {}
    for row in rows:
        by_path.setdefault(row.path, []).append(row)
    leaves = [_stacked(leaf, num_blocks) for leaf in block] + list(outside)
    done = [_measured(leaf, by_path[leaf.path]) if leaf.path in by_path else leaf for leaf in leaves]
    return QuantizeReport(recipe, sorted(done, key=lambda leaf: leaf.path.split("/")))


def together(rows: Sequence[LeafRow]) -> float:
    """The SQNR in dB of the rows' weights taken as one."""
    noise = sum(row.energy / 10 ** (row.sqnr_db / 10) for row in rows if row.sqnr_db is not None)
    return 10 * math.log10(sum(row.energy for row in rows) / noise) if noise else math.inf


def _stacked(leaf: LeafReport, num_blocks: int) -> LeafReport:
    if leaf.shape is None:
        return leaf
    sizes = {"dense_nbytes": leaf.dense_nbytes * num_blocks, "nbytes": leaf.nbytes * num_blocks}
    return dataclasses.replace(leaf, shape=(num_blocks, *leaf.shape), **sizes)


def _measured(leaf: LeafReport, rows: list[LeafRow]) -> LeafReport:
    nbytes = sum(row.nbytes for row in rows)
    return dataclasses.replace(leaf, status="packed", nbytes=nbytes, noise=np.float64(together(rows)))
