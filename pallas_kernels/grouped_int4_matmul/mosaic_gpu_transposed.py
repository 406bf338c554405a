"""dx[M, K]: each row of dy[M, N] by its expert's W[K, N]^T on a Hopper GPU, from the codes as they lie.

The kernel of int4_matmul/mosaic_gpu_transposed_kernel.py over the work items of mosaic_gpu.py, whose tiles are gathered
as there.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_int4_matmul.mosaic_gpu import gathered
from pallas_kernels.grouped_int4_matmul.work_items import work_items
from pallas_kernels.int4_matmul.gpu_blocks import GpuPlan
from pallas_kernels.int4_matmul.gpu_chips import Gpu
from pallas_kernels.int4_matmul.mosaic_gpu import plan_of, result_dtype, terms_of
from pallas_kernels.int4_matmul.mosaic_gpu_transposed import product_of_transposed, spread_over_rows
from pallas_kernels.int4_matmul.spec import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed


def grouped_int4_matmul_mosaic_gpu_transposed(
    dy: jax.Array,
    w: Packed,
    group_sizes: jax.Array,
    spec: PackedSpec,
    *,
    dtype: Any,
    gpu: Gpu | None = None,
    plan: GpuPlan | None = None,
) -> jax.Array:
    """`dtype`[M, K]; dy[M, N] is rounded to `dtype` if that has 16 bits. Rows after the last group give zeros.

    Others as for `grouped_int4_matmul_mosaic_gpu`.
    """
    rows, sizes = dy.shape[0], group_sizes.astype(jnp.int32)
    terms = list(terms_of(dy.astype(dtype), None))
    out_dtype = result_dtype(dtype, len(terms))
    plan = plan or plan_of(terms[0], w, spec, out_dtype, gpu, transposed=True)
    items = work_items(sizes, rows, plan.tile_m)
    own = (items.tile, items.expert, items.used)
    tiles = [product_of_transposed(term, w, spec, plan, out_dtype, own) for term in terms]
    out = gathered(sum(tiles[1:], tiles[0]), sizes, rows, plan.tile_m)
    if w.offset is not None:
        offset = jnp.swapaxes(w.offset, -1, -2).astype(jnp.float32)  # [E, N, G]
        sums = lax.ragged_dot(dy.astype(jnp.float32), offset, sizes, precision=lax.Precision.HIGHEST)
        out = out + spread_over_rows(sums, spec)
    return out.astype(dtype)
