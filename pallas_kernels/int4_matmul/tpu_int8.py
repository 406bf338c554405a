"""x[M, K] @ W[K, N] on a TPU with W of 8-bit integers, int8[K, N], scales [G, 1, N]: XLA's own product or a kernel.

Of one byte a weight little is left to gain. Where codes are int8 in memory XLA fuses their conversion into the dot, and
at decode every chip then waits for HBM, as a kernel would (16 x 4096 x 4096 in groups of 128, modelled microseconds of
XLA's form and the kernel's: v4 14.1 and 47.9, v5e 21.1 and 21.1, v5p 6.6 and 6.3, v6e 10.6 and 10.6, TPU7x 4.7 and
5.2). By the column XLA's form is at the MXU's bound with many rows as well.

Many rows by groups are another matter, chip by chip. v4, v5e and v5p make bf16 weights while they feed one dot, and
write none to memory, nor copy a layer out of a stack; v6e and TPU7x write them first, and have the kernel. Modelled
microseconds at 512 x 4096 x 14336 (benchmarks/results/tpu-int8-prefill.json; libtpu 0.0.52, no chip was timed):

                        v4       v5e      v5p      v6e      tpu7x
    bundles             254      268      130      78.4     47.9
    the MXU's bound     219      305      131      65.5     52.1
    HBM                 63.9     95.9     28.4     81.1     37.4
    what multiplies     XLA, in one dot            the kernel

Whole numbers by int8 have the kernel wherever there is an integer MXU: at 512 x 4096 x 4096 67.5 on v5e and 28.9 on
v5p, where bf16 takes 87.2 and 37.4.

Activations in fp8 (e4m3) beside int4 weights, which e4m3 holds, were counted for TPU7x, whose MXU takes them at twice
the rate, and left out. Bundles of a step of 1024 x 1024 codes, bf16 x and fp8 x: 16 rows 510 and 542 in groups of 128,
433 and 434 by the column; 512 rows 4758 and 4028 (scaled weights beside bf16 take 2372), 1900 and 1370. Only many rows
by the column would gain: activations rounded to e4m3 are multiplied as bf16 here, which holds them.

The kernel is that of tpu.py. Words of four codes would let it read a layer of a stack in place (tpu.py says why), but
would keep XLA from fusing; rows are many where it is used, so that a layer is copied (two bytes of traffic a weight).
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul import tiles, xla
from pallas_kernels.int4_matmul.spec import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.int4_matmul.tpu import int4_matmul_tpu
from pallas_kernels.int4_matmul.tpu_chips import Chip, traced_chip


def matmul_tpu(
    x: jax.Array,
    w: Packed,
    spec: PackedSpec,
    *,
    platform: str = "tpu",
    precision: Any = None,
    dtype: Any = None,
    chip: Chip | None = None,
    fits: str = "",
    interpret: bool = False,
) -> jax.Array:
    """`dtype` (f32)[M, N] = x[M, K] @ W[K, N] as `int4_matmul_tpu` has it; of 8 bits by whichever is faster."""
    chip, integers = chip or traced_chip(), fits == "int8"
    if spec.bits == 8 and not kernel_pays(x.shape[0], spec, chip, integers):
        return by_xla(x, w, spec, precision=precision, integers=integers and chip.integer_mxu)
    return int4_matmul_tpu(
        x, w, spec, platform=platform, precision=precision, dtype=dtype, chip=chip, integers=integers,
        interpret=interpret,
    )  # fmt: skip


def kernel_pays(rows: int, spec: PackedSpec, chip: Chip, integers: bool) -> bool:
    many = spec.num_groups > 1 and rows > xla.DECODE_ROWS
    return many and (chip.bf16_vector or (integers and chip.integer_mxu))


def by_xla(x: jax.Array, w: Packed, spec: PackedSpec, *, precision: Any, integers: bool) -> jax.Array:
    """f32[M, N]. With `integers`, x holds whole numbers of at most 127, which are multiplied as int8."""
    if integers and w.zero_point is None and w.offset is None:
        return _integer_sums(x.astype(jnp.int8), tiles.squeezed_scales(w, spec), spec)
    if spec.num_groups > 1 and x.shape[0] > xla.DECODE_ROWS:
        return xla.by_one_dot(x, w, spec, precision)
    return xla.int4_matmul_xla(x, w, spec, platform="tpu", precision=precision)


def _integer_sums(x: jax.Array, w: Packed, spec: PackedSpec) -> jax.Array:
    """One product of int8 by int8 a group into int32 sums f32[G, M, N], scaled and added."""
    group = min(spec.group_size, spec.length)
    missing = spec.num_groups * group - spec.length
    x = jnp.pad(x, ((0, 0), (0, missing))).reshape(x.shape[0], spec.num_groups, group)
    codes = jnp.pad(w.codes, ((0, missing), (0, 0))).reshape(spec.num_groups, group, -1)
    sums = jnp.einsum("mgk,gkn->gmn", x, codes, preferred_element_type=jnp.int32)
    return jnp.sum(sums.astype(jnp.float32) * w.scale.astype(jnp.float32)[:, None], 0)
