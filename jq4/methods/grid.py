"""The grid of one group, given how much each of its rows matters: searched for, and refitted to codes.

    search   of the ranges [low, high] * factor (of either end on its own where the grid is asymmetric, with scales of
             both signs where it is symmetric), the one with the least sum_k importance_k (w_k - dequantized_k)^2
    refit    with the codes fixed, the weights are linear in the scale (and the offset): w = B theta with the columns
             B = [levels, 1]. theta moves by the least-squares step in the Hessian's norm, given all other errors,
                 theta <- theta + inv(B^T H B) B^T H e
             and is rounded to the dtype that it is stored in; where that made it worse, it stays as it was.

Parameters are f32[1, N] and exactly representable as stored.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jq4.formats import Format
from jq4.qarray import levels_of
from jq4.rounding import (
    Encoding,
    Parameters,
    dequantize_blocks,
    find_range,
    keep_better,
    parameters_of_range,
    storable,
    storable_scale,
)

_FLAT = 1e-5  # levels that are all alike tell the scale from the offset no better than this, in f32


def dequantized(codes: jax.Array, parameters: Parameters, form: Format) -> jax.Array:
    """Codes u8[g, N] as weights f32[g, N]."""
    weight = levels_under(codes, parameters, form) * parameters.scale
    return weight if parameters.offset is None else weight + parameters.offset


def levels_under(codes: jax.Array, parameters: Parameters, form: Format) -> jax.Array:
    """The levels f32[g, N] of codes: what the scale multiplies."""
    if parameters.zero_point is None:
        return levels_of(codes, form)
    return codes.astype(jnp.float32) - parameters.zero_point


def search(target: jax.Array, importance: jax.Array, encoding: Encoding, starts: int) -> Parameters:
    """The best parameters f32[1, N] for a group's target f32[g, N] and importance f32[g, 1], of those of a range."""
    low, high = find_range(target, encoding)

    def attempt(start: jax.Array) -> tuple[jax.Array, Parameters]:
        parameters = parameters_of_range(low * start[0], high * start[1], encoding)
        parameters = parameters._replace(scale=parameters.scale * start[2])
        error = jnp.square(target - dequantize_blocks(target, parameters, encoding.number_format)) * importance
        return jnp.sum(error, axis=encoding.reduced_axes, keepdims=True), parameters

    def step(best: tuple[jax.Array, Parameters], start: jax.Array) -> tuple[tuple[jax.Array, Parameters], None]:
        return keep_better(best, attempt(start)), None

    grid = jnp.asarray(_starts(encoding, starts))
    return jax.lax.scan(step, attempt(grid[0]), grid[1:])[0][1]


def _starts(encoding: Encoding, starts: int) -> np.ndarray:
    """Rows (factor of the low end, factor of the high end, sign of the scale), f32[S, 3]."""
    factors = 1 - np.linspace(0, encoding.max_shrink, starts)
    if not encoding.symmetric:
        return np.asarray([(low, high, 1) for low, high in itertools.product(factors, factors)], np.float32)
    signs = (1, -1) if encoding.number_format.is_integer else (1,)
    return np.asarray([(f, f, sign) for f, sign in itertools.product(factors, signs)], np.float32)


def refit(
    codes: jax.Array, parameters: Parameters, gradient: jax.Array, hessian: jax.Array, encoding: Encoding
) -> Parameters:
    """Parameters for the codes u8[g, N] of one group.

    Args:
      gradient: f32[g, N], the group's rows of H E, of which E f32[K, N] are the errors now.
      hessian: f32[g, g], the group's own block of H.
    """

    def summed(values: jax.Array) -> jax.Array:
        return jnp.sum(values, axis=encoding.reduced_axes, keepdims=True)  # f32[1, N]

    levels = levels_under(codes, parameters, encoding.number_format)  # f32[g, N]
    bent = jnp.matmul(hessian, levels, precision="highest")
    normal = _Normal(summed(levels * gradient), summed(levels * bent))
    if parameters.offset is not None:
        flat = jnp.broadcast_to(jnp.sum(hessian), levels.shape[1:])[None]
        flat = summed(flat) if encoding.per_tensor else flat
        normal = _Normal(normal.along, normal.steep, summed(gradient), flat, summed(bent))
    old: tuple[Any, Any] = (parameters.scale, parameters.offset)
    new = _step(normal, parameters, encoding)
    keep = normal.gain(*(None if x is None else x - y for x, y in zip(new, old, strict=True))) > 0
    scale, offset = (None if x is None else jnp.where(keep, x, y) for x, y in zip(new, old, strict=True))
    return parameters._replace(scale=scale, offset=offset)


class _Normal(NamedTuple):
    """The normal equations of one group, each f32[1, N]: B^T H e and B^T H B, for the scale and for the offset."""

    along: jax.Array
    steep: jax.Array
    along_offset: Any = None
    steep_offset: Any = None
    mixed: Any = None

    def gain(self, scale: Any, offset: Any) -> jax.Array:
        """By how much the error e^T H e falls when scale and offset move by this much."""
        gain = 2 * scale * self.along - scale**2 * self.steep
        if offset is None:
            return gain
        return gain + 2 * offset * (self.along_offset - scale * self.mixed) - offset**2 * self.steep_offset


def _step(normal: _Normal, old: Parameters, encoding: Encoding) -> tuple[Any, Any]:
    """The least-squares (scale, offset), as they will be stored; a scale keeps its sign."""
    along, steep = normal.along, normal.steep
    if old.offset is not None:
        along = along - normal.along_offset * normal.mixed / normal.steep_offset
        steep = steep - normal.mixed**2 / normal.steep_offset
    safe = steep > _FLAT * normal.steep
    scale = old.scale + jnp.where(safe, along / jnp.where(safe, steep, jnp.ones_like(steep)), 0)
    size = storable_scale(jnp.abs(scale), encoding.scale_dtype)
    scale = jnp.where(scale * old.scale > 0, jnp.sign(scale) * size, old.scale)
    if old.offset is None:
        return scale, None
    lift = (normal.along_offset - (scale - old.scale) * normal.mixed) / normal.steep_offset
    return scale, storable(old.offset + lift, encoding.scale_dtype)
