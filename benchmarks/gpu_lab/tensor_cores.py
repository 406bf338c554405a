"""Which thread holds which element of wgmma's operands: PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16",
and k32 for bytes; and of mma's, "Matrix Fragments for mma.m16n8k16": a warp's left operand and sums are as a warp's of
wgmma, the right operand is in registers too."""

from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.gpu_lab.memory import THREADS


def element_type(kind: str) -> Any:
    return {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "s8": np.int8, "e4m3": ml_dtypes.float8_e4m3fn}[kind]


FIXED_BITS = 14  # of a sum of products of e4m3
_THREAD = np.arange(THREADS)
_ROW = 16 * (_THREAD // 32) + _THREAD % 32 // 4
_COLUMN = 2 * (_THREAD % 4)


def left_fragments(registers: np.ndarray, kind: str) -> np.ndarray:
    """f64[64, 16], or [64, 32] of bytes, of four registers u32[128, 4]."""
    held = np.ascontiguousarray(registers).view(element_type(kind)).reshape(THREADS, 4, -1)
    width = held.shape[-1]  # elements of a register
    matrix = np.empty((64, 8 * width))
    for register in range(4):
        for i in range(width):
            column = _COLUMN * width // 2 + i + 4 * width * (register // 2)
            matrix[_ROW + 8 * (register % 2), column] = held[:, register, i].astype(np.float64)
    return matrix


def right_fragments(registers: np.ndarray, kind: str) -> np.ndarray:
    """f64[warps, 16, 8] of mma's two registers u32[128, 2]."""
    held = np.ascontiguousarray(registers).view(element_type(kind)).reshape(THREADS, 2, 2).astype(np.float64)
    matrix = np.empty((THREADS // 32, 16, 8))
    for register, half in np.ndindex(2, 2):
        matrix[_THREAD // 32, _COLUMN + 8 * register + half, _THREAD % 32 // 4] = held[:, register, half]
    return matrix


def summed_in_fixed_point(sums: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """f32[64, n] of sums[64, n] + left[64, k] right[n, k]^T as Hopper adds up products of e4m3.

    What is known was found by measuring (DeepSeek-V3 Technical Report, 2024, section 3.5.2): products are shifted to
    the largest of them, and what lies below its highest FIXED_BITS bits is cut off. Here the sum before takes part.
    """
    products = np.concatenate([sums.astype(np.float64)[..., None], left[:, None] * right], -1)  # [64, n, 1 + k]
    largest = np.max(np.abs(products), -1, keepdims=True)
    unit = np.exp2(np.frexp(largest)[1] - FIXED_BITS)
    return (np.floor(products / unit) * unit).sum(-1).astype(np.float32)


def _places(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of the sums in each thread's registers, [128, count]."""
    i = np.arange(count)
    return _ROW[:, None] + 8 * (i % 4 // 2), _COLUMN[:, None] + 8 * (i // 4) + i % 2


def sums_of(registers: np.ndarray) -> np.ndarray:
    matrix = np.empty((64, 2 * registers.shape[1]), registers.dtype)
    matrix[_places(registers.shape[1])] = registers
    return matrix


def registers_of(matrix: np.ndarray) -> np.ndarray:
    return matrix[_places(matrix.shape[1] // 2)]
