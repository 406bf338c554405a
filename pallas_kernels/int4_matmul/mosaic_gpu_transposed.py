"""dx[M, K] = dy[M, N] @ W[K, N]^T, what reaches x, on a Hopper GPU; by the kernel of mosaic_gpu_transposed_kernel.py.

Weights are rounded to the dtype of dy as dense ones are. float32 dy is the sum of two bf16 terms, as x is in the
forward product. What offsets add is a product of its own, [M, N] by [N, G].
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul import gradients
from pallas_kernels.int4_matmul.gpu_blocks import GpuPlan, GpuProblem, choose_plan
from pallas_kernels.int4_matmul.gpu_chips import HOPPER, Gpu, gpu_named, traced_kind
from pallas_kernels.int4_matmul.gpu_fragments import padded_length, rows_of
from pallas_kernels.int4_matmul.mosaic_gpu import MOST_ROWS, ROW_MULTIPLE, result_dtype, terms_of
from pallas_kernels.int4_matmul.spec import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.manual_axes import varying_as

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
    plan = plan or plan_of_transposed(rows, w, spec, out_dtype, gpu)
    out = product_of_transposed(rows, w, spec, plan, out_dtype)[: count * m]
    out = out if count == 1 else jnp.sum(out.reshape(count, m, -1), 0)
    if w.offset is not None:
        offset = w.offset.astype(jnp.float32).T
        sums = jnp.matmul(dy.astype(jnp.float32), offset, precision=lax.Precision.HIGHEST)  # [M, G]
        out = out + spread_over_rows(sums, spec)
    return out.astype(dtype)


def plan_of_transposed(rows: jax.Array, w: Packed, spec: PackedSpec, dtype: Any, gpu: Gpu | None) -> GpuPlan:
    """The chosen plan, on `gpu` or that of the trace; codes with a leading axis are experts'."""
    m, n = rows.shape
    problem = GpuProblem(
        m, n, padded_length(spec.length), spec.num_groups, spec.group_size, bits=spec.bits, transposed=True,
        scale_bytes=jnp.dtype(w.scale.dtype).itemsize, out_bytes=dtype.itemsize,
        experts=w.codes.shape[0] if w.codes.ndim == 3 else 0,
    )  # fmt: skip
    return choose_plan(problem, gpu or gpu_named(traced_kind()) or HOPPER[0])


def product_of_transposed(
    rows: jax.Array, w: Packed, spec: PackedSpec, plan: GpuPlan, dtype: Any, items: tuple[jax.Array, ...] = ()
) -> jax.Array:
    """The kernel's result: dtype[ceil8(M), K], or [items * tile_m, K] of work items."""
    from pallas_kernels.int4_matmul import mosaic_gpu_transposed_kernel as kernel  # a second's import, for Hopper alone

    m, n = rows.shape
    rows = jnp.pad(rows, ((0, -m % ROW_MULTIPLE), (0, max(0, LEAST_COLUMNS - n))))
    scale, zero_point = (None if part is None else jnp.broadcast_to(part, (*part.shape[:-1], n)) for part in w[1:3])
    shape = kernel.Shape(
        m=rows.shape[0], k=padded_length(spec.length), n=n, group_size=spec.group_size, groups=spec.num_groups,
        dtype=rows.dtype, out_dtype=dtype, zero_points=zero_point is not None, bits=spec.bits,
        items=len(items[0]) if items else 0,
    )  # fmt: skip
    call = functools.partial(kernel.call, shape=shape, plan=plan)
    operands = (items, rows, w.codes, scale, zero_point)
    out = varying_as(jax.custom_batching.sequential_vmap(call)(*operands), operands)
    out = out if plan.splits == 1 else jnp.sum(out, 0).astype(dtype)
    return out[:, : spec.length]


def spread_over_rows(sums: jax.Array, spec: PackedSpec) -> jax.Array:
    """[M, K] of [M, G]: what every row of a group gets."""
    if spec.num_groups == 1:
        return jnp.broadcast_to(sums, (sums.shape[0], spec.length))
    return jnp.repeat(sums, spec.group_size, axis=1)[:, : spec.length]
