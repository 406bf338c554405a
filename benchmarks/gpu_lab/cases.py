"""One product by a kernel: its sizes, its plan, the GPU, and random operands with the float64 result."""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.aot import DEVICE_KINDS
from pallas_kernels.grouped_int4_matmul.work_items import place_of_rows, work_items
from pallas_kernels.int4_matmul import gpu_blocks, gpu_blocks_mma
from pallas_kernels.int4_matmul.gpu_blocks import GpuProblem
from pallas_kernels.int4_matmul.gpu_chips import AMPERE, KNOWN, Gpu, gpu_named
from pallas_kernels.int4_matmul.gpu_fragments import in_order_of_bytes, padded_length, to_fragments
from pallas_kernels.int4_matmul.mosaic_gpu import COLUMN_MULTIPLE, ROW_MULTIPLE
from pallas_kernels.int4_matmul.mosaic_gpu_transposed import LEAST_COLUMNS


@dataclasses.dataclass(frozen=True)
class Case:
    """Fields of JSON: x[rows, k] by codes [k, n], or by those of several experts, of whom some have no rows.

    group_size 0 is one scale a column, experts 0 one weight, plan None the chosen plan.
    """

    rows: int
    k: int
    n: int
    group_size: int = 128
    asymmetric: bool = False
    dtype: str = "bfloat16"
    scale_dtype: str = "bfloat16"
    plan: dict[str, Any] | None = None
    experts: int = 0
    bits: int = 4
    fits: str = ""  # x is numbers of this dtype, int8 or float8_e4m3fn, and multiplied in it
    transposed: bool = False  # x is dy[rows, n], by the codes' transpose
    device: str = "h200"  # what it is compiled for

    @property
    def gpu(self) -> Gpu:
        found = gpu_named(DEVICE_KINDS[self.device], KNOWN)
        assert found is not None
        return found

    @property
    def model(self) -> Any:
        """What chooses its plan and tells the time it takes."""
        return gpu_blocks_mma if self.gpu in AMPERE else gpu_blocks

    @property
    def group(self) -> int:
        return self.group_size or self.k

    @property
    def groups(self) -> int:
        return -(-self.k // self.group)

    @property
    def problem(self) -> GpuProblem:
        k, n = (self.n, padded_length(self.k)) if self.transposed else (self.k, self.n)
        return GpuProblem(
            self.rows, k, n, self.groups, self.group, np.dtype(self.scale_dtype).itemsize,
            bits=self.bits, fits=self.fits, experts=self.experts, transposed=self.transposed,
        )  # fmt: skip

    @property
    def weights(self) -> int:
        """Of one matrix."""
        return self.k * self.n

    @property
    def nbytes(self) -> int:
        """Read and written at least; of experts, as many as there are rows for."""
        packed = self.weights * (self.bits / 8 + np.dtype(self.scale_dtype).itemsize / self.group)
        return round(self.problem.matrices * packed) + 2 * self.rows * (self.k + self.n)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes of the weight."""
        return (self.experts,) if self.experts else ()


@dataclasses.dataclass(frozen=True)
class Operands:
    """The kernel's arguments in order, its result last (poisoned), what a part of it is to be, and which rows."""

    arrays: list[np.ndarray]
    wanted: np.ndarray
    place: np.ndarray

    @property
    def result(self) -> np.ndarray:
        """f64[rows, n]: the splits of K added."""
        got = self.arrays[-1].astype(np.float64)
        return (got.sum(0) if got.ndim == 3 else got)[self.place, : self.wanted.shape[1]]


def operands(case: Case, plan: dict[str, Any], seed: int = 0) -> Operands:
    """Random operands of a case, as the kernel is given them."""
    random = np.random.default_rng(seed)
    weight, dense = _weight(case, random)
    x = _rows(case, random)
    sizes, splits, tile_m = group_sizes(case, random), plan["splits"], plan["tile_m"]
    items, place = _items(sizes, case.rows, tile_m)
    padded = _padded(x, case, tile_m if case.gpu in AMPERE else ROW_MULTIPLE)
    width = padded_length(case.k) if case.transposed else case.n
    shape = (splits,) * (splits > 1) + (len(items[0]) * tile_m if items else len(padded), width)
    out = np.full(shape, np.nan, np.float32 if splits > 1 else np.dtype(case.dtype))
    wanted = wanted_product(x[: len(place)], np.swapaxes(dense, -1, -2) if case.transposed else dense, sizes)
    return Operands([*items, padded, *weight, out], wanted, place)


def _weight(case: Case, random: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """(words, scales and zero points; f64[*lead, k, n])."""
    levels, of_groups = 2**case.bits, (*case.lead, case.groups, case.n)
    codes = random.integers(0, levels, (*case.lead, case.k, case.n)).astype(np.uint8)
    scale = random.uniform(0.5, 1.5, of_groups) * random.choice([-1, 1], of_groups)
    scale = scale.astype(np.dtype(case.scale_dtype))
    zero = random.integers(0, levels, of_groups).astype(np.uint8)
    words = np.asarray(to_fragments(codes, case.bits))
    centered = codes - (spread_over_groups(zero, case) if case.asymmetric else levels / 2)
    return [words, scale, *[zero] * case.asymmetric], centered * spread_over_groups(scale, case)


def _rows(case: Case, random: np.random.Generator) -> np.ndarray:
    """x, or dy of a product by the transpose."""
    if case.fits:
        return numbers_that_fit(case.fits, (case.rows, case.k), random)
    return random.normal(size=(case.rows, case.n if case.transposed else case.k)).astype(np.dtype(case.dtype))


def numbers_that_fit(fits: str, size: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """int8, or e4m3 as jq4.activations makes it: each row's largest is 448."""
    if fits == "int8":
        return random.integers(-127, 128, size).astype(np.int8)
    x = random.normal(size=size)
    return (x / np.abs(x).max(-1, keepdims=True) * 448).astype(ml_dtypes.float8_e4m3fn)


def _padded(x: np.ndarray, case: Case, rows: int) -> np.ndarray:
    """As mosaic_gpu.py pads and orders them: a multiple of `rows`."""
    missing = max(0, LEAST_COLUMNS - case.n) if case.transposed else -case.k % COLUMN_MULTIPLE
    padded = np.pad(x, ((0, -case.rows % rows), (0, missing)))
    return np.array(in_order_of_bytes(padded)) if case.fits else padded


def group_sizes(case: Case, random: np.random.Generator) -> np.ndarray | None:
    """i32[experts]: rows of each, most of the rows in all; of every three experts the second has none."""
    if not case.experts:
        return None
    share = random.uniform(0.1, 1.0, case.experts) * (np.arange(case.experts) % 3 != 1)
    return np.floor(share / share.sum() * case.rows).astype(np.int32)


def _items(sizes: np.ndarray | None, rows: int, tile_m: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The kernel's arguments that tell the work items, and where in its result the rows that have an expert are."""
    if sizes is None:
        return [], np.arange(rows)
    items = work_items(sizes, rows, tile_m)
    place = np.asarray(place_of_rows(sizes, rows, tile_m))[: sizes.sum()]
    return [np.array(part) for part in (items.tile, items.expert, items.used)], place


def wanted_product(x: np.ndarray, weight: np.ndarray, sizes: np.ndarray | None) -> np.ndarray:
    """f64: rows by their weight, rows of experts in turn."""
    x = x.astype(np.float64)
    if sizes is None:
        return x @ weight
    parts = np.split(x, np.cumsum(sizes)[:-1])
    return np.concatenate([part @ own for part, own in zip(parts, weight, strict=True)])


def spread_over_groups(values: np.ndarray, case: Case) -> np.ndarray:
    """f64[*lead, k, n] of values [*lead, groups, n]."""
    return np.repeat(values.astype(np.float64), case.group, -2)[..., : case.k, :]
