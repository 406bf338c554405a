"""The kernel for Ampere and Ada: out[M, N] = x[M, K] @ W[K, N], W in the hopper layout, by Pallas' Mosaic GPU backend.

What wgmma wants of a warpgroup's registers is what mma (m16n8k16) wants of each of its warps, so codes, their order and
how they become floats are Hopper's (gpu_fragments.py, mosaic_gpu_registers.py). What differs:

    block       one warpgroup, `strips` strips of 64 columns by `tile_m` rows of x; several blocks share a core, and
                hide each other's waits, where Hopper has warpgroups of one block do so
    copies      cp.async by all threads, of 16 bytes, `stages` steps ahead. It fills in no zeros and asks for no bounds:
                `plan` divides N and K, x is padded to whole tiles
    scales      read from memory into registers a step ahead: rows of 64 16-bit scales are too short for cp.async
    products    mma of registers alone: x comes by ldmatrix, sums of a group stay in registers and are scaled there,
                nothing is waited for

Marlin (Frantar et al., 2024) is built likewise, and deals its weights out to four warps along K as well.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling

from pallas_kernels.int4_matmul.gpu_blocks import GpuPlan
from pallas_kernels.int4_matmul.gpu_fragments import STRIP, TILE_K
from pallas_kernels.int4_matmul.mosaic_gpu_forms import Rows, Shape, finished, of_tile, scaled
from pallas_kernels.int4_matmul.mosaic_gpu_kernel import result_type, transforms_of
from pallas_kernels.int4_matmul.mosaic_gpu_registers import ROW, floats_of
from pallas_kernels.int4_matmul.mosaic_gpu_seams import left_layout, load, mma, right_layout, store

LINE = 32  # words of a row of codes in shared memory: 128 bytes
# Word 4 t + i of 512 lies in thread t: of 16 lines each warp has four, each of their eight threads 16 bytes.
WORDS = plgpu.Layout.TILED(Tiling(((16, LINE), (4, LINE), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def call(
    items: tuple[jax.Array, ...], x: jax.Array, words: jax.Array, scale: jax.Array, zero_point: Any,
    shape: Shape, plan: GpuPlan,
) -> jax.Array:  # fmt: skip
    """out_dtype[M, N], or f32[splits, M, N] of partial sums.

    Args:
      items: none.
      x: bf16 or f16[M, K], whole tiles of `plan`.
      words: i32[N / 64, 2 * bits * ceil128(K)], see gpu_fragments.py.
      scale: float[G, N].
      zero_point: u8[G, N] or None.
      shape: sizes, dtypes.
      plan: how it is cut.
    """
    assert not items
    operands = [x, words.reshape(-1, LINE), scale, *([] if zero_point is None else [zero_point])]
    staged = plgpu.SMEM((plan.tile_m, STRIP), _staged_dtype(shape, plan), transforms=_staged_transforms(shape, plan))
    kernel = plgpu.kernel(
        functools.partial(_block, shape=shape, plan=plan),
        out_type=result_type(shape, plan, shape.n),
        grid=(shape.n // plan.columns, plan.splits, shape.m // plan.tile_m),
        grid_names=("columns", "splits", "rows"),
        scratch_types={"staged": staged},
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(*operands)


def _block(x: Any, words: Any, *rest: Any, shape: Shape, plan: GpuPlan, staged: Any) -> None:
    """One block: a tile of the result, or of the partial sums of a split."""
    *by_row, out = rest
    columns, split, rows = (lax.axis_index(name) for name in ("columns", "splits", "rows"))
    strips = [columns * plan.strips + i for i in range(plan.strips)]
    steps = shape.k // plan.tile_k // plan.splits
    first = split * steps

    def rows_of(step: Any) -> list[Rows]:
        return [_rows_of_step(by_row, strip, first + step, shape, plan) for strip in strips]

    def body(indices: Any, x: Any, *refs_and_carry: Any) -> Any:
        *codes, (sums, held) = refs_and_carry
        following = rows_of(jnp.minimum(indices[0] + 1, steps - 1))
        return _step(shape, plan, x, codes, held, sums), following

    def lines_of(strip: Any) -> Any:
        lines = 2 * shape.bits * plan.tile_k // LINE
        per_strip = shape.k // plan.tile_k
        return plgpu.BlockSpec(
            (lines, LINE), lambda step: (strip * per_strip + first + step, 0), transforms=transforms_of(jnp.int32)
        )

    x_block = plgpu.BlockSpec(
        (plan.tile_m, plan.tile_k), lambda step: (rows, first + step), transforms=transforms_of(shape.dtype)
    )
    pipeline = plgpu.emit_pipeline(
        body,
        grid=(steps,),
        in_specs=[x_block, *map(lines_of, strips)],
        max_concurrent_steps=plan.stages,
        init_carry=([_zeros(plan)] * plan.strips, rows_of(jnp.int32(0))),
    )
    sums, last = pipeline(x, *[words] * plan.strips)
    where = out.at[split] if plan.splits > 1 else out
    for strip, total, own in zip(strips, sums, last, strict=True):
        part = finished(shape, total, own.scale[0] if plan.form == "column" else None)
        _write(part, staged, where, rows, strip)


def _rows_of_step(by_row: list[Any], strip: Any, step: Any, shape: Shape, plan: GpuPlan) -> Rows:
    """Scales and zero points of a step's groups, from memory; of rows that only fill up the last tile, the last's."""
    first = lax.div(step * plan.tile_k, jnp.int32(shape.group_size))
    groups = [first + i for i in range(max(1, plan.tile_k // shape.group_size))]
    if shape.groups * shape.group_size < shape.k:
        groups = [jnp.minimum(group, shape.groups - 1) for group in groups]
    at = pl.ds(strip * STRIP, STRIP)
    return Rows(*([load(ref.at[group, at], ROW, optimized=False) for group in groups] for ref in by_row))


def _step(shape: Shape, plan: GpuPlan, x: Any, codes: list[Any], rows_of: list[Rows], sums: list[Any]) -> list[Any]:
    """One step's products: chains of a group each, scaled and added; or one chain, of scaled weights or of levels."""
    chain = min(shape.group_size, plan.tile_k) if plan.form == "sums" else 0
    piece = min(TILE_K, chain) if chain else TILE_K
    totals, partial = list(sums), list(sums)
    for tile in range(plan.tile_k // TILE_K):
        right = load(x.at[:, pl.ds(tile * TILE_K, TILE_K)].T, right_layout(shape.dtype))
        left = [_weights(shape, plan, ref, rows, tile) for ref, rows in zip(codes, rows_of, strict=True)]
        for start in range(0, TILE_K, piece):
            row, part = tile * TILE_K + start, slice(start, start + piece)
            for i, rows in enumerate(rows_of):
                before = _zeros(plan) if chain and row % chain == 0 else partial[i]
                partial[i] = mma(before, left[i][:, part], right[part])
                if chain and (row + piece) % chain == 0:
                    totals[i] = totals[i] + scaled(partial[i], rows.scale[row // chain])
    return totals if chain else partial


def _weights(shape: Shape, plan: GpuPlan, codes: Any, rows: Rows, tile: int) -> jax.Array:
    """A tile of a strip in registers: levels, or weights."""
    tiles, lines = plan.tile_k // TILE_K, 2 * shape.bits * TILE_K // LINE
    scales_weights = plan.form == "weights"
    scales = [one.astype(shape.dtype) for one in of_tile(rows.scale, tile, tiles)] if scales_weights else []
    zeros = [one.astype(jnp.int32) for one in of_tile(rows.zero_point or [], tile, tiles)]
    convert = floats_of(
        shape.dtype, shape.bits, len(scales), len(zeros), words_in=WORDS, result_in=left_layout(shape.dtype)
    )
    return convert(load(codes.at[pl.ds(tile * lines, lines)], WORDS), *scales, *zeros)


def _zeros(plan: GpuPlan) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((STRIP, plan.tile_m), jnp.float32), plgpu.Layout.WGMMA)


def _write(part: jax.Array, staged: Any, out: Any, rows: Any, strip: Any) -> None:
    """[64, tile_m], transposed, to a tile of rows and a strip of `out`, by way of shared memory."""
    tile_m = staged.shape[-2]
    store(staged.T, plgpu.layout_cast(part.astype(staged.dtype), plgpu.Layout.WGMMA_TRANSPOSED))
    at = (pl.ds(rows * tile_m, tile_m), pl.ds(strip * STRIP, STRIP))
    layout = plgpu.Layout.SMEM_GMEM_COPY((tile_m, STRIP), staged.dtype, swizzle=_staged_swizzle(tile_m, staged.dtype))
    out[at] = plgpu.layout_cast(staged[...], layout)


def _staged_dtype(shape: Shape, plan: GpuPlan) -> Any:
    return result_type(shape, plan, shape.n).dtype


def _staged_swizzle(tile_m: int, dtype: Any) -> int:
    """Bytes of a row of tiles: such that the four warps have a tile each."""
    return min(128, 2 * tile_m * jnp.dtype(dtype).itemsize)


def _staged_transforms(shape: Shape, plan: GpuPlan) -> tuple[Any, ...]:
    dtype = _staged_dtype(shape, plan)
    swizzle = _staged_swizzle(plan.tile_m, dtype)
    return (plgpu.TilingTransform((8, swizzle // dtype.itemsize)), plgpu.SwizzleTransform(swizzle))
