"""Half-quadratic quantization (Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models").

The default of choice where there is no calibration data.

For each group, with levels l = round((w - offset) / scale) clipped to the grid, find the scale and the offset of

    minimise   sum phi(w - (l * scale + offset)),      phi(e) = |e|**p, p < 1

An error norm with p < 1 forgives the few weights that fall off the grid and fits the many. Split it half-quadratically:
an auxiliary e stands for the errors, held to them by beta, and two closed forms alternate while beta grows by kappa,

    e  =  shrink(w - dequantized) = sign(r) * max(|r| - |r|**(p-1) / beta, 0)      the outliers that are given up
    (scale, offset)  =  least squares of the target w - e on the levels            everything else

What differs from the paper, each measured to help at equal bits (benchmarks/quality.py):

  - residuals are in units of the group's step, so that beta means the same for every weight: at 3, only errors beyond
    .43 steps, mostly of clipped weights, are shrunk at all. The paper's beta of 10 is in the weights' own units,
    where a typical LLM weight is so small that nothing shrinks, and its update is a plain mean.
  - the scale is solved for along with the offset; the paper keeps the scale of the extremes. So a symmetric grid, an
    integer zero point (kept from the start) and a codebook are served as well: scale = sum(target * l) / sum(l * l).
  - the alternation finds the optimum nearest to where it starts, so it starts several times: from ranges of which
    either end is shrunk by up to `max_shrink`, or, for a symmetric grid, from scales of both signs (a negative one
    gives the extra level -2**(b-1) to the positive side). Each group keeps the best by sum of squared error, computed
    on parameters as they will be stored. Round-to-nearest's own are the first candidate: no group comes out worse.

Deterministic, and no data is looked at. What is traded: starts**2 * (iters + 1) passes over the weight (75), where the
paper takes 20 and rounding takes one.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error
from jq4.qarray import QArray
from jq4.rounding import (
    Encoding,
    Parameters,
    encode_weight,
    find_range,
    group_error,
    keep_better,
    levels_of_blocks,
    parameters_of_range,
    storable,
    storable_scale,
)


def quantize(
    weight: jax.Array,
    statistics: Any,
    encoding: Encoding,
    *,
    lp_norm: float = 0.7,
    beta: float = 3.0,
    kappa: float = 1.01,
    iters: int = 2,
    starts: int = 5,
    max_shrink: float = 0.3,
) -> QArray:
    """Quantizes a weight float[*B, K, N]; `statistics` are not looked at.

    Args:
      lp_norm: p, above 0 and at most 1.
      beta: how strongly e is held to the errors, in units of the step; infinite gives plain least squares.
      kappa: beta's growth an iteration.
      iters: iterations from each start; 0 only searches.
      starts: candidates for each end of the range; 1 starts from the extremes alone.
      max_shrink: of the range's ends, the furthest start.
    """
    del statistics
    if not 0 < lp_norm <= 1 or beta <= 0 or kappa < 1 or iters < 0 or starts < 1 or not 0 <= max_shrink < 1:
        raise JQ4Error(
            f"hqq: lp_norm={lp_norm}, beta={beta}, kappa={kappa}, iters={iters}, starts={starts}, "
            f"max_shrink={max_shrink}: wanted 0 < lp_norm <= 1, beta > 0, kappa >= 1, iters >= 0, starts >= 1, "
            "0 <= max_shrink < 1"
        )
    grid = _starts(encoding, int(starts), max_shrink)  # f32[starts, 3]

    def find(blocks: jax.Array, encoding: Encoding) -> Parameters:
        low, high = find_range(blocks, encoding)
        first = parameters_of_range(low, high, encoding)

        def attempt(start: jax.Array) -> tuple[jax.Array, Parameters]:
            parameters = _begin(low, high, start, encoding)
            for i in range(int(iters)):
                parameters = _iterate(blocks, parameters, encoding, beta * kappa**i, lp_norm)
            parameters = _stored(parameters, encoding)
            return group_error(blocks, parameters, encoding), parameters

        def step(best: tuple[jax.Array, Parameters], start: jax.Array) -> tuple[tuple[jax.Array, Parameters], None]:
            return keep_better(best, attempt(start)), None

        return jax.lax.scan(step, (group_error(blocks, first, encoding), first), jnp.asarray(grid))[0][1]

    return encode_weight(weight, encoding, find)


def shrink(residual: jax.Array, beta: float, lp_norm: float) -> jax.Array:
    """The proximal step for |e|**p: zero below (1/beta)**(1/(2-p)), nearly the identity far above."""
    size = jnp.abs(residual)
    return jnp.sign(residual) * jnp.maximum(size - size ** (lp_norm - 1) / beta, 0)


def _starts(encoding: Encoding, starts: int, max_shrink: float) -> np.ndarray:
    """Rows (factor of the low end, factor of the high end, sign of the scale), f32[starts, 3]."""
    if encoding.symmetric:
        factors = 1 - np.linspace(0, max_shrink, 2 * starts + 1)
        signs = (1, -1) if encoding.number_format.is_integer else (1,)
        return np.asarray([(f, f, sign) for f, sign in itertools.product(factors, signs)], np.float32)
    factors = 1 - np.linspace(0, max_shrink, starts) if starts > 1 else [1.0]
    return np.asarray([(low, high, 1) for low, high in itertools.product(factors, factors)], np.float32)


def _begin(low: jax.Array, high: jax.Array, start: jax.Array, encoding: Encoding) -> Parameters:
    parameters = parameters_of_range(low * start[0], high * start[1], encoding)
    return parameters._replace(scale=parameters.scale * start[2])


def _iterate(blocks: jax.Array, old: Parameters, encoding: Encoding, beta: float, lp_norm: float) -> Parameters:
    """One round of the two closed forms, for blocks f32[..., G, g, ...]."""

    def mean(values: jax.Array) -> jax.Array:
        return jnp.mean(values, axis=encoding.reduced_axes, keepdims=True)

    levels = levels_of_blocks(blocks, old, encoding.number_format)
    dequantized = levels * old.scale + (0 if old.offset is None else old.offset)
    step = jnp.abs(old.scale)
    target = blocks - shrink((blocks - dequantized) / step, beta, lp_norm) * step
    if old.offset is None:
        return old._replace(scale=_ratio(mean(target * levels), mean(levels * levels), old.scale))
    middle, center = mean(levels), mean(target)
    spread = levels - middle
    scale = _ratio(mean(spread * (target - center)), mean(spread * spread), old.scale)
    return old._replace(scale=scale, offset=center - scale * middle)


def _ratio(numerator: jax.Array, denominator: jax.Array, old: jax.Array) -> jax.Array:
    """The new scale, or the old one where all levels are alike or the sign would turn."""
    ratio = numerator / jnp.where(denominator == 0, jnp.ones_like(denominator), denominator)
    return jnp.where((denominator > 0) & (ratio * jnp.sign(old) > 0), ratio, old)


def _stored(parameters: Parameters, encoding: Encoding) -> Parameters:
    """The parameters as `scale_dtype` holds them."""
    scale = jnp.sign(parameters.scale) * storable_scale(jnp.abs(parameters.scale), encoding.scale_dtype)
    offset = None if parameters.offset is None else storable(parameters.offset, encoding.scale_dtype)
    return parameters._replace(scale=scale, offset=offset)
