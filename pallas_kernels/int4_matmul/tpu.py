"""x[M, K] @ W[K, N] on a TPU, W as words of int4 i32[K / 8, N] with scales [G, 1, N], by one Pallas kernel.

    grid     (M / bm, N / bn, K / bk), K innermost; out[bm, bn] is summed in f32 in VMEM and rounded once
    in HBM   x, codes, scales, zero points, offsets: nothing of the dense weight, ever
    x        stays in VMEM over the whole sweep of N where it is small (decode), so that each step reads only weights

What becomes of the codes between VMEM and the MXU, chip by chip, as the compiler's schedules show it (the forms are in
tpu_forms.py, which of them is taken when in tpu_blocks.py):

    v6e     direct     vunpack.s4.bf16, one instruction for 2048 codes, and push; partial sums are scaled
            wscale     the same and one vmul.bf16 for 2048 weights, hidden by the MXU where rows are many
    tpu7x   direct     vunpack.s4.s8, vcvt to fp8 (e4m3 holds -8..7 exactly), pushed as fp8 beside x in bf16
            wscale     as on v6e
    v5e/p   magic      vshrl, vand, vxor on words: bf16 136 + code with no conversion, three for 2048 codes
            direct     vunpack.s4.s8, vunpack.s8.s32, vcvt.s32.f32 and a push that rounds: nine for 2048 codes, but no
                       sums of x; both are hidden by HBM at decode
            wscale     the same, vmul.f32 and a pack, for many rows; there are no bf16 vectors to scale in
    v4      magic      as on v5; its compiler's own unpacking goes through memory and takes 3 to 6 times as long
            shifted    vshll, vshra, vcvt.s32.f32, vmul.f32 and half a pack for 1024 codes, for many rows
    v5, v6e integer    vunpack.s4.s8 and an s8 push, for whole numbers

Of a stack of layers in a `lax.scan` each layer is a dynamic slice of the stack. XLA writes a kernel's operand to memory
first, which would move every weight three times, unless it may fuse the slice into the kernel's own reading, which its
TPU compiler does for 32-bit types alone, in kernels without loops that are content with the default share of VMEM:
hence words of eight codes, `allow_input_fusion`, and blocks of a few MiB.

Scales are [G, 1, N] in the caller's tree, which XLA lays in memory as [G, N]: the kernel reads them as that wherever a
block has eight rows of them. Read as [G, 1, N] they were padded to registers by XLA before every call, 5 us of 56 with
groups of 128 and 21 of 96 with groups of 32 (v5p, 16 x 8192 x 28672).

Where K is no multiple of the block, x is padded with zeros, which codes beyond the end meet, and scales beyond the end
are taken for zeros. (They are not overwritten in VMEM: where XLA fuses what reads an operand into the kernel, its
compiler cannot write there.) Rows beyond M and columns beyond N are computed from what memory holds, and dropped.

float32 x goes through the MXU as XLA's own float32 products do: rounded to bf16 by default, as the sum of two or three
bf16 terms (more rows of x, by the same kernel) for Precision.HIGH and HIGHEST.
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
from pallas_kernels.int4_matmul.precision import bf16_terms
from pallas_kernels.int4_matmul.spec import TPU, PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.int4_matmul.tpu_blocks import find_plan
from pallas_kernels.int4_matmul.tpu_chips import Chip, traced_chip
from pallas_kernels.int4_matmul.tpu_forms import LANES
from pallas_kernels.int4_matmul.tpu_order import in_order
from pallas_kernels.int4_matmul.tpu_plan import Plan, Problem, reads_flat_scales
from pallas_kernels.int4_matmul.xla import int4_matmul_xla
from pallas_kernels.manual_axes import shape_varying_as

GROUP_MULTIPLE = 32  # rows of int4 that every chip slices without shuffling
MOST_DEPTH = 2048  # rows of a block of codes that are both whole groups and a multiple of LANES


def refusal(spec: PackedSpec) -> str | None:
    """Why the kernel does not take a weight, or None."""
    if spec.layout != TPU:
        return f"tpu reads the tpu layout, not the {spec.layout} one (jq4.prepare re-lays a tree once)"
    if spec.num_groups > 1 and spec.group_size % GROUP_MULTIPLE:
        return f"tpu reads groups of a multiple of {GROUP_MULTIPLE} rows, not of {spec.group_size}"
    if spec.num_groups > 1 and spec.group_size % LANES and math.lcm(spec.group_size, LANES) > MOST_DEPTH:
        common = math.lcm(spec.group_size, LANES)
        return f"tpu reads whole groups and multiples of {LANES} rows, at most {MOST_DEPTH} of them, not {common}"
    return None


def int4_matmul_tpu(
    x: jax.Array,
    w: Packed,
    spec: PackedSpec,
    *,
    platform: str = "tpu",
    precision: Any = None,
    dtype: Any = None,
    chip: Chip | None = None,
    plan: Plan | None = None,
    integers: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """`dtype` (f32)[M, N] = x[M, K] @ W[K, N].

    Args:
      x: float[M, K].
      w: codes i32[ceil(K / 8), N] or int4[K, N], scale [G, 1, N], zero_point u8[G, 1, N], offset [G, 1, N].
      spec: layout "tpu".
      platform: always "tpu", but for the interpreter.
      precision: of a float32 x.
      dtype: of the result.
      chip: None is the one of the trace.
      plan: None is chosen for the chip and the sizes; where nothing fits its memory, XLA's form is taken.
      integers: x holds whole numbers of at most 127: they may be multiplied as int8.
      interpret: run on a CPU, by Pallas' interpreter of TPU kernels.
    """
    (m, k), n = x.shape, w.codes.shape[1]
    if 0 in (m, k, n):
        return jnp.zeros((m, n), dtype or jnp.float32)
    terms = bf16_terms(x, lax.Precision.DEFAULT if integers else precision)  # bf16[T, M, K]
    count = len(terms)
    flags = (w.zero_point is not None, w.offset is not None)
    written = jnp.float32 if count > 1 or dtype in (None, jnp.float16) else dtype  # f16 is the caller's own rounding
    kinds = {"number": number_of(spec), "out_bytes": jnp.dtype(written).itemsize}
    problem = Problem(count * m, k, n, spec.num_groups, spec.group_size, *flags, **kinds)
    chip = chip or traced_chip()
    plan = plan or find_plan(problem, chip, count > 1, integers)
    if plan is None:
        return int4_matmul_xla(x, w, spec, platform="tpu", precision=precision)
    if w.zero_point is not None and plan.loops and chip.name in ("v4", "unknown"):
        w = w._replace(zero_point=w.zero_point.astype(jnp.int32))  # v4 slices bytes by multiples of 32 rows alone
    rows = terms.reshape(count * m, k).astype(jnp.int8 if plan.form == "integer" else jnp.bfloat16)
    tables = tpu_tables.tables_for(spec.levels, chip.name, count)
    out = functools.reduce(jnp.add, [_call(rows, w, table, plan, spec, written, interpret) for table in tables])
    return out if count == 1 else jnp.sum(out.reshape(count, m, n), 0)


def number_of(spec: PackedSpec) -> str:
    """What kind of codes a weight has, for Problem."""
    return "table" if spec.levels is not None else f"int{spec.bits}"


def _call(x: jax.Array, w: Packed, table: Any, plan: Plan, spec: PackedSpec, dtype: Any, interpret: bool) -> jax.Array:
    """[M, N] from bf16 or int8 x[M, K]."""
    (m, k), n = x.shape, w.codes.shape[1]
    bm, bk, bn = plan.block_m, plan.block_k, plan.block_n
    steps = pl.cdiv(k, bk)
    one = spec.num_groups == 1
    group = bk if one else min(bk, spec.group_size)
    repeat = steps if one else max(1, spec.group_size // bk)  # blocks that share a row of scales
    per_block = bk // group
    over = 0 if repeat > 1 else steps * per_block - spec.num_groups  # groups that the last block has too many
    x = jnp.pad(x, ((0, 0), (0, steps * bk - k)))
    x = in_order(x, group, plan.form, from_table=table is not None)
    flat = reads_flat_scales(spec.num_groups, spec.group_size, plan)
    by_group = pl.BlockSpec((per_block, 1, bn), lambda i, j, k: (lax.div(k, jnp.int32(repeat)), 0, j))
    if flat:
        by_group = pl.BlockSpec((per_block, bn), lambda i, j, k: (k, j))
    x_columns = steps * bk if plan.resident else bk
    once = pl.Buffered(1) if plan.once else None
    stored = tpu_forms.rows_of_a_code(w.codes, spec.bits)
    full = [None if part is None else _full(part, n, flat) for part in w[1:]]
    operands = {
        "x": (x, pl.BlockSpec((bm, x_columns), lambda i, j, k: (i, 0 if plan.resident else k), pipeline_mode=once)),
        "codes": (w.codes, pl.BlockSpec((bk // stored, bn), lambda i, j, k: (k, j))),
        **{name: (part, by_group) for name, part in zip(("scale", "zero_point", "offset"), full, strict=True)},
        "table": tpu_tables.operand(table),
    }
    present = {name: pair for name, pair in operands.items() if pair[0] is not None}
    kernel = functools.partial(
        _kernel, names=tuple(present), plan=plan, group=group, over=over, steps=steps, interpret=interpret
    )
    arrays = [array for array, _ in present.values()]
    return pl.pallas_call(
        kernel,
        name="int4_matmul",
        grid=(pl.cdiv(m, bm), pl.cdiv(n, bn), steps),
        in_specs=[block for _, block in present.values()],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
        out_shape=shape_varying_as((m, n), dtype or jnp.float32, arrays),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=plan.vmem_limit,
            allow_input_fusion=tuple(
                not plan.loops and name not in ("x", "table") and array.dtype.itemsize == 4
                for name, (array, _) in present.items()
            ),
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
    )(*arrays)


def _full(part: jax.Array, n: int, flat: bool) -> jax.Array:
    """[G, 1, N], or [G, N], from [G, 1, N or 1]."""
    part = tpu_forms.without_float16(part)
    groups = part.shape[0]
    return jnp.broadcast_to(part, (groups, 1, n)).reshape((groups, n) if flat else (groups, 1, n))


def _kernel(*refs: Any, names: tuple[str, ...], plan: Plan, group: int, over: int, steps: int, interpret: bool) -> None:
    *inputs, out, total = refs
    block = _block_of(dict(zip(names, inputs, strict=True)), plan.block_k)
    block = block._replace(groups_held=tpu_forms.held_of(block.scale.shape[0], over, steps))
    form = tpu_forms.form_of(plan.form, plan.wide, interpret)
    if steps == 1 and plan.chunk >= plan.block_k:
        out[...] = form(block, group).astype(out.dtype)
        return

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    tpu_forms.accumulate(form, block, group, plan.chunk, total)

    @pl.when(pl.program_id(2) == steps - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def _block_of(refs: dict[str, Any], block_k: int) -> tpu_forms.Block:
    """The grid step's operands; of a resident x, the columns of this step."""
    x = refs["x"]
    if x.shape[1] != block_k:
        x = x.at[:, pl.ds(pl.multiple_of(pl.program_id(2) * block_k, block_k), block_k)]
    return tpu_forms.Block(**{**refs, "x": x})
