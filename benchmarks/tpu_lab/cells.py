"""The matrix of cells that each must compile, or be refused by a clear error while tracing; done in parts.

Chips x rows x group sizes x shapes x (symmetric, zero points). A file of JSON lines keeps what is done, so that the
command goes on where it was stopped; what did not compile is tried again.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tpu_lab.chips import CHIPS
from benchmarks.tpu_lab.jobs import Job
from pallas_kernels.int4_matmul.shapes import SHAPES

ROWS = (1, 8, 16, 64, 128, 512, 2048)
GROUPS = (32, 64, 128, 0)  # 0: one scale for each column
MATRIX_SHAPES = (
    "llama-3-8b/qkv_proj", "llama-3-8b/down_proj", "llama-3-70b/gate_proj", "llama-3-70b/down_proj",
    "qwen3-32b/o_proj", "qwen3-32b/gate_up", "gemma-3-27b/qkv_proj", "gemma-3-27b/down_proj",
    "llama-2-7b/down_proj", "odd/short-group", "odd/prime",
)  # fmt: skip


def matrix(
    chips: Sequence[str] = tuple(CHIPS), contender: str = "tpu", shapes: Sequence[str] = MATRIX_SHAPES
) -> list[Job]:
    """Every cell, one shape after the other, so that a part of it is whole for all chips."""
    cells = itertools.product(shapes, chips, GROUPS, ROWS, (False, True))
    return [_job(chip, contender, shape, group, rows, zeros) for shape, chip, group, rows, zeros in cells]


def sample(chips: Sequence[str] = tuple(CHIPS), contender: str = "tpu") -> list[Job]:
    """A few cells of every chip: each group size, few and many rows, and sizes that fit no tile."""
    chosen = (
        ("llama-3-8b/qkv_proj", 128, 1, False),
        ("llama-2-7b/down_proj", 64, 16, True),
        ("odd/prime", 32, 64, True),
        ("llama-3-8b/qkv_proj", 0, 512, False),
        ("odd/short-group", 128, 2048, True),
        ("llama-3-8b/qkv_proj", 32, 64, True),
    )
    return [_job(chip, contender, *cell) for chip in chips for cell in chosen]


def _job(chip: str, contender: str, shape: str, group: int, rows: int, zeros: bool) -> Job:
    k, n = SHAPES[shape]
    return Job(chip, contender, {"rows": rows, "k": k, "n": n, "group_size": group, "asymmetric": zeros})


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("chip", "contender", "rows", "k", "n", "group_size", "asymmetric"))


def read(file: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The cells that are done, by their key; a line that a kill cut short is left out."""
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    rows = [json.loads(line) for line in lines]
    return {key(row): row for row in rows}


def left(jobs: Iterable[Job], done: dict[tuple[Any, ...], dict[str, Any]]) -> list[Job]:
    """The jobs not done yet, or that failed."""
    return [job for job in jobs if done.get(key(job.row), {}).get("status", "failed") == "failed"]


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts by chip and status, and every cell that did not compile."""
    rows = list(rows)
    counts = {chip: dict(Counter(row["status"] for row in rows if row["chip"] == chip)) for chip in CHIPS}
    kept = ("chip", "rows", "k", "n", "group_size", "asymmetric", "status", "error")
    return {
        "cells": len(rows),
        "by_chip": {chip: count for chip, count in counts.items() if count},
        "seconds": round(sum(row.get("seconds", 0) for row in rows)),
        "not_compiled": [{name: row[name] for name in kept} for row in rows if row["status"] != "ok"],
    }
