"""x[M, K] @ W[K, N] by XLA alone, in the form that each platform's compiler keeps packed.

A plain `x @ dequantize(W)` makes every XLA backend write the dense weight to memory first (on a CPU at M = 1 that is
ten times slower than a float product, on a TPU it doubles the bytes of the bf16 one). What does not:

    cpu   N tiles of a few hundred columns, unpacked to f32 in the cache and multiplied there (a few rows by [K, N]:
          K blocks, whose bytes are contiguous). At M = 1 it runs at the speed of an f32 product of the dense weight,
          with an eighth of its memory (benchmarks/cpu_matmul.py).
    tpu   int4 or int8 [K, N], or words. One dot a group, whose convert the compiler fuses, and the partial sums scaled.
          Many rows on v4, v5e and v5p: one dot of bf16 weights, which their compilers make while they feed the MXU (of
          v6e and TPU7x the compiler writes them to memory first). Nothing is cut along N, so that a program that XLA
          partitions along it gathers no weights: these forms serve where the kernel cannot (partitioned.py). By N tiles
          it gathered 28 times, and moved 563 MiB for 7 MiB of codes (v5e, 512 x 4096 x 14336 on four chips).
          Many rows by groups shorter than LEAST_DOT go by N tiles, other than words.
    gpu   int4 [N, K], by the same two forms as int4 on a TPU. (One scaled product of the whole is fused by JAX 0.12's
          Triton, but JAX 0.10.2 writes its dense weight to memory.)

Neutral bytes on a TPU or GPU, and what has no int4 form (other bits, codebooks), go by N tiles everywhere: slower, as
the bytes are unpacked by vector operations at every call, but in bounded memory (re-laying the whole weight inside the
program takes more memory than the dense one, by the TPU's compiler). `jq4.prepare` re-lays once. Sums are float32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import packing
from pallas_kernels.int4_matmul import tiles
from pallas_kernels.int4_matmul.spec import NEUTRAL, TPU, PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.int4_matmul.tpu_chips import traced_chip
from pallas_kernels.int4_matmul.words import words_to_integers

# Up to so many rows the partial sums of the groups are scaled; above, the weights are. KERNELS: the crossing lies
# between 16 and 64 on the TPUs whose schedules were counted; one f32 sum a group and row must stay below the weight.
DECODE_ROWS = 32

# A dot of so many rows of a group fills enough of an MXU of 128 or 256 rows.
LEAST_DOT = 64

# On a CPU, up to so many rows of x go through [K, N] in blocks of K: narrow tiles of columns stride through memory.
ROW_BLOCK_ROWS = 8

# Elements of a column tile: enough for a dot to fill the chip, small beside a large weight.
ACCELERATOR_TILE = {"tpu": 2**22, "gpu": 2**24}


def int4_matmul_xla(x: jax.Array, w: Packed, spec: PackedSpec, *, platform: str, precision: Any = None) -> jax.Array:
    """f32[M, N] = x[M, K] @ W[K, N] for lowering on `platform` ("cpu", "tpu" or "gpu")."""
    rows, columns = x.shape[0], spec.columns(w.codes.shape)
    if 0 in (*x.shape, columns):
        return jnp.zeros((rows, columns), accumulator(x.dtype))
    if platform == "cpu":
        x, w = x.astype(accumulator(x.dtype)), tiles.flat_scales(w, spec)
        few = x.shape[0] <= ROW_BLOCK_ROWS and spec.orientation == "kn"
        return (by_row_blocks if few else by_column_tiles)(x, w, spec, precision)
    if platform == "tpu" and x.shape[0] > DECODE_ROWS and makes_weights_in_the_dot(spec):
        return by_one_dot(x, w, spec, precision)
    if tiles.holds_words(w, spec) and (spec.num_groups == 1 or spec.group_size % 8 == 0):
        return by_groups(x, tiles.squeezed_scales(w, spec), spec, precision)
    w = tiles.flat_scales(w, spec)
    if spec.layout != NEUTRAL and (x.shape[0] <= DECODE_ROWS or (spec.layout == TPU and fills_dots(spec))):
        return by_groups(x, w, spec, precision)
    return by_column_tiles(x, w, spec, precision, ACCELERATOR_TILE[platform])


def makes_weights_in_the_dot(spec: PackedSpec) -> bool:
    """Whether the compiler of the traced chip fuses all of a weight's unpacking and scaling into one dot."""
    return spec.layout == TPU and spec.num_groups > 1 and spec.levels is None and not traced_chip().bf16_vector


def fills_dots(spec: PackedSpec) -> bool:
    """Whether a dot a group is worth its while with many rows."""
    return spec.num_groups == 1 or spec.group_size >= LEAST_DOT


def has_int4_form(spec: PackedSpec) -> bool:
    return spec.layout != NEUTRAL or (spec.bits == 4 and spec.levels is None)


def as_int4(w: Packed, spec: PackedSpec, layout: str) -> tuple[Packed, PackedSpec]:
    """A 4-bit weight in the tpu (int4, not words) or gpu layout; batch axes in front are kept. Lossless.

    For the tpu layout it may be a codebook's, or of 8 bits: int8.
    """
    if spec.layout == layout and w.codes.dtype != jnp.int32:
        return w, spec
    w = tiles.flat_scales(w, spec)
    codes = w.codes
    if spec.layout == NEUTRAL:
        codes = packing.unpack(codes, spec.bits, spec.k_axis, spec.length)
        signed = lax.bitcast_convert_type(codes ^ jnp.uint8(128), jnp.int8)  # code - 128
        codes = signed if spec.bits == 8 else (codes.astype(jnp.int8) - jnp.int8(8)).astype(jnp.int4)
    orientation = "kn" if layout == TPU else "nk"
    scales = w[1:]
    if orientation != spec.orientation:
        codes, *scales = (None if part is None else jnp.swapaxes(part, -1, -2) for part in (codes, *scales))
    if layout == TPU:
        scales = [None if part is None else jnp.expand_dims(part, -2) for part in scales]
    return Packed(codes, *scales), dataclasses.replace(spec, orientation=orientation, layout=layout)


def accumulator(dtype: Any) -> Any:
    """float32, or float64 for float64."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def by_column_tiles(
    x: jax.Array, w: Packed, spec: PackedSpec, precision: Any = None, elements: int | None = None
) -> jax.Array:
    """Tiles of columns, each unpacked to x's dtype and multiplied: at most one tile is ever dense. Scales are flat."""
    n = spec.columns(w.codes.shape)
    tile = tiles.column_tile(spec, n, elements or tiles.tile_elements(x.shape[0]))
    parts = tiles.split_columns(x, spec)

    def one(index: Any, size: int) -> jax.Array:
        weights = tiles.weight_fields(tiles.columns(w, spec, index * tile, size), spec, x.dtype)
        return _sum_of_products(parts, weights, spec, precision)  # [M, size]

    return tiles.over_tiles(n, tile, one, axis=-1, threads=elements is None and x.shape[0] == 1)


def by_one_dot(x: jax.Array, w: Packed, spec: PackedSpec, precision: Any = None) -> jax.Array:
    """One dot of all weights in x's dtype, of the tpu layout: for compilers that make them while they feed the dot."""
    w = tiles.squeezed_scales(w, spec)
    if tiles.holds_words(w, spec):
        w = w._replace(codes=words_to_integers(w.codes, spec.length))  # as int8 they were written to memory
    return _sum_of_products([x], tiles.weight_fields(w, spec, x.dtype), spec, precision)


def by_row_blocks(x: jax.Array, w: Packed, spec: PackedSpec, precision: Any = None) -> jax.Array:
    """Blocks of rows of [K, N], each unpacked to x's dtype, multiplied and added up. Scales are flat."""
    n, one_row = spec.columns(w.codes.shape), x.shape[0] == 1
    size = tiles.row_block(spec, n, tiles.tile_elements(x.shape[0]))
    per_block = size // tiles.unit_of(spec)
    fields = jnp.stack(tiles.split_columns(x, spec), 1)  # [M, unit, rows]

    def one(index: Any, length: int) -> jax.Array:
        block, sub = tiles.rows(w, spec, index, size, length)
        count = block.codes.shape[0] // (w.codes.shape[0] // fields.shape[-1])
        rows = lax.dynamic_slice_in_dim(fields, index * per_block, count, 2)  # [M, unit, count]
        if tiles.stacks(spec):
            parts, weights = [rows.reshape(rows.shape[0], -1)], [tiles.stacked_weights(block, sub, x.dtype)]
        else:
            parts, weights = list(jnp.unstack(rows, axis=1)), tiles.weight_fields(block, sub, x.dtype)
        return _sum_of_products(parts, weights, spec, precision)  # [M, N]

    index_of = tiles.on_all_threads if one_row else lambda i: i
    whole, rest = divmod(spec.length, size)
    out = one(0, min(size, spec.length))
    if whole > 1:
        out, _ = lax.scan(lambda total, i: (total + one(index_of(i), size), None), out, jnp.arange(1, whole))
    return out + one(whole, rest) if whole and rest else out


def by_groups(x: jax.Array, w: Packed, spec: PackedSpec, precision: Any = None) -> jax.Array:
    """Codes, int4 or words, go into one dot a group as they are; partial sums [G, M, N] are scaled and added.

    Scales are flat.
    """
    k, group = spec.length, min(spec.group_size, spec.length)
    whole = k // group * group
    kn = spec.orientation == "kn"
    scales = [None if part is None else (part if kn else part.T).astype(jnp.float32) for part in w[1:]]  # [G, N]
    scale, constant = scales[0], _constant(scales, spec)
    assert scale is not None

    def partial(first: int, last: int, groups: int) -> jax.Array:
        rows = x[:, first:last].reshape(x.shape[0], groups, -1)  # [M, G, g]
        codes = _codes_of_groups(w.codes, spec, first, last, groups)
        codes = (codes if spec.levels is None else tiles.levels_of_codebook(codes, spec)).astype(x.dtype)
        equation = "mgk,gkn->gmn" if kn else "mgk,ngk->gmn"
        return jnp.einsum(equation, rows, codes, preferred_element_type=accumulator(x.dtype), precision=precision)

    sums = partial(0, whole, whole // group) * scale[: whole // group, None, :]
    out = jnp.sum(sums, axis=0)  # f32[M, N]
    if whole < k:  # a short last group
        out = out + (partial(whole, k, 1) * scale[-1:, None, :])[0]
    if constant is not None:
        sums_of_x = tiles.sum_over_groups(x.astype(jnp.float32), dataclasses.replace(spec, orientation="nk"), 0)
        out = out + jnp.matmul(sums_of_x, constant, precision=lax.Precision.HIGHEST)
    return out


def _codes_of_groups(codes: jax.Array, spec: PackedSpec, first: int, last: int, groups: int) -> jax.Array:
    """Codes [first, last) along K as [groups, g, N], or [N, groups, g]; words start with a group and end with one."""
    if codes.dtype == jnp.int32:
        held = lax.slice_in_dim(codes, first // 8, -(-last // 8), axis=0)
        return words_to_integers(held.reshape(groups, -1, held.shape[-1]), (last - first) // groups)
    axis = 0 if spec.orientation == "kn" else 1
    codes = lax.slice_in_dim(codes, first, last, axis=axis)
    return codes.reshape(*codes.shape[:axis], groups, -1, *codes.shape[axis + 1 :])


def _constant(scales: list[Any], spec: PackedSpec) -> Any:
    """What every row of a group adds, f32[G, N]: (center - zero_point) * scale + offset, or None."""
    scale, zero_point, offset = scales
    constant = None if zero_point is None else (float(spec.center) - zero_point) * scale
    if offset is None:
        return constant
    return offset if constant is None else constant + offset


def _sum_of_products(parts: list[jax.Array], weights: list[jax.Array], spec: PackedSpec, precision: Any) -> jax.Array:
    contract = ((1,), (0 if spec.orientation == "kn" else 1,))
    dots = [
        lax.dot_general(
            part, weight, (contract, ((), ())), precision=precision, preferred_element_type=accumulator(part.dtype)
        )
        for part, weight in zip(parts, weights, strict=True)
    ]
    return sum(dots[1:], dots[0])
