"""One product by the Hopper kernel: its sizes, its plan, and random operands with the float64 result."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Fields of JSON: x[rows, k] by codes [k, n]; group_size 0 is one scale a column; plan None is the chosen one."""

    rows: int
    k: int
    n: int
    group_size: int = 128
    asymmetric: bool = False
    dtype: str = "bfloat16"
    scale_dtype: str = "bfloat16"
    plan: dict[str, Any] | None = None

    @property
    def group(self) -> int:
        return self.group_size or self.k

    @property
    def groups(self) -> int:
        return -(-self.k // self.group)

    @property
    def weights(self) -> int:
        return self.k * self.n


@dataclasses.dataclass(frozen=True)
class Operands:
    """The kernel's arguments in order, its result last (poisoned), and what it is to be."""

    arrays: list[np.ndarray]
    wanted: np.ndarray
    rows: int

    @property
    def result(self) -> np.ndarray:
        """f64[rows, n]: the splits of K added."""
        got = self.arrays[-1].astype(np.float64)
        return (got.sum(0) if got.ndim == 3 else got)[: self.rows]


def operands(case: Case, splits: int, seed: int = 0) -> Operands:
    """Random operands of a case, padded as mosaic_gpu.py pads them."""
    import jax.numpy as jnp

    from pallas_kernels.int4_matmul.gpu_fragments import to_fragments
    from pallas_kernels.int4_matmul.mosaic_gpu import COLUMN_MULTIPLE, ROW_MULTIPLE

    random = np.random.default_rng(seed)
    dtype, scales = jnp.dtype(case.dtype), jnp.dtype(case.scale_dtype)
    codes = random.integers(0, 16, (case.k, case.n)).astype(np.uint8)
    x = random.normal(size=(case.rows, case.k)).astype(dtype)
    scale = random.uniform(0.5, 1.5, (case.groups, case.n)) * random.choice([-1, 1], (case.groups, case.n))
    scale = scale.astype(scales)
    zero = random.integers(0, 16, (case.groups, case.n)).astype(np.uint8)
    levels = codes - (_spread(zero, case) if case.asymmetric else 8.0)
    wanted = x.astype(np.float64) @ (levels * _spread(scale, case))
    padded = np.pad(x, ((0, -case.rows % ROW_MULTIPLE), (0, -case.k % COLUMN_MULTIPLE)))
    shape = ((splits,) if splits > 1 else ()) + (len(padded), case.n)
    out = np.full(shape, np.nan, np.float32 if splits > 1 else dtype)
    words = np.asarray(to_fragments(jnp.asarray(codes)))
    return Operands([padded, words, scale, *([zero] if case.asymmetric else []), out], wanted, case.rows)


def _spread(values: np.ndarray, case: Case) -> np.ndarray:
    return np.repeat(values.astype(np.float64), case.group, 0)[: case.k]
