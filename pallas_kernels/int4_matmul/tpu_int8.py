"""x[M, K] @ W[K, N] on a TPU with W of 8-bit integers, int8[K, N], scales [G, 1, N]: XLA's own product or a kernel.

Of one byte a weight little is left to gain. Where codes are int8 in memory XLA fuses their conversion into the dot, and
at decode every chip then waits for HBM, as a kernel would. What its compiler does less well is many rows by groups: it
scales the weights in a loop of its own before each dot. Modelled microseconds at 4096 x 4096 (libtpu 0.0.52; no chip
was timed), the best of XLA's forms and the kernel's:

    rows, scales          v4           v5e          v5p          v6e          tpu7x
    16, groups of 128     14.1 / 47.9  21.1 / 21.1   6.6 / 6.3   10.6 / 10.6   4.7 / 5.2      XLA
    512, a column         86.8 / -     87.2 / -     37.5 / -     19.4 / -     14.9 / -        XLA
    512, groups of 128    78.9 / 119   87.2 / 87.2  37.5 / 37.5  37.4 / 26.3  25.1 / 17.7     kernel on v6e and TPU7x
    512, the same, x int8  as above    87.2 / 67.5  37.4 / 28.9  37.4 / 26.3  as above        kernel where there is an
                                                                                              integer MXU

Those are the best of several forms; the one that xla.py has for many rows by groups, tiles of columns, takes 120, 98.5,
70.9, 36.8 and 28.3 (benchmarks/results/tpu-int8.json): on v4, v5e and v5p there is time left to win.

Activations in fp8 (e4m3) beside int4 weights, which e4m3 holds, were counted for TPU7x, whose MXU takes them at twice
the rate, and left out. Bundles of a step of 1024 x 1024 codes, bf16 x and fp8 x: 16 rows 510 and 542 in groups of 128,
433 and 434 by the column; 512 rows 4758 and 4028 (scaled weights beside bf16 take 2372), 1900 and 1370. Only many rows
by the column would gain, and jq4's rounded activations are whole numbers up to 127, which e4m3 does not hold.

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
    integers: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """`dtype` (f32)[M, N] = x[M, K] @ W[K, N] as `int4_matmul_tpu` has it; of 8 bits by whichever is faster."""
    chip = chip or traced_chip()
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
