"""Codebooks of sixteen levels (nf4, fp4) inside a TPU kernel: codes to bf16 levels by gathers within registers.

A level is looked up, not computed: nf4's are quantiles of a normal distribution (Dettmers et al. 2023), which no few
operations give. Words hold eight codes as for int4 (code ^ 8 in each nibble, which the order of the table undoes).
Two codes at a time, of the nibbles j and j + 4 of a word, become the two bf16 halves of a 32-bit lane, rows in the
`magic_order` of tpu_forms.py:

    sublanes   v5, v6e, TPU7x   a register of 8 sublanes is a table of 8 entries that the vector unit reads in one
               instruction (vperm.slane on v5, vrot.slane on v6e), with the low three bits of a code for an index; the
               fourth chooses between two such tables. One pair of tables has its levels in the low half of a lane, one
               in the high half, so that an `or` joins two codes. 7.5 (v5) or 8.5 instructions for 1024 codes.
    lanes      v4               a register of 128 lanes is a table of 128 entries for the cross-lane unit (vperm.lane);
               seven bits of a pair of codes are the index and the eighth chooses between two. Fewer instructions, but
               the cross-lane unit is slower than the vector unit: v5e 4043 bundles for 1024 x 1024 codes, v6e 3416.

v4's compiler has no gather along sublanes. A mixture of both (a half of the codes by each unit) schedules no better
than sublanes alone: v6e 2545 bundles against 2503, v5e 2893 against 2246.

Sixteen selects, or this, is more than the vector unit does for int4, and it is what bounds a product. Modelled
microseconds at 4096 x 4096 in groups of 64 (benchmarks/results/tpu-nf4.json): the kernel, XLA's form on the same words
(a tree of fifteen selects), and the product of bf16 weights:

    rows    v4                 v5e                v5p               v6e               tpu7x
    16      47.0  186   27.6   33.5  102   41.5   14.9  50.3 12.3   21.9  113  20.7   17.5  90.9  9.2
    512     99.1  275   67.8    113  277   87.2   54.7   109 37.4   41.6  177  33.2   27.6   133 15.9

XLA's tiles of neutral bytes take 87.7 and 120 on v6e, 104 and 158 on v5e. So the kernel is taken everywhere, and nf4
decodes faster than bf16 on v5e alone: elsewhere what it saves is memory.

Levels are rounded to bf16 once, when the table is made (fp4's are exact).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SUBLANES, LANES = 8, 128


def table_of(levels: np.ndarray, sublanes: bool) -> np.ndarray:
    """i32[tables, 8, 128] of levels bf16[16], by the code as it is stored; see the module's text."""
    bits = levels[np.arange(16) ^ 8].view(np.uint16).astype(np.uint32)  # u32[16]
    high = bits << 16
    if sublanes:
        tables = np.stack([bits[:8], bits[8:], high[:8], high[8:]])[:, :, None]  # [4, 8, 1]
    else:
        tables = (bits[None, :] | high[:, None]).reshape(2, 1, LANES)  # entry a + 16 b: levels a (low) and b (high)
    return np.ascontiguousarray(np.broadcast_to(tables, (len(tables), SUBLANES, LANES))).view(np.int32)


def tables_for(levels: tuple[float, ...] | None, chip: str, terms: int) -> list[np.ndarray | None]:
    """Tables whose levels sum to those of a codebook, at most `terms` of them: one rounds to bf16. [None] of none."""
    if levels is None:
        return [None]
    rest, tables = np.asarray(levels, np.float32), []
    for _ in range(terms):
        rounded = rest.astype(jnp.bfloat16)
        tables.append(table_of(rounded, sublanes=chip not in ("v4", "unknown")))
        rest = rest - rounded.astype(np.float32)
        if not rest.any():
            break
    return tables


def operand(table: np.ndarray | None) -> tuple[Any, Any]:
    """The table as an operand of a kernel, and its block: whole, at every step."""
    if table is None:
        return None, None
    return jnp.asarray(table), pl.BlockSpec(table.shape, lambda *_: (0, 0, 0))


def levels_of(words: jax.Array, table: jax.Array, chunk: int) -> jax.Array:
    """bf16[8 * W, N], rows in the `magic_order` of chunks, from words i32[W, N]."""
    height, columns = words.shape
    words = _whole_registers(words)
    look_up = _by_sublanes if table.shape[0] == 4 else _by_lanes
    pairs = [_tiled(lambda tile, j=j: look_up(tile, table, j), words) for j in range(4)]
    halves = [pltpu.bitcast(pair, jnp.bfloat16)[:, :columns] for pair in pairs]  # bf16[2 W, N]: rows (r, h)
    step = chunk // 4
    return jnp.concatenate([half[start : start + step] for start in range(0, 2 * height, step) for half in halves], 0)


def natural_order(columns: jax.Array, chunk: int) -> jax.Array:
    """[M, K] with the columns of a chunk, which are in `magic_order`, in their own: 8r + 4h + j is at (j, r, h)."""
    places = np.arange(LANES).reshape(LANES // chunk, chunk // 8, 2, 4).transpose(0, 3, 1, 2).reshape(-1)
    matrix = jnp.asarray(np.eye(LANES)[places], columns.dtype)
    precision = None if columns.dtype == jnp.bfloat16 else lax.Precision.HIGHEST  # exact in either case
    moved = jnp.matmul(columns.reshape(-1, LANES), matrix, precision=precision, preferred_element_type=jnp.float32)
    return moved.astype(columns.dtype).reshape(columns.shape)


def _whole_registers(words: jax.Array) -> jax.Array:
    """Zeros after the words of groups of 32 rows and of fewer columns than a register has."""
    for axis, multiple in enumerate((SUBLANES, LANES)):
        missing = -words.shape[axis] % multiple
        if missing:
            shape = [*words.shape[:axis], missing, *words.shape[axis + 1 :]]
            words = jnp.concatenate([words, jnp.zeros(shape, jnp.int32)], axis)
    return words


def _tiled(function: Any, words: jax.Array) -> jax.Array:
    """`function` of every register of [W, N]."""
    rows = [
        jnp.concatenate(
            [function(words[r : r + SUBLANES, n : n + LANES]) for n in range(0, words.shape[1], LANES)],
            1,
        )
        for r in range(0, words.shape[0], SUBLANES)
    ]
    return jnp.concatenate(rows, 0)


def _by_sublanes(words: jax.Array, table: jax.Array, j: int) -> jax.Array:
    """i32[8, 128]: the levels of nibbles j and j + 4 in the low and the high half."""
    halves = []
    for half in range(2):
        place = 4 * (j + 4 * half)
        index = _shifted(words, place) & jnp.int32(7)
        low, high = (
            jnp.take_along_axis(table[2 * half + top], index, axis=0, mode="promise_in_bounds") for top in range(2)
        )
        halves.append(jnp.where(_bit(words, place + 3), high, low))
    return halves[0] | halves[1]


def _by_lanes(words: jax.Array, table: jax.Array, j: int) -> jax.Array:
    """The same by the cross-lane unit."""
    index = (_shifted(words, 4 * j) & jnp.int32(15)) | (_shifted(words, 4 * j + 12) & jnp.int32(0x70))
    low, high = (jnp.take_along_axis(table[top], index, axis=1, mode="promise_in_bounds") for top in range(2))
    return jnp.where(_bit(words, 4 * j + 19), high, low)


def _shifted(words: jax.Array, places: int) -> jax.Array:
    return lax.shift_right_logical(words, jnp.int32(places)) if places else words


def _bit(words: jax.Array, place: int) -> jax.Array:
    if place == 31:
        return words < 0
    return (words & jnp.int32(1 << place)) != 0
