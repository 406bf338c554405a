"""Codes to floats in the registers of a warpgroup: what lies between words of codes and wgmma's left operand.

A 16-bit float whose mantissa ends in the bits of a code u is 128 + u in bf16 (0x4300 | u, of 4 bits) and 1024 + u in
f16 (0x6400 | u): no conversion, two codes at once, one lop3 on a shifted word. One subtraction makes the level exact,

    level = (128 + u) - (128 + zero_point)          8 where there are no zero points

so that zero points cost nothing beside symmetric weights. Three shifts, four lop3 and four subtractions unpack eight
codes: 1.4 instructions each (Kim et al., 2022; Frantar et al., 2024, whose weights are symmetric). To scale the weights
takes four multiplications more, and rounds them.

Codes of 8 bits fit f16 likewise. The mantissa of bf16 has seven bits; the eighth chooses what is subtracted,

    level = (128 + (u & 127)) - (u < 128 ? 256 : 128) = u - 128         256 and 128 differ in the bit that 128 is in u

a second lop3 instead of the conversion to f32 and back that is usual: 1.75 instructions each. Zero points there are
z - 128 in bf16, which is exact, and one more subtraction.

A thread's registers for a tile [64, 64] are sixteen pairs, register h + 2 j of step s at 4 s + 2 j + h in the order of
Mosaic's array of them; those of one value a row are two, for the rows 16 w + g and 16 w + g + 8.
"""

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
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value for each of the 64 rows of a tile
REGISTERS = 16  # of a thread, for a tile
AND_XOR, AND_OR = 0x6A, 0xEA  # of lop3: (a & b) ^ c, (a & b) | c


def words_shape(bits: int) -> tuple[int, int]:
    """Of a tile: the copy engine takes at most 256 elements along an axis."""
    return bits // 2, 256


def words_layout(bits: int) -> Any:
    return plgpu.Layout.WG_STRIDED(words_shape(bits), vec_size=4)


def floats_of(
    dtype: Any, bits: int, scales: int, zero_points: int, *, words_in: Any = None, result_in: Any = plgpu.Layout.WGMMA
) -> Callable[..., jax.Array]:
    """A function in a kernel: words, scales, zero points [64] -> dtype[64, 64], transposed.

    Args:
      dtype: bfloat16 or float16, of the result.
      bits: 4 or 8, of a code.
      scales: how many scales (of `dtype`) follow, for equal parts of the tile's rows; 0 leaves levels.
      zero_points: how many zero points (see `zero_points_of`) follow the scales, likewise; 0 is a symmetric weight.
      words_in: the layout of the words, in which a thread holds its own; None is that of i32[bits / 2, 256].
      result_in: the layout of the result, whose registers are those of wgmma's left operand, in their order.
    """
    dtype = jnp.dtype(dtype)
    pair_of = _centered_pair if _is_wide(dtype, bits) else _biased_pair

    @plgpu.inline_mgpu(
        arg_types=(words_in or words_layout(bits), *[ROW] * (scales + zero_points)),
        return_type=plgpu.ShapeDtypeStruct((STRIP, TILE_K), dtype, layout=result_in),
    )
    def convert(ctx: Any, words: Any, *rows: Any) -> Any:
        del ctx
        scale, zero = [[_by_half(part) for part in some] for some in (rows[:scales], rows[scales:])]
        layout = result_in.to_mgpu()
        registers = np.empty(REGISTERS, dtype=object)
        for at, shifted in enumerate(shifted_words(words, bits)):
            step, h = at // 4, at % 2
            below = zero[step * len(zero) // 4][h] if zero else None
            pair = pair_of(shifted, below, dtype, bits)
            registers[at] = arith.mulf(pair, _twice(scale[step * len(scale) // 4][h])) if scale else pair
        shape = layout.registers_shape((STRIP, TILE_K))
        return mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)

    return convert


def zero_points_of(row: jax.Array, dtype: Any, bits: int) -> jax.Array:
    """u8[64] as the function of `floats_of` takes it: i32, or z - 128 in bf16 for codes wider than its mantissa."""
    numbers = row.astype(jnp.int32)
    return (numbers.astype(jnp.float32) - 128.0).astype(dtype) if _is_wide(jnp.dtype(dtype), bits) else numbers


def shifted_words(words: Any, bits: int) -> list[Any]:
    """i32 of a thread's 16 registers, of register h + 2 j of step s that at 4 s + h + 2 j: codes in the low bits."""
    held = [vector.extract(four, [], [i]) for four in words.registers.flat for i in range(4)]
    per_word = 16 // bits  # registers
    return [
        arith.shrui(held[at // per_word], constant(bits * (at % per_word))) if at % per_word else held[at // per_word]
        for at in range(16)
    ]


def _is_wide(dtype: Any, bits: int) -> bool:
    return bits == 8 and dtype == jnp.bfloat16


def _biased_pair(word: Any, zero: Any, dtype: Any, bits: int) -> Any:
    """Two levels, by a bias: (bias + u) - (bias + zero)."""
    bias, mask = BIAS[dtype] * 0x10001, (2**bits - 1) * 0x10001
    below = constant(bias + 2 ** (bits - 1) * 0x10001) if zero is None else _biased_twice(zero, bias)
    return arith.subf(_as_floats(lop3(word, mask, bias, AND_XOR), dtype), _as_floats(below, dtype))


def _centered_pair(word: Any, zero: Any, dtype: Any, bits: int) -> Any:
    """Two levels of 8 bits in bf16: u - 128, from seven bits and the eighth; less z - 128."""
    del bits
    low, below = lop3(word, 0x007F007F, 0x43004300, AND_OR), lop3(word, 0x00800080, 0x43804380, AND_XOR)
    pair = arith.subf(_as_floats(low, dtype), _as_floats(below, dtype))
    return pair if zero is None else arith.subf(pair, _twice(zero))


def _by_half(part: Any) -> list[Any]:
    """A value a row, for rows g and g + 8."""
    return [vector.extract(register, [], [0]) for register in part.registers.flat]


def _twice(value: Any) -> Any:
    return vector.broadcast(ir.VectorType.get((2,), value.type), value)


def _biased_twice(zero: Any, bias: int) -> Any:
    """i32 that holds bias | zero twice."""
    return arith.ori(arith.ori(zero, arith.shli(zero, constant(16))), constant(bias))


def lop3(word: Any, mask: int, other: int, table: int) -> Any:
    """i32: one instruction of three operands."""
    assembly = f"lop3.b32 $0, $1, {mask:#010x}, {other:#010x}, {table:#04x};"
    return llvm.inline_asm(i32(), [word], assembly, "=r,r")


def _as_floats(word: Any, dtype: Any) -> Any:
    kind = ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get()
    return mgpu.utils.bitcast(word, ir.VectorType.get((2,), kind))


def i32() -> Any:
    return ir.IntegerType.get_signless(32)


def constant(value: int) -> Any:
    return arith.constant(i32(), ir.IntegerAttr.get(i32(), value - 2**32 if value >= 2**31 else value))
