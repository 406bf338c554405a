"""tuned.json: block sizes that the TPU compiler schedules better than the model of tpu_model.py can tell.

    {"command": ..., "plans": {CHIP: {"M x K x N g GROUP [z]": [form, block_m, block_k, block_n, resident, chunk]}}}

M is the largest number of rows of a bucket: an entry serves every problem in it, with its block_m cut to the rows there
are; a group of 0 is one for the whole of K, and z stands for zero points. benchmarks/tpu_tune.py compiles the model's
first few plans for shapes of real models and writes an entry where one of them is faster than the model's first by
more than 1.5 %. An entry that does not fit (float32 results, a layout it was not tuned for) is not taken.
"""

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from pallas_kernels.int4_matmul.tpu_chips import Chip
from pallas_kernels.int4_matmul.tpu_model import vmem_of
from pallas_kernels.int4_matmul.tpu_plan import EXACT, Plan, Problem, in_rows_held_once

FILE = "tuned.json"
BUCKETS = (16, 512, 2048)  # rows: up to 16, from 257 to 512, and from 1025 to 2048


def tuned_plan(problem: Problem, chip: Chip, exact: bool) -> Plan | None:
    """The table's plan for a problem, or None."""
    if problem.number != "int4" or problem.offsets or bucket_of(problem.m) is None:
        return None
    entry = table().get(chip.name, {}).get(key_of(problem))
    if entry is None:
        return None
    plan = plan_of(entry, problem.m, chip)
    fits = vmem_of(problem, plan, chip) <= chip.vmem
    return plan if fits and (plan.form in EXACT or not exact) else None


def bucket_of(rows: int) -> int | None:
    """The bucket that a number of rows is in; none has those from 17 to 256, from 513 to 1024 and beyond 2048."""
    return next((most for most in BUCKETS if most // 2 < rows <= most or rows <= most == BUCKETS[0]), None)


def key_of(problem: Problem) -> str:
    group = 0 if problem.groups == 1 else problem.group_size
    size = f"{bucket_of(problem.m)} x {problem.k} x {problem.n} g {group}"
    return f"{size} z" if problem.zero_points else size


def plan_of(entry: list[Any], rows: int, chip: Chip) -> Plan:
    form, block_m, block_k, block_n, resident, chunk = entry
    wide = form == "wscale" and not chip.bf16_vector
    return in_rows_held_once(Plan(form, min(block_m, rows), block_k, block_n, resident, chunk, wide=wide))


def entry_of(plan: Plan) -> list[Any]:
    return [plan.form, plan.block_m, plan.block_k, plan.block_n, plan.resident, min(plan.chunk, plan.block_k)]


@functools.cache
def table() -> Mapping[str, Mapping[str, list[Any]]]:
    """The plans by chip and problem."""
    return json.loads(resources.files("pallas_kernels.int4_matmul").joinpath(FILE).read_text())["plans"]
