"""x[M, K] @ W[K, N] on a TPU, W as int4[K, N] with scales [G, 1, N], by one Pallas kernel. (First version.)"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.int4_matmul import tpu_forms
from pallas_kernels.int4_matmul.spec import TPU, PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a product is cut: rows, depth and columns of a grid step, and the inner form."""

    form: str
    block_m: int
    block_k: int
    block_n: int


def refusal(spec: PackedSpec) -> str | None:
    """Why the kernel does not take a weight, or None."""
    if spec.layout != TPU:
        return f"tpu reads the tpu layout, not the {spec.layout} one (jq4.prepare re-lays a tree once)"
    if spec.num_groups > 1 and spec.group_size % 32:
        return f"tpu reads groups of a multiple of 32 rows, not of {spec.group_size}"
    return None


def choose_plan(m: int, n: int, spec: PackedSpec) -> Plan:
    k = spec.length
    group = k if spec.num_groups == 1 else spec.group_size
    block_n = n if n < 128 else min(1024, -(-n // 128) * 128)
    block_k = min(-(-k // group) * group, max(2048 // group, 1) * group)
    block_m = min(m, 512)
    return Plan("direct" if m <= 32 else "wscale", block_m, block_k, block_n)


def int4_matmul_tpu(
    x: jax.Array,
    w: Packed,
    spec: PackedSpec,
    *,
    platform: str = "tpu",
    precision: Any = None,
    dtype: Any = None,
    plan: Plan | None = None,
    interpret: bool = False,
) -> jax.Array:
    """[M, N] = x[M, K] @ W[K, N]."""
    m, n = x.shape[0], w.codes.shape[1]
    plan = plan or choose_plan(m, n, spec)
    steps_k = -(-spec.length // plan.block_k)
    x = jnp.pad(x.astype(jnp.bfloat16), ((0, 0), (0, steps_k * plan.block_k - spec.length)))
    return _call(x, w.codes, w.scale, spec, plan, dtype or jnp.float32, interpret)


def _call(x, codes, scale, spec: PackedSpec, plan: Plan, dtype, interpret: bool) -> jax.Array:
    (m, padded_k), n = x.shape, codes.shape[1]
    steps_k = padded_k // plan.block_k
    group = min(spec.group_size, plan.block_k)
    groups = plan.block_k // group
    kernel = functools.partial(_kernel, form=plan.form, group=group, steps=steps_k, upcast=interpret)
    return pl.pallas_call(
        kernel,
        name="int4_matmul",
        grid=(pl.cdiv(m, plan.block_m), pl.cdiv(n, plan.block_n), steps_k),
        in_specs=[
            pl.BlockSpec((plan.block_m, plan.block_k), lambda m, n, k: (m, k)),
            pl.BlockSpec((plan.block_k, plan.block_n), lambda m, n, k: (k, n)),
            pl.BlockSpec((groups, 1, plan.block_n), lambda m, n, k: (k, 0, n)),
        ],
        out_specs=pl.BlockSpec((plan.block_m, plan.block_n), lambda m, n, k: (m, n)),
        out_shape=jax.ShapeDtypeStruct((m, n), dtype),
        scratch_shapes=[pltpu.VMEM((plan.block_m, plan.block_n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=pltpu.InterpretParams() if interpret else False,
    )(x, codes, scale)


def _kernel(x, codes, scale, out, total, *, form: str, group: int, steps: int, upcast: bool):
    options = {"upcast": upcast} if form == "direct" else {}
    partial = getattr(tpu_forms, form)(x, codes, scale, group, **options)
    if steps == 1:
        out[...] = partial.astype(out.dtype)
        return

    @pl.when(pl.program_id(2) == 0)
    def _():
        total[...] = partial

    @pl.when(pl.program_id(2) > 0)
    def _():
        total[...] += partial

    @pl.when(pl.program_id(2) == steps - 1)
    def _():
        out[...] = total[...].astype(out.dtype)
