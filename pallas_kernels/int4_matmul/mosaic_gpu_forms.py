"""A step of a warpgroup: tiles of codes to floats (or bytes) in registers, products, sums.

    sums[64, tile_m] += W^T[64, 64] (registers)  x^T[64, tile_m] (shared memory)          wgmma, in f32 (or int32)

    "sums"      one chain of wgmma a group and step (of e4m3 at most CHAIN rows); its result is scaled, in f32, and
                added up
    "weights"   weights are scaled in registers (rounded to x's dtype), one chain over all of K
    "column"    one scale a column: one chain over all of K, scaled at the end

Where x is int8 there are "sums" and "column", where it is e4m3 "sums" alone. With several strips their chains are asked
for in turn, so that one is multiplied while the next is unpacked. `FORMS` has for each form its step, how the pipeline
around it is run, and what accumulators that takes.
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
from pallas_kernels.int4_matmul.mosaic_gpu_bytes import CHAIN, bytes_of, factor_of, zero_bytes_of
from pallas_kernels.int4_matmul.mosaic_gpu_registers import factor_of_floats, floats_of, words_layout
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
    bits: int = 4
    items: int = 0  # work items, of a product with experts

    @property
    def in_bytes(self) -> bool:
        return jnp.dtype(self.dtype).itemsize == 1

    @property
    def factor(self) -> float:
        """What sums are multiplied by beside their scales."""
        if self.in_bytes:
            return factor_of(self.dtype, self.bits, self.zero_points)
        return factor_of_floats(self.dtype)

    def chain(self, plan: GpuPlan) -> int:
        """Rows of W whose products are summed before they are scaled."""
        rows = plan.tile_k if self.groups == 1 else min(self.group_size, plan.tile_k)
        return min(rows, CHAIN) if self.dtype == jnp.float8_e4m3fn else rows


class Rows(NamedTuple):
    """What a strip's 64 columns have for each group of a step: scales and zero points, [64] each."""

    scale: list[Any]
    zero_point: list[Any] | None = None


def sums_step(shape: Shape, plan: GpuPlan, x: Any, codes: Sequence[Any], rows_of: Sequence[Rows], sums: Any) -> Any:
    """f32[64, tile_m] a strip, and one step's products: chains for each group of the step, scaled and added."""
    tiles, sums = shape.chain(plan) // TILE_K, list(sums)
    count = plan.tile_k // TILE_K // tiles
    convert = _operand_of(shape, 0, int(shape.zero_points))
    for chain in range(count):
        group = chain * len(rows_of[0].scale) // count

        def chains(*partial: Any, chain: int = chain, group: int = group) -> list[jax.Array]:
            for tile in range(chain * tiles, (chain + 1) * tiles):
                for strip, rows in enumerate(rows_of):
                    zeros = [] if rows.zero_point is None else [_zero_of(shape, rows.zero_point[group])]
                    _multiply(shape, convert, x, codes[strip], tile, zeros, partial[strip])
            return [one[...] for one in partial]

        products = pl.run_scoped(chains, *_accumulators(shape, plan))
        for strip, (rows, product) in enumerate(zip(rows_of, products, strict=True)):
            sums[strip] = sums[strip] + scaled(product, rows.scale[group])
    return tuple(sums)


def chain_step(shape: Shape, plan: GpuPlan, x: Any, codes: Sequence[Any], rows_of: Sequence[Rows], totals: Any) -> Any:
    """One step of one chain a strip: weights scaled in registers, or levels where one scale serves a column."""
    scales_weights, tiles = plan.form == "weights", plan.tile_k // TILE_K
    per_tile = max(1, len(rows_of[0].scale) // tiles)
    convert = _operand_of(shape, per_tile if scales_weights else 0, per_tile if shape.zero_points else 0)
    for tile in range(tiles):
        for strip, rows in enumerate(rows_of):
            scales = [one.astype(shape.dtype) for one in of_tile(rows.scale, tile, tiles)] if scales_weights else []
            zeros = [_zero_of(shape, one) for one in of_tile(rows.zero_point or [], tile, tiles)]
            _multiply(shape, convert, x, codes[strip], tile, [*scales, *zeros], totals[strip])
    plgpu.wgmma_wait(0)
    return totals


def scaled(product: jax.Array, scale: jax.Array) -> jax.Array:
    """f32[64, tile_m]: what a chain of levels gave, times its columns' scales."""
    return product.astype(jnp.float32) * lax.broadcast_in_dim(scale.astype(jnp.float32), product.shape, [0])


def finished(shape: Shape, total: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """f32[64, tile_m]: a block's sums, times their columns' one scale where it has not been in them, and the factor."""
    total = total if scale is None else scaled(total, scale)
    return total if shape.factor == 1.0 else total * jnp.float32(shape.factor)


def _operand_of(shape: Shape, scales: int, zero_points: int) -> Callable[..., jax.Array]:
    if shape.in_bytes:
        return bytes_of(shape.dtype, shape.bits, zero_points)
    return floats_of(shape.dtype, shape.bits, scales, zero_points)


def _zero_of(shape: Shape, row: jax.Array) -> jax.Array:
    return zero_bytes_of(row) if shape.in_bytes else row.astype(jnp.int32)


def _multiply(shape: Shape, convert: Any, x: Any, codes: Any, tile: int, parts: list[Any], total: Any) -> None:
    weights = convert(load(codes.at[tile], words_layout(shape.bits)), *parts)
    plgpu.wgmma(total, weights, x.at[:, pl.ds(tile * TILE_K, TILE_K)].T)


def of_tile(rows: list[Any], tile: int, tiles: int) -> list[Any]:
    """Those of a tile's groups; one where a group is longer than a tile."""
    first = tile * len(rows) // tiles
    return rows[first : first + max(1, len(rows) // tiles)]


def _accumulators(shape: Shape, plan: GpuPlan) -> list[Any]:
    dtype = jnp.int32 if shape.dtype == jnp.int8 else jnp.float32
    return [plgpu.WGMMAAccumulatorRef((STRIP, plan.tile_m), dtype)] * plan.strips


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
    accumulators: Callable[[Shape, GpuPlan], list[Any]]


FORMS = {
    "sums": Form(sums_step, _sums_in_registers, lambda shape, plan: []),
    "weights": Form(chain_step, _sums_of_chains, _accumulators),
    "column": Form(chain_step, _sums_of_chains, _accumulators),
}
