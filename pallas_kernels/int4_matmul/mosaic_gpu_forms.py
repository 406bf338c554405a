"""A step of a warpgroup: tiles of codes to floats in registers, products, sums.

    sums[64, tile_m] += W^T[64, 64] (registers)  x^T[64, tile_m] (shared memory)          wgmma, in f32

    "sums"      one chain of wgmma a group and step; its result is scaled, in f32, and added up
    "weights"   weights are scaled in registers (rounded to x's dtype), one chain over all of K
    "column"    one scale a column: one chain over all of K, scaled at the end

With several strips their chains are asked for in turn, so that one is multiplied while the next is unpacked.
`FORMS` has for each form its step, how the pipeline around it is run, and what accumulators that takes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.int4_matmul.gpu_blocks import GpuPlan
from pallas_kernels.int4_matmul.gpu_fragments import STRIP, TILE_K
from pallas_kernels.int4_matmul.mosaic_gpu_registers import WORDS_LAYOUT, floats_of
from pallas_kernels.int4_matmul.mosaic_gpu_seams import load


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


class Rows(NamedTuple):
    """What a strip's 64 columns have for each group of a step: scales and zero points, [64] each."""

    scale: list[Any]
    zero_point: list[Any] | None = None


def sums_step(shape: Shape, plan: GpuPlan, x: Any, codes: Sequence[Any], rows_of: Sequence[Rows], sums: Any) -> Any:
    """f32[64, tile_m] a strip, and one step's products: a chain for each group of the step, scaled and added."""
    group, sums = min(shape.group_size, plan.tile_k), list(sums)
    convert = floats_of(shape.dtype, 0, int(shape.zero_points))
    for i in range(len(rows_of[0].scale)):

        def chains(*partial: Any, i: int = i) -> list[jax.Array]:
            for tile in range(i * group // TILE_K, (i + 1) * group // TILE_K):
                for strip, rows in enumerate(rows_of):
                    zeros = [] if rows.zero_point is None else [rows.zero_point[i].astype(jnp.int32)]
                    _multiply(convert, x, codes[strip], tile, zeros, partial[strip])
            return [one[...] for one in partial]

        products = pl.run_scoped(chains, *_accumulators(plan))
        for strip, (rows, product) in enumerate(zip(rows_of, products, strict=True)):
            scale = lax.broadcast_in_dim(rows.scale[i].astype(jnp.float32), product.shape, [0])
            sums[strip] = sums[strip] + product * scale
    return tuple(sums)


def chain_step(shape: Shape, plan: GpuPlan, x: Any, codes: Sequence[Any], rows_of: Sequence[Rows], totals: Any) -> Any:
    """One step of one chain a strip: weights scaled in registers, or levels where one scale serves a column."""
    scaled, tiles = plan.form == "weights", plan.tile_k // TILE_K
    per_tile = max(1, len(rows_of[0].scale) // tiles)
    convert = floats_of(shape.dtype, per_tile if scaled else 0, per_tile if shape.zero_points else 0)
    for tile in range(tiles):
        for strip, rows in enumerate(rows_of):
            scales = [one.astype(shape.dtype) for one in _of_tile(rows.scale, tile, tiles)] if scaled else []
            zeros = [one.astype(jnp.int32) for one in _of_tile(rows.zero_point or [], tile, tiles)]
            _multiply(convert, x, codes[strip], tile, [*scales, *zeros], totals[strip])
    plgpu.wgmma_wait(0)
    return totals


def _multiply(convert: Any, x: Any, codes: Any, tile: int, parts: list[Any], total: Any) -> None:
    weights = convert(load(codes.at[tile], WORDS_LAYOUT), *parts)
    plgpu.wgmma(total, weights, x.at[:, pl.ds(tile * TILE_K, TILE_K)].T)


def _of_tile(rows: list[Any], tile: int, tiles: int) -> list[Any]:
    """Those of a tile's groups; one where a group is longer than a tile."""
    first = tile * len(rows) // tiles
    return rows[first : first + max(1, len(rows) // tiles)]


def _accumulators(plan: GpuPlan) -> list[Any]:
    return [plgpu.WGMMAAccumulatorRef((STRIP, plan.tile_m), jnp.float32)] * plan.strips


def _sums_in_registers(plan: GpuPlan, pipeline: Any, totals: Sequence[Any]) -> list[jax.Array]:
    del totals
    zeros = plgpu.layout_cast(jnp.zeros((STRIP, plan.tile_m), jnp.float32), plgpu.Layout.WGMMA)
    return list(pipeline((zeros,) * plan.strips))


def _sums_of_chains(plan: GpuPlan, pipeline: Any, totals: Sequence[Any]) -> list[jax.Array]:
    del plan
    pipeline(tuple(totals))
    return [total[...] for total in totals]


class Form(NamedTuple):
    """step(shape, plan, x, codes, rows, sums) -> sums; run(plan, pipeline, accumulators) -> [f32[64, tile_m]]."""

    step: Callable[..., Any]
    run: Callable[..., list[jax.Array]]
    accumulators: Callable[[GpuPlan], list[Any]]


FORMS = {
    "sums": Form(sums_step, _sums_in_registers, lambda plan: []),
    "weights": Form(chain_step, _sums_of_chains, _accumulators),
    "column": Form(chain_step, _sums_of_chains, _accumulators),
}
