"""Ragged groups of rows by packed experts, by XLA alone, with never more than a part of the experts dense.

    cpu         XLA expands `lax.ragged_dot` to a product of all rows by all experts. Here the rows are cut into work
                items, each up to R rows of one expert; there are at most min(M, M // R + E) of them whatever the
                groups are, so the loop is static. An item is the dense product's CPU form. Experts without rows are
                not touched.
    tpu, gpu    `lax.ragged_dot` is native. It runs over blocks of K, whose [E, block, N] is unpacked at a time, words
                within the loop: unpacked before it they took fifteen times as long (v5e, 128 experts of 2048 x 768,
                8192 rows: 47.1 ms modelled, and 3.1).

The same two forms serve the transpose dx = dy @ W^T.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul import gradients, tiles, xla
from pallas_kernels.int4_matmul.spec import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed

MAX_ITEM_ROWS = 128
K_BLOCKS = 16  # of the experts' weights that are unpacked at a time: a sixteenth, or a group where groups are larger


def grouped_xla(
    x: jax.Array, w: Packed, group_sizes: jax.Array, spec: PackedSpec, *, platform: str, precision: Any = None
) -> jax.Array:
    """f32[M, N] from x[M, K], packed [E, K, N] and i32[E] for lowering on `platform`. Scales are [E, G, N]."""
    if platform == "cpu":
        x = x.astype(xla.accumulator(x.dtype))

        def product(rows: jax.Array, expert: Packed) -> jax.Array:
            return xla.by_column_tiles(rows, tiles.unpacked_words(expert, spec), spec, precision)

        return by_items(x, w, group_sizes, spec.columns(w.codes.shape), product)
    return _by_blocks_of_k(x, w, group_sizes, spec, precision)


def grouped_input_cotangent(
    dy: jax.Array, w: Packed, group_sizes: jax.Array, spec: PackedSpec, dtype: Any, *, platform: str, precision: Any
) -> jax.Array:
    """f32[M, K] = each row of dy[M, N] by its expert's W^T. Scales are [E, G, N]."""
    if platform == "cpu":
        compute = xla.accumulator(dtype)

        def product(rows: jax.Array, expert: Packed) -> jax.Array:
            return gradients.input_cotangent(rows, tiles.unpacked_words(expert, spec), spec, compute, precision)

        return by_items(dy.astype(compute), w, group_sizes, spec.length, product)

    def one(index: Any, length: int) -> jax.Array:
        fields, sub = _block(w, spec, index, size, length, dtype)
        parts = [_ragged(dy.astype(dtype), jnp.swapaxes(field, -1, -2), group_sizes, precision) for field in fields]
        return tiles.join_columns(parts, sub.length)

    size = _block_size(w, spec)
    return tiles.over_tiles(spec.length, size, one, axis=-1)


def by_items(
    x: jax.Array, w: Packed, group_sizes: jax.Array, width: int, product: Callable[[jax.Array, Packed], jax.Array]
) -> jax.Array:
    """[M, width]: product(rows of x, their expert) for every work item, put back in the rows' order."""
    rows_total, experts = x.shape[0], w.codes.shape[0]
    size = _item_rows(rows_total, experts)
    items = min(rows_total, rows_total // size + experts)
    group_sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(group_sizes)  # i32[E]
    starts = ends - group_sizes
    item_ends = jnp.cumsum((group_sizes + size - 1) // size)
    item_starts = item_ends - (group_sizes + size - 1) // size

    def one(item: jax.Array) -> jax.Array:
        expert = jnp.minimum(jnp.sum(item >= item_ends), experts - 1)
        first = starts[expert] + (item - item_starts[expert]) * size
        place = first + jnp.arange(size)
        inside = (place < ends[expert]) & (item < item_ends[-1])
        rows = jnp.where(inside[:, None], jnp.take(x, place, axis=0, mode="clip"), jnp.zeros((), x.dtype))
        own = jax.tree.map(lambda part: lax.dynamic_index_in_dim(part, expert, keepdims=False), w)
        return lax.cond(
            item < item_ends[-1], product, lambda rows, own: jnp.zeros_like(rows, shape=(size, width)), rows, own
        )

    done = lax.map(one, jnp.arange(items)).reshape(items * size, width)
    row = jnp.arange(rows_total)
    expert = jnp.minimum(jnp.sum(row[:, None] >= ends[None, :], axis=1), experts - 1)  # i32[M]
    within = row - starts[expert]
    at = (item_starts[expert] + within // size) * size + within % size
    out = jnp.take(done, at, axis=0, mode="clip")
    return jnp.where((row < ends[-1])[:, None], out, jnp.zeros((), out.dtype))


def rows_of_expert(x: jax.Array, group_sizes: jax.Array, expert: jax.Array) -> jax.Array:
    """x[M, K] with the rows of other experts zeroed."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])
    inside = (row < ends[expert]) & (row >= ends[expert] - group_sizes[expert])
    return jnp.where(inside[:, None], x, jnp.zeros((), x.dtype))


def _item_rows(rows: int, experts: int) -> int:
    wanted = 8
    while wanted < MAX_ITEM_ROWS and wanted * experts < rows:
        wanted *= 2
    return max(1, min(wanted, rows))


def _by_blocks_of_k(x: jax.Array, w: Packed, group_sizes: Any, spec: PackedSpec, precision: Any) -> jax.Array:
    size = _block_size(w, spec)
    per_block = size // tiles.unit_of(spec)
    parts = tiles.split_columns(x, spec)

    def one(index: Any, length: int) -> jax.Array:
        fields, _ = _block(w, spec, index, size, length, x.dtype)
        terms = [
            _ragged(lax.dynamic_slice_in_dim(part, index * per_block, field.shape[1], 1), field, group_sizes, precision)
            for part, field in zip(parts, fields, strict=True)
        ]
        return sum(terms[1:], terms[0])

    whole, rest = divmod(spec.length, size)
    out = one(0, min(size, spec.length))
    if whole > 1:
        out, _ = lax.scan(lambda total, i: (total + one(i, size), None), out, jnp.arange(1, whole))
    return out + one(whole, rest) if whole and rest else out


def _block_size(w: Packed, spec: PackedSpec) -> int:
    size = tiles.row_block(spec, 1, elements=max(32, spec.length // K_BLOCKS))
    if not tiles.holds_words(w, spec) or size % 8 == 0:
        return size
    if spec.num_groups == 1:
        return -(-size // 8) * 8
    return math.lcm(size if spec.group_size % 8 == 0 else spec.group_size, 8)  # whole words


def _block(
    w: Packed, spec: PackedSpec, index: Any, size: int, length: int, dtype: Any
) -> tuple[list[jax.Array], PackedSpec]:
    """The fields [E, rows, N] of a block of K."""
    sub = dataclasses.replace(spec, length=length)

    def of_expert(expert: Packed) -> list[jax.Array]:
        block, inner = tiles.rows(expert, spec, index, size, length)
        fields = tiles.weight_fields(block, inner, dtype)
        return fields if spec.orientation == "kn" else [field.T for field in fields]

    return jax.vmap(of_expert)(w), sub


def _ragged(x: jax.Array, weights: jax.Array, group_sizes: jax.Array, precision: Any) -> jax.Array:
    return lax.ragged_dot(
        x, weights, group_sizes.astype(jnp.int32), precision=precision, preferred_element_type=jnp.float32
    )
