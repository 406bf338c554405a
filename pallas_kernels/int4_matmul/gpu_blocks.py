"""How a product is cut on a Hopper GPU: form, block, stages and splits of K, by a model of the time.

    core    max(instructions / issue rate, multiply-adds / tensor rate, bytes / its share of the bandwidths)
    all     waves of blocks (one a core at a time) * steps * core + the filling of the rings, + for splits the partial
            sums written, read and added by a kernel of its own

Instructions a weight are counted in what the compiler made of each form (benchmarks/gpu_compile.py); rates and
bandwidths are the datasheets'. No GPU was timed: the shares and fixed costs are assumptions, to be replaced by measured
ones.

    one scale a column          "column"
    groups of 64 and more       "sums" up to SUMS_ROWS rows of x, above "weights": the sums of a block of 128 rows would
                                be scaled by as many instructions as unpack its weights
    groups of 32                "weights": a chain of two wgmma would be waited for
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from pallas_kernels.int4_matmul.gpu_chips import LANES, MACS, Gpu
from pallas_kernels.int4_matmul.gpu_fragments import STRIP, TILE_K


@dataclasses.dataclass(frozen=True)
class GpuProblem:
    """One product: x[m, k] by codes [k, n] in `groups` groups of `group_size`."""

    m: int
    k: int
    n: int
    groups: int
    group_size: int
    scale_bytes: int = 2
    out_bytes: int = 2


@dataclasses.dataclass(frozen=True)
class GpuPlan:
    """How a product is cut.

    Attributes:
      form: "sums", "weights" or "column" of mosaic_gpu_kernel.py.
      tile_m: rows of x of a block, a multiple of 8, at most 256.
      warpgroups: that multiply, at most MOST_WARPGROUPS.
      tile_k: rows of codes of a step, a multiple of 64.
      stages: steps that are in shared memory at a time.
      splits: blocks along K, whose sums are added afterwards.
      strips: of 64 columns, that a warpgroup has. warpgroups * strips is at most 4: a row of scales is one copy.
    """

    form: str
    tile_m: int
    warpgroups: int = 2
    tile_k: int = 128
    stages: int = 4
    splits: int = 1
    strips: int = 1

    @property
    def columns(self) -> int:
        return self.warpgroups * self.strips * STRIP


SUMS_ROWS = 64
INSTRUCTIONS = {"column": (2.25, 1.9), "sums": (2.4, 2.1), "weights": (2.9, 2.5)}  # of a thread, a weight, by strips
INSTRUCTIONS_OF_A_SUM = 64 / 128 / 64  # more of them for each row of x beyond 16: one a sum and group of 128
LEAST_ROWS_OF_TENSOR_CORE = 16  # fewer take as long
TENSOR_SHARE = 0.7
FILLING = 1.5e-6  # seconds before a block's first product
ADDING = 3e-6  # seconds that the kernel which adds the splits costs in any case
ROWS = (8, 16, 32, 64, 128, 256)
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
MOST_STAGES, LEAST_STAGES = 6, 3
MOST_WARPGROUPS = 3
# By rows of a block: (warpgroups, strips of each), and rows of codes of a step. Beside the copying one, two warpgroups
# leave a thread 224 registers, three leave it 152. Pallas shares out 512 registers among the threads of one number in
# all warpgroups, but a block with four and the copying one is launched with 480: it would wait for more for ever.
_FEW_ROWS = ((2, 2), (2, 1))  # of 192 columns, zero points are not whole 128 bytes, which a copy must be
WARPGROUPS: dict[int, tuple[tuple[int, int], ...]] = {
    **dict.fromkeys((8, 16, 32, 64), _FEW_ROWS), 128: ((2, 2), (2, 1)), 256: ((2, 1),)
}  # fmt: skip
DEPTHS: dict[int, tuple[int, ...]] = {
    8: (256, 128),
    16: (256, 128),
    32: (256, 128),
    64: (128,),
    128: (128,),
    256: (64,),
}


def form_of(problem: GpuProblem) -> str:
    if problem.groups == 1:
        return "column"
    return "sums" if problem.group_size >= TILE_K and problem.m <= SUMS_ROWS else "weights"


@functools.cache
def choose_plan(problem: GpuProblem, gpu: Gpu) -> GpuPlan:
    """The plan of the shortest modelled time."""
    return min(_plans(problem, gpu), key=lambda plan: modelled_seconds(problem, plan, gpu))


def modelled_seconds(problem: GpuProblem, plan: GpuPlan, gpu: Gpu) -> float:
    steps = math.ceil(math.ceil(problem.k / plan.tile_k) / plan.splits)
    blocks = math.ceil(problem.m / plan.tile_m) * math.ceil(problem.n / plan.columns) * plan.splits
    weights = plan.columns * plan.tile_k
    instructions = INSTRUCTIONS[plan.form][plan.strips - 1]
    if plan.form == "sums":
        instructions += INSTRUCTIONS_OF_A_SUM * (plan.tile_m - 16)
    rows = max(plan.tile_m, LEAST_ROWS_OF_TENSOR_CORE)
    busy = min(blocks, gpu.cores)
    x_bytes = 2 * plan.tile_m * plan.tile_k
    w_bytes = weights * (0.5 + problem.scale_bytes / min(problem.group_size, problem.k))
    step = max(
        instructions * weights / (LANES * gpu.clock),
        rows * weights / (MACS * TENSOR_SHARE * gpu.clock),
        busy * w_bytes / gpu.bandwidth / max(1, math.ceil(problem.m / plan.tile_m) / 2),
        busy * (w_bytes + x_bytes) / gpu.cache_bandwidth,
    )
    added = plan.splits * max(problem.m, ROWS[0]) * problem.n  # rows of a tile are written whole
    adding = ADDING + 8 * added / gpu.bandwidth if plan.splits > 1 else 0.0
    return math.ceil(blocks / gpu.cores) * (steps * step + FILLING) + adding


def shared_bytes(problem: GpuProblem, plan: GpuPlan) -> int:
    """Shared memory that a plan takes: the rings, the staged result, and barriers."""
    x = 2 * plan.tile_m * plan.tile_k
    codes = plan.columns * plan.tile_k // 2
    per_row = 0 if plan.form == "column" else problem.scale_bytes + 1
    scales = max(1, plan.tile_k // problem.group_size) * plan.columns * per_row
    staged = plan.columns * plan.tile_m * (4 if plan.splits > 1 else problem.out_bytes)
    return plan.stages * (x + codes + scales) + staged + 2048


def _spills(problem: GpuProblem, plan: GpuPlan) -> bool:
    """Found by compiling: two strips' totals and sums of 64 rows, with two groups' scales and zero points at a time."""
    return plan.form == "sums" and plan.strips == 2 and plan.tile_m == 64 and problem.group_size < plan.tile_k


def _plans(problem: GpuProblem, gpu: Gpu) -> Iterator[GpuPlan]:
    limit = next((rows for rows in ROWS if rows >= problem.m), ROWS[-1])
    wanted = [rows for rows in ROWS if rows == limit or 128 <= rows <= limit]
    for tile_m, splits in itertools.product(wanted, SPLITS):
        for tile_k, (warpgroups, strips) in itertools.product(DEPTHS[tile_m], WARPGROUPS[tile_m]):
            plan = GpuPlan(form_of(problem), tile_m, warpgroups, tile_k, MOST_STAGES, splits, strips)
            if (splits > 1 and 2 * splits * tile_k > problem.k) or _spills(problem, plan):
                continue
            while plan.stages > LEAST_STAGES and shared_bytes(problem, plan) > gpu.shared_memory:
                plan = dataclasses.replace(plan, stages=plan.stages - 1)
            if shared_bytes(problem, plan) <= gpu.shared_memory:
                yield plan
