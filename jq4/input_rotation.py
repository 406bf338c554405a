"""Inputs that a product rotates as they come: where no rotation can be folded into the layer before.

    x W = (x R) (R^T W)        R block-diagonal of Hadamard matrices H_b / sqrt(b), b the largest 2**n that divides K

What enters a gated MLP's down_proj has passed a product of two activations, which no rotation commutes with, and has
the outliers that 4-bit inputs do not bear (Ashkboos et al. 2024, "QuaRot"). So R is applied to them at run time, before
they are rounded, and R^T W is what is packed: `QArray.input_rotation` is b, and dequantizing gives W itself.

Sylvester's H_b is symmetric and its own inverse, and x R takes b log2(b) additions where a matrix takes b * b. Blocks
instead of a Hadamard matrix of all K, which exists for few K that are no powers of two, spread an outlier over b
channels: 2,048 of 14,336, 256 of 11,008.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error
from jq4.upper_squares import whole

HADAMARD = "hadamard"


def block_of(length: int) -> int:
    """The largest power of two that divides K; raises JQ4Error for an odd K."""
    if length % 2:
        raise JQ4Error(f"input_rotation: {length} inputs, wanted an even number: leave it out of the rule")
    return length & -length


@functools.partial(jax.jit, static_argnums=(1, 2))
def rotated(x: jax.Array, block: int, axis: int) -> jax.Array:
    """x with its blocks along an axis times H_b / sqrt(b), in x's dtype; twice gives x again."""
    moved = jnp.moveaxis(x, axis, -1)
    values, half = moved.astype(jnp.float32), 1
    while half < block:
        pairs = values.reshape(*moved.shape[:-1], -1, 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        values = jnp.stack([first + second, first - second], axis=-2)
        half *= 2
    values = values.reshape(moved.shape) * np.float32(block**-0.5)
    return jnp.moveaxis(values.astype(x.dtype), -1, axis)


def rotate_leaf(weight: jax.Array, statistics: Any, axis: int) -> tuple[int, jax.Array, Any]:
    """(b, R^T W, the statistics of x R) of a weight contracted along `axis`; what is not known of x R is left out."""
    block = block_of(weight.shape[axis])
    return block, rotated(weight, block, axis), None if statistics is None else _rotated_statistics(statistics, block)


def rotating_inputs(packed: Any, block: int) -> Any:
    """A QArray packed from R^T W, whose products rotate their inputs; 0 leaves it as it is."""
    if block and packed.input_scale is not None:
        raise JQ4Error("input_rotation with a scale of inputs found behind it: wanted the option `multiplier: 0` (awq)")
    return dataclasses.replace(packed, input_rotation=block) if block else packed


def _rotated_statistics(statistics: Any, block: int) -> Any:
    def turned(total: jax.Array | None, axes: tuple[int, ...]) -> jax.Array | None:
        if total is None:
            return None
        return functools.reduce(lambda values, axis: rotated(values, block, axis), axes, total)

    outer = turned(whole(statistics.outer_total), (-1, -2))
    return dataclasses.replace(
        statistics,
        absmax=None,
        total=turned(statistics.total, (-1,)),
        square_total=None if outer is None else jnp.diagonal(outer, axis1=-2, axis2=-1),
        outer_total=outer,
        cross_total=turned(statistics.cross_total, (-1, -2)),
        way_total=turned(statistics.way_total, (-2,)),
    )
