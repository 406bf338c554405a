"""Codes to floats in the registers of a warpgroup: what lies between words of codes and wgmma's left operand.

No code is converted: its bits are made those of a float, two codes at once, and one instruction makes a level of it.

bf16. The lowest eight bits, a mantissa and the last bit of an exponent, are a whole number v when no other is set:
v * 2^-133, up to 127 as a subnormal number and from there on as the first normal ones. One multiply-add takes a level
from it, and where codes have four bits, every second one is left where it is, four bits higher, as v = 16 u:

    level * 2^-6 = v * 2^127 - origin * 2^-6                v = u           origin: 8 or 128, or the zero point
                 = v * 2^123 - origin * 2^-6                v = 16 u

(2^127 is the largest power of two; sums are multiplied by 2^6 at the end, `factor_of_floats`.) Every step is exact, and
zero points cost nothing beside symmetric weights. Eight codes of 4 bits take one shift, four ands and four
multiply-adds, 1.1 instructions each, where the usual bias (below) takes two shifts more; of 8 bits 1.25 each, where
seven bits of mantissa are too few for a bias. Multiply-adds of bf16 do not flush subnormal numbers (PTX ISA, fma).

f16. A float whose mantissa ends in the bits of a code u is 1024 + u (0x6400 | u): one lop3 on a shifted word, and

    level = (1024 + u) - (1024 + origin)

(Kim et al., 2022; Frantar et al., 2024.) Times 2^-6 and a small scale, levels would be subnormal numbers of f16 and
lose bits.

To scale the weights takes a multiplication more for two codes, and rounds them.

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

BIAS = 0x64006400  # 1024 twice in f16: the bits above a code's
LEVELS_STEP = 2.0**-6  # of levels in bf16
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value for each of the 64 rows of a tile
REGISTERS = 16  # of a thread, for a tile
AND_XOR = 0x6A  # of lop3: (a & b) ^ c
_MINUS = 0x8000  # a bf16's sign


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
      zero_points: how many zero points (i32) follow the scales, likewise; 0 is a symmetric weight.
      words_in: the layout of the words, in which a thread holds its own; None is that of i32[bits / 2, 256].
      result_in: the layout of the result, whose registers are those of wgmma's left operand, in their order.
    """
    dtype = jnp.dtype(dtype)
    pair_of, in_place = (_subnormal_pair, 8 // bits) if dtype == jnp.bfloat16 else (_biased_pair, 1)

    @plgpu.inline_mgpu(
        arg_types=(words_in or words_layout(bits), *[ROW] * (scales + zero_points)),
        return_type=plgpu.ShapeDtypeStruct((STRIP, TILE_K), dtype, layout=result_in),
    )
    def convert(ctx: Any, words: Any, *rows: Any) -> Any:
        del ctx
        scale, zero = [[_by_half(part) for part in some] for some in (rows[:scales], rows[scales:])]
        layout = result_in.to_mgpu()
        registers = np.empty(REGISTERS, dtype=object)
        for at, word in enumerate(shifted_words(words, bits, in_place)):
            step, h = at // 4, at % 2
            below = zero[step * len(zero) // 4][h] if zero else None
            pair = pair_of(word, bits, bits * (at % in_place), below)
            registers[at] = arith.mulf(pair, _twice(scale[step * len(scale) // 4][h])) if scale else pair
        shape = layout.registers_shape((STRIP, TILE_K))
        return mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)

    return convert


def factor_of_floats(dtype: Any) -> float:
    """What sums of products of the result of `floats_of` are to be multiplied by."""
    return 1.0 / LEVELS_STEP if dtype == jnp.bfloat16 else 1.0


def shifted_words(words: Any, bits: int, in_place: int = 1) -> list[Any]:
    """i32 of a thread's 16 registers, of register h + 2 j of step s that at 4 s + h + 2 j.

    Codes are in the low bits; of register i they are `i % in_place` codes above them.
    """
    held = [vector.extract(four, [], [i]) for four in words.registers.flat for i in range(4)]
    per_word = 16 // bits  # registers

    def of_register(at: int) -> Any:
        word, place = held[at // per_word], at % per_word // in_place * in_place
        return arith.shrui(word, constant(bits * place)) if place else word

    return [of_register(at) for at in range(REGISTERS)]


def _subnormal_pair(word: Any, bits: int, place: int, zero: Any) -> Any:
    """Two levels in bf16, times LEVELS_STEP, of codes that begin at bit `place` of either half."""
    kind = ir.BF16Type.get()
    codes = arith.andi(word, constant(_twice_over((2**bits - 1) << place)))
    below: Any = constant(_twice_over(power_of_two(bits - 7) | _MINUS))
    if zero is not None:
        number = _as_floats(_multiply_add(zero, constant(power_of_two(127) | _MINUS), constant(0)), kind)
        below = mgpu.utils.bitcast(_twice(vector.extract(number, [], [0])), i32())
    return _as_floats(_multiply_add(codes, constant(_twice_over(power_of_two(127 - place))), below), kind)


def _biased_pair(word: Any, bits: int, place: int, zero: Any) -> Any:
    """Two levels in f16, of codes in the lowest bits: (1024 + u) - (1024 + origin)."""
    del place
    below: Any = constant(BIAS + _twice_over(2 ** (bits - 1)))
    if zero is not None:
        below = arith.ori(arith.ori(zero, arith.shli(zero, constant(16))), constant(BIAS))
    above = lop3(word, _twice_over(2**bits - 1), BIAS, AND_XOR)
    return arith.subf(_as_floats(above, ir.F16Type.get()), _as_floats(below, ir.F16Type.get()))


def power_of_two(exponent: int) -> int:
    """Its bits in bf16."""
    return (127 + exponent) << 7


def _twice_over(half: int) -> int:
    return half * 0x10001


def _by_half(part: Any) -> list[Any]:
    """A value a row, for rows g and g + 8."""
    return [vector.extract(register, [], [0]) for register in part.registers.flat]


def _twice(value: Any) -> Any:
    return vector.broadcast(ir.VectorType.get((2,), value.type), value)


def _multiply_add(a: Any, b: Any, c: Any) -> Any:
    """a * b + c of two bf16 each, in i32: one instruction, and no compiler takes its subnormal numbers for zeros."""
    return llvm.inline_asm(i32(), [a, b, c], "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r")


def lop3(word: Any, mask: int, other: int, table: int) -> Any:
    """i32: one instruction of three operands."""
    assembly = f"lop3.b32 $0, $1, {mask:#010x}, {other:#010x}, {table:#04x};"
    return llvm.inline_asm(i32(), [word], assembly, "=r,r")


def _as_floats(word: Any, kind: Any) -> Any:
    return mgpu.utils.bitcast(word, ir.VectorType.get((2,), kind))


def i32() -> Any:
    return ir.IntegerType.get_signless(32)


def constant(value: int) -> Any:
    return arith.constant(i32(), ir.IntegerAttr.get(i32(), value - 2**32 if value >= 2**31 else value))
