"""dx[M, K]: each row of dy[M, N] by its expert's W[K, N]^T on a TPU, from the codes as they lie.

    grid     (K / bk, items, N / bn), N innermost; the items are those of tpu.py, tiles of rows and their experts
    a step   unpacks and scales one block of the item's expert to bf16[bk, bn] in VMEM, and contracts both operands'
             last axes, as int4_matmul/tpu_transposed.py does

There is one form, that of `wscale`: the weights are rounded as dense bf16 weights are. Experts without rows are never
fetched. Levels of a codebook come in the order of tpu_tables.py, and so do the columns of dx, put back at the end.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_int4_matmul.tpu import (
    SMALLEST_TILE,
    by_blocks,
    reads_in_place,
    tile_rows_of,
)
from pallas_kernels.grouped_int4_matmul.work_items import rows_of, work_items
from pallas_kernels.int4_matmul import tpu_forms, tpu_tables
from pallas_kernels.int4_matmul.spec import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.int4_matmul.tpu_chips import Chip, traced_chip
from pallas_kernels.int4_matmul.tpu_transposed import BLOCKS, depth_of
from pallas_kernels.manual_axes import shape_varying_as


def grouped_int4_matmul_tpu_transposed(
    dy: jax.Array,
    w: Packed,
    group_sizes: jax.Array,
    spec: PackedSpec,
    *,
    chip: Chip | None = None,
    block: int | None = None,
    tile_rows: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """f32[M, K], all but `block` as for grouped_int4_matmul_tpu; dy is rounded to bf16.

    `block` is the depth and width of a block of W where groups allow it.
    """
    chip = chip or traced_chip()
    (table, *_) = tpu_tables.tables_for(spec.levels, chip.name, 1)
    (rows, n), experts = dy.shape, w.codes.shape[0]
    if 0 in (rows, n, experts, spec.length):
        return jnp.zeros((rows, spec.length), jnp.float32)
    block = block or BLOCKS[chip.bf16_vector]
    bm = min(tile_rows or tile_rows_of(rows, experts), -(-rows // SMALLEST_TILE) * SMALLEST_TILE)
    bk = depth_of(spec, block)
    bn = min(max(block * block // max(bk, block), tpu_forms.LANES), n)
    group = bk if spec.num_groups == 1 else min(bk, spec.group_size)
    steps_k, steps = pl.cdiv(spec.length, bk), pl.cdiv(n, bn)
    repeat = steps_k if spec.num_groups == 1 else max(1, spec.group_size // bk)  # blocks that share a row of scales
    missing = 0 if repeat > 1 else max(0, steps_k * (bk // group) - w.scale.shape[1])
    dy = jnp.pad(dy.astype(jnp.bfloat16), ((0, -rows % bm), (0, steps * bn - n)))
    items = work_items(group_sizes.astype(jnp.int32), rows, bm)

    def of_rows(k: Any, i: Any, j: Any, tile: Any, expert: Any, first: Any, end: Any, used: Any) -> Any:
        return tile[i], jnp.where(i < used[0], j, steps - 1)

    def of_expert(k: Any, i: Any, j: Any, tile: Any, expert: Any, first: Any, end: Any, used: Any) -> Any:
        return expert[i], k, jnp.where(i < used[0], j, steps - 1)

    def of_groups(k: Any, i: Any, j: Any, tile: Any, expert: Any, first: Any, end: Any, used: Any) -> Any:
        return expert[i], lax.div(k, jnp.int32(repeat)), 0, jnp.where(i < used[0], j, steps - 1)

    stored = tpu_forms.rows_of_a_code(w.codes, spec.bits)
    operands = {
        "x": (dy, pl.BlockSpec((bm, bn), of_rows)),
        "codes": (w.codes, pl.BlockSpec((None, bk // stored, bn), of_expert)),
    }
    for name, part in zip(("scale", "zero_point", "offset"), w[1:], strict=True):
        if part is not None:
            operands[name] = by_blocks(part, n, missing), pl.BlockSpec((None, bk // group, 1, bn), of_groups)
    if table is not None:
        operands["table"] = tpu_tables.operand(table)
    arrays = [array for array, _ in operands.values()]
    settings = {"group": group, "wide": not chip.bf16_vector, "over": steps * bn - n, "steps": steps}
    out = pl.pallas_call(
        functools.partial(_kernel, names=tuple(operands), **settings),
        name="grouped_int4_matmul_transposed",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=(steps_k, items.tile.shape[0], steps),
            in_specs=[place for _, place in operands.values()],
            out_specs=pl.BlockSpec((bm, bk), lambda k, i, j, tile, *_: (tile[i], k)),
            scratch_shapes=[pltpu.VMEM((bm, bk), jnp.float32)],
        ),
        out_shape=shape_varying_as((dy.shape[0], steps_k * bk), jnp.float32, arrays),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=chip.vmem,
            allow_input_fusion=reads_in_place(items, operands, w, loops=False),
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
    )(*items, *arrays)
    out = jnp.where((jnp.arange(rows) < rows_of(items, bm))[:, None], out[:rows], 0.0)
    if table is not None:
        out = tpu_tables.natural_order(out, math.gcd(group, tpu_forms.LANES))
    return out[:, : spec.length]


def _kernel(
    tile: Any, expert: Any, first: Any, end: Any, used: Any, *refs: Any,
    names: tuple[str, ...], group: int, wide: bool, over: int, steps: int,
) -> None:  # fmt: skip
    *inputs, out, total = refs
    block = tpu_forms.Block(**dict(zip(names, inputs, strict=True)))
    block = block._replace(columns_held=tpu_forms.held_of(block.codes.shape[1], over, steps))
    item, step = pl.program_id(1), pl.program_id(2)

    @pl.when(item < used[0])
    def _() -> None:
        @pl.when(step == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        weight = tpu_forms.dense(block, group, wide=wide)  # bf16[bk, bn]
        contract = (((1,), (1,)), ((), ()))
        total[...] += lax.dot_general(block.x[...], weight, contract, preferred_element_type=jnp.float32)

        @pl.when(step == steps - 1)
        def _() -> None:
            row = lax.broadcasted_iota(jnp.int32, total.shape, 0)
            own = (row >= first[item]) & (row < end[item])
            out[...] = jnp.where(own, total[...], out[...])
