"""Ragged groups of rows by packed experts on a TPU, by one Pallas kernel; how many rows each expert has is data.

x[M, K] is sorted by expert and cut into tiles of bm rows; the grid goes over work items (work_items.py), a tile and an
expert that has rows in it:

    grid      (N / bn, items, K / bk), K innermost
    prefetch  of each item its tile, its expert, and the expert's first and last row in the tile; how many items
              there are. The index maps read them: experts without rows are never fetched, idle items at the end
              repeat the last one's blocks, which moves nothing, and compute nothing.
    out       a tile's rows are written by each of its experts in turn, while the block stays in VMEM

JAX's megablox for TPUs does so with dense experts. What an item is multiplied by here is a block of the dense kernel
(int4_matmul/tpu_forms.py, blocks by tpu_blocks.py): codes, scales and zero points of the item's expert, unpacked in
VMEM; nothing of a dense weight is ever in HBM. A tile with rows of several experts is multiplied once for each of them,
whole: bm is no larger than the experts' average share asks for.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_int4_matmul.work_items import Items, rows_of, work_items
from pallas_kernels.grouped_int4_matmul.xla import grouped_xla
from pallas_kernels.int4_matmul import tiles, tpu_forms, tpu_tables
from pallas_kernels.int4_matmul.precision import bf16_terms
from pallas_kernels.int4_matmul.spec import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.int4_matmul.tpu import number_of
from pallas_kernels.int4_matmul.tpu import refusal as refusal
from pallas_kernels.int4_matmul.tpu_blocks import fitting
from pallas_kernels.int4_matmul.tpu_chips import Chip, traced_chip
from pallas_kernels.int4_matmul.tpu_model import bundles_of_step, bytes_of_step, seconds
from pallas_kernels.int4_matmul.tpu_order import in_order
from pallas_kernels.int4_matmul.tpu_plan import EXACT, Plan, Problem
from pallas_kernels.manual_axes import shape_varying_as

SMALLEST_TILE, LARGEST_TILE = 16, 256  # rows
EQUALLY_FAST = 1.01  # times the fastest plan's modelled time


def grouped_int4_matmul_tpu(
    x: jax.Array,
    w: Packed,
    group_sizes: jax.Array,
    spec: PackedSpec,
    *,
    precision: Any = None,
    chip: Chip | None = None,
    tile_rows: int | None = None,
    integers: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """f32[M, N]: each row of x[M, K] times its expert's W[K, N]; rows after the last group give zeros.

    Args:
      x: float[M, K], sorted by expert.
      w: codes i32[E, ceil(K / 8), N], int4[E, K, N] or int8[E, K, N], scale and its kin [E, G, 1, N].
      group_sizes: i32[E].
      spec: layout "tpu".
      precision: of a float32 x, as the dense kernel's.
      chip: None is the one of the trace.
      tile_rows: bm; None is chosen; where no block fits the chip's memory, XLA's form is taken.
      integers: x holds whole numbers of at most 127: they may be multiplied as int8.
      interpret: run on a CPU, by Pallas' interpreter of TPU kernels.
    """
    rows, experts, columns = x.shape[0], w.codes.shape[0], w.codes.shape[2]
    if 0 in (*x.shape, experts, columns):
        return jnp.zeros((rows, columns), jnp.float32)
    bm = min(tile_rows or tile_rows_of(rows, experts), -(-rows // SMALLEST_TILE) * SMALLEST_TILE)
    flags = (w.zero_point is not None, w.offset is not None)
    problem = Problem(bm, spec.length, columns, spec.num_groups, spec.group_size, *flags, number=number_of(spec))
    terms = bf16_terms(x, lax.Precision.DEFAULT if integers else precision)
    chip, exact = chip or traced_chip(), terms.shape[0] > 1
    while problem.m > SMALLEST_TILE and not fitting(problem, chip, exact, integers, resident=True):
        problem = dataclasses.replace(problem, m=max(SMALLEST_TILE, problem.m // 2 // SMALLEST_TILE * SMALLEST_TILE))
    bm = problem.m
    plan = plan_of(problem, chip, exact, integers)
    if plan is None:
        return grouped_xla(x, tiles.squeezed_scales(w, spec), group_sizes, spec, platform="tpu", precision=precision)
    plan = dataclasses.replace(plan, vmem_limit=chip.vmem)
    items = work_items(group_sizes.astype(jnp.int32), rows, bm)
    terms = terms.astype(jnp.int8 if plan.form == "integer" else jnp.bfloat16)
    tables = tpu_tables.tables_for(spec.levels, chip.name, len(terms))
    out = [_call(term, w, table, items, bm, plan, spec, interpret) for term in terms for table in tables]
    return functools.reduce(jnp.add, out)


def plan_of(problem: Problem, chip: Chip, exact: bool, integers: bool) -> Plan | None:
    """The fastest plan of an item: as for one product, but for its first block, which the item before hides.

    Of those that HBM makes equally fast, the one of fewest bundles: items of one expert in turn read its block once,
    which the model does not know. None where no block fits.
    """
    plans = fitting(problem, chip, exact, integers, resident=True)
    times = [_time_of_item(problem, plan, chip) for plan in plans]
    fastest = [plan for plan, time in zip(plans, times, strict=True) if time <= EQUALLY_FAST * min(times)]
    return min(fastest, key=lambda plan: _bundles_of_item(problem, plan, chip), default=None)


def _time_of_item(problem: Problem, plan: Plan, chip: Chip) -> float:
    steps_n, steps_k = pl.cdiv(problem.n, plan.block_n), pl.cdiv(problem.k, plan.block_k)
    hidden = bytes_of_step(problem, plan, steps_n, steps_k) / chip.bandwidth
    return (seconds(problem, plan, chip) - hidden) * (1.0 if plan.form in EXACT else 1.05)


def _bundles_of_item(problem: Problem, plan: Plan, chip: Chip) -> float:
    steps = pl.cdiv(problem.n, plan.block_n) * pl.cdiv(problem.k, plan.block_k)
    return steps * bundles_of_step(problem, plan, chip)


def tile_rows_of(rows: int, experts: int) -> int:
    size = SMALLEST_TILE
    while size < LARGEST_TILE and size * experts < rows:
        size *= 2
    return size


def _call(
    x: jax.Array, w: Packed, table: Any, items: Items, bm: int, plan: Plan, spec: PackedSpec, interpret: bool
) -> jax.Array:
    (rows, k), n = x.shape, w.codes.shape[2]
    bk, bn = plan.block_k, plan.block_n
    steps = pl.cdiv(k, bk)
    group = bk if spec.num_groups == 1 else min(bk, spec.group_size)
    repeat = steps if spec.num_groups == 1 else max(1, spec.group_size // bk)  # blocks that share a row of scales
    per_block = bk // group
    x = jnp.pad(x, ((0, -rows % bm), (0, steps * bk - k)))
    x = in_order(x, group, plan.form, from_table=table is not None)
    missing = 0 if repeat > 1 else max(0, steps * per_block - w.scale.shape[1])

    def block_of(step: Any, item: Any, used: Any) -> Any:
        """Of K; idle items stay at the last one's."""
        return jnp.where(item < used[0], step, steps - 1)

    def of_expert(j: Any, i: Any, k: Any, tile: Any, expert: Any, first: Any, end: Any, used: Any) -> Any:
        return expert[i], block_of(k, i, used), j

    def of_groups(j: Any, i: Any, k: Any, tile: Any, expert: Any, first: Any, end: Any, used: Any) -> Any:
        return expert[i], lax.div(block_of(k, i, used), jnp.int32(repeat)), 0, j

    parts = {"codes": w.codes}
    blocks = {"x": pl.BlockSpec((bm, x.shape[1]), lambda j, i, k, tile, *_: (tile[i], 0))}
    blocks["codes"] = pl.BlockSpec((None, bk // tpu_forms.rows_of_a_code(w.codes, spec.bits), bn), of_expert)
    for name, part in zip(("scale", "zero_point", "offset"), w[1:], strict=True):
        if part is not None:
            parts[name] = by_blocks(part, n, missing)
            blocks[name] = pl.BlockSpec((None, per_block, 1, bn), of_groups)
    if table is not None:
        parts["table"], blocks["table"] = tpu_tables.operand(table)
    kernel = functools.partial(_kernel, names=tuple(blocks), plan=plan, group=group, steps=steps, interpret=interpret)
    out = pl.pallas_call(
        kernel,
        name="grouped_int4_matmul",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=(pl.cdiv(n, bn), items.tile.shape[0], steps),
            in_specs=list(blocks.values()),
            out_specs=pl.BlockSpec((bm, bn), lambda j, i, k, tile, *_: (tile[i], j)),
            scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        ),
        out_shape=shape_varying_as((x.shape[0], n), jnp.float32, [x, *parts.values()]),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=plan.vmem_limit,
            allow_input_fusion=reads_in_place(items, blocks, w, plan.loops),
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
    )(*items, x, *parts.values())
    return jnp.where((jnp.arange(rows) < rows_of(items, bm))[:, None], out[:rows], 0.0)


def reads_in_place(items: Items, names: Iterable[str], w: Packed, loops: bool) -> list[bool]:
    """Which operands XLA may slice out of a stack of layers while the kernel reads them (int4_matmul/tpu.py): words."""
    words = w.codes.dtype == jnp.int32 and not loops
    return [False] * len(items) + [name == "codes" and words for name in names]


def by_blocks(part: jax.Array, n: int, missing: int) -> jax.Array:
    """[E, G, 1, N] of [E, G, 1, N or 1], and rows of zeros for the groups that the last block of K has too many."""
    wide = jnp.broadcast_to(tpu_forms.without_float16(part), (*part.shape[:-1], n))
    return jnp.pad(wide, ((0, 0), (0, missing), (0, 0), (0, 0)))


def _kernel(
    tile: Any, expert: Any, first: Any, end: Any, used: Any, *refs: Any,
    names: tuple[str, ...], plan: Plan, group: int, steps: int, interpret: bool,
) -> None:  # fmt: skip
    *inputs, out, total = refs
    item, step = pl.program_id(1), pl.program_id(2)
    operands = dict(zip(names, inputs, strict=True))
    x = operands["x"]
    if steps > 1:
        x = x.at[:, pl.ds(pl.multiple_of(step * plan.block_k, plan.block_k), plan.block_k)]
    rest = [operands.get(name) for name in ("scale", "zero_point", "offset", "table")]

    @pl.when(item < used[0])
    def _() -> None:
        @pl.when(step == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        form = tpu_forms.form_of(plan.form, plan.wide, interpret)
        tpu_forms.accumulate(form, tpu_forms.Block(x, operands["codes"], *rest), group, plan.chunk, total)

        @pl.when(step == steps - 1)
        def _() -> None:
            row = lax.broadcasted_iota(jnp.int32, total.shape, 0)
            own = (row >= first[item]) & (row < end[item])
            out[...] = jnp.where(own, total[...], out[...])
