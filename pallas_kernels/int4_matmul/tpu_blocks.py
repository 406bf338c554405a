"""How a product is cut on a TPU: rows, depth and columns of a grid step, and the inner form.

Every plan that fits the chip's memory is modelled (tpu_model.py) and the shortest one is taken, unless tuned.json has
one for these sizes (tpu_tuned.py). What follows, chip by chip (see tpu_forms.py for the forms):

    v4      decode: magic, bound by its pushes of 1024 weights (others push 2048); prefill: shifted. Its compiler
            unpacks int4 through memory, 3 to 6 times slower than the MXU, so no other form is considered
    v5e/v5p decode: direct where HBM hides it (v5e), else magic; of groups of 32 direct; 128 rows: direct, in blocks as
            deep as they can be, which the MXU all but hides; prefill: wscale, whose unpacking to f32 it hides then
    v6e     decode: direct, one unpacking instruction and no slack, or wscale for groups of 32 and 64; prefill: wscale
    tpu7x   the same; bound by the vector unit at decode where groups are short, as 3.7 TB/s a core outrun it

Whole numbers (rounded activations) go by int8 on v5e, v5p and v6e where groups are long enough for it to be faster.
Where forms are within a twentieth of each other, an exact one (direct, magic) goes before those that round weights.

Blocks are large: a step costs some 200 bundles whatever it does, so that 4 Mi codes a step are 5 to 10 % faster than 2
Mi (v5p, 16 rows, magic: 2339 bundles against twice 1302); and their scales fill registers. At prefill the block of
weights is unpacked once for 512 or 1024 rows of x, and is as deep as VMEM allows, for the f32 sums are read and written
once a step. (On v5p, where a layer is read in place in small blocks alone, 256 rows allow twice the depth, and the MXU
hides that weights are unpacked twice as often: at 512 x 4096 x 14336 131.3 us instead of 139.1, of which the MXU needs
131.0; layers of more than LARGE_LAYER are copied out of their stack then.) Keeping the unpacked block in VMEM of its
own changes nothing: the compiler schedules the same bundles.
`shifted` holds rows that stay once and not twice, which makes room for twice the columns: 2048 x 4096 x 28672 1769 us
instead of 1845 (v4), of which the MXU needs 1749.
"""

import functools
from collections.abc import Iterator

from pallas_kernels.int4_matmul.tpu_chips import Chip
from pallas_kernels.int4_matmul.tpu_forms import LANES
from pallas_kernels.int4_matmul.tpu_model import counted, reads_in_place, seconds, vmem_of
from pallas_kernels.int4_matmul.tpu_plan import EXACT, Plan, Problem, in_rows_held_once
from pallas_kernels.int4_matmul.tpu_tuned import tuned_plan

BLOCKS_N = (2048, 1024, 512, 256, 128)
LARGEST_WIDTH = 2048
MOST_CODES = 2**22  # of a block: 2 MiB
LEAST_CODES = 2**21  # of a block at decode, where there are so many: 1 MiB
DECODE_ROWS = 64
UNROLLED_GROUPS = (64, 16)  # of a block, for few rows and for many: more of them compile slowly
MANY_ROWS = {"direct": 256, "magic": 128, "integer": 128}  # from which on a form has many
MANY_ROWS_OF_TABLES = 128


@functools.lru_cache(maxsize=4096)
def find_plan(
    problem: Problem, chip: Chip, exact: bool = False, integers: bool = False, resident: bool = False
) -> Plan | None:
    """The plan of tuned.json, or the one of the shortest modelled time, that fits the chip's memory.

    `exact` leaves out the forms that round weights; `integers` lets in the one for whole numbers;
    `resident` asks for plans that keep the rows of x.
    """
    if not (integers or resident) and (plan := tuned_plan(problem, chip, exact)):
        return plan
    plans = ranked(problem, chip, exact, integers, resident)
    return plans[0] if plans else None


def ranked(problem: Problem, chip: Chip, exact: bool, integers: bool, resident: bool) -> list[Plan]:
    """The plans that fit, the fastest first."""
    plans = fitting(problem, chip, exact, integers, resident)
    if problem.m <= DECODE_ROWS:
        least = LEAST_CODES * 4 // problem.bits
        plans = [plan for plan in plans if plan.block_k * plan.block_n >= least] or plans
    return sorted(plans, key=lambda plan: seconds(problem, plan, chip) * (1.0 if plan.form in EXACT else 1.05))


def fitting(problem: Problem, chip: Chip, exact: bool, integers: bool, resident: bool) -> list[Plan]:
    """The plans that fit the chip's memory, with small blocks where there are such."""
    plans = [plan for plan in candidates(problem, chip, exact, integers) if plan.resident or not resident]
    plans = plans if resident else [in_rows_held_once(plan) for plan in plans]
    plans = [plan for plan in plans if vmem_of(problem, plan, chip) <= chip.vmem]
    return [plan for plan in plans if reads_in_place(problem, plan, chip)] or plans


def candidates(problem: Problem, chip: Chip, exact: bool, integers: bool) -> Iterator[Plan]:
    known = counted(chip.name, problem.number)
    forms = [form for form in known if (form in EXACT or not exact) and (form != "integer" or integers)]
    rows = sorted({problem.m, 256, 512, 1024}) if problem.m > 256 else [problem.m]
    most = MOST_CODES * 4 // problem.bits
    for form in forms:
        wide = form == "wscale" and not chip.bf16_vector
        for block_m in (m for m in rows if m <= min(problem.m, 1024)):
            for block_k in depths(problem):
                for block_n in widths(problem):
                    if block_k * block_n <= most or block_k == min(depths(problem)):
                        for chunk in chunks(problem, form, block_m, block_k, chip):
                            for resident in (True, False):
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
    """Columns of a block: powers of two, and equal parts of N of the larger ones' size."""
    if problem.n < LANES:
        return [problem.n]
    parts = range(4 * LANES, LARGEST_WIDTH + 1, LANES)
    equal = [width for width in parts if problem.n % width == 0]
    return sorted({*equal, *(width for width in BLOCKS_N if width <= -(-problem.n // LANES) * LANES)})


def chunks(problem: Problem, form: str, block_m: int, block_k: int, chip: Chip) -> list[int]:
    """Rows of codes to unpack at a time, divisors of block_k: as many as compile quickly, or fewer in less memory."""
    group = block_k if problem.groups == 1 else problem.group_size
    if form not in EXACT:
        most = [block_k, 2048 if chip.bf16_vector else 512]
    elif block_m < (MANY_ROWS_OF_TABLES if problem.number == "table" else MANY_ROWS[form]):
        most = [UNROLLED_GROUPS[0] * group]
    else:
        most = [UNROLLED_GROUPS[1] * group, problem.unit]
    units = max(1, block_k // problem.unit)
    parts = [part for part in range(1, units + 1) if units % part == 0]
    fitting = [max([part for part in parts if part * problem.unit <= rows], default=1) for rows in most]
    return sorted({min(block_k, part * problem.unit) for part in fitting})
