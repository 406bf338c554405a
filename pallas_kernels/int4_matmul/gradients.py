"""The transposes of x @ W: what reaches x, the scales and the offsets. Codes are integers and get none.

    dx      = dy @ W^T                                       by K blocks: one block of W is dense at a time
    dscale  = sum over the rows k of a group of level[k, n] (x^T dy)[k, n]     by N tiles
    doffset = sum over the rows k of a group of            (x^T dy)[k, n]     = (x summed over groups)^T dy

A cotangent that nobody asks for is dead code, which the compiler removes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul import tiles
from pallas_kernels.int4_matmul.spec import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.int4_matmul.xla import accumulator


def input_cotangent(dy: jax.Array, w: Packed, spec: PackedSpec, dtype: Any, precision: Any = None) -> jax.Array:
    """f32[M, K] = dy[M, N] @ W[K, N]^T, one block of rows of W unpacked (to `dtype`) at a time."""
    n = spec.columns(w.codes.shape)
    size = tiles.row_block(spec, n)
    contract = (((1,), (1 if spec.orientation == "kn" else 0,)), ((), ()))
    dy = dy.astype(dtype)

    def one(index: Any, length: int) -> jax.Array:
        block, sub = tiles.rows(w, spec, index, size, length)
        parts = [
            lax.dot_general(dy, weight, contract, precision=precision, preferred_element_type=accumulator(dtype))
            for weight in tiles.weight_fields(block, sub, dtype)
        ]
        return tiles.join_columns(parts, length)  # [M, length]

    return tiles.over_tiles(spec.length, size, one, axis=-1)


def of_input(dy: jax.Array, w: Packed, spec: PackedSpec, dtype: Any, precision: Any = None) -> jax.Array:
    """`input_cotangent` of a weight in its own layout, not with flat scales."""
    return input_cotangent(dy, tiles.flat_scales(w, spec), spec, dtype, precision)


def scale_cotangent(x: jax.Array, dy: jax.Array, w: Packed, spec: PackedSpec) -> jax.Array:
    """f32[G, N] (or [N, G]): the cotangent of a full scale, one tile of columns of x^T dy at a time."""
    n = spec.columns(w.codes.shape)
    tile = tiles.column_tile(spec, n)
    parts = [part.astype(jnp.float32) for part in tiles.split_columns(x, spec)]
    dy = dy.astype(jnp.float32)

    def one(index: Any, size: int) -> jax.Array:
        levels = tiles.level_fields(tiles.columns(w, spec, index * tile, size), spec)
        piece = lax.dynamic_slice_in_dim(dy, index * tile, size, 1)
        total = None
        for i, (part, level) in enumerate(zip(parts, levels, strict=True)):
            product = part.T @ piece if spec.orientation == "kn" else piece.T @ part  # [rows, size] or [size, rows]
            summed = tiles.sum_over_groups(product * level, spec, i)
            total = summed if total is None else total + summed
        assert total is not None
        return total

    return tiles.over_tiles(n, tile, one, axis=-1 if spec.orientation == "kn" else -2)


def offset_cotangent(x: jax.Array, dy: jax.Array, spec: PackedSpec) -> jax.Array:
    """f32[G, N] (or [N, G]): the cotangent of a full offset."""
    along_rows = dataclasses.replace(spec, orientation="nk", layout="gpu")  # x[M, K] as it stands: K last, no fields
    sums = tiles.sum_over_groups(x.astype(jnp.float32), along_rows, 0)  # [M, G]
    dy = dy.astype(jnp.float32)
    return sums.T @ dy if spec.orientation == "kn" else dy.T @ sums


def like(full: jax.Array, part: jax.Array) -> jax.Array:
    """A full cotangent [G, N] summed where `part` broadcasts, in part's shape and dtype."""
    if full.size != part.size:
        axes = [axis for axis, (a, b) in enumerate(zip(full.shape, _flat(part, full.ndim), strict=True)) if a != b]
        full = jnp.sum(full, axis=axes, keepdims=True)
    return full.reshape(part.shape).astype(part.dtype)


def _flat(part: jax.Array, ndim: int) -> tuple[int, ...]:
    return part.shape if part.ndim == ndim else (*part.shape[:-2], part.shape[-1])  # [G, 1, N] of the tpu layout
