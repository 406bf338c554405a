"""How a product is cut on a TPU: rows, depth and columns of a grid step, and the inner form. (To grow a model.)"""

import dataclasses
import math

from pallas_kernels.int4_matmul.tpu_chips import Chip


@dataclasses.dataclass(frozen=True)
class Problem:
    """One product: x[m, k] by codes [k, n] in `groups` groups of `group_size`."""

    m: int
    k: int
    n: int
    groups: int
    group_size: int
    zero_points: bool = False
    offsets: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a product is cut.

    Attributes:
      form: "direct", "magic" or "wscale" of tpu_forms.py.
      block_m, block_k, block_n: of a grid step. block_k is whole groups, or an equal part of one.
      resident: whether the rows of x stay in VMEM over the whole of K.
      vmem_limit: bytes that the compiler may use.
    """

    form: str
    block_m: int
    block_k: int
    block_n: int
    resident: bool = False
    vmem_limit: int | None = None


def choose_plan(problem: Problem, chip: Chip, exact: bool = False) -> Plan:
    m, k, n = problem.m, problem.k, problem.n
    one = problem.groups == 1
    group = 128 if one else problem.group_size
    block_n = n if n < 128 else min(1024, -(-n // 128) * 128)
    unit = math.lcm(group, 128)
    block_k = max(2048 // unit, 1) * unit
    block_k = min(-(-k // unit) * unit, block_k)
    form = "direct" if m <= 64 or exact else "wscale"
    return Plan(form, min(m, 512), block_k, block_n, m <= 64, chip.vmem)
