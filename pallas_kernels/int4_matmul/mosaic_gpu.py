"""x[M, K] @ W[K, N] on a Hopper GPU, W in the hopper layout (gpu_fragments.py), by one Pallas Mosaic GPU kernel.

Weights are read once, as they lie, and become floats in registers (mosaic_gpu_registers.py), which are the left operand
of a transposed product: few rows of x are the narrow side of wgmma, 8 at the least (mosaic_gpu_kernel.py). The kernel
follows Marlin (Frantar et al., 2024), which does so with the mma of Ampere, and Machete (vLLM, 2024), with wgmma.

What is known of it: it compiles for sm_90a without spills, and its machine code, emulated instruction by instruction on
a CPU (benchmarks/gpu_lab), computes the product. It has not run on a GPU. So nothing takes it that does not ask for it:
`jq4.prepare(tree, "NVIDIA H200")` makes the layout that XLA's forms read, and only `layout="hopper"` makes this one.

Where M is large the codes are unpacked to memory once and multiplied by XLA: the product is then bound by the tensor
cores, which XLA's own kernels keep busier than this one can be expected to.

float32 x is the sum of two bf16 terms (three for Precision.HIGHEST), which are more rows of x.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul.gpu_blocks import GpuPlan, GpuProblem, choose_plan
from pallas_kernels.int4_matmul.gpu_chips import HOPPER, Gpu, gpu_named, traced_kind
from pallas_kernels.int4_matmul.gpu_fragments import rows_of
from pallas_kernels.int4_matmul.precision import bf16_terms
from pallas_kernels.int4_matmul.spec import HOPPER as LAYOUT
from pallas_kernels.int4_matmul.spec import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.int4_matmul.xla import int4_matmul_xla

GROUPS = (32, 64, 128)  # and multiples of the last
MOST_ROWS = 1536  # above, writing the dense weight costs less than XLA's better use of the tensor cores saves: modelled
ROW_MULTIPLE = 8  # of x and of the result, in the tiles of shared memory
COLUMN_MULTIPLE = 128  # of x, two tiles at least: of one, its place would not be told to the copy engine


def refusal(spec: PackedSpec) -> str | None:
    """Why the kernel does not take a weight, or is not for the device that is traced for, or None."""
    if spec.layout != LAYOUT:
        return f"mosaic_gpu reads the hopper layout, not the {spec.layout} one (jq4.prepare(..., layout='hopper'))"
    if reason := layout_refusal(spec):
        return reason
    if gpu_named(traced_kind()) is None:
        return f"mosaic_gpu runs on Hopper GPUs (compute capability 9.0), and this is traced for {traced_kind()!r}"
    return None


def layout_refusal(spec: PackedSpec) -> str | None:
    """Why a weight has no hopper layout, or None."""
    if spec.bits != 4 or spec.levels is not None:
        return f"mosaic_gpu reads 4-bit integers, not {spec.bits}-bit {'codebooks' if spec.levels else 'integers'}"
    if spec.num_groups > 1 and spec.group_size not in GROUPS and spec.group_size % GROUPS[-1]:
        return f"mosaic_gpu reads groups of {GROUPS} rows and multiples of the last, not of {spec.group_size}"
    return None


def int4_matmul_mosaic_gpu(
    x: jax.Array,
    w: Packed,
    spec: PackedSpec,
    *,
    platform: str = "gpu",
    precision: Any = None,
    dtype: Any = None,
    gpu: Gpu | None = None,
    plan: GpuPlan | None = None,
) -> jax.Array:
    """`dtype` (f32)[M, N] = x[M, K] @ W[K, N].

    Args:
      x: float[M, K].
      w: codes i32[N / 64, 8 * ceil128(K)], scale [G, N], zero_point u8[G, N], offset [G, N].
      spec: layout "hopper".
      platform: always "gpu".
      precision: of a float32 x.
      dtype: of the result.
      gpu: None is the one of the trace.
      plan: None is chosen for the GPU and the sizes.
    """
    terms = _terms(x, precision)  # bf16 or f16 [T, M, K]
    count, m, k = terms.shape
    if count * m > MOST_ROWS and plan is None:
        return int4_matmul_xla(x, *rows_of(w, spec), platform=platform, precision=precision)
    rows = terms.reshape(count * m, k)
    n = spec.columns(w.codes.shape)
    dtype = jnp.dtype(jnp.float32 if count > 1 or dtype not in (jnp.bfloat16, jnp.float16) else dtype)
    problem = GpuProblem(
        count * m, k, n, spec.num_groups, spec.group_size, jnp.dtype(w.scale.dtype).itemsize, dtype.itemsize
    )
    plan = plan or choose_plan(problem, gpu or gpu_named(traced_kind()) or HOPPER[0])
    out = _call(rows, w, spec, plan, dtype)
    out = out if count == 1 else jnp.sum(out.reshape(count, m, n), 0)
    return out if w.offset is None else out.astype(jnp.float32) + _of_offsets(x, w.offset, spec)


def _call(rows: jax.Array, w: Packed, spec: PackedSpec, plan: GpuPlan, dtype: Any) -> jax.Array:
    from pallas_kernels.int4_matmul import mosaic_gpu_kernel as kernel  # a second's import, for Hopper alone

    (m, k), n = rows.shape, spec.columns(w.codes.shape)
    rows = jnp.pad(rows, ((0, -m % ROW_MULTIPLE), (0, -k % COLUMN_MULTIPLE)))
    scale, zero_point = (None if part is None else jnp.broadcast_to(part, (part.shape[0], n)) for part in w[1:3])
    shape = kernel.Shape(
        m=rows.shape[0], k=rows.shape[1], n=n, group_size=spec.group_size, groups=spec.num_groups,
        dtype=rows.dtype, out_dtype=dtype, zero_points=zero_point is not None,
    )  # fmt: skip
    call = functools.partial(kernel.call, shape=shape, plan=plan)
    out = jax.custom_batching.sequential_vmap(call)(rows, w.codes, scale, zero_point)
    return (out if plan.splits == 1 else jnp.sum(out, 0).astype(dtype))[:m]


def _terms(x: jax.Array, precision: Any) -> jax.Array:
    """[T, M, K] that sum to x: itself where it is of 16 bits."""
    if x.dtype in (jnp.bfloat16, jnp.float16):
        return x[None]
    default = precision is None or precision == lax.Precision.DEFAULT
    return bf16_terms(x.astype(jnp.float32), lax.Precision.HIGH if default else lax.Precision.HIGHEST)


def _of_offsets(x: jax.Array, offset: jax.Array, spec: PackedSpec) -> jax.Array:
    """f32[M, N]: what offsets add, the sums of x over each group times them."""
    missing = 0 if spec.num_groups == 1 else spec.num_groups * spec.group_size - spec.length
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, missing)))
    sums = jnp.sum(padded.reshape(x.shape[0], spec.num_groups, -1), -1)
    return jnp.matmul(sums, offset.astype(jnp.float32), precision=lax.Precision.HIGHEST)
