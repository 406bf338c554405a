"""Products of arrays whose axes have names of any kind: the axes of a leaf, or the pieces that they were split in."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul.xla import accumulator

Names = Sequence[Hashable]


def product(x: jax.Array, x_axes: Names, y: jax.Array, y_axes: Names, axes: Names, precision: Any = None) -> jax.Array:
    """x times y, of one dtype, summed over what is not in `axes`, at least in f32; what has one name has one size."""
    label = {name: place for place, name in enumerate(dict.fromkeys((*x_axes, *y_axes)))}
    wide = accumulator(x.dtype)
    return jnp.einsum(
        x, [label[name] for name in x_axes], y, [label[name] for name in y_axes], [label[name] for name in axes],
        precision=precision, preferred_element_type=wide,
    )  # fmt: skip
