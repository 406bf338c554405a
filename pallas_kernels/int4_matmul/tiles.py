"""A packed weight cut into tiles, and a tile turned into floats: what every XLA form and gradient is made of.

    N tiles   columns(w, start, size)   all of K, some columns: a product's output tile
    K blocks  rows(w, block, ...)       all of N, whole groups: a gradient's output block

A tile is a packed weight of its own, with its own spec. Its floats are not put into the order of K: with `unit`
codes to a packing unit, field i holds rows i, i + unit, i + 2 unit, ..., and

    x @ W = sum_i x[:, i::unit] @ field_i            x padded with zeros to whole units

so nothing is interleaved (interleaving costs eight times the product itself on a CPU), and padding codes meet zeros.
A field's floats are exactly what dequantizing gives: (code - zero_point) * scale + offset, computed in float32.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import packing
from pallas_kernels.int4_matmul.spec import HOPPER, NEUTRAL, TPU, PackedSpec
from pallas_kernels.int4_matmul.words import words_to_int4, words_to_integers

# Floats of one tile: they stay in a CPU's cache, yet are enough for a product to run at full speed. One row of x is
# bound by the unpacking, and gains from fewer, larger steps.
TILE_ELEMENTS = 2**20
TILE_ELEMENTS_OF_ONE_ROW = 2**21

# A weight smaller than a tile is still cut in so many, down to tiles of so many floats: unpacked as a whole it would
# take as much as the dense one.
TILES_OF_A_WEIGHT = 4
SMALLEST_TILE = 2**14


class Packed(NamedTuple):
    """The arrays of a packed weight; shapes in spec.py."""

    codes: Any
    scale: Any
    zero_point: Any = None
    offset: Any = None


def unit_of(spec: PackedSpec) -> int:
    """Codes to a packing unit; 1 where codes are elements."""
    return packing.codes_per_unit(spec.bits) if spec.layout == NEUTRAL else 1


def flat_scales(w: Packed, spec: PackedSpec) -> Packed:
    """Scales [G, 1, N] of the tpu layout as [G, N], and its words as int4; others as they are."""
    w = squeezed_scales(w, spec)
    return w._replace(codes=words_to_int4(w.codes, spec.length)) if holds_words(w, spec) else w


def holds_words(w: Packed, spec: PackedSpec) -> bool:
    return spec.layout == TPU and w.codes.dtype == jnp.int32


def unpacked_words(w: Packed, spec: PackedSpec) -> Packed:
    """Words as int8[K, N]; others as they are."""
    return w._replace(codes=words_to_integers(w.codes, spec.length).astype(jnp.int8)) if holds_words(w, spec) else w


def holds_all_of_k(codes: jax.Array, spec: PackedSpec) -> bool:
    """Whether the codes are as long along K as the spec says."""
    have, want = lengths_along_k(codes, spec)
    return have == want


def lengths_along_k(codes: jax.Array, spec: PackedSpec) -> tuple[int, int]:
    """How long the codes are along K, in bytes, words or elements, and how long they should be."""
    have = codes.shape[-1 if spec.layout == HOPPER else spec.k_axis]
    in_words = spec.layout == TPU and codes.dtype == jnp.int32
    return have, -(-spec.length // 8) if in_words else spec.packed_length


def squeezed_scales(w: Packed, spec: PackedSpec) -> Packed:
    """Scales [G, 1, N] of the tpu layout as [G, N]; others as they are."""
    if spec.layout != TPU:
        return w
    return Packed(w.codes, *(None if part is None else jnp.squeeze(part, -2) for part in w[1:]))


# --- cutting ---------------------------------------------------------------------------------------------------


def columns(w: Packed, spec: PackedSpec, start: Any, size: int) -> Packed:
    """The packed weight of columns [start, start + size). `w` has flat scales."""
    axis = w.codes.ndim - 3 - spec.k_axis  # of two axes, the one that K is not
    n = w.codes.shape[axis]

    def cut(part):
        if part is None or part.shape[axis] != n or size == n:
            return part
        return lax.dynamic_slice_in_dim(part, start, size, axis)

    return Packed(*map(cut, w))


def tile_elements(rows_of_x: int) -> int:
    """How many floats a tile should have on a CPU."""
    return TILE_ELEMENTS_OF_ONE_ROW if rows_of_x == 1 else TILE_ELEMENTS


def column_tile(spec: PackedSpec, n: int, elements: int = TILE_ELEMENTS) -> int:
    """How many columns a tile has."""
    elements = _at_most_a_part(elements, spec.length * n)
    return min(n, max(32, elements // max(spec.length, 1) // 32 * 32))


def row_block(spec: PackedSpec, n: int, elements: int = TILE_ELEMENTS) -> int:
    """How many rows a block has: whole units, and whole groups or an equal part of one."""
    elements = _at_most_a_part(elements, spec.length * n)
    unit, target = unit_of(spec), max(32, elements // max(n, 1))
    if spec.num_groups == 1:
        step = unit
    elif (step := math.lcm(spec.group_size, unit)) > target and spec.group_size % unit == 0:
        parts = spec.group_size // unit
        return unit * max(d for d in range(1, parts + 1) if parts % d == 0 and (d == 1 or unit * d <= target))
    return min(spec.length, max(1, target // step) * step)


def _at_most_a_part(elements: int, weight: int) -> int:
    return min(elements, max(weight // TILES_OF_A_WEIGHT, SMALLEST_TILE))


def rows(w: Packed, spec: PackedSpec, block: Any, size: int, length: int) -> tuple[Packed, PackedSpec]:
    """The packed weight of rows [block * size, block * size + length), for `size` from `row_block`, length <= size.

    Of words, `size` is a multiple of 8, and what comes is int8: that XLA fuses into what reads it.
    """
    if length == spec.length:
        return unpacked_words(w, spec), spec
    words = holds_words(w, spec)
    unit = 8 if words else unit_of(spec)
    sub = dataclasses.replace(spec, length=length)
    stored = -(-length // 8) if words else sub.packed_length
    per_block = size // unit * (w.codes.shape[spec.k_axis] // -(-spec.length // unit))
    codes = lax.dynamic_slice_in_dim(w.codes, block * per_block, stored, w.codes.ndim + spec.k_axis)
    groups = -(-length // spec.group_size)

    def cut(part):
        if part is None or part.shape[spec.k_axis] == 1:
            return part
        first = block * size // spec.group_size
        return lax.dynamic_slice_in_dim(part, first, groups, part.ndim + spec.k_axis)

    return unpacked_words(Packed(codes, *map(cut, w[1:])), sub), sub


def on_all_threads(index: jax.Array) -> jax.Array:
    """The index of a loop, by way of a sort that changes nothing.

    From JAX 0.12 on, XLA's CPU compiler turns a loop whose body calls nothing into one single-threaded function. A
    body with one row of x calls nothing; a sort it must call, and the loop stays one of parallel kernels: at best
    1.1 ms instead of 1.8 at 4096 x 4096 on two cores (JAX 0.12.0.1).
    """
    return lax.sort(jnp.stack([index, index]))[0]


def over_tiles(
    length: int, tile: int, function: Callable[[Any, int], jax.Array], axis: int, threads: bool = False
) -> jax.Array:
    """Concatenates function(tile_index, size) along `axis`: whole tiles in one loop, the rest after it."""
    whole = length // tile
    parts = []
    if whole == 1:
        parts.append(function(0, tile))
    elif whole:
        index_of = on_all_threads if threads else lambda i: i
        stacked = lax.map(lambda i: function(index_of(i), tile), jnp.arange(whole))  # [tiles, ..., tile, ...]
        moved = jnp.moveaxis(stacked, 0, axis % (stacked.ndim - 1))
        at = axis % (stacked.ndim - 1)
        parts.append(moved.reshape(*moved.shape[:at], whole * tile, *moved.shape[at + 2 :]))
    if length % tile:
        parts.append(function(whole, length % tile))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


# --- to floats -------------------------------------------------------------------------------------------------


def weight_fields(w: Packed, spec: PackedSpec, dtype: Any) -> list[jax.Array]:
    """Field i, `dtype`[rows, N] (or [N, rows]): rows i, i + unit, ... of the dense weight. Scales are flat."""
    fields = level_fields(w, spec)
    weights = []
    for i, levels in enumerate(fields):
        weight = levels * _of_field(w.scale, i, spec, levels)
        if w.offset is not None:
            weight = weight + _of_field(w.offset, i, spec, levels)
        weights.append(weight.astype(dtype))
    return weights


def stacks(spec: PackedSpec) -> bool:
    """Whether `stacked_weights` can serve: [K, N] bytes whose fields share their scales."""
    aligned = spec.num_groups == 1 or spec.group_size % unit_of(spec) == 0
    return spec.layout == NEUTRAL and spec.orientation == "kn" and 8 % spec.bits == 0 and aligned


def stacked_weights(w: Packed, spec: PackedSpec, dtype: Any) -> jax.Array:
    """All fields, one after the other, `dtype`[unit * rows, N]: one kernel and one product instead of `unit`."""
    shifts = jnp.arange(unit_of(spec), dtype=jnp.uint8) * jnp.uint8(spec.bits)
    codes = (w.codes[None] >> shifts[:, None, None]) & jnp.uint8(2**spec.bits - 1)  # u8[unit, rows, N]
    weight = _levels(codes, spec)
    if w.zero_point is not None:
        weight = weight - _of_field(w.zero_point.astype(jnp.float32) - float(spec.center), 0, spec, w.codes)[None]
    weight = weight * _of_field(w.scale, 0, spec, w.codes)[None]
    if w.offset is not None:
        weight = weight + _of_field(w.offset, 0, spec, w.codes)[None]
    return weight.reshape(-1, weight.shape[-1]).astype(dtype)


def level_fields(w: Packed, spec: PackedSpec) -> list[jax.Array]:
    """Field i of the levels, f32: the weight before its scale."""
    raw = [w.codes] if spec.layout != NEUTRAL else packing.unpack_fields(w.codes, spec.bits, spec.k_axis)
    levels = [_levels(field, spec) for field in raw]
    if w.zero_point is None:
        return levels
    shift = w.zero_point.astype(jnp.float32) - float(spec.center)
    return [field - _of_field(shift, i, spec, field) for i, field in enumerate(levels)]


def split_columns(x: jax.Array, spec: PackedSpec) -> list[jax.Array]:
    """x[M, K] as the fields of K: x[:, i::unit] with zeros for the padding."""
    unit = unit_of(spec)
    if unit == 1:
        return [x]
    x = jnp.pad(x, ((0, 0), (0, -x.shape[-1] % unit)))
    return [x[:, i::unit] for i in range(unit)]


def join_columns(parts: list[jax.Array], length: int) -> jax.Array:
    """Undoes `split_columns`."""
    if len(parts) == 1:
        return parts[0]
    return jnp.stack(parts, -1).reshape(parts[0].shape[0], -1)[:, :length]


def spread_to_fields(values: jax.Array, spec: PackedSpec, i: int, count: int) -> jax.Array:
    """One value a group to one a row of field i (`count` rows) along K; one group stays one."""
    axis = values.ndim + spec.k_axis
    groups, unit = values.shape[axis], unit_of(spec)
    if groups == 1:
        return values
    if spec.group_size % unit:
        group_of_row = np.minimum((np.arange(count) * unit + i) // spec.group_size, groups - 1)
        return jnp.take(values, jnp.asarray(group_of_row), axis=axis)
    times = spec.group_size // unit
    shape = (*values.shape[: axis + 1], times, *values.shape[axis + 1 :])
    wide = jnp.broadcast_to(jnp.expand_dims(values, axis + 1), shape)
    wide = wide.reshape(*values.shape[:axis], groups * times, *values.shape[axis + 1 :])
    return lax.slice_in_dim(wide, 0, count, axis=axis)


def sum_over_groups(field: jax.Array, spec: PackedSpec, i: int) -> jax.Array:
    """Rows of field i summed group by group: the transpose of `spread_to_fields`, [rows, N] -> [G, N]."""
    axis, unit = field.ndim + spec.k_axis, unit_of(spec)
    count = field.shape[axis]
    if spec.num_groups == 1:
        return jnp.sum(field, axis=axis, keepdims=True)
    if spec.group_size % unit:
        group_of_row = np.minimum((np.arange(count) * unit + i) // spec.group_size, spec.num_groups - 1)
        moved = jax.ops.segment_sum(jnp.moveaxis(field, axis, 0), jnp.asarray(group_of_row), spec.num_groups)
        return jnp.moveaxis(moved, 0, axis)
    times = spec.group_size // unit
    padding = [(0, 0)] * field.ndim
    padding[axis] = (0, spec.num_groups * times - count)
    field = jnp.pad(field, padding)
    shape = (*field.shape[:axis], spec.num_groups, times, *field.shape[axis + 1 :])
    return jnp.sum(field.reshape(shape), axis=axis + 1)


def _of_field(values: jax.Array, i: int, spec: PackedSpec, field: jax.Array) -> jax.Array:
    return spread_to_fields(values.astype(jnp.float32), spec, i, field.shape[spec.k_axis])


def _levels(field: jax.Array, spec: PackedSpec) -> jax.Array:
    """Levels f32 of codes without zero points (stored elements of integer formats are levels already)."""
    if spec.levels is not None:
        return levels_of_codebook(field, spec)
    if spec.layout != NEUTRAL:
        return field.astype(jnp.float32)
    if spec.bits == 8:
        return field.astype(jnp.float32) - float(spec.center)
    return (field.astype(jnp.int8) - jnp.int8(spec.center)).astype(jnp.float32)  # exact, and vectorises best


def levels_of_codebook(field: jax.Array, spec: PackedSpec) -> jax.Array:
    """The same of unsigned codes, or of stored elements, which are code - center."""
    if spec.layout != NEUTRAL:
        field = (field.astype(jnp.int8) + jnp.int8(spec.center)).astype(jnp.uint8)
    return _select(field, spec.levels or (), 0, len(spec.levels or ()))


def _select(codes: jax.Array, levels: tuple[float, ...], low: int, high: int) -> jax.Array:
    """levels[codes] as a tree of selects: vectors everywhere, where a gather would go element by element."""
    if high - low == 1:
        return jnp.full(codes.shape, levels[low], jnp.float32)
    middle = (low + high) // 2
    below, above = _select(codes, levels, low, middle), _select(codes, levels, middle, high)
    return jnp.where(codes < jnp.uint8(middle), below, above)
