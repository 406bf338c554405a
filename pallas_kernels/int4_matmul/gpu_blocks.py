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
    x of int8                   "sums" whatever the rows, of blocks of at most 128, as scaled weights are no integers
    x of float8_e4m3fn          "sums" likewise, for one scale a column too, as its sums in the tensor core are short
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from pallas_kernels.int4_matmul.gpu_chips import LANES, Gpu
from pallas_kernels.int4_matmul.gpu_fragments import STRIP, TILE_K


@dataclasses.dataclass(frozen=True)
class GpuProblem:
    """One product: x[m, k] by codes [k, n] in `groups` groups of `group_size`, or by those of `experts`, ragged."""

    m: int
    k: int
    n: int
    groups: int
    group_size: int
    scale_bytes: int = 2
    out_bytes: int = 2
    bits: int = 4
    fits: str = ""  # "int8" or "float8_e4m3fn": what x is multiplied in; "" is a float of 16 bits
    transposed: bool = False  # by codes [n, k], grouped along n, which are stored as those of a product by [k, n] are
    experts: int = 0

    @property
    def x_bytes(self) -> int:
        return 1 if self.fits else 2

    @property
    def matrices(self) -> int:
        """How many are read, at most."""
        return min(self.m, self.experts) or 1

    @property
    def rows_of_weight(self) -> int:
        """Rows of x that a weight is multiplied by, on average where there are experts."""
        return -(-self.m // max(1, self.experts))

    def row_blocks(self, tile_m: int) -> int:
        """Blocks along the rows of x; of experts, as many as there may be."""
        return min(self.m, -(-self.m // tile_m) + max(0, self.experts - 1))


@dataclasses.dataclass(frozen=True)
class GpuPlan:
    """How a product is cut.

    Attributes:
      form: "sums", "weights" or "column" of mosaic_gpu_forms.py, or "transposed".
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
# Of a thread, a weight, by strips of a warpgroup; of codes of 4 and 8 bits (for 4, f16 takes a quarter more than bf16)
# and, where x is int8, of either; by e4m3.
INSTRUCTIONS = {"column": (2.0, 1.65), "sums": (2.15, 1.85), "weights": (2.65, 2.25)}
INSTRUCTIONS_OF_WIDE = {"column": (2.3, 1.8), "sums": (2.6, 2.15), "weights": (3.2, 2.6)}
INSTRUCTIONS_OF_INTEGERS = {"column": (1.3, 1.0), "sums": (1.6, 1.2)}
INSTRUCTIONS_OF_E4M3 = {"sums": (1.9, 1.65)}
INSTRUCTIONS_OF_TRANSPOSED = {4: 3.4, 8: 3.3}  # by bits
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
TRANSPOSED, DEPTH_OF_TRANSPOSED = (2, 1), 128  # an even number of tiles: their places in shared memory take turns
DEPTHS: dict[int, tuple[int, ...]] = {
    8: (256, 128),
    16: (256, 128),
    32: (256, 128),
    64: (128,),
    128: (128,),
    256: (64,),
}


def form_of(problem: GpuProblem) -> str:
    if problem.transposed:
        return "transposed"
    if problem.groups == 1 and problem.fits != "float8_e4m3fn":
        return "column"
    if problem.fits:
        return "sums"
    return "sums" if problem.group_size >= TILE_K and problem.rows_of_weight <= SUMS_ROWS else "weights"


@functools.cache
def choose_plan(problem: GpuProblem, gpu: Gpu) -> GpuPlan:
    """The plan of the shortest modelled time."""
    return min(_plans(problem, gpu), key=lambda plan: modelled_seconds(problem, plan, gpu))


def modelled_seconds(problem: GpuProblem, plan: GpuPlan, gpu: Gpu) -> float:
    steps = math.ceil(math.ceil(problem.k / plan.tile_k) / plan.splits)
    row_blocks = problem.row_blocks(plan.tile_m)
    blocks = row_blocks * math.ceil(problem.n / plan.columns) * plan.splits
    weights = plan.columns * plan.tile_k
    instructions = _instructions(problem, plan)
    rows = max(plan.tile_m, LEAST_ROWS_OF_TENSOR_CORE)
    busy = min(blocks, gpu.cores)
    x_bytes = problem.x_bytes * plan.tile_m * plan.tile_k
    w_bytes = weights * (problem.bits / 8 + problem.scale_bytes / min(problem.group_size, problem.k))
    step = max(
        instructions * weights / (LANES * gpu.clock),
        rows * weights * problem.x_bytes / (2 * gpu.macs * TENSOR_SHARE * gpu.clock),
        busy * w_bytes / gpu.bandwidth / max(1, row_blocks / problem.matrices / 2),
        busy * (w_bytes + x_bytes) / gpu.cache_bandwidth,
    )
    rows_out = row_blocks * plan.tile_m if problem.experts else max(problem.m, ROWS[0])  # at least a tile's eight
    added = plan.splits * rows_out * problem.n
    adding = ADDING + 8 * added / gpu.bandwidth if plan.splits > 1 else 0.0
    return math.ceil(blocks / gpu.cores) * (steps * step + FILLING) + adding


def _instructions(problem: GpuProblem, plan: GpuPlan) -> float:
    """Of a thread, a weight; of each sum of more than 16 rows one more a group, or two where it must become a float."""
    if problem.transposed:
        return INSTRUCTIONS_OF_TRANSPOSED[problem.bits]
    of_floats = INSTRUCTIONS_OF_WIDE if problem.bits == 8 else INSTRUCTIONS
    table = {"int8": INSTRUCTIONS_OF_INTEGERS, "float8_e4m3fn": INSTRUCTIONS_OF_E4M3}.get(problem.fits, of_floats)
    of_a_sum = (2 if problem.fits == "int8" else 1) / min(problem.group_size, plan.tile_k)
    return table[plan.form][plan.strips - 1] + (of_a_sum * (plan.tile_m - 16) if plan.form == "sums" else 0.0)


def shared_bytes(problem: GpuProblem, plan: GpuPlan) -> int:
    """Shared memory that a plan takes: the rings, the staged result, and barriers."""
    x = problem.x_bytes * plan.tile_m * plan.tile_k
    codes = plan.columns * plan.tile_k * problem.bits // 8
    per_row = 0 if problem.groups == 1 and not problem.transposed else problem.scale_bytes + 1
    scales = max(1, plan.tile_k // problem.group_size) * plan.columns * per_row
    staged = plan.columns * plan.tile_m * (4 if plan.splits > 1 else problem.out_bytes)
    dense = 2 * 2 * STRIP * plan.columns if plan.form == "transposed" else 0
    return plan.stages * (x + codes + scales) + staged + dense + 2048


def in_whole_groups(problem: GpuProblem, tile_k: int) -> bool:
    """Whether a step has whole groups, or a group whole steps: groups of 384 rows have no steps of 256."""
    more, fewer = max(problem.group_size, tile_k), min(problem.group_size, tile_k)
    return problem.groups == 1 or more % fewer == 0


def _spills(problem: GpuProblem, plan: GpuPlan) -> bool:
    """Found by compiling: two strips' totals and sums of 64 rows, with two groups' scales and zero points at a time.

    And what needs no compiler: totals and sums of more rows in all than a thread has registers for.
    """
    rows = plan.strips * plan.tile_m
    many = plan.strips == 2 and plan.tile_m == 64 and problem.group_size < plan.tile_k
    return plan.form == "sums" and (many or rows > 128)


def _plans(problem: GpuProblem, gpu: Gpu) -> Iterator[GpuPlan]:
    limit = next((rows for rows in ROWS if rows >= problem.rows_of_weight), ROWS[-1])
    wanted = [rows for rows in ROWS if rows == limit or 128 <= rows <= limit]
    for tile_m, splits in itertools.product(wanted, SPLITS):
        shapes, depths = WARPGROUPS[tile_m], DEPTHS[tile_m]
        if problem.transposed:
            shapes, depths = (TRANSPOSED,), (DEPTH_OF_TRANSPOSED,)
        for tile_k, (warpgroups, strips) in itertools.product(depths, shapes):
            plan = GpuPlan(form_of(problem), tile_m, warpgroups, tile_k, MOST_STAGES, splits, strips)
            if (splits > 1 and 2 * splits * tile_k > problem.k) or _spills(problem, plan):
                continue
            if not problem.transposed and not in_whole_groups(problem, tile_k):
                continue
            while plan.stages > LEAST_STAGES and shared_bytes(problem, plan) > gpu.shared_memory:
                plan = dataclasses.replace(plan, stages=plan.stages - 1)
            if shared_bytes(problem, plan) <= gpu.shared_memory:
                yield plan
