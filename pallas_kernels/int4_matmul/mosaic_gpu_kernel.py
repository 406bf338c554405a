"""The kernel itself: out[M, N] = x[M, K] @ W[K, N] on Hopper, W in the hopper layout, by Pallas' Mosaic GPU backend.

    block         `columns` columns by `tile_m` rows of x; the grid is columns x splits of K x rows, the
                  last running fastest, so that blocks which read the same codes run at the same time
    warpgroups    one copies (TMA) blocks of codes, scales and x into `stages` rings of shared memory; each of the
                  others has `strips` strips of 64 columns: it unpacks a tile's codes in registers and multiplies
                  (mosaic_gpu_forms.py)

Of experts' weights (grouped_int4_matmul/mosaic_gpu.py) the rows of the grid are work items, each with a tile of x and
an expert that it looks up; blocks of idle ones end at once.

What a block reads beyond the ends of M and K are zeros (the copy engine's), and what it computes beyond the ends of M
and N is not written.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.int4_matmul.gpu_blocks import MOST_WARPGROUPS, GpuPlan
from pallas_kernels.int4_matmul.gpu_fragments import STRIP, TILE_K
from pallas_kernels.int4_matmul.mosaic_gpu_forms import FORMS, Rows, Shape, finished
from pallas_kernels.int4_matmul.mosaic_gpu_registers import ROW, words_shape
from pallas_kernels.int4_matmul.mosaic_gpu_seams import load, store

COPY_REGISTERS = 56
SWIZZLE = 128


def call(
    items: tuple[jax.Array, ...], x: jax.Array, words: jax.Array, scale: jax.Array, zero_point: Any,
    shape: Shape, plan: GpuPlan,
) -> jax.Array:  # fmt: skip
    """out_dtype[M, N], or f32[splits, M, N] of partial sums.

    Args:
      items: none; or for experts, whose weights have a leading axis E, the tile of x's rows and the expert of each work
        item, i32[items], and how many are in use, i32[1]. The result then is [items * tile_m, N], each item's tile.
      x: bf16 or f16[M, K], K a multiple of 8; or int8 or float8_e4m3fn, in the order of
        `gpu_fragments.in_order_of_bytes`.
      words: i32[N / 64, 2 * bits * ceil128(K)], see gpu_fragments.py.
      scale: float[G, N].
      zero_point: u8[G, N] or None.
      shape: sizes, dtypes.
      plan: how it is cut.
    """
    if plan.warpgroups > MOST_WARPGROUPS:
        raise ValueError(f"{plan} would wait for registers for ever: wanted at most {MOST_WARPGROUPS} warpgroups")
    codes = words.reshape(*words.shape[:-1], -1, *words_shape(shape.bits))  # [N / 64, K / 64, bits / 2, 256]
    operands = [*items, x, codes, scale] if zero_point is None else [*items, x, codes, scale, zero_point]
    kernel = plgpu.kernel(
        functools.partial(_kernel, shape=shape, plan=plan),
        out_type=result_type(shape, plan, shape.n),
        grid=(pl.cdiv(shape.n, plan.columns), plan.splits, shape.items or pl.cdiv(shape.m, plan.tile_m)),
        grid_names=("columns", "splits", "rows"),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={"staged": staged_type(shape, plan)},
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(*operands)


def _kernel(*refs: Any, shape: Shape, plan: GpuPlan, staged: Any) -> None:
    of_weight(refs, shape, functools.partial(_block, shape=shape, plan=plan, staged=staged))


def result_type(shape: Shape, plan: GpuPlan, columns: int) -> jax.ShapeDtypeStruct:
    """Of x's rows or of all work items' tiles; partial sums where K is split."""
    rows, split = shape.items * plan.tile_m or shape.m, (plan.splits,) if plan.splits > 1 else ()
    return jax.ShapeDtypeStruct((*split, rows, columns), jnp.float32 if split else shape.out_dtype)


def staged_type(shape: Shape, plan: GpuPlan) -> Any:
    """A block's result in shared memory."""
    dtype = result_type(shape, plan, shape.n).dtype
    return tiled((plan.columns // STRIP, plan.tile_m, STRIP), dtype)


def of_weight(refs: Any, shape: Shape, block: Callable[..., None]) -> None:
    """block([x, codes, ...], out, tile of x's rows, tile of the result's), of the one weight or of a work item's."""
    rows = lax.axis_index("rows")
    if not shape.items:
        *inputs, out = refs
        block(inputs, out, rows, rows)
        return
    tile, expert, used, x, *weight, out = refs

    @pl.when(rows < used[0])
    def _() -> None:
        own = expert[rows]
        block([x, *(part.at[own] for part in weight)], out, tile[rows], rows)


def _block(inputs: list[Any], out: Any, rows: Any, rows_out: Any, shape: Shape, plan: GpuPlan, staged: Any) -> None:
    """One block: of x the tile `rows`, into the tile `rows_out` of the result."""
    columns, split = (lax.axis_index(name) for name in ("columns", "splits"))
    steps = pl.cdiv(pl.cdiv(shape.k, plan.tile_k), plan.splits)
    first, own = split * steps, lax.axis_index("warpgroup") * plan.strips  # step of K, strip of the block
    strips = [(own + i, columns * (plan.columns // STRIP) + own + i) for i in range(plan.strips)]  # of block, of W
    whole = [_rows_of_column(inputs[2:], strip, shape) for _, strip in strips] if shape.groups == 1 else []
    multiply, sums_of, accumulators = FORMS[plan.form]

    def body(_: Any, x: Any, codes: Any, *rest: Any) -> Any:
        *by_row, sums = rest
        rows_of = whole or [_rows_of_step(by_row, strip, shape, plan) for strip, _ in strips]
        return multiply(shape, plan, x, [codes.at[strip] for strip, _ in strips], rows_of, sums)

    def write(sums: list[jax.Array]) -> None:
        scales = [rows.scale[0] for rows in whole] if plan.form == "column" else [None] * len(sums)
        parts = [finished(shape, total, scale) for total, scale in zip(sums, scales, strict=True)]
        where = out.at[split] if plan.splits > 1 else out
        write_tiles(parts, staged, where, rows_out, strips, shape.n // STRIP)

    def around(pipeline: Any) -> None:
        pl.run_scoped(lambda *totals: write(sums_of(plan, pipeline, totals)), *accumulators(shape, plan))

    pipeline = plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        in_specs=_blocks(shape, plan, rows, columns, first, len(inputs) - 2),
        memory_registers=COPY_REGISTERS,
        max_concurrent_steps=plan.stages,
        wg_axis="warpgroup",
        num_compute_wgs=plan.warpgroups,
        compute_context=around,
    )
    pipeline(*(inputs[:2] if shape.groups == 1 else inputs))


def write_tiles(
    parts: list[jax.Array], staged: Any, out: Any, rows: Any, strips: list[tuple[Any, Any]], count: int
) -> None:
    """[64, tile_m] each, transposed, to columns of `out`, by way of shared memory.

    Args:
      parts: f32.
      staged: [strips of the block, tile_m, 64], in shared memory.
      out: [M, N].
      rows: number of the tile of rows.
      strips: of each part its place in `staged`, and that of its 64 columns in `out`.
      count: of strips in `out`; those beyond are not written.
    """
    tile_m = staged.shape[-2]
    for part, (place, _) in zip(parts, strips, strict=True):
        store(staged.at[place].T, plgpu.layout_cast(part.astype(staged.dtype), plgpu.Layout.WGMMA_TRANSPOSED))
    plgpu.commit_smem()
    for place, column in strips:
        at = (pl.ds(rows * tile_m, tile_m), pl.ds(column * STRIP, STRIP))
        plgpu.copy_smem_to_gmem(staged.at[place], out.at[at], predicate=column < count)
    plgpu.wait_smem_to_gmem(0)


def _blocks(shape: Shape, plan: GpuPlan, rows: Any, columns: Any, first: Any, by_row: int) -> list[Any]:
    """What a step reads: x, codes, and the scales (and zero points) of its groups; those of one group are not in it."""
    per_step = max(1, plan.tile_k // shape.group_size)  # groups of a step
    repeat = jnp.int32(max(1, shape.group_size // plan.tile_k))  # steps of a group
    codes = (plan.columns // STRIP, plan.tile_k // TILE_K, *words_shape(shape.bits))
    x_block = plgpu.BlockSpec(
        (plan.tile_m, plan.tile_k), lambda step: (rows, first + step), transforms=transforms_of(shape.dtype)
    )
    of_groups = plgpu.BlockSpec((per_step, plan.columns), lambda step: (lax.div(first + step, repeat), columns))
    return [
        x_block,
        plgpu.BlockSpec(codes, lambda step: (columns, first + step, 0, 0)),
        *([of_groups] * by_row if shape.groups > 1 else []),
    ]


def _rows_of_step(by_row: list[Any], strip: Any, shape: Shape, plan: GpuPlan) -> Rows:
    count = max(1, plan.tile_k // shape.group_size)
    parts = [[load(ref.at[i, pl.ds(strip * STRIP, STRIP)], ROW) for i in range(count)] for ref in by_row]
    return Rows(*parts)


def _rows_of_column(by_row: list[Any], strip: Any, shape: Shape) -> Rows:
    """From memory, once; of a strip beyond the end, any, as nothing of it is written."""
    strip = jnp.minimum(strip, shape.n // STRIP - 1)
    return Rows(*([load(ref.at[0, pl.ds(strip * STRIP, STRIP)], ROW, optimized=False)] for ref in by_row))


def transforms_of(dtype: Any) -> tuple[Any, ...]:
    """Rows of 8 by TILE_K elements (128 bytes at most), as wgmma's descriptors and the copy engine know them."""
    swizzle = min(SWIZZLE, TILE_K * jnp.dtype(dtype).itemsize)
    tile = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return (tile, plgpu.SwizzleTransform(swizzle))


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=transforms_of(dtype))
