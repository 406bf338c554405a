"""The time and the memory of a plan on a TPU, without compiling it.

    step   max(bundles / clock, HBM bytes / bandwidth), with the bundles that a step has in any case
    all    steps / cores * step + the first step's bytes, which nothing hides, and those of rows of x that are there
           once, + the copy of the codes out of a stack of layers, which a kernel with a loop over chunks cannot read in
           place, + what XLA rewrites before the kernel: x in another order, scales in single rows

The bundles (VLIW instructions, one a cycle) come from counting: COUNTED holds the schedules that the TPU compiler
(libtpu 0.0.52) made of each form for one step of 1024 x 1024 codes (of 16 rows: a quarter of a step of 2048 x 2048), at
two group sizes and four numbers of rows. Between them the count is linear in the rows and in the groups of a block, and
it grows with the block's area, but for what every step and every f32 sum that it updates cost. No chip was timed.
"""

import functools
from typing import Any

import numpy as np

from pallas_kernels.int4_matmul import tpu_counted
from pallas_kernels.int4_matmul.tpu_chips import LARGE_LAYER, Chip
from pallas_kernels.int4_matmul.tpu_forms import LANES
from pallas_kernels.int4_matmul.tpu_plan import EXACT, SUBLANES, Plan, Problem, reads_flat_scales

COUNTED_ROWS = (16, 64, 128, 512)
# Bundles of a step of 1024 x 1024 codes at COUNTED_ROWS: (groups of 32, groups of 128).
COUNTED = {
    "v4": {
        "magic": ((2224, 1235), (5550, 2316), (11228, 3795), (43932, 11036)),
        "shifted": ((2862, 2861), (3319, 3320), (3991, 4029), (9091, 8993)),
    },
    "v5e": {
        "direct": ((1200, 827), (4055, 1360), (8054, 2401), (31975, 8845)),
        "magic": ((1264, 688), (4400, 1351), (9229, 3178), (34191, 10133)),
        "integer": ((1217, 514), (2368, 834), (4492, 1434), (17500, 5431)),
        "wscale": ((1655, 1582), (2051, 1954), (2694, 2623), (8240, 8174)),
    },
    "v6e": {
        "direct": ((820, 592), (2340, 889), (5339, 1907), (18270, 5566)),
        "integer": ((855, 517), (2221, 832), (4317, 1363), (16500, 4527)),
        "wscale": ((642, 620), (827, 805), (1041, 1028), (2868, 2854)),
    },
    "tpu7x": {
        "direct": ((690, 412), (2316, 850), (5378, 1809), (18570, 5689)),
        "wscale": ((629, 610), (742, 724), (910, 899), (2383, 2372)),
    },
}
# Of 256 rows, where that is less than the line from 128 to 512 says: what is done in f32 hides all of its unpacking
# there.
AT_256_ROWS = {("v4", "shifted"): (5287, 5320), ("v5e", "wscale"): (4315, 4312)}
COUNTED |= {
    "v5p": COUNTED["v5e"],
    "unknown": {form: counted for form, counted in COUNTED["v6e"].items() if form != "integer"},
}
AT_256_ROWS["v5p", "wscale"] = AT_256_ROWS["v5e", "wscale"]
# What zero points or offsets multiply it by: (groups below 128, groups from 128 on).
CORRECTION = {
    "direct": (1.7, 1.15), "magic": (1.25, 1.1), "integer": (1.8, 1.2), "wscale": (1.2, 1.1), "shifted": (1.1, 1.1),
}  # fmt: skip
SUMS_BUNDLES = 1.1 / 1024  # of a step, for each of the sums that it reads and writes
SUMS_BUNDLES_OF_64_ROWS = {("v5e", "direct"): 3.3 / 1024}  # of int4; v5p's smaller blocks are cut worse by it
# Of more rows, blocks as small as large layers ask for take 6 % longer wherever the layer is (v5p); its copy out of a
# stack takes 8 to 16 %.
MOST_ROWS_OF_SMALL_INPUTS = 128
LOOP_BUNDLES = 100  # of a turn of the loop over chunks, which drains the MXU
# Bytes of stack of a weight of "shifted", by the least group's rows: without and with zero points or offsets.
STACK_OF_SHIFTED = {0: (1.3, 3.0), 64: (0.9, 1.9), 128: (0.5, 1.2)}
REWRITTEN = 3e-12  # seconds for a scale or offset that XLA rewrites in single rows
REWRITTEN_ZERO_POINT = 16  # bytes of HBM for one: a row fills a 32nd of its registers, and not all of it is waited for
# Forms whose stack was seen to hold the sums of one group at a time. Others may too, but larger blocks of theirs were
# copied out of stacks of layers, or did not fit (magic on v4, f32 rows by groups of 32).
WITH_ONE_SUM = {("v5e", "direct"), ("v5p", "direct")}


def bundles_of_any_step(form: str) -> int:
    """Bundles that a step has whatever its size."""
    return 400 if form == "shifted" else 130


def bundles_of_sums(chip: str, number: str, form: str, rows: int, columns: int) -> float:
    """Those of the sums of a step."""
    of_a_sum, at_64 = SUMS_BUNDLES, SUMS_BUNDLES_OF_64_ROWS.get((chip, form))
    if at_64 is not None and number == "int4":
        of_a_sum = float(np.interp(rows, (16, 64, 128), (SUMS_BUNDLES, at_64, SUMS_BUNDLES)))
    return of_a_sum * rows * columns


def counted(chip: str, number: str) -> dict[str, Any]:
    return COUNTED[chip] if number == "int4" else tpu_counted.OTHERS[number][chip]


def seconds(problem: Problem, plan: Plan, chip: Chip) -> float:
    """The modelled time of the whole product."""
    steps_m, steps_n, steps_k = (
        -(-size // block)
        for size, block in ((problem.m, plan.block_m), (problem.n, plan.block_n), (problem.k, plan.block_k))
    )
    bundles = bundles_of_step(problem, plan, chip) / chip.clock
    transfer = bytes_of_step(problem, plan, steps_n, steps_k) / chip.bandwidth
    steps = -(-steps_m * steps_n // chip.cores) * steps_k
    waits = steps_m / chip.cores * 2 * plan.block_m * problem.k / chip.bandwidth if plan.once else 0.0
    return steps * max(bundles, transfer) + transfer + waits + _before(problem, plan, chip)


def _before(problem: Problem, plan: Plan, chip: Chip) -> float:
    """Seconds of what XLA does before the kernel."""
    copied = problem.k * problem.n * problem.bits / 4 if plan.loops else 0  # codes, read and written
    copied += 6 * problem.m * problem.k if plan.form == "magic" else 0
    flat = problem.groups == 1 or reads_flat_scales(problem.groups, problem.group_size, plan)
    rewritten = 0 if flat else problem.groups * problem.n
    of_one = REWRITTEN * (1 + problem.offsets) + problem.zero_points * REWRITTEN_ZERO_POINT / chip.bandwidth
    return copied / chip.cores / chip.bandwidth + rewritten * of_one


def bundles_of_step(problem: Problem, plan: Plan, chip: Chip) -> float:
    group = plan.block_k if problem.groups == 1 else problem.group_size
    tile = bundles_of_tile(chip.name, problem.number, plan.form, plan.block_m, group)
    count = tile * plan.block_k * plan.block_n / 2**20
    count += bundles_of_sums(chip.name, problem.number, plan.form, plan.block_m, plan.block_n)
    if problem.zero_points or problem.offsets:
        count *= CORRECTION[plan.form][group >= 128]
    if plan.block_n < chip.mxu_depth:  # half of a wide MXU
        count *= 2
    turns = plan.block_k // min(plan.chunk, plan.block_k)
    return count + (turns - 1) * LOOP_BUNDLES + bundles_of_any_step(plan.form)


@functools.lru_cache(maxsize=4096)
def bundles_of_tile(chip: str, number: str, form: str, rows: int, group: int) -> float:
    """Of 1024 x 1024 codes, less those of any step and its sums: COUNTED, linear in rows and in groups between."""
    at, found = COUNTED_ROWS, counted(chip, number)[form]
    if number == "int4" and (between := AT_256_ROWS.get((chip, form))):
        at, found = (*at[:-1], 256, at[-1]), (*found[:-1], between, found[-1])
    bundles = np.asarray(found, float) - bundles_of_any_step(form)  # [rows, group]
    bundles -= np.asarray([bundles_of_sums(chip, number, form, counted_rows, 1024) for counted_rows in at])[:, None]
    within = min(rows, at[-1])
    short, long = (float(np.interp(within, at, bundles[:, i])) * rows / within for i in (0, 1))
    share = (1 / group - 1 / 128) / (1 / 32 - 1 / 128)
    return max(long + (short - long) * share, 0.6 * long)


def _bytes_of_a_scale(problem: Problem) -> int:
    """And of its zero point and offset."""
    return 2 + problem.zero_points + 2 * problem.offsets


def bytes_of_step(problem: Problem, plan: Plan, steps_n: int, steps_k: int) -> float:
    """HBM bytes: codes, scales and their kin, x where it is read again, and the result."""
    groups = plan.block_k / (problem.k if problem.groups == 1 else problem.group_size)
    weights = plan.block_n * (plan.block_k * problem.bits / 8 + groups * _bytes_of_a_scale(problem))
    x = 2 * plan.block_m * plan.block_k / (steps_n if plan.resident or steps_k == 1 else 1)
    return weights + x + problem.out_bytes * plan.block_m * plan.block_n / steps_k


def vmem_of(problem: Problem, plan: Plan, chip: Chip) -> int:
    """Bytes of VMEM: two of every block (or one of x), the sum, and what the compiler was seen to keep on its stack."""
    bm, bk, bn = -(-plan.block_m // 16) * 16, plan.block_k, -(-plan.block_n // LANES) * LANES
    groups = 1 if problem.groups == 1 else max(1, bk // problem.group_size)
    columns = (1 + problem.zero_points + problem.offsets) * 4 * max(groups, SUBLANES) * bn
    x = 2 * bm * (-(-problem.k // bk) * bk if plan.resident else bk)
    in_place = not plan.loops and plan.form != "shifted"  # whose codes take as much again
    codes = bk * bn * problem.bits // 8 * (2 if in_place else 1)
    blocks = 2 * (codes + columns + problem.out_bytes * bm * bn) + (x if plan.once else 2 * x)
    return blocks + 4 * bm * bn + _stack(problem, plan, chip, bm, bn)


def reads_in_place(problem: Problem, plan: Plan, chip: Chip) -> bool:
    """Whether blocks are as small as those with which XLA was seen to let a kernel read a layer out of a stack."""
    codes = plan.block_k * plan.block_n * problem.bits // 8
    x = 2 * plan.block_m * (problem.k if plan.resident else plan.block_k)
    inputs = 2 * codes + (x if plan.resident else 2 * x)
    large = problem.k * problem.n * problem.bits // 8 > LARGE_LAYER and problem.m <= MOST_ROWS_OF_SMALL_INPUTS
    return max(codes, x, 4 * plan.block_m * plan.block_n) <= chip.block and not (large and inputs > chip.inputs)


def _stack(problem: Problem, plan: Plan, chip: Chip, bm: int, bn: int) -> int:
    chunk = min(plan.chunk, plan.block_k)
    corrected = problem.zero_points or problem.offsets
    if plan.form == "shifted":  # and all of x, or of the sums
        least = max(group for group in STACK_OF_SHIFTED if group <= problem.group_size)
        return int(STACK_OF_SHIFTED[least][corrected] * chunk * bn) + max(2 * bm * chunk, 4 * bm * bn)
    of_a_weight = 1.75 if plan.form == "wscale" else 1.5 if corrected else 0.75
    if problem.number != "int4":
        of_a_weight = max(of_a_weight, 5.0)
    sums = 0
    if plan.form in EXACT:
        held = problem.groups > 1 and plan.block_m > 16 and (chip.name, plan.form) not in WITH_ONE_SUM
        sums = 4 * bm * bn * (chunk // min(chunk, problem.group_size) if held else 1)
    return int(of_a_weight * chunk * bn) + sums + 2**20
