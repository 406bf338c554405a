"""dx[M, K] = dy[M, N] @ W[K, N]^T, what reaches x, on a Hopper GPU; by the kernel of mosaic_gpu_transposed_kernel.py.

Weights are rounded to the dtype of dy as dense ones are. float32 dy is the sum of two bf16 terms, as x is in the
forward product. What offsets add is a product of its own, [M, N] by [N, G].
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul import gradients
from pallas_kernels.int4_matmul.gpu_blocks import GpuPlan
from pallas_kernels.int4_matmul.gpu_chips import Gpu
from pallas_kernels.int4_matmul.gpu_fragments import padded_length, rows_of
from pallas_kernels.int4_matmul.mosaic_gpu import MOST_ROWS, ROW_MULTIPLE, called, plan_of, result_dtype, terms_of
from pallas_kernels.int4_matmul.spec import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed

LEAST_COLUMNS = 128  # of dy, two tiles: of one, its place would not be told to the copy engine


def int4_matmul_mosaic_gpu_transposed(
    dy: jax.Array,
    w: Packed,
    spec: PackedSpec,
    *,
    dtype: Any,
    gpu: Gpu | None = None,
    plan: GpuPlan | None = None,
) -> jax.Array:
    """`dtype`[M, K], of dy[M, N], which is rounded to `dtype` if that has 16 bits.

    Args:
      dy: float[M, N].
      w: as for `int4_matmul_mosaic_gpu`.
      spec: layout "hopper".
      dtype: of x, and of the result.
      gpu: None is the one of the trace.
      plan: None is chosen for the GPU and the sizes.
    """
    terms = terms_of(dy.astype(dtype), None)
    count, m, n = terms.shape
    if count * m > MOST_ROWS and plan is None:
        return gradients.of_input(dy, *rows_of(w, spec), dtype=dtype).astype(dtype)
    out_dtype = result_dtype(dtype, count)
    rows = terms.reshape(count * m, n)
    plan = plan or plan_of(rows, w, spec, out_dtype, gpu, transposed=True)
    out = product_of_transposed(rows, w, spec, plan, out_dtype)[: count * m]
    out = out if count == 1 else jnp.sum(out.reshape(count, m, -1), 0)
    if w.offset is not None:
        offset = w.offset.astype(jnp.float32).T
        sums = jnp.matmul(dy.astype(jnp.float32), offset, precision=lax.Precision.HIGHEST)  # [M, G]
        out = out + spread_over_rows(sums, spec)
    return out.astype(dtype)


def product_of_transposed(
    rows: jax.Array, w: Packed, spec: PackedSpec, plan: GpuPlan, dtype: Any, items: tuple[jax.Array, ...] = ()
) -> jax.Array:
    """The kernel's result: dtype[ceil8(M), K], or [items * tile_m, K] of work items."""
    from pallas_kernels.int4_matmul import mosaic_gpu_transposed_kernel as kernel  # a second's import, for Hopper alone

    m, n = rows.shape
    rows = jnp.pad(rows, ((0, -m % ROW_MULTIPLE), (0, max(0, LEAST_COLUMNS - n))))
    out = called(kernel, rows, w, spec, plan, dtype, items, k=padded_length(spec.length), n=n)
    return out[:, : spec.length]


def spread_over_rows(sums: jax.Array, spec: PackedSpec) -> jax.Array:
    """[M, K] of [M, G]: what every row of a group gets."""
    if spec.num_groups == 1:
        return jnp.broadcast_to(sums, (sums.shape[0], spec.length))
    return jnp.repeat(sums, spec.group_size, axis=1)[:, : spec.length]
