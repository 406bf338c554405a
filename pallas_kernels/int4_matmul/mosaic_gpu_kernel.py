"""The kernel itself: out[M, N] = x[M, K] @ W[K, N] on Hopper, W in the hopper layout, by Pallas' Mosaic GPU backend.

    block         `warpgroups` strips of 64 columns by `tile_m` rows of x; the grid is rows x columns x splits of K
    warpgroups    one copies (TMA) blocks of codes, scales and x into `stages` rings of shared memory; each of the
                  others unpacks the codes of its strip in registers and multiplies, transposed:

                      sums[64, tile_m] += W^T[64, 64] (registers)  x^T[64, tile_m] (shared memory)      wgmma, f32

    forms         "sums"      one chain of wgmma a group and step; its result is scaled, in f32, and added up
                  "weights"   weights are scaled in registers (rounded to x's dtype), one chain over all of K
                  "column"    one scale a column: one chain over all of K, scaled at the end

What a block reads beyond the ends of M and K are zeros (the copy engine's), and what it computes beyond the ends of M
and N is not written.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.int4_matmul.gpu_blocks import GpuPlan
from pallas_kernels.int4_matmul.gpu_fragments import STRIP, TILE_K
from pallas_kernels.int4_matmul.mosaic_gpu_registers import ROW, WORDS_LAYOUT, WORDS_SHAPE, floats_of
from pallas_kernels.int4_matmul.mosaic_gpu_seams import load

COPY_REGISTERS = 40
SWIZZLE = 128


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for beside its plan."""

    m: int
    k: int
    n: int
    group_size: int
    groups: int
    dtype: Any
    out_dtype: Any
    zero_points: bool


def call(x: jax.Array, words: jax.Array, scale: jax.Array, zero_point: Any, shape: Shape, plan: GpuPlan) -> jax.Array:
    """out_dtype[M, N], or f32[splits, M, N] of partial sums.

    Args:
      x: bf16 or f16[M, K], K a multiple of 8.
      words: i32[N / 64, ceil(K / 128) * 1024], see gpu_fragments.py.
      scale: float[G, N].
      zero_point: u8[G, N] or None.
      shape: sizes, dtypes.
      plan: how it is cut.
    """
    codes = words.reshape(shape.n // STRIP, -1, *WORDS_SHAPE)  # [N / 64, K / 64, 2, 256]
    operands = [x, codes, scale] if zero_point is None else [x, codes, scale, zero_point]
    split = (plan.splits,) if plan.splits > 1 else ()
    out_dtype = jnp.float32 if split else shape.out_dtype
    kernel = plgpu.kernel(
        functools.partial(_kernel, shape=shape, plan=plan),
        out_type=jax.ShapeDtypeStruct((*split, shape.m, shape.n), out_dtype),
        grid=(pl.cdiv(shape.m, plan.tile_m), pl.cdiv(shape.n, plan.columns), plan.splits),
        grid_names=("rows", "columns", "splits"),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={"staged": _tiled((plan.warpgroups, plan.tile_m, STRIP), out_dtype)},
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(*operands)


def _kernel(*refs: Any, shape: Shape, plan: GpuPlan, staged: Any) -> None:
    *inputs, out = refs
    rows, columns, split = (lax.axis_index(name) for name in ("rows", "columns", "splits"))
    own = lax.axis_index("warpgroup")
    one_group = shape.groups == 1
    steps = pl.cdiv(pl.cdiv(shape.k, plan.tile_k), plan.splits)
    first = split * steps
    per_step = max(1, plan.tile_k // shape.group_size)  # groups of a step
    repeat = max(1, shape.group_size // plan.tile_k)  # steps of a group

    def of_group(step: Any) -> tuple[Any, Any]:
        return (lax.div(first + step, jnp.int32(repeat)), columns)

    by_group = plgpu.BlockSpec((per_step, plan.columns), of_group)
    specs = [
        plgpu.BlockSpec(
            (plan.tile_m, plan.tile_k), lambda step: (rows, first + step), transforms=_transforms(shape.dtype)
        ),
        plgpu.BlockSpec(
            (plan.warpgroups, plan.tile_k // TILE_K, *WORDS_SHAPE), lambda step: (columns, first + step, 0, 0)
        ),
        *([] if one_group else [by_group] * (len(inputs) - 2)),
    ]
    own_strip = columns * plan.warpgroups + own
    strip = jnp.minimum(own_strip, shape.n // STRIP - 1)  # beyond the end: any, it is not written
    whole = (
        [load(ref.at[0, pl.ds(strip * STRIP, STRIP)], ROW, optimized=False) for ref in inputs[2:]] if one_group else []
    )
    multiply = _multiply_of(shape, plan)

    def body(_: Any, x: Any, codes: Any, *rest: Any) -> Any:
        *by_row, sums = rest
        rows_of = [[load(ref.at[i, pl.ds(own * STRIP, STRIP)], ROW) for i in range(per_step)] for ref in by_row]
        return multiply(x, codes.at[own], rows_of if not one_group else [[part] for part in whole], sums)

    def write(sums: jax.Array) -> None:
        if one_group:
            sums = sums * lax.broadcast_in_dim(whole[0].astype(jnp.float32), sums.shape, [0])
        tile = staged.at[own]
        tile.T[...] = plgpu.layout_cast(sums.astype(staged.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        where = out.at[split] if plan.splits > 1 else out
        at = (pl.ds(rows * plan.tile_m, plan.tile_m), pl.ds(own_strip * STRIP, STRIP))
        plgpu.copy_smem_to_gmem(tile, where.at[at], predicate=own_strip < shape.n // STRIP)
        plgpu.wait_smem_to_gmem(0)

    def around(pipeline: Any) -> None:
        if plan.form == "sums":
            zeros = plgpu.layout_cast(jnp.zeros((STRIP, plan.tile_m), jnp.float32), plgpu.Layout.WGMMA)
            write(pipeline(zeros))
            return

        def chain(total: Any) -> None:
            pipeline(total)
            write(total[...])

        pl.run_scoped(chain, plgpu.WGMMAAccumulatorRef((STRIP, plan.tile_m), jnp.float32))

    plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        in_specs=specs,
        memory_registers=COPY_REGISTERS,
        max_concurrent_steps=plan.stages,
        wg_axis="warpgroup",
        num_compute_wgs=plan.warpgroups,
        compute_context=around,
    )(*(inputs[:2] if one_group else inputs))


def _multiply_of(shape: Shape, plan: GpuPlan) -> Any:
    return functools.partial({"sums": _by_sums, "weights": _by_weights, "column": _by_weights}[plan.form], shape, plan)


def _by_sums(shape: Shape, plan: GpuPlan, x: Any, codes: Any, rows_of: list[Any], sums: jax.Array) -> jax.Array:
    """f32[64, tile_m] and one step's products: a chain for each group of the step, scaled and added."""
    group = min(shape.group_size, plan.tile_k)
    scales, zeros = rows_of[0], rows_of[1] if shape.zero_points else None
    convert = floats_of(shape.dtype, 0, 1 if shape.zero_points else 0)
    for i, scale in enumerate(scales):
        parts = [] if zeros is None else [zeros[i].astype(jnp.int32)]

        def chain(partial: Any, i: int = i, parts: list[Any] = parts) -> jax.Array:
            for tile in range(i * group // TILE_K, (i + 1) * group // TILE_K):
                weights = convert(load(codes.at[tile], WORDS_LAYOUT), *parts)
                plgpu.wgmma(partial, weights, x.at[:, pl.ds(tile * TILE_K, TILE_K)].T)
            return partial[...]

        product = pl.run_scoped(chain, plgpu.WGMMAAccumulatorRef((STRIP, plan.tile_m), jnp.float32))
        sums = sums + product * lax.broadcast_in_dim(scale.astype(jnp.float32), product.shape, [0])
    return sums


def _by_weights(shape: Shape, plan: GpuPlan, x: Any, codes: Any, rows_of: list[Any], total: Any) -> Any:
    """One step of one chain: weights scaled in registers, or levels where one scale serves a column."""
    scaled, tiles = plan.form == "weights", plan.tile_k // TILE_K
    per_tile = max(1, len(rows_of[0]) // tiles)
    scales = [scale.astype(shape.dtype) for scale in rows_of[0]] if scaled else []
    zeros = [zero.astype(jnp.int32) for zero in rows_of[1]] if shape.zero_points else []
    convert = floats_of(shape.dtype, per_tile if scaled else 0, per_tile if zeros else 0)
    for tile in range(tiles):
        parts = [part for rows in (scales, zeros) if rows for part in _of_tile(rows, tile, tiles, per_tile)]
        weights = convert(load(codes.at[tile], WORDS_LAYOUT), *parts)
        plgpu.wgmma(total, weights, x.at[:, pl.ds(tile * TILE_K, TILE_K)].T)
    plgpu.wgmma_wait(0)
    return total


def _of_tile(rows: list[Any], tile: int, tiles: int, per_tile: int) -> list[Any]:
    first = tile * len(rows) // tiles
    return rows[first : first + per_tile]


def _transforms(dtype: Any) -> tuple[Any, ...]:
    """Rows of 8 by 128 bytes, as wgmma's descriptors and the copy engine know them."""
    tile = plgpu.TilingTransform((8, SWIZZLE // jnp.dtype(dtype).itemsize))
    return (tile, plgpu.SwizzleTransform(SWIZZLE))


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=_transforms(dtype))
