"""dx[M, K] = dy[M, N] @ W[K, N]^T on a TPU, from the codes as they lie: the transpose of tpu.py's product.

    grid     (M / bm, K / bk, N / bn), N innermost; dx[bm, bk] is summed in f32 in VMEM and rounded once
    a step   unpacks and scales one block of W to bf16[bk, bn] in VMEM, and contracts both operands' last axes, which
             the MXU does without transposing anything in memory

Gradients are taken over many rows, so that there is one form, that of `wscale`: the weights are rounded as a dense bf16
weight is. Where N is no multiple of the block, dy is padded with zeros, and scales beyond the end are taken for zeros.
Levels of a codebook come in the order of tpu_tables.py, and so do the columns of dx: they are put back at the end.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.int4_matmul import tpu_forms, tpu_tables
from pallas_kernels.int4_matmul.spec import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.int4_matmul.tpu_chips import Chip, traced_chip
from pallas_kernels.manual_axes import shape_varying_as

# Rows of dy, and rows and columns of a block of W, by whether the chip multiplies bf16 vectors (others unpack in f32).
BLOCKS = {True: 1024, False: 512}


def int4_matmul_tpu_transposed(
    dy: jax.Array,
    w: Packed,
    spec: PackedSpec,
    *,
    dtype: Any = None,
    chip: Chip | None = None,
    block: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`dtype` (f32)[M, K] = dy[M, N] @ W[K, N]^T, all but `block` as for int4_matmul_tpu; dy is rounded to bf16."""
    chip = chip or traced_chip()
    bf16_vector, (table, *_) = chip.bf16_vector, tpu_tables.tables_for(spec.levels, chip.name, 1)
    block = block or BLOCKS[bf16_vector]
    (m, n), k = dy.shape, spec.length
    if 0 in (m, n, k):
        return jnp.zeros((m, k), dtype or jnp.float32)
    group = k if spec.num_groups == 1 else spec.group_size
    bk = depth_of(spec, block)
    rest = max(block * block // max(bk, block), tpu_forms.LANES)  # `block`, or less beside a deeper block of W
    bm, bn = min(m, rest // 16 * 16), min(n, rest // tpu_forms.LANES * tpu_forms.LANES)
    per_block = max(1, bk // group)
    repeat = pl.cdiv(k, bk) if spec.num_groups == 1 else max(1, group // bk)  # blocks that share a row of scales
    steps = pl.cdiv(n, bn)
    dy = jnp.pad(dy.astype(jnp.bfloat16), ((0, 0), (0, steps * bn - n)))
    by_group = pl.BlockSpec((per_block, 1, bn), lambda i, k, j: (lax.div(k, jnp.int32(repeat)), 0, j))
    stored = tpu_forms.rows_of_a_code(w.codes, spec.bits)
    parts = map(tpu_forms.without_float16, w[1:])
    full = [None if part is None else jnp.broadcast_to(part, (part.shape[0], 1, n)) for part in parts]
    operands = {
        "x": (dy, pl.BlockSpec((bm, bn), lambda i, k, j: (i, j))),
        "codes": (w.codes, pl.BlockSpec((bk // stored, bn), lambda i, k, j: (k, j))),
        **{name: (part, by_group) for name, part in zip(("scale", "zero_point", "offset"), full, strict=True)},
        "table": tpu_tables.operand(table),
    }
    present = {name: pair for name, pair in operands.items() if pair[0] is not None}
    arrays = [array for array, _ in present.values()]
    kernel = functools.partial(
        _kernel, names=tuple(present), group=bk // per_block, wide=not bf16_vector, over=steps * bn - n, steps=steps
    )
    written = jnp.float32 if dtype is None or dtype == jnp.float16 else dtype
    steps_k = pl.cdiv(k, bk)
    out = pl.pallas_call(
        kernel,
        name="int4_matmul_transposed",
        grid=(pl.cdiv(m, bm), steps_k, steps),
        in_specs=[block_spec for _, block_spec in present.values()],
        out_specs=pl.BlockSpec((bm, bk), lambda i, k, j: (i, k)),
        out_shape=shape_varying_as((m, k if table is None else steps_k * bk), written, arrays),
        scratch_shapes=[pltpu.VMEM((bm, bk), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            allow_input_fusion=tuple(
                name not in ("x", "table") and array.dtype.itemsize == 4 for name, (array, _) in present.items()
            ),
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
    )(*arrays)
    if table is not None:
        held = min(out.shape[1], spec.num_groups * group) if spec.num_groups > 1 else out.shape[1]
        out = jnp.pad(out[:, :held], ((0, 0), (0, -held % tpu_forms.LANES)))  # columns without a scale may be NaN
        out = tpu_tables.natural_order(out, math.gcd(bk // per_block, tpu_forms.LANES))[:, :k]
    return out.astype(dtype or jnp.float32)


def depth_of(spec: PackedSpec, block: int) -> int:
    """Rows of W of a block: whole groups, or an equal part of a long one; a multiple of LANES."""
    if spec.num_groups == 1:
        return min(block, -(-spec.length // tpu_forms.LANES) * tpu_forms.LANES)
    unit = math.lcm(spec.group_size, tpu_forms.LANES)
    if unit <= block:
        return min(block // unit, -(-spec.length // unit)) * unit
    parts = range(tpu_forms.LANES, block + 1, tpu_forms.LANES)
    return max((size for size in parts if spec.group_size % size == 0), default=unit)


def _kernel(*refs: Any, names: tuple[str, ...], group: int, wide: bool, over: int, steps: int) -> None:
    *inputs, out, total = refs
    block = tpu_forms.Block(**dict(zip(names, inputs, strict=True)))
    block = block._replace(columns_held=tpu_forms.held_of(block.codes.shape[1], over, steps))

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    weight = tpu_forms.dense(block, group, wide=wide)  # bf16[bk, bn]
    total[...] += lax.dot_general(block.x[...], weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == steps - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)
