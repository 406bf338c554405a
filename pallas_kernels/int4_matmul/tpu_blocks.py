"""How a product is cut on a TPU: rows, depth and columns of a grid step, and the inner form.

The time of a plan is modelled, and the shortest one is taken:

    step   max(bundles / clock, HBM bytes / bandwidth) + what a step costs in any case
    all    steps / cores * step + the first step's bytes, which nothing hides, + the copy of the codes out of a stack
           of layers, which a kernel with a loop over chunks cannot read in place

The bundles (VLIW instructions, one a cycle) come from counting: COUNTED holds the schedules that the TPU compiler
(libtpu 0.0.52) made of each form for one step of 1024 x 1024 codes, at two group sizes and four numbers of rows;
between them the count is linear in the rows and in the groups of a block, and it grows with the block's area. No chip
was timed.

What follows from it, chip by chip (see tpu_forms.py for the forms):

    v4      magic everywhere: its compiler unpacks int4 through memory, 3 to 6 times slower than the MXU
    v5e/v5p decode: magic (groups of 128) or direct (short groups), half of the HBM's time; prefill: wscale, whose
            unpacking to f32 is then hidden by the MXU
    v6e     decode: direct, one unpacking instruction and no slack, or wscale for groups of 32 and 64; prefill: wscale
    tpu7x   the same; bound by the vector unit at decode, as 3.7 TB/s a core outrun it

Whole numbers (rounded activations) go by int8 on v5e, v5p and v6e where groups are long enough for it to be faster.
Where forms are within a twentieth of each other, an exact one (direct, magic) goes before wscale, which rounds weights.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from pallas_kernels.int4_matmul import tpu_counted
from pallas_kernels.int4_matmul.tpu_chips import Chip
from pallas_kernels.int4_matmul.tpu_forms import LANES


@dataclasses.dataclass(frozen=True)
class Problem:
    """One product: x[m, k] by codes [k, n] in `groups` groups of `group_size`; `number` is int4, int8 or table."""

    m: int
    k: int
    n: int
    groups: int
    group_size: int
    zero_points: bool = False
    offsets: bool = False
    number: str = "int4"

    @property
    def bits(self) -> int:
        return 8 if self.number == "int8" else 4

    @property
    def unit(self) -> int:
        """Rows that a block of K is a multiple of, or divides (one group, or long ones)."""
        return LANES if self.groups == 1 else math.lcm(self.group_size, LANES)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a product is cut.

    Attributes:
      form: "direct", "magic", "integer" or "wscale" of tpu_forms.py.
      block_m, block_k, block_n: of a grid step. block_k is a multiple of LANES and of whole groups, or of a group an
        equal part.
      resident: whether the rows of x stay in VMEM over the whole of K.
      chunk: rows of codes that are unpacked at a time.
      wide: whether wscale computes in f32, for want of bf16 vectors.
      vmem_limit: bytes that the compiler may use; None is its default, which the choice of blocks keeps to.
    """

    form: str
    block_m: int
    block_k: int
    block_n: int
    resident: bool = False
    chunk: int = 2**30
    vmem_limit: int | None = None
    wide: bool = False

    @property
    def loops(self) -> bool:
        return self.chunk < self.block_k


EXACT = ("direct", "magic", "integer")
COUNTED_ROWS = (16, 64, 128, 512)
# Bundles of a step of 1024 x 1024 codes at COUNTED_ROWS: (groups of 32, groups of 128).
COUNTED = {
    "v4": {
        "magic": ((4015, 1397), (6974, 2355), (11517, 3406), (44000, 11184)),
        "wscale": ((6628, 6617), (7069, 7050), (7716, 7718), (14361, 14427)),
    },
    "v5e": {
        "direct": ((1287, 860), (4048, 1389), (8097, 2435), (33298, 8854)),
        "magic": ((1680, 738), (4603, 1508), (8866, 2565), (34689, 9178)),
        "integer": ((1217, 514), (2368, 834), (4492, 1434), (17500, 5431)),
        "wscale": ((1290, 1206), (1545, 1452), (2531, 2439), (8745, 8300)),
    },
    "v6e": {
        "direct": ((864, 623), (2359, 902), (4485, 1414), (17500, 4800)),
        "integer": ((855, 517), (2221, 832), (4317, 1363), (16500, 4527)),
        "wscale": ((727, 659), (868, 824), (1057, 1027), (2889, 2859)),
    },
    "tpu7x": {
        "direct": ((841, 505), (2346, 875), (4415, 1401), (17300, 4750)),
        "wscale": ((698, 631), (764, 715), (871, 840), (2250, 2200)),
    },
}
COUNTED |= {
    "v5p": COUNTED["v5e"],
    "unknown": {form: counted for form, counted in COUNTED["v6e"].items() if form != "integer"},
}
# What zero points or offsets multiply it by: (groups below 128, groups from 128 on).
CORRECTION = {"direct": (1.8, 1.2), "magic": (1.4, 1.15), "integer": (1.8, 1.2), "wscale": (1.05, 1.05)}
STEP_BUNDLES = 110  # of a step, whatever its size
LOOP_BUNDLES = 100  # of a turn of the loop over chunks, which drains the MXU


def counted(chip: str, number: str) -> dict[str, Any]:
    return COUNTED[chip] if number == "int4" else tpu_counted.OTHERS[number][chip]


BLOCKS_N = (2048, 1024, 512, 256, 128)
MOST_CODES = {1: 2**22, 2: 2**21}  # of a block, by the cores of a device: 2 and 1 MiB
LEAST_CODES = 2**21  # of a block at decode, where there are so many: 1 MiB
DECODE_ROWS = 64
UNROLLED_GROUPS = 32  # of a block at decode: more of them compile slowly
MANY_ROWS = 128  # from which partial sums fill the registers


@functools.lru_cache(maxsize=4096)
def choose_plan(
    problem: Problem, chip: Chip, exact: bool = False, integers: bool = False, resident: bool = False
) -> Plan:
    """The plan of the shortest modelled time that fits the chip's memory.

    `exact` leaves out the form that rounds weights; `integers` lets in the one for whole numbers;
    `resident` asks for plans that keep the rows of x.
    """
    plans = fitting(problem, chip, exact, integers, resident)
    if not plans:
        raise ValueError(f"no block of {problem} fits the {chip.vmem >> 20} MiB of a {chip.name}: {problem.unit=}")
    if problem.m <= DECODE_ROWS:
        least = LEAST_CODES * 4 // problem.bits
        plans = [plan for plan in plans if plan.block_k * plan.block_n >= least] or plans
    return min(plans, key=lambda plan: seconds(problem, plan, chip) * (1.0 if plan.form in EXACT else 1.05))


def fitting(problem: Problem, chip: Chip, exact: bool, integers: bool, resident: bool) -> list[Plan]:
    """The plans that fit the chip's memory."""
    plans = (plan for plan in candidates(problem, chip, exact, integers) if plan.resident or not resident)
    return [plan for plan in plans if vmem_of(problem, plan) <= chip.vmem]


def candidates(problem: Problem, chip: Chip, exact: bool, integers: bool) -> Iterator[Plan]:
    known = counted(chip.name, problem.number)
    forms = [form for form in known if (form in EXACT or not exact) and (form != "integer" or integers)]
    rows = sorted({problem.m, 256, 512, 1024}) if problem.m > 256 else [problem.m]
    most = MOST_CODES[chip.cores] * 4 // problem.bits
    for form in forms:
        for block_m in (m for m in rows if m <= min(problem.m, 1024)):
            for block_k in depths(problem):
                chunk = chunk_of(problem, form, block_m, block_k, chip)
                for block_n in widths(problem):
                    if block_k * block_n <= most or block_k == min(depths(problem)):
                        for resident in (True, False):
                            wide = form == "wscale" and not chip.bf16_vector
                            yield Plan(form, block_m, block_k, block_n, resident, chunk, wide=wide)


def depths(problem: Problem) -> list[int]:
    """Depths of a block: parts of K that leave no group over, and powers of two; of long groups, equal parts."""
    unit = problem.unit
    if problem.groups > 1 and unit > 2048:
        return [d for d in range(LANES, problem.group_size + 1, LANES) if problem.group_size % d == 0] or [unit]
    units = -(-problem.k // unit)
    whole = {unit * part for part in range(1, units + 1) if units % part == 0 and unit * part <= 16384}
    return sorted(whole | {unit * 2**i for i in range(8) if unit * 2**i <= min(8192, unit * units)})


def widths(problem: Problem) -> list[int]:
    if problem.n < LANES:
        return [problem.n]
    return [width for width in BLOCKS_N if width <= -(-problem.n // LANES) * LANES]


def chunk_of(problem: Problem, form: str, block_m: int, block_k: int, chip: Chip) -> int:
    """Rows of codes to unpack at a time, a divisor of block_k."""
    if block_k <= problem.unit:
        return block_k
    group = block_k if problem.groups == 1 else problem.group_size
    if form in EXACT:
        most = problem.unit if block_m >= MANY_ROWS else UNROLLED_GROUPS * group
    else:
        most = 2048 if chip.bf16_vector else 512
    units = block_k // problem.unit
    parts = [part for part in range(1, units + 1) if units % part == 0 and problem.unit * part <= most]
    return problem.unit * max(parts, default=1)


def seconds(problem: Problem, plan: Plan, chip: Chip) -> float:
    """The modelled time of the whole product."""
    steps_m, steps_n, steps_k = (
        -(-size // block)
        for size, block in ((problem.m, plan.block_m), (problem.n, plan.block_n), (problem.k, plan.block_k))
    )
    bundles = bundles_of_step(problem, plan, chip) / chip.clock
    transfer = bytes_of_step(problem, plan, steps_n, steps_k) / chip.bandwidth
    step = max(bundles, transfer) + STEP_BUNDLES / chip.clock
    copied = problem.k * problem.n * problem.bits / 4 / chip.cores if plan.loops else 0  # codes, read and written
    return -(-steps_m * steps_n // chip.cores) * steps_k * step + transfer + copied / chip.bandwidth


def bundles_of_step(problem: Problem, plan: Plan, chip: Chip) -> float:
    """Without STEP_BUNDLES."""
    group = plan.block_k if problem.groups == 1 else problem.group_size
    area = plan.block_k * plan.block_n / 2**20
    count = bundles_of_tile(chip.name, problem.number, plan.form, plan.block_m, group) * area
    if problem.zero_points or problem.offsets:
        count *= CORRECTION[plan.form][group >= 128]
    if plan.block_n < chip.mxu_depth:  # half of a wide MXU
        count *= 2
    turns = plan.block_k // min(plan.chunk, plan.block_k)
    return count + (turns - 1) * LOOP_BUNDLES


@functools.lru_cache(maxsize=4096)
def bundles_of_tile(chip: str, number: str, form: str, rows: int, group: int) -> float:
    """Of 1024 x 1024 codes, without STEP_BUNDLES: COUNTED, linear in the rows and in the number of groups between."""
    bundles = np.asarray(counted(chip, number)[form], float) - STEP_BUNDLES  # [rows, group]
    within = min(rows, COUNTED_ROWS[-1])
    short, long = (float(np.interp(within, COUNTED_ROWS, bundles[:, i])) * rows / within for i in (0, 1))
    share = (1 / group - 1 / 128) / (1 / 32 - 1 / 128)
    return max(long + (short - long) * share, 0.6 * long)


def bytes_of_step(problem: Problem, plan: Plan, steps_n: int, steps_k: int) -> float:
    """HBM bytes: codes, scales and their kin, x where it is read again, and the result."""
    a_column = 2 + problem.zero_points + 2 * problem.offsets
    groups = plan.block_k / (problem.k if problem.groups == 1 else problem.group_size)
    weights = plan.block_n * (plan.block_k * problem.bits / 8 + groups * a_column)
    x = 2 * plan.block_m * plan.block_k / (steps_n if plan.resident or steps_k == 1 else 1)
    return weights + x + 2 * plan.block_m * plan.block_n / steps_k


def vmem_of(problem: Problem, plan: Plan) -> int:
    """Bytes of VMEM: two of every block, the sum, and what the compiler was seen to keep on its stack."""
    bm, bk, bn = -(-plan.block_m // 16) * 16, plan.block_k, -(-plan.block_n // LANES) * LANES
    groups = 1 if problem.groups == 1 else max(1, bk // problem.group_size)
    columns = (1 + problem.zero_points + problem.offsets) * 4 * groups * bn
    x = 2 * bm * (-(-problem.k // bk) * bk if plan.resident else bk)
    chunk = min(plan.chunk, bk)
    if plan.form == "wscale":
        many = plan.block_m > MANY_ROWS or (problem.groups > 1 and problem.group_size < LANES)
        stack = (5 if many else 2) * chunk * bn
    else:
        stack = 4 * bm * bn * (max(1, groups * chunk // bk) if plan.block_m > 16 else 1)
    codes = bk * bn * problem.bits // 8 * (1 if plan.loops else 2)  # and as much for a slice that is read in place
    return 2 * (codes + columns + x + 4 * bm * bn) + 4 * bm * bn + stack + 2**20
