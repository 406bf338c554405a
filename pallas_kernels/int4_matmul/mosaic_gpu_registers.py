"""Codes to floats in the registers of a warpgroup: what lies between a word of eight codes and wgmma's left operand.

A 16-bit float whose mantissa ends in the four bits of a code u is 128 + u in bf16 (0x4300 | u) and 1024 + u in f16
(0x6400 | u): no conversion, two codes at once, one lop3 on a shifted word. One subtraction makes the level exact,

    level = (128 + u) - (128 + zero_point)          8 where there are no zero points

so that zero points cost nothing beside symmetric weights. Three shifts, four lop3 and four subtractions unpack eight
codes: 1.4 instructions each (Kim et al., 2022; Frantar et al., 2024, whose weights are symmetric). To scale the weights
takes four multiplications more, and rounds them.

In Mosaic's words: a thread's registers for a tile [64, 64] in the layout WGMMA are an array of pairs whose axis 1
counts steps of 8 along K and whose axis 4 tells the rows 16 w + g from 16 w + g + 8; those of one value a row have an
axis for the two rows alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.int4_matmul.gpu_fragments import STRIP, TILE_K

BIAS = {jnp.dtype(jnp.bfloat16): 0x4300, jnp.dtype(jnp.float16): 0x6400}  # 128 and 1024: the bits above a code's
SYMMETRIC_ZERO = 8
WORDS_SHAPE = (2, 256)  # of a tile: the copy engine takes at most 256 elements along an axis
WORDS_LAYOUT = plgpu.Layout.WG_STRIDED(WORDS_SHAPE, vec_size=4)
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value for each of the 64 rows of a tile


def floats_of(dtype: Any, scales: int, zero_points: int) -> Callable[..., jax.Array]:
    """A function in a kernel: words i32[2, 256], scales and zero points [64] -> dtype[64, 64], transposed.

    Args:
      dtype: bfloat16 or float16, of the result.
      scales: how many scales (of `dtype`) follow, for equal parts of the tile's rows; 0 leaves levels.
      zero_points: how many zero points (i32) follow the scales, likewise; 0 is a symmetric weight.
    """
    result = plgpu.ShapeDtypeStruct((STRIP, TILE_K), dtype, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(WORDS_LAYOUT, *[ROW] * (scales + zero_points)), return_type=result)
    def convert(ctx: Any, words: Any, *rows: Any) -> Any:
        del ctx
        scale = [_pairs_of_rows(part) for part in rows[:scales]]
        zero = [_biased_pairs(part, BIAS[jnp.dtype(dtype)]) for part in rows[scales:]]
        return _fragments(words, scale, zero, jnp.dtype(dtype))

    return convert


def _fragments(words: Any, scale: list[Any], zero: list[Any], dtype: Any) -> Any:
    (four,) = words.registers.flat  # vector<4xi32>, one word a step of 16 rows
    registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((STRIP, TILE_K)), dtype=object)
    word = functools.cache(lambda step: vector.extract(four, [], [step]))
    symmetric = _constant((BIAS[dtype] + SYMMETRIC_ZERO) * 0x10001)
    for index in np.ndindex(registers.shape):
        (step, j), h = divmod(index[1], 2), index[4]
        biased = _biased_codes(word(step), h + 2 * j, BIAS[dtype])
        below = zero[step * len(zero) // 4][h] if zero else symmetric
        pair = arith.subf(_as_floats(biased, dtype), _as_floats(below, dtype))
        registers[index] = arith.mulf(pair, scale[step * len(scale) // 4][h]) if scale else pair
    return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def _biased_codes(word: Any, register: int, bias: int) -> Any:
    """i32: the two codes of a register in the mantissas of two floats. 0x6a is (a & b) ^ c."""
    shifted = arith.shrui(word, _constant(4 * register)) if register else word
    assembly = f"lop3.b32 $0, $1, 0x000F000F, {bias * 0x10001:#010x}, 0x6a;"
    return llvm.inline_asm(_i32(), [shifted], assembly, "=r,r")


def _pairs_of_rows(part: Any) -> list[Any]:
    """A scale a row as pairs of equal halves, for rows g and g + 8."""
    values = [vector.extract(register, [], [0]) for register in part.registers.flat]
    return [vector.broadcast(ir.VectorType.get((2,), value.type), value) for value in values]


def _biased_pairs(part: Any, bias: int) -> list[Any]:
    """A zero point i32 a row as i32 that hold bias | zero point twice."""
    values = [vector.extract(register, [], [0]) for register in part.registers.flat]
    twice = [arith.ori(value, arith.shli(value, _constant(16))) for value in values]
    return [arith.ori(value, _constant(bias * 0x10001)) for value in twice]


def _as_floats(word: Any, dtype: Any) -> Any:
    kind = ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get()
    return mgpu.utils.bitcast(word, ir.VectorType.get((2,), kind))


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _constant(value: int) -> Any:
    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), value - 2**32 if value >= 2**31 else value))
