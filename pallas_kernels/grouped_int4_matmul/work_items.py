"""How kernels walk over rows sorted by expert: work items, each a tile of bm rows and one expert that has rows in it.

In the order of the rows there are at most ceil(M / bm) + E - 1 of them, whatever the groups are, and no more than rows:
so a grid over items is static, and idle ones come last. This is how megablox walks (Gale et al. 2022, MegaBlocks).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Items(NamedTuple):
    """The work items: their tile, expert and rows [first, end) of the tile, i32[items] each; those in use i32[1]."""

    tile: jax.Array
    expert: jax.Array
    first: jax.Array
    end: jax.Array
    used: jax.Array


class _Experts(NamedTuple):
    """Of each expert, i32[E]: its rows [start, end), and the items before it and up to its end."""

    start: jax.Array
    end: jax.Array
    first_item: jax.Array
    item_end: jax.Array


def most_items(rows: int, experts: int, bm: int) -> int:
    return min(rows, -(-rows // bm) + experts - 1)


def work_items(group_sizes: jax.Array, rows: int, bm: int) -> Items:
    """The items of i32[E] rows for each expert, `rows` in all, in tiles of bm. Idle ones repeat the last one in use."""
    experts = group_sizes.shape[0]
    start, end, first_item, item_end = _experts(group_sizes, rows, bm)
    count = item_end[-1]
    number = jnp.minimum(jnp.arange(most_items(rows, experts, bm), dtype=jnp.int32), jnp.maximum(count - 1, 0))
    expert = _owner(item_end, number)
    tile = start[expert] // bm + number - first_item[expert]
    first = jnp.clip(start[expert] - tile * bm, 0, bm)
    return Items(tile, expert, first, jnp.clip(end[expert] - tile * bm, 0, bm), count[None])


def rows_of(items: Items, bm: int) -> jax.Array:
    """i32[]: how many rows have an expert."""
    return jnp.where(items.used[0] > 0, items.tile[-1] * bm + items.end[-1], 0)


def place_of_rows(group_sizes: jax.Array, rows: int, bm: int) -> jax.Array:
    """i32[rows]: where a row is among the rows of all items, tile after tile. Of rows without an expert, anything."""
    start, end, first_item, _ = _experts(group_sizes, rows, bm)
    row = jnp.arange(rows, dtype=jnp.int32)
    expert = _owner(end, row)
    return (first_item[expert] + row // bm - start[expert] // bm) * bm + row % bm


def _experts(group_sizes: jax.Array, rows: int, bm: int) -> _Experts:
    end = jnp.minimum(jnp.cumsum(group_sizes, dtype=jnp.int32), rows)
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), end[:-1]])
    in_tiles = jnp.where(end > start, (end - 1) // bm - start // bm + 1, 0)  # how many an expert is in
    item_end = jnp.cumsum(in_tiles, dtype=jnp.int32)
    return _Experts(start, end, item_end - in_tiles, item_end)


def _owner(ends: jax.Array, number: jax.Array) -> jax.Array:
    """The expert whose end is the first beyond a number, the last one for those beyond all."""
    beyond = jnp.sum(number[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)  # in one pass, where a search has log E
    return jnp.minimum(beyond, ends.shape[0] - 1)
