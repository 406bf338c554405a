"""The inner forms of the TPU kernels: one block of x by one block of codes, inside a Pallas kernel.

A form takes a `Block` and the static length of a group, and returns f32[bm, bn], the block's share of x @ W (added to
a total by `accumulate`):

    sum over the groups i of the block, over k in group i, of
        x[m, k] * ((code[k, n] - (zero_point[i, n] - 8)) * scale[i, n] + offset[i, n])

    direct   per group  (x_i @ codes_i - sums_i * (zero_point_i - 8)) * scale_i + sums_i * offset_i,
             sums_i the sum of x's columns in the group, taken only where something needs it.
             bf16 by int4 goes into the dot as it is and the compiler picks the chip's unpacking (v6e: one instruction,
             int4 to bf16; TPU7x: to fp8, which its MXU takes beside bf16; v5: four instructions; v4: a shuffle through
             memory that is six times slower than the product). Exact in the codes: what is rounded is x and f32 sums.
             Costs bm * bn scalings a group, and passes of the MXU no deeper than a group.
    magic    the same with codes_i read as bfloat16 136 + code, by three bit operations on words of eight codes:
                 (word >> 4j) & 0x000F000F ^ 0x43084308    is two bf16, of the codes j and j + 4 of the word
             (0x4300 is 128 with the code's bits at its end; ^ 8 turns the sign bit into + 8), so that no conversion is
             needed at all, and 136 * sums_i is taken off the product. Words run down K and the halves of a word become
             neighbouring rows: x must come with its columns in `magic_order` (tpu_order.py).
    integer  direct with x as int8, whole numbers: int8 by int8 into exact int32 sums, twice bf16's rate on v5 and v6e
             (v4 and TPU7x have no integer MXU; there, whole numbers go through the others as bf16, which holds them).
    wscale   one dot with bf16(weight) of the whole block. Costs bk * bn scalings, whatever bm is; the MXU sees one deep
             product, which v6e and TPU7x (256 deep) need at prefill: groups of 128 fill half of it. It rounds the
             weights as a dense bf16 weight is: that errs by 1.4e-3 of the product, its rounding to bf16 by 1.7e-3, both
             by 2.2e-3, against 1.7e-3 of `direct`. Nothing less costly takes that away: a code times a scale has
             twelve bits, the MXU's operand eight, and what is left over differs from group to group.
    shifted  the same in f32 by shifts of words, for v4. A row of words is read into all eight sublanes of a register,
             which the load does for nothing, and each of them shifted by its own places: so the rows come in the order
             of K, and x is read as it is. (Taking the same nibble of eight rows of words at a time costs as much, but
             wants the columns of x moved first, which took 477 of 4034 us at 2048 x 28672 x 8192.)

The magic numbers are those of FasterTransformer's and Marlin's GPU kernels (Kim et al. 2022; Frantar et al. 2024),
for bf16 and for the order in which a TPU holds int4.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.int4_matmul import tpu_tables
from pallas_kernels.int4_matmul.tpu_order import LANES as LANES
from pallas_kernels.int4_matmul.tpu_order import chunk_of, groups_at_a_time


class Block(NamedTuple):
    """One grid step's operands: refs or values, of blocks in VMEM.

    Attributes:
      x: bf16[bm, bk], or int8 for `integer`. Columns after the end of K are zeros: codes there are what memory held,
        so that a form may multiply them by x and nothing else.
      codes: int4[bk, bn], of which the level is the code itself, or the same as words, i32[bk / 8, bn].
      scale: [bk / group, 1, bn], bf16 or f32. `group` divides bk: where a real group is longer than the block, the
        index map repeats its row and `group` is bk.
      zero_point: u8[bk / group, 1, bn] or None, counted in unsigned codes.
      offset: [bk / group, 1, bn] or None.
      table: i32[tables, 8, 128] of tpu_tables.py where codes are indices of levels, or None. Codes are int8, or words
        of four, where they are of eight bits.
      groups_held, columns_held: i32[], of how many groups and columns there are scales and offsets, where the last
        block sticks out of W, else None. What memory holds after their end may be NaN: it is read as zero (`held`).
    """

    x: Any
    codes: Any
    scale: Any
    zero_point: Any = None
    offset: Any = None
    table: Any = None
    groups_held: Any = None
    columns_held: Any = None


def accumulate(form: Any, block: Block, group: int, chunk: int, total: Any) -> None:
    """total f32[bm, bn] += form(block, group), `chunk` rows of codes at a time where that is less than the block.

    With many rows of x a form's partial sums do not fit the registers, and a scheduler that is shown all groups at once
    spills them all; a loop holds one chunk's. A chunk is whole groups and a multiple of LANES.
    """
    depth = block.x.shape[1]
    if chunk >= depth:
        total[...] += form(block, group)
        return
    inner = min(group, chunk)  # a block of one group has one row of scales for all of its chunks
    per, stored = (chunk // group if inner == group else 0), _stored(block, chunk)

    @pl.loop(0, depth // chunk)
    def _(index: jax.Array) -> None:
        x = block.x[:, pl.ds(pl.multiple_of(index * chunk, chunk), chunk)]
        codes = block.codes.at[pl.ds(pl.multiple_of(index * stored, stored), stored), :]
        rows = pl.ds(pl.multiple_of(index * per, per), per) if per else slice(None)
        groups = [None if part is None else part[rows] for part in block[2:5]]
        rest = None if block.groups_held is None else block.groups_held - index * per
        scale, zero_point, offset = groups
        part = block._replace(x=x, codes=codes, scale=scale, zero_point=zero_point, offset=offset, groups_held=rest)
        total[...] += form(part, inner)


def form_of(name: str, wide: bool, interpret: bool) -> Callable[[Block, int], jax.Array]:
    """The form of a plan."""
    forms = {
        "direct": functools.partial(direct, upcast=interpret),
        "magic": magic,
        "integer": integer,
        "wscale": functools.partial(wscale, wide=wide),
        "shifted": functools.partial(shifted, upcast=interpret),
    }
    return forms[name]


def held_of(count: int, over: int, steps: int) -> jax.Array | None:
    """How many of `count` groups or columns of a block this step holds, the last of `steps` `over` less."""
    return None if not over else jnp.where(pl.program_id(2) == steps - 1, count - over, count)


def without_float16(part: Any) -> Any:
    """Scales or offsets (or None) as f32 where they are f16, which the kernels' compiler does not have."""
    return part.astype(jnp.float32) if part is not None and part.dtype == jnp.float16 else part


def rows_of_a_code(codes: Any, bits: int = 4) -> int:
    """Rows of W that one row of the array of codes holds: 8 in words of four bits each."""
    return 32 // bits if codes.dtype == jnp.int32 else 1


def as_elements(codes: jax.Array, rows: int) -> jax.Array:
    """int4 or int8[rows, bn] of such codes, or of words of them: the same bits, read otherwise."""
    if codes.dtype != jnp.int32:
        return codes
    return pltpu.bitcast(codes, jnp.int4 if rows == 8 * codes.shape[0] else jnp.int8)


def direct(block: Block, group: int, *, upcast: bool = False) -> jax.Array:
    """`upcast` unpacks before the dot, for an interpreter that has no product of bf16 by int4."""

    def weight(codes: jax.Array) -> jax.Array:
        levels = _levels(block, codes, group, group)
        return levels.astype(jnp.bfloat16) if upcast or levels.dtype == jnp.int8 else levels

    return _by_groups(block, group, weight)


def integer(block: Block, group: int) -> jax.Array:
    return _by_groups(block, group, lambda codes: as_elements(codes, group).astype(jnp.int8))


def magic(block: Block, group: int) -> jax.Array:
    return _by_groups(block, group, _magic_weight, 136.0, groups_at_a_time(group))


def wscale(block: Block, group: int, *, wide: bool = False) -> jax.Array:
    return product(block.x[...], dense(block, group, wide=wide))


def dense(block: Block, group: int, *, wide: bool = False) -> jax.Array:
    """bf16[bk, bn]: the block's weights, rounded as a dense bf16 weight is. x is not looked at.

    `wide` computes in f32, with the same result, for chips that have no bf16 vectors and would convert back and forth.
    """
    levels = _levels(block, block.codes[...], block.scale.shape[0] * group, group)
    # one rounding: a bf16 scale times a small integer is rounded once by a bf16 product, anything else by f32's end
    small = levels.dtype != jnp.int8 or block.zero_point is None
    exact = block.scale.dtype == jnp.bfloat16 and block.offset is None and small and not wide
    dtype = jnp.bfloat16 if exact else jnp.float32
    affine = _affine(block, group, dtype)
    parts = [affine(i, levels[i * group : (i + 1) * group].astype(dtype)) for i in range(levels.shape[0] // group)]
    return jnp.concatenate([part.astype(jnp.bfloat16) for part in parts], 0)


def shifted(block: Block, group: int, *, upcast: bool = False) -> jax.Array:
    """`wscale` in f32, with codes that shifts take out of words: each of the eight rows that a word's row is read into
    is shifted by places of its own, so that they come in the order of K.

    For a chip whose compiler unpacks int4 through memory. `upcast` is for an interpreter that reads no row twice, nor
    int4 as words.
    """
    words = block.codes  # [bk / 8, bn]
    if words.dtype != jnp.int32:
        words = _words(words[...]) if upcast else words.bitcast(jnp.int32)
    left = 28 - 4 * lax.broadcasted_iota(jnp.int32, (8, words.shape[1]), 0)
    affine, groups = _affine(block, group, jnp.float32), []
    for i in range(block.x.shape[1] // group):
        rows = range(i * group // 8, (i + 1) * group // 8)
        eights = [_eight_times(words, row, upcast) for row in rows]
        fields = [lax.shift_right_arithmetic(lax.shift_left(eight, left), jnp.int32(28)) for eight in eights]
        groups.append(affine(i, jnp.concatenate(fields, 0).astype(jnp.float32)).astype(jnp.bfloat16))
    return product(block.x[...], jnp.concatenate(groups, 0))


def _eight_times(words: Any, row: int, spread: bool) -> jax.Array:
    """i32[8, bn]: one row, read so; `spread` after it was read, which goes through memory once more."""
    if spread:
        return jnp.broadcast_to(words[row : row + 1, :], (8, words.shape[1]))
    return words[pl.ds(row, 8, stride=0), :]


def _affine(block: Block, group: int, dtype: Any) -> Any:
    """A function (i, levels dtype[rows, bn] of group i) -> the weights in `dtype`."""
    scale = block.scale
    if dtype == jnp.bfloat16 and block.groups_held is block.columns_held is None:  # by way of f32, whole registers
        scale = scale[...].astype(jnp.float32).astype(dtype)
    shift = None if block.zero_point is None else _shift(block, block.zero_point[...], group).astype(dtype)

    def weight(i: int, levels: jax.Array) -> jax.Array:
        if shift is not None:
            levels = levels - row_of(shift, i)
        levels = levels * held(block, scale, i).astype(dtype)
        if block.offset is not None:
            levels = levels + held(block, block.offset, i).astype(dtype)
        return levels

    return weight


def held(block: Block, part: Any, i: int) -> Any:
    """[1, bn]: the values of group i, zeros where there are none."""
    row = row_of(part, i)
    if block.groups_held is not None:
        row = jnp.where(i < block.groups_held, row.astype(jnp.float32), 0.0)
    if block.columns_held is not None:
        column = lax.broadcasted_iota(jnp.int32, row.shape, 1)
        row = jnp.where(column < block.columns_held, row.astype(jnp.float32), 0.0)
    return row


def row_of(part: Any, i: int) -> Any:
    """[1, bn]: the values of group i, whatever they are."""
    return part[i] if part.ndim == 3 else part[i : i + 1]


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """f32[bm, bn] = x[bm, k] @ weight[k, bn]; of int8 by int8 the sums are int32 until they are whole."""
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(x, weight, (((1,), (0,)), ((), ())), preferred_element_type=sums).astype(jnp.float32)


def _by_groups(block: Block, group: int, weight: Any, center: float = 0.0, together: int = 1) -> jax.Array:
    """The sum over groups of (x_i @ weight(codes_i) - sums_i * (center + shift_i)) * scale_i + sums_i * offset_i.

    `together` groups go into one product: x as often, one below the other, each with the columns of its own group.
    """
    total, (rows, depth) = None, block.x.shape
    shifts = None if block.zero_point is None else _shift(block, block.zero_point[...], group) + center
    for start in range(0, depth, together * group):
        end = start + together * group
        x = _apart(block.x[:, start:end], together)  # [together * bm, together * group]
        partials = product(x, weight(block.codes[_stored(block, start) : _stored(block, end), :]))
        for i in range(start // group, end // group):
            own = slice(rows * (i - start // group), rows * (i + 1 - start // group))
            partial = partials[own]
            if center or shifts is not None:
                partial = partial - _row_sums(x[own]) * (center if shifts is None else row_of(shifts, i))
            partial = partial * held(block, block.scale, i).astype(jnp.float32)
            if block.offset is not None:
                partial = partial + _row_sums(x[own]) * held(block, block.offset, i).astype(jnp.float32)
            total = partial if total is None else total + partial
    assert total is not None
    return total


def _apart(x: jax.Array, parts: int) -> jax.Array:
    """x [parts * bm, k]: the whole of it as often as there are parts, zeros outside of columns of a part's own codes.

    In `magic_order` the columns of two groups of 32 alternate by eight.
    """
    if parts == 1:
        return x
    part = lax.broadcasted_iota(jnp.int32, x.shape, 1) // 8 % parts
    wide = x.astype(jnp.float32)
    return jnp.concatenate([jnp.where(part == i, wide, 0.0) for i in range(parts)], 0).astype(x.dtype)


def _row_sums(x: jax.Array) -> jax.Array:
    """f32[bm, 1]."""
    wide = x.astype(jnp.int32) if x.dtype == jnp.int8 else x  # from int8 by way of i32, which every chip converts
    return jnp.sum(wide.astype(jnp.float32), axis=1, keepdims=True)


def _shift(block: Block, zero_point: jax.Array, group: int) -> jax.Array:
    """f32: the zero point counted from the code of level zero; by way of i32, which every chip converts."""
    eight_bits = block.codes.dtype == jnp.int8 or 4 * block.codes.shape[0] == block.scale.shape[0] * group
    return zero_point.astype(jnp.int32).astype(jnp.float32) - (128.0 if eight_bits else 8.0)


def _stored(block: Block, rows: int) -> int:
    """Rows of the array of codes that hold `rows` rows of W."""
    return rows * block.codes.shape[0] // block.x.shape[1]


def _levels(block: Block, codes: jax.Array, rows: int, group: int) -> jax.Array:
    """[rows, bn] in the order of K as int4 or int8, or from a table as bf16 in `magic_order`."""
    if block.table is None:
        return as_elements(codes, rows)
    words = _words(codes)
    return tpu_tables.levels_of(words, block.table[...], chunk_of(group))


def _magic_weight(codes: jax.Array) -> jax.Array:
    """bf16[group, bn] = 136 + code, rows in `magic_order`, from int4[group, bn] or words."""
    words = _words(codes)  # [group / 8, bn]
    fields = [lax.shift_right_logical(words, jnp.int32(4 * j)) if j else words for j in range(4)]
    bits = [(field & jnp.int32(0x000F000F)) ^ jnp.int32(0x43084308) for field in fields]
    halves = [pltpu.bitcast(field, jnp.bfloat16) for field in bits]  # bf16[group / 4, bn]: rows (r, h)
    step = chunk_of(8 * words.shape[0]) // 4
    chunks = range(0, 2 * words.shape[0], step)
    return jnp.concatenate([half[start : start + step] for start in chunks for half in halves], 0)


def _words(codes: jax.Array) -> jax.Array:
    return codes if codes.dtype == jnp.int32 else pltpu.bitcast(codes, jnp.int32)
