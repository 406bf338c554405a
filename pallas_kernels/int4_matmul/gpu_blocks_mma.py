"""How a product is cut on Ampere and Ada: form, block, stages and splits of K, by a model of the time.

As gpu_blocks.py has it for Hopper, but for what a core holds: RESIDENT blocks of four warps, each with half of what the
core issues, multiplies and keeps in shared memory. One alone gets its half.

Instructions a weight were counted in what the compiler made (benchmarks/gpu_compile.py) and are within a tenth of it:
what unpacks a code, what a step costs whatever its size, what reads a group's scales, and what a row of x adds (an mma
of eight rows has 512 weights; loads of x; scaling of sums). No GPU was timed: shares and fixed costs are assumptions.

    one scale a column                              "column"
    groups of at least twice the rows of a block    "sums": to scale them takes less than to scale the weights
    others                                          "weights"

The kernel asks for no bounds, so blocks and splits divide N and K.
"""

import functools
import itertools
from collections.abc import Iterator

from pallas_kernels.int4_matmul.gpu_blocks import ADDING, FILLING, GpuPlan, GpuProblem, in_whole_groups
from pallas_kernels.int4_matmul.gpu_chips import LANES, Gpu
from pallas_kernels.int4_matmul.gpu_fragments import STRIP, padded_length

RESIDENT = 2
UNPACKING = {4: 1.35, 8: 2.2}  # instructions a weight, by bits
SCALING = 0.5  # of a weight that is scaled
OF_A_STEP = 38  # for all weights of a thread
OF_A_GROUP = 8  # a weight and zero point or scale, over the size of the group
TENSOR_SHARE = 0.6
STAGES = (4, 3, 2)
SPLITS = (1, 2, 3, 4, 6, 7, 8, 12, 14, 16)
# By rows of a block: strips, and rows of codes of a step. More of either spills.
BLOCKS: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    8: ((2, 1), (256,)),
    16: ((2, 1), (256, 128)),
    32: ((2, 1), (128,)),
    64: ((2, 1), (128,)),
    128: ((1,), (128,)),
}
MOST_ROWS = max(BLOCKS)


def form_of(problem: GpuProblem, tile_m: int) -> str:
    if problem.groups == 1:
        return "column"
    return "sums" if problem.group_size >= 2 * tile_m else "weights"


@functools.cache
def choose_plan(problem: GpuProblem, gpu: Gpu) -> GpuPlan:
    """The plan of the shortest modelled time."""
    return min(_plans(problem, gpu), key=lambda plan: modelled_seconds(problem, plan, gpu))


def modelled_seconds(problem: GpuProblem, plan: GpuPlan, gpu: Gpu) -> float:
    row_blocks = problem.row_blocks(plan.tile_m)
    blocks, places = row_blocks * (problem.n // plan.columns) * plan.splits, RESIDENT * gpu.cores
    waves, rest = divmod(blocks, places)
    seconds = waves * _wave_seconds(problem, plan, gpu, places) + _wave_seconds(problem, plan, gpu, rest)
    if plan.splits == 1:
        return seconds
    return seconds + ADDING + 8 * plan.splits * row_blocks * plan.tile_m * problem.n / gpu.bandwidth


def _wave_seconds(problem: GpuProblem, plan: GpuPlan, gpu: Gpu, blocks: int) -> float:
    """Of so many blocks that run at the same time, at most as many as there are places."""
    if not blocks:
        return 0.0
    steps = padded_length(problem.k) // plan.tile_k // plan.splits
    weights, shared_by = plan.columns * plan.tile_k, max(1, problem.row_blocks(plan.tile_m) / 2)
    x_bytes = 2 * plan.tile_m * plan.tile_k
    w_bytes = weights * (problem.bits / 8 + problem.scale_bytes / min(problem.group_size, problem.k))
    step = max(
        RESIDENT * instructions(problem, plan) * weights / (LANES * gpu.clock),
        RESIDENT * plan.tile_m * weights / (gpu.macs * TENSOR_SHARE * gpu.clock),
        blocks * w_bytes / gpu.bandwidth / shared_by,
        blocks * (w_bytes + x_bytes) / gpu.cache_bandwidth,
    )
    return steps * step + FILLING


def instructions(problem: GpuProblem, plan: GpuPlan) -> float:
    """Of a thread, a weight."""
    of_a_row = 1 / 64 + 1 / (100 * plan.strips)
    fixed = UNPACKING[problem.bits] + OF_A_STEP / (plan.strips * STRIP * plan.tile_k / LANES)
    if plan.form == "column":
        return fixed + plan.tile_m * of_a_row
    scaling = SCALING if plan.form == "weights" else plan.tile_m / problem.group_size
    return fixed + OF_A_GROUP / problem.group_size + plan.tile_m * of_a_row + scaling


def shared_bytes(problem: GpuProblem, plan: GpuPlan) -> int:
    """Shared memory that a block takes: the rings, and the staged result."""
    codes = plan.columns * plan.tile_k * problem.bits // 8
    staged = STRIP * plan.tile_m * (4 if plan.splits > 1 else problem.out_bytes)
    return plan.stages * (2 * plan.tile_m * plan.tile_k + codes) + staged + 1024


def _plans(problem: GpuProblem, gpu: Gpu) -> Iterator[GpuPlan]:
    limit = next((rows for rows in BLOCKS if rows >= problem.m), MOST_ROWS)
    length = padded_length(problem.k)
    for tile_m in (rows for rows in BLOCKS if min(limit // 2, 32) <= rows <= max(limit, 16)):
        form = form_of(problem, tile_m)
        for strips, tile_k, splits in itertools.product(*BLOCKS[tile_m], SPLITS):
            divides = problem.n % (strips * STRIP) == 0 and length % (splits * tile_k) == 0
            if not divides or not in_whole_groups(problem, tile_k) or _spills(form, tile_m, strips):
                continue
            plans = (GpuPlan(form, tile_m, 1, tile_k, stages, splits, strips) for stages in STAGES)
            fitting = (plan for plan in plans if RESIDENT * shared_bytes(problem, plan) <= gpu.shared_memory)
            if (plan := next(fitting, None)) is not None:
                yield plan


def _spills(form: str, tile_m: int, strips: int) -> bool:
    """Found by compiling: totals and sums of a group, of 64 rows, of two strips."""
    return form == "sums" and tile_m * strips > 64
