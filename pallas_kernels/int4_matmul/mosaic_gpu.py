"""x[M, K] @ W[K, N] on a Hopper GPU, W in the hopper layout (gpu_fragments.py), by one Pallas Mosaic GPU kernel.

Weights are read once, as they lie, and become floats in registers (mosaic_gpu_registers.py), which are the left operand
of a transposed product: few rows of x are the narrow side of wgmma, 8 at the least (mosaic_gpu_kernel.py). The kernel
follows Marlin (Frantar et al., 2024), which does so with the mma of Ampere, and Machete (vLLM, 2024), with wgmma.

What is known of it, and of its kin for experts and for gradients: they compile for sm_90a without spills, and their
PTX, emulated instruction by instruction on a CPU (benchmarks/gpu_lab), computes the products. None has run on a GPU.
So nothing takes them that does not ask for them: `jq4.prepare(tree, "NVIDIA H200")` makes the layout that XLA's forms
read, and only `layout="hopper"` makes this one.

Codes of 8 bits are read likewise. Where x holds whole numbers (activations rounded to int8), or numbers of e4m3, its
products are those of 8 bits, at twice the tensor cores' speed (mosaic_gpu_bytes.py).

Where M is large the codes are unpacked to memory once and multiplied by XLA: the product is then bound by the tensor
cores, which XLA's own kernels keep busier than this one can be expected to.

float32 x is the sum of two bf16 terms (three for Precision.HIGHEST), which are more rows of x.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul.gpu_blocks import GpuPlan, GpuProblem, choose_plan
from pallas_kernels.int4_matmul.gpu_chips import HOPPER, Gpu, gpu_named, refusal_of_device, traced_kind
from pallas_kernels.int4_matmul.gpu_fragments import TILE_K, in_order_of_bytes, padded_length, rows_of
from pallas_kernels.int4_matmul.precision import bf16_terms
from pallas_kernels.int4_matmul.spec import HOPPER as LAYOUT
from pallas_kernels.int4_matmul.spec import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.int4_matmul.xla import int4_matmul_xla
from pallas_kernels.manual_axes import varying_as

GROUPS = (32, 64, 128)  # and multiples of the last
MOST_ROWS = 1536  # above, writing the dense weight costs less than XLA's better use of the tensor cores saves: modelled
ROW_MULTIPLE = 8  # of x and of the result, in the tiles of shared memory
MOST_ROWS_OF_SUM = (2**31 - 1) // (127 * 128)  # products of int8 that an int32 sum is exact for
COLUMN_MULTIPLE = 128  # of x, two tiles at least: of one, its place would not be told to the copy engine


def refusal(spec: PackedSpec) -> str | None:
    """Why the kernel does not take a weight, or is not for the device that is traced for, or None."""
    reason = refusal_of_spec(spec) or refusal_of_device(traced_kind())
    return reason and f"mosaic_gpu {reason}"


def refusal_of_spec(spec: PackedSpec) -> str | None:
    """Why kernels of the hopper layout do not take a weight, or None."""
    if spec.layout != LAYOUT:
        return f"reads the hopper layout, not the {spec.layout} one (jq4.prepare(..., layout='hopper'))"
    return layout_refusal(spec)


def layout_refusal(spec: PackedSpec) -> str | None:
    """Why a weight has no hopper layout, or None."""
    if spec.bits not in (4, 8) or spec.levels is not None:
        kind = "codebooks" if spec.levels else "integers"
        return f"reads integers of 4 and 8 bits, not {spec.bits}-bit {kind}"
    if spec.num_groups > 1 and spec.group_size not in GROUPS and spec.group_size % GROUPS[-1]:
        return f"reads groups of {GROUPS} rows and multiples of the last, not of {spec.group_size}"
    return None


def takes(fits: str, spec: PackedSpec, zero_points: bool) -> bool:
    """Whether a weight can be multiplied by an x of `fits`: its levels fit too, its groups are chains of wgmma.

    Zero points are values and not looked at: e4m3 has levels by zeros of 0 to 16 alone, which is all that codes of 4
    bits are given by any method here, and by files that keep to their format.
    """
    if spec.bits == 8 and (zero_points or fits != "int8"):
        return False
    if spec.num_groups == 1:
        return fits != "int8" or spec.length <= MOST_ROWS_OF_SUM
    return spec.group_size % TILE_K == 0


def int4_matmul_mosaic_gpu(
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
    """`dtype` (f32)[M, N] = x[M, K] @ W[K, N].

    Args:
      x: float[M, K].
      w: codes i32[N / 64, 2 * bits * ceil128(K)], scale [G, N], zero_point u8[G, N], offset [G, N].
      spec: layout "hopper".
      platform: always "gpu".
      precision: of a float32 x.
      dtype: of the result.
      fits: "int8" or "float8_e4m3fn", which holds every number of x: they may be multiplied in it.
      gpu: None is the one of the trace.
      plan: None is chosen for the GPU and the sizes.
    """

    def multiply(rows: jax.Array, dtype: Any) -> jax.Array:
        rows = in_bytes(rows, w, spec, fits) if fits else rows
        return product(rows, w, spec, plan or plan_of(rows, w, spec, dtype, gpu), dtype)

    most_rows = MOST_ROWS if plan is None else None
    return of_terms(multiply, x, w, spec, most_rows, platform, precision, dtype, fits)


def of_terms(
    multiply: Callable[[jax.Array, Any], jax.Array], x: jax.Array, w: Packed, spec: PackedSpec, most_rows: int | None,
    platform: str, precision: Any, dtype: Any, fits: str,
) -> jax.Array:  # fmt: skip
    """[M, N] by `multiply` (rows of all of x's terms, the result's dtype), or by XLA if they are more than most_rows.

    What offsets add is added.
    """
    terms = terms_of(x, precision, fits)  # [T, M, K]
    count, m, k = terms.shape
    if most_rows is not None and count * m > most_rows:
        return int4_matmul_xla(x, *rows_of(w, spec), platform=platform, precision=precision)
    out = multiply(terms.reshape(count * m, k), result_dtype(dtype, count))[: m * count]
    out = out if count == 1 else jnp.sum(out.reshape(count, m, -1), 0)
    if w.offset is None:
        return out
    offset = w.offset.astype(jnp.float32)
    return out.astype(jnp.float32) + jnp.matmul(sums_of_groups(x, spec), offset, precision=lax.Precision.HIGHEST)


def plan_of(
    rows: jax.Array, w: Packed, spec: PackedSpec, dtype: Any, gpu: Gpu | None, transposed: bool = False
) -> GpuPlan:
    """The chosen plan, on `gpu` or that of the trace; codes with a leading axis are experts'."""
    m, depth = rows.shape
    columns = padded_length(spec.length) if transposed else spec.columns(w.codes.shape)
    problem = GpuProblem(
        m, depth, columns, spec.num_groups, spec.group_size, bits=spec.bits, transposed=transposed,
        scale_bytes=jnp.dtype(w.scale.dtype).itemsize, out_bytes=dtype.itemsize,
        fits=rows.dtype.name if rows.dtype.itemsize == 1 else "", experts=w.codes.shape[0] if w.codes.ndim == 3 else 0,
    )  # fmt: skip
    return choose_plan(problem, gpu or gpu_named(traced_kind()) or HOPPER[0])


def product(
    rows: jax.Array, w: Packed, spec: PackedSpec, plan: GpuPlan, dtype: Any, items: tuple[jax.Array, ...] = ()
) -> jax.Array:
    """The kernel's result: dtype[ceil8(M), N], or [items * tile_m, N] of work items (see mosaic_gpu_kernel.call)."""
    from pallas_kernels.int4_matmul import mosaic_gpu_kernel as kernel  # a second's import, for Hopper alone

    m, k = rows.shape
    rows = jnp.pad(rows, ((0, -m % ROW_MULTIPLE), (0, -k % COLUMN_MULTIPLE)))
    rows = in_order_of_bytes(rows) if rows.dtype.itemsize == 1 else rows
    return called(kernel, rows, w, spec, plan, dtype, items, k=rows.shape[1], n=spec.columns(w.codes.shape))


def called(
    kernel: Any, rows: jax.Array, w: Packed, spec: PackedSpec, plan: GpuPlan, dtype: Any,
    items: tuple[jax.Array, ...], *, k: int, n: int,
) -> jax.Array:  # fmt: skip
    """What a kernel's module gives for padded rows and a weight [k, n], partial sums added up."""
    scale, zero_point = (None if part is None else jnp.broadcast_to(part, (*part.shape[:-1], n)) for part in w[1:3])
    shape = kernel.Shape(
        m=rows.shape[0], k=k, n=n, group_size=spec.group_size, groups=spec.num_groups,
        dtype=rows.dtype, out_dtype=dtype, zero_points=zero_point is not None, bits=spec.bits,
        items=len(items[0]) if items else 0,
    )  # fmt: skip
    call = functools.partial(kernel.call, shape=shape, plan=plan)
    operands = (items, rows, w.codes, scale, zero_point)
    out = varying_as(jax.custom_batching.sequential_vmap(call)(*operands), operands)
    return out if plan.splits == 1 else jnp.sum(out, 0).astype(dtype)


def result_dtype(dtype: Any, terms: int) -> Any:
    """What the kernel writes where its caller will round to `dtype`: f32 but for one term and a dtype of 16 bits."""
    return jnp.dtype(jnp.float32 if terms > 1 or dtype not in (jnp.bfloat16, jnp.float16) else dtype)


def in_bytes(x: jax.Array, w: Packed, spec: PackedSpec, fits: str) -> jax.Array:
    """Numbers of 8 bits in their dtype where the kernel takes that, else as they are."""
    return x.astype(fits) if takes(fits, spec, w.zero_point is not None) else x


def terms_of(x: jax.Array, precision: Any, fits: str = "") -> jax.Array:
    """bf16 or f16[T, M, K] that sum to x: itself where it is of 16 bits, and one where it holds numbers of 8."""
    if fits:
        return x.astype(jnp.bfloat16)[None]
    if x.dtype in (jnp.bfloat16, jnp.float16):
        return x[None]
    default = precision is None or precision == lax.Precision.DEFAULT
    return bf16_terms(x.astype(jnp.float32), lax.Precision.HIGH if default else lax.Precision.HIGHEST)


def sums_of_groups(x: jax.Array, spec: PackedSpec) -> jax.Array:
    """f32[M, G]: x summed over each group, what offsets are multiplied by."""
    missing = 0 if spec.num_groups == 1 else spec.num_groups * spec.group_size - spec.length
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, missing)))
    return jnp.sum(padded.reshape(x.shape[0], spec.num_groups, -1), -1)
