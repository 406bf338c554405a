"""What a TPU kernel is asked for, and how it does it: the two records that the choice of blocks is made of."""

import dataclasses
import math

from pallas_kernels.int4_matmul.tpu_forms import LANES

SUBLANES = 8
EXACT = ("direct", "magic", "integer")  # forms that round no weights


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
    out_bytes: int = 4  # of a result

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
      form: "direct", "magic", "integer", "wscale" or "shifted" of tpu_forms.py.
      block_m, block_k, block_n: of a grid step. block_k is a multiple of LANES and of whole groups, or of a group an
        equal part.
      resident: whether the rows of x stay in VMEM over the whole of K and N.
      once: whether resident rows are there once and not twice: to wait for the next ones costs less than larger blocks
        of codes save (by their bytes 7 of 900 us for 512 rows of 4096 on v4).
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
    once: bool = False

    @property
    def loops(self) -> bool:
        return self.chunk < self.block_k


def in_rows_held_once(plan: Plan) -> Plan:
    """A plan of one product: resident rows are there once where that makes room. (Those of experts are sorted, and the
    next ones soon wanted.)"""
    return dataclasses.replace(plan, once=plan.resident and plan.form == "shifted")


def reads_flat_scales(groups: int, group_size: int, plan: Plan) -> bool:
    """Whether blocks hold registers full of rows of scales, so that the kernel reads them as [G, N].

    That is how XLA lays [G, 1, N] in memory. Single rows have to be addressed in [G, 1, N] itself, padded to registers,
    for which XLA rewrites the scales before every call: 21 us beside the kernel's 75 (v5p, 16 x 8192 x 28672, g32).
    """
    rows = min(plan.chunk, plan.block_k) // group_size
    return groups > 1 and rows > 0 and rows % SUBLANES == 0
