"""Codes to bytes in the registers of a warpgroup: wgmma's left operand where x is int8 or float8_e4m3fn.

wgmma of bytes (m64nMk32) takes its left operand from registers of four: of each half of 16 rows of its 32, thread
t = 32 w + 4 g + c holds for h = 0, 1

    register h      column 16 w + 8 h + g       rows 4 c + i,  i = 0 to 3 from the low byte up

The hopper layout (gpu_fragments.py) has in the same thread the codes of rows 8 j + 2 c + e. Which of 16 rows is called
which does not change a sum, if x is put in that order too (`in_order_of_bytes`): row 8 j + 2 c + e at 4 c + 2 e + j. So
one layout serves every kind of x, and a register's four codes are found by one lop3. int8:

    4 bits, symmetric       ((word << 4) & 0xF0F0F0F0) ^ 0x80808080 = 16 (u - 8), undone at the end: 1.5 for four
    4 bits, zero points     ((word & 0x0F0F0F0F) | 0x80808080) - z ^ 0x80808080 = u - z: no borrow leaves a byte
    8 bits, symmetric       four bytes of two words, ^ 0x80808080 = u - 128

a quarter of what floats take. e4m3 (a sign, four bits of exponent, three of mantissa) begins with equal steps: the
bytes 0 to 16 are 0/512 to 16/512, subnormals and then the first normals. So a level of 4 bits needs no table and no
exponent, only its size, by vabsdiff4, which takes four bytes, and its sign, by a lop3; 512 is undone at the end. e4m3:

    symmetric       |(word & 0x0F0F0F0F) - 8|   and the sign ~(word << 4) & 0x80808080: 4 for four
    zero points     |d - 128| of d = ((word & 0x0F0F0F0F) | 0x80808080) - z = 128 + (u - z), and ~d & 0x80808080: 4.5

exact for zero points up to 16 (GPTQ's, stored less one, reach it), as int8's are up to 128. (A table of sixteen e4m3 by
prmt, as in Mosaic GPU's conversion from int4, takes more, and has no zero points.) Codes of 8 bits do not fit e4m3.

Hopper sums products of e4m3 in fixed point, in about 14 bits from the largest of them down (DeepSeek-AI, DeepSeek-V3
Technical Report, 2024, section 3.5.2), though the sum is called f32. So no chain of wgmma is longer than CHAIN rows of
W: its sum is then scaled, and added to others in f32 registers (mosaic_gpu_forms.py), which is one multiply-add a sum
whether the scale is another or not. By the emulator's model of such sums (benchmarks/gpu_lab/tensor_cores.py) one chain
of 8192 rows loses 2.9 % of a product of normally distributed rows by symmetric codes, chains of 256 0.08 %, of 128
0.04 %; to round the result to bf16 loses 0.17 %.
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
from pallas_kernels.int4_matmul.mosaic_gpu_registers import (
    AND_XOR,
    ROW,
    constant,
    i32,
    lop3,
    words_layout,
)

CHAIN = 128  # rows of W of which products of e4m3 are summed before they are scaled
_SIGNS = 0x80808080
_AND_OR, _OR_NOT_AND = 0xEA, 0xF2  # of lop3: (a & b) | c, a | (~b & c)
_STEP = 1 / 512  # between e4m3's smallest numbers


def bytes_of(dtype: Any, bits: int, zero_points: int) -> Callable[..., jax.Array]:
    """A function in a kernel: words i32[bits / 2, 256], zero points [64] -> dtype[64, 64], transposed.

    The result times `factor_of` is the levels.

    Args:
      dtype: int8 or float8_e4m3fn, of x and the result.
      bits: 4 or 8, of a code; 8 only in int8 without zero points.
      zero_points: how many (i32, see `zero_bytes_of`) follow, for equal parts of the tile's rows; 0 is symmetric.
    """
    result = plgpu.ShapeDtypeStruct((STRIP, TILE_K), dtype, layout=plgpu.Layout.WGMMA_8BIT)
    floats = dtype == jnp.float8_e4m3fn
    of_word = _floats_of_a_word if floats else _integers_of_a_word
    of_register = _integers_of_two_words if bits == 8 else of_word

    @plgpu.inline_mgpu(arg_types=(words_layout(bits), *[ROW] * zero_points), return_type=result)
    def convert(ctx: Any, words: Any, *rows: Any) -> Any:
        del ctx
        kind = ir.Float8E4M3FNType.get() if floats else ir.IntegerType.get_signless(8)
        zero = [[vector.extract(register, [], [0]) for register in part.registers.flat] for part in rows]
        held = [vector.extract(four, [], [i]) for four in words.registers.flat for i in range(4)]
        registers = np.empty(mgpu.WGMMA_LAYOUT_8BIT.registers_shape((STRIP, TILE_K)), dtype=object)
        for index in np.ndindex(registers.shape):
            step, h = index[1], index[4]
            own = zero[step * len(zero) // 4][h] if zero else None
            four = of_register(held[step * bits // 4 : (step + 1) * bits // 4], h, own)
            registers[index] = mgpu.utils.bitcast(four, ir.VectorType.get((4,), kind))
        signed = None if floats else True
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT_8BIT, _is_signed=signed)

    return convert


def factor_of(dtype: Any, bits: int, zero_points: bool) -> float:
    """What sums are to be multiplied by beside their scales."""
    if dtype == jnp.float8_e4m3fn:
        return 1 / _STEP
    return 1.0 / 16 if bits == 4 and not zero_points else 1.0


def zero_bytes_of(row: jax.Array) -> jax.Array:
    """u8[64] as the function of `bytes_of` takes it: four times in an i32."""
    return row.astype(jnp.int32) * jnp.int32(0x01010101)


def _integers_of_a_word(words: list[Any], h: int, zero: Any) -> Any:
    (word,) = words
    if zero is None:
        high = word if h else arith.shli(word, constant(4))
        return lop3(high, 0xF0F0F0F0, _SIGNS, AND_XOR)
    return arith.xori(_above_128(word, h, zero), constant(_SIGNS))


def _floats_of_a_word(words: list[Any], h: int, zero: Any) -> Any:
    (word,) = words
    if zero is None:
        high = word if h else arith.shli(word, constant(4))
        return _signed(arith.andi(_low(word, h), constant(0x0F0F0F0F)), constant(0x08080808), high)
    level = _above_128(word, h, zero)
    return _signed(level, constant(_SIGNS), level)


def _signed(four: Any, origin: Any, positive: Any) -> Any:
    """|four - origin| in each byte, below a sign where the highest bit of `positive` is not set."""
    operands = [four, origin, constant(0)]
    size: Any = llvm.inline_asm(i32(), operands, "vabsdiff4.u32.u32.u32 $0, $1, $2, $3;", "=r,r,r,r")
    return llvm.inline_asm(i32(), [size, positive], f"lop3.b32 $0, $1, $2, {_SIGNS:#x}, {_OR_NOT_AND:#x};", "=r,r,r")


def _above_128(word: Any, h: int, zero: Any) -> Any:
    """128 + (u - z) in each byte."""
    return arith.subi(lop3(_low(word, h), 0x0F0F0F0F, _SIGNS, _AND_OR), zero)


def _low(word: Any, h: int) -> Any:
    """The codes of register h in the low half of each byte."""
    return arith.shrui(word, constant(4)) if h else word


def _integers_of_two_words(words: list[Any], h: int, zero: Any) -> Any:
    assert zero is None
    chosen = (6 + h) << 12 | (2 + h) << 8 | (4 + h) << 4 | h
    four: Any = llvm.inline_asm(i32(), words, f"prmt.b32 $0, $1, $2, {chosen:#06x};", "=r,r,r")
    return arith.xori(four, constant(_SIGNS))
