"""dx[M, K] = dy[M, N] @ W[K, N]^T on Hopper, from the codes that the forward product reads.

    sums[64 rows of W, tile_m] += W[64, 64] (shared memory)  dy^T[64, tile_m] (shared memory)         wgmma, in f32

The registers of the hopper layout hold W^T: wgmma wants the rows of its left operand spread over the warps, and those
are columns of W. Rows would have to change warps, so a tile goes through shared memory: unpacked and scaled in
registers as for the forward product (the "weights" form of mosaic_gpu_forms.py: scales lie along the contraction),
stored as 16-bit floats, and read from there by wgmma, which takes an operand of 16 bits in shared memory either way
round. Nothing dense is ever in HBM; what it costs beside the forward product is one store and one read of each weight
in shared memory, and a barrier a tile. XLA's form (gradients.py) for W[4096, 14336], compiled for an H200, needs 31 MiB
of temporaries at M = 16 and 52 MiB at M = 512: codes unpacked to int4, and blocks of K dense; this one none but dy.

    block         `columns` rows of W by `tile_m` rows of dy; the grid is blocks of K x splits of N x rows of dy
    warpgroups    one copies; each of the others has 64 rows of W, and two tiles in shared memory, one to fill while
                  the other is multiplied

A warp that fills a tile again must know that all four have multiplied by it: each waits for its own products before the
barrier that follows the filling of the other tile.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.int4_matmul.gpu_blocks import GpuPlan
from pallas_kernels.int4_matmul.gpu_fragments import STRIP, TILE_K
from pallas_kernels.int4_matmul.mosaic_gpu_forms import Shape, finished
from pallas_kernels.int4_matmul.mosaic_gpu_kernel import (
    COPY_REGISTERS,
    of_weight,
    result_type,
    staged_type,
    tiled,
    transforms_of,
    write_tiles,
)
from pallas_kernels.int4_matmul.mosaic_gpu_registers import ROW, floats_of, words_layout, words_shape
from pallas_kernels.int4_matmul.mosaic_gpu_seams import load, store


def call(
    items: tuple[jax.Array, ...], dy: jax.Array, words: jax.Array, scale: jax.Array, zero_point: Any,
    shape: Shape, plan: GpuPlan,
) -> jax.Array:  # fmt: skip
    """out_dtype[M, ceil128(K)], or f32[splits, M, ceil128(K)] of partial sums. Columns from K on are of no use.

    Args:
      items: none, or those of a product with experts, as mosaic_gpu_kernel.call takes them.
      dy: bf16 or f16[M, N].
      words: i32[N / 64, 2 * bits * ceil128(K)], see gpu_fragments.py.
      scale: float[G, N].
      zero_point: u8[G, N] or None.
      shape: sizes, dtypes; k is ceil128(K).
      plan: how it is cut, along K as others are along N; `tile_k` is the depth of a step along N.
    """
    codes = words.reshape(*words.shape[:-1], -1, *words_shape(shape.bits))  # [N / 64, K / 64, bits / 2, 256]
    operands = [*items, dy, codes, scale] if zero_point is None else [*items, dy, codes, scale, zero_point]
    kernel = plgpu.kernel(
        functools.partial(_kernel, shape=shape, plan=plan),
        out_type=result_type(shape, plan, shape.k),
        grid=(pl.cdiv(shape.k, plan.columns), plan.splits, shape.items or pl.cdiv(shape.m, plan.tile_m)),
        grid_names=("blocks", "splits", "rows"),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "staged": staged_type(shape, plan),
            "dense": tiled((plan.warpgroups, 2, STRIP, TILE_K), shape.dtype),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(*operands)


def _kernel(*refs: Any, shape: Shape, plan: GpuPlan, staged: Any, dense: Any) -> None:
    of_weight(refs, shape, functools.partial(_block, shape=shape, plan=plan, staged=staged, dense=dense))


def _block(
    inputs: list[Any], out: Any, rows: Any, rows_out: Any, shape: Shape, plan: GpuPlan, staged: Any, dense: Any
) -> None:
    """One block: of dy the tile `rows`, into the tile `rows_out` of the result."""
    block, split = (lax.axis_index(name) for name in ("blocks", "splits"))
    steps = pl.cdiv(pl.cdiv(shape.n, plan.tile_k), plan.splits)
    own = lax.axis_index("warpgroup")

    def body(_: Any, dy: Any, codes: Any, *rest: Any) -> Any:
        *by_group, totals = rest
        for strip in range(plan.tile_k // STRIP):
            weights = _weights(shape, codes.at[strip, own], by_group, own, strip)
            tile = dense.at[own, strip % 2]
            store(tile, weights)
            plgpu.wgmma_wait(0)
            plgpu.commit_smem()
            plgpu.wgmma(totals[0], tile.T, dy.at[:, pl.ds(strip * STRIP, STRIP)].T)
        plgpu.wgmma_wait(0)
        return totals

    def around(pipeline: Any) -> None:
        def run(total: Any) -> None:
            pipeline((total,))
            where = out.at[split] if plan.splits > 1 else out
            tile = block * plan.warpgroups + own
            write_tiles([finished(shape, total[...])], staged, where, rows_out, [(own, tile)], shape.k // TILE_K)

        pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((TILE_K, plan.tile_m), jnp.float32))

    pipeline = plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        in_specs=_blocks(shape, plan, rows, block, split * steps, len(inputs) - 2),
        memory_registers=COPY_REGISTERS,
        max_concurrent_steps=plan.stages,
        wg_axis="warpgroup",
        num_compute_wgs=plan.warpgroups,
        compute_context=around,
    )
    pipeline(*inputs)


def _weights(shape: Shape, codes: Any, by_group: list[Any], own: Any, strip: int) -> jax.Array:
    """[64 columns, 64 rows] of W: unpacked, scaled."""
    count = max(1, TILE_K // shape.group_size)  # groups of a tile
    first = 0 if by_group[0].shape[0] == 1 else own * count
    columns = pl.ds(strip * STRIP, STRIP)
    scale, *zero = ([load(ref.at[first + i, columns], ROW) for i in range(count)] for ref in by_group)
    scales = [one.astype(shape.dtype) for one in scale]
    zeros = [one.astype(jnp.int32) for some in zero for one in some]
    convert = floats_of(shape.dtype, shape.bits, len(scales), len(zeros))
    return convert(load(codes, words_layout(shape.bits)), *scales, *zeros)


def _blocks(shape: Shape, plan: GpuPlan, rows: Any, block: Any, first: Any, by_group: int) -> list[Any]:
    """What a step reads: dy, codes, and the scales (and zero points) of the block's groups."""
    groups = 1 if shape.groups == 1 else max(1, plan.columns // shape.group_size)
    repeat = max(1, shape.group_size // plan.columns)  # blocks of a group
    group = jnp.int32(0) if shape.groups == 1 else lax.div(block, jnp.int32(repeat))
    dy = plgpu.BlockSpec(
        (plan.tile_m, plan.tile_k), lambda step: (rows, first + step), transforms=transforms_of(shape.dtype)
    )
    codes = (plan.tile_k // STRIP, plan.warpgroups, *words_shape(shape.bits))
    of_groups = plgpu.BlockSpec((groups, plan.tile_k), lambda step: (group, first + step))
    return [dy, plgpu.BlockSpec(codes, lambda step: (first + step, block, 0, 0)), *[of_groups] * by_group]
