"""Ragged groups of rows by packed experts on a Hopper GPU, by the kernel of int4_matmul/mosaic_gpu_kernel.py.

x[M, K] is sorted by expert and cut into tiles of tile_m rows. The grid goes over columns and work items
(work_items.py), a tile of x and an expert that has rows in it; how many rows an expert has is data, and a block looks
up its item's tile and expert, reads that expert's codes and scales, and is otherwise a block of the dense product.
Experts without rows are not read, idle items end at once, and the items of one expert run at the same time, so that
its codes are read from memory once.

    out[items * tile_m, N]      each item writes its whole tile to a place of its own
    row m of the result         is gathered from the item of its expert; rows after the last group are zeros

A tile with rows of several experts is multiplied, and written, once for each. To write only an item's own rows, in
place, would take copies of every power of two of rows and a staged tile without swizzle, and a pass for the zeros all
the same: the gather is that pass. What it costs is memory for (E - 1) * tile_m more rows of the result, at most.

tile_m is as large as an expert's average share of the rows asks for. XLA's form (`lax.ragged_dot` over blocks of K) is
not taken for many rows, as the dense kernel's is: for an H200 it is compiled to products of all rows by all experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_int4_matmul.work_items import place_of_rows, work_items
from pallas_kernels.int4_matmul.gpu_blocks import GpuPlan
from pallas_kernels.int4_matmul.gpu_chips import Gpu
from pallas_kernels.int4_matmul.mosaic_gpu import in_bytes, plan_of, product, result_dtype, sums_of_groups, terms_of
from pallas_kernels.int4_matmul.mosaic_gpu import refusal as refusal
from pallas_kernels.int4_matmul.spec import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed


def grouped_int4_matmul_mosaic_gpu(
    x: jax.Array,
    w: Packed,
    group_sizes: jax.Array,
    spec: PackedSpec,
    *,
    precision: Any = None,
    dtype: Any = None,
    fits: str = "",
    gpu: Gpu | None = None,
    plan: GpuPlan | None = None,
) -> jax.Array:
    """`dtype` (f32)[M, N]: each row of x[M, K] times its expert's W[K, N]; rows after the last group give zeros.

    Args:
      x: float[M, K], sorted by expert.
      w: codes i32[E, N / 64, 2 * bits * ceil128(K)], scale [E, G, N], zero_point u8[E, G, N], offset [E, G, N].
      group_sizes: i32[E].
      spec: layout "hopper".
      precision: of a float32 x, as the dense kernel's.
      dtype: of the result.
      fits: "int8" or "float8_e4m3fn", which holds every number of x: they may be multiplied in it.
      gpu: None is the one of the trace.
      plan: None is chosen for the GPU and the sizes.
    """
    rows, sizes = x.shape[0], group_sizes.astype(jnp.int32)
    terms = list(terms_of(x, precision, fits))
    dtype = result_dtype(dtype, len(terms))
    terms = [in_bytes(term, w, spec, fits) for term in terms] if fits else terms
    plan = plan or plan_of(terms[0], w, spec, dtype, gpu)
    items = work_items(sizes, rows, plan.tile_m)
    tiles = [product(term, w, spec, plan, dtype, (items.tile, items.expert, items.used)) for term in terms]
    out = gathered(sum(tiles[1:], tiles[0]), sizes, rows, plan.tile_m)
    if w.offset is None:
        return out
    sums, offset = sums_of_groups(x, spec), w.offset.astype(jnp.float32)
    return out.astype(jnp.float32) + lax.ragged_dot(sums, offset, sizes, precision=lax.Precision.HIGHEST)


def gathered(tiles: jax.Array, group_sizes: jax.Array, rows: int, tile_m: int) -> jax.Array:
    """[rows, N] of the tiles of all work items; zeros where a row has no expert."""
    out = jnp.take(tiles, place_of_rows(group_sizes, rows, tile_m), axis=0, mode="clip")
    has_expert = jnp.arange(rows) < jnp.sum(group_sizes)
    return jnp.where(has_expert[:, None], out, jnp.zeros((), out.dtype))
