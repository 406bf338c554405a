"""Codes to int8 in the registers of a warpgroup: wgmma's left operand where x is int8.

wgmma of int8 (m64nMk32) takes its left operand from registers of four: of each half of 16 rows of its 32, thread
t = 32 w + 4 g + c holds for h = 0, 1

    register h      column 16 w + 8 h + g       rows 4 c + i,  i = 0 to 3 from the low byte up

The hopper layout (gpu_fragments.py) has in the same thread the codes of rows 8 j + 2 c + e. Which of 16 rows is called
which does not change a sum, if x is put in that order too (`in_order_of_bytes`): row 8 j + 2 c + e at 4 c + 2 e + j. So
one layout serves both kinds of x, and a register's four codes are found by one lop3,

    4 bits, symmetric       ((word << 4) & 0xF0F0F0F0) ^ 0x80808080 = 16 (u - 8), which the scales undo: 1.5 for four
    4 bits, zero points     ((word & 0x0F0F0F0F) | 0x80808080) - z ^ 0x80808080 = u - z: no borrow leaves a byte
    8 bits, symmetric       four bytes of two words, ^ 0x80808080 = u - 128

a quarter of what floats take. Floats of 8 bits (e4m3), which are multiplied as fast, take codes through tables.
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
    AND_OR,
    AND_XOR,
    ROW,
    constant,
    i32,
    lop3,
    words_layout,
)

_SIGNS = 0x80808080


def integers_of(bits: int, zero_points: int) -> Callable[..., jax.Array]:
    """A function in a kernel: words i32[bits / 2, 256], zero points [64] -> int8[64, 64], transposed.

    The result times `factor_of` is the levels.

    Args:
      bits: 4 or 8, of a code; 8 only without zero points.
      zero_points: how many (i32, see `zero_bytes_of`) follow, for equal parts of the tile's rows; 0 is symmetric.
    """
    result = plgpu.ShapeDtypeStruct((STRIP, TILE_K), jnp.int8, layout=plgpu.Layout.WGMMA_8BIT)
    of_register = _bytes_of_two_words if bits == 8 else _bytes_of_a_word

    @plgpu.inline_mgpu(arg_types=(words_layout(bits), *[ROW] * zero_points), return_type=result)
    def convert(ctx: Any, words: Any, *rows: Any) -> Any:
        del ctx
        zero = [[vector.extract(register, [], [0]) for register in part.registers.flat] for part in rows]
        held = [vector.extract(four, [], [i]) for four in words.registers.flat for i in range(4)]
        registers = np.empty(mgpu.WGMMA_LAYOUT_8BIT.registers_shape((STRIP, TILE_K)), dtype=object)
        for index in np.ndindex(registers.shape):
            step, h = index[1], index[4]
            own = zero[step * len(zero) // 4][h] if zero else None
            four = of_register(held[step * bits // 4 : (step + 1) * bits // 4], h, own)
            registers[index] = mgpu.utils.bitcast(four, ir.VectorType.get((4,), ir.IntegerType.get_signless(8)))
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT_8BIT, _is_signed=True)

    return convert


def factor_of(bits: int, zero_points: bool) -> float:
    """What products are to be multiplied by beside their scales."""
    return 1.0 / 16 if bits == 4 and not zero_points else 1.0


def zero_bytes_of(row: jax.Array) -> jax.Array:
    """u8[64] as the function of `integers_of` takes it: four times in an i32."""
    return row.astype(jnp.int32) * jnp.int32(0x01010101)


def _bytes_of_a_word(words: list[Any], h: int, zero: Any) -> Any:
    (word,) = words
    if zero is None:
        high = word if h else arith.shli(word, constant(4))
        return lop3(high, 0xF0F0F0F0, _SIGNS, AND_XOR)
    low = arith.shrui(word, constant(4)) if h else word
    return arith.xori(arith.subi(lop3(low, 0x0F0F0F0F, _SIGNS, AND_OR), zero), constant(_SIGNS))


def _bytes_of_two_words(words: list[Any], h: int, zero: Any) -> Any:
    assert zero is None
    chosen = (6 + h) << 12 | (2 + h) << 8 | (4 + h) << 4 | h
    four: Any = llvm.inline_asm(i32(), words, f"prmt.b32 $0, $1, $2, {chosen:#06x};", "=r,r,r")
    return arith.xori(four, constant(_SIGNS))
