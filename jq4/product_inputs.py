"""What happens to the inputs x of a product before they are rounded, whether its weight is packed or learned.

What lies beside a weight (scales of its inputs, fixed steps) has the weight's axes; x has its own, and rows of experts
have none for the expert.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from jq4.input_rotation import rotated


def placed(part: jax.Array, places: Mapping[int, int], ndim: int) -> jax.Array:
    """A part that broadcasts to an x of `ndim` axes: each axis in `places`, non-negative, at its place there.

    The others are one long.
    """
    order = sorted(places, key=places.__getitem__)
    shape = [1] * ndim
    for axis, place in places.items():
        shape[place] = part.shape[axis]
    rest = [axis for axis in range(part.ndim) if axis not in places]
    return lax.transpose(part, (*order, *rest)).reshape(shape)


def expert_of_rows(group_sizes: jax.Array, rows: int) -> jax.Array:
    """The expert of each of so many rows sorted by expert, int[rows]; that of rows past the last is their number."""
    ends = jnp.cumsum(group_sizes)
    return jnp.searchsorted(ends, jnp.arange(rows, dtype=ends.dtype), side="right")


def scaled_and_rotated(x: jax.Array, scale: jax.Array | None, block: int, axis: int) -> jax.Array:
    """x times a scale that broadcasts to it, then rotated in blocks along an axis (0: not), in x's dtype."""
    if scale is not None:
        x = (x.astype(jnp.float32) * scale.astype(jnp.float32)).astype(x.dtype)
    return rotated(x, block, axis) if block else x
