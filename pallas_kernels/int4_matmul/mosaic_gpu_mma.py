"""x[M, K] @ W[K, N] on an Ampere or Ada GPU, W in the hopper layout, by one Pallas Mosaic GPU kernel.

The older tensor cores (mma.sync) take of a warp the registers that wgmma takes of each of a warpgroup's four, so
weights that were prepared for Hopper are read here as they lie; the kernel is mosaic_gpu_mma_kernel.py.

What is known of it: it compiles for sm_80 and sm_89 without spills, and its PTX, emulated instruction by instruction on
a CPU (benchmarks/gpu_lab), computes the product. It has not run on a GPU, so only who asks gets it, as on Hopper
(mosaic_gpu.py). Where it cannot serve (`refusal` says why: JAX before 0.11.2 has no mma.sync), and for gradients and
experts, weights are unpacked and multiplied by XLA.

Rows of x are padded to whole tiles. Activations rounded to int8 or e4m3 are multiplied as bf16, which holds them
exactly.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul.gpu_blocks import GpuPlan, GpuProblem
from pallas_kernels.int4_matmul.gpu_blocks_mma import choose_plan
from pallas_kernels.int4_matmul.gpu_chips import AMPERE, Gpu, gpu_named, refusal_of_mma, traced_kind
from pallas_kernels.int4_matmul.gpu_fragments import padded_length
from pallas_kernels.int4_matmul.mosaic_gpu import called, of_terms, refusal_of_spec
from pallas_kernels.int4_matmul.spec import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed

MOST_ROWS = 512  # above, writing the dense weight costs less than XLA's better use of the tensor cores saves: modelled


def refusal(spec: PackedSpec) -> str | None:
    """Why the kernel does not take a weight, or is not for the device that is traced for, or None."""
    reason = refusal_of_spec(spec) or refusal_of_mma(traced_kind())
    return reason and f"mosaic_gpu_mma {reason}"


def int4_matmul_mosaic_gpu_mma(
    x: jax.Array,
    w: Packed,
    spec: PackedSpec,
    *,
    platform: str = "gpu",
    precision: Any = None,
    dtype: Any = None,
    fits: str = "",
    gpu: Gpu | None = None,
    plan: GpuPlan | None = None,
) -> jax.Array:
    """`dtype` (f32)[M, N] = x[M, K] @ W[K, N]; arguments as `int4_matmul_mosaic_gpu` has them."""
    multiply = functools.partial(_product, w=w, spec=spec, gpu=gpu, plan=plan)
    most_rows = MOST_ROWS if plan is None else None
    return of_terms(multiply, x, w, spec, most_rows, platform, precision, dtype, fits)


def plan_of(m: int, w: Packed, spec: PackedSpec, dtype: Any, gpu: Gpu | None) -> GpuPlan:
    """The chosen plan of m rows, on `gpu` or that of the trace."""
    problem = GpuProblem(
        m, spec.length, spec.columns(w.codes.shape), spec.num_groups, spec.group_size, bits=spec.bits,
        scale_bytes=jnp.dtype(w.scale.dtype).itemsize, out_bytes=dtype.itemsize,
    )  # fmt: skip
    return choose_plan(problem, gpu or gpu_named(traced_kind(), AMPERE) or AMPERE[0])


def _product(
    rows: jax.Array, dtype: Any, *, w: Packed, spec: PackedSpec, gpu: Gpu | None, plan: GpuPlan | None
) -> jax.Array:
    from pallas_kernels.int4_matmul import mosaic_gpu_mma_kernel as kernel  # a second's import, for GPUs alone

    (m, k), depth = rows.shape, padded_length(spec.length)
    plan = plan or plan_of(m, w, spec, dtype, gpu)
    rows = jnp.pad(rows, ((0, -m % plan.tile_m), (0, depth - k)))
    return called(kernel, rows, w, spec, plan, dtype, (), k=depth, n=spec.columns(w.codes.shape))
