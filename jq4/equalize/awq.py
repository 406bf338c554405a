"""AWQ's scale search (Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression").

A few input channels carry most of the outputs, and rounding their weights costs most. Scaling a channel's weights up by
s before rounding, and its inputs down, makes its share of the rounding error smaller by s, as long as the group's own
scale hardly grows. So find the s for which the outputs suffer least,

    minimise   sum over weights W of E |x (W - W_q(s))|^2 = tr(dW^T H dW),    dW = Q(s * W) / s - W,   H = E[x x^T]

over a family of one exponent, s = r^a, r the root mean square of each input (the paper takes the mean of |x|), a from 0
to 1, and, with `by_weights`, of s = r^a / w^(1-a), w the mean of a row's |W| relative to its group's largest. s is
normalised so that its largest and smallest are inverse to each other. Q is round-to-nearest with the rule's own
encoding. All weights that share the inputs share s: their errors are added. a = 0 is s = 1, the first candidate.

What is traded: the objective is that of the layer, exact where the Hessian was collected; with its diagonal alone
(`hessian: false`, K times cheaper) it takes rounding errors of different rows for independent, which they nearly are.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jq4.equalize.folds import Fold
from jq4.rounding import Encoding, Parameters, find_parameters, map_groups, round_trip
from jq4.statistics import WeightStatistics

RATIOS = 20
Find = Callable[[jax.Array, Encoding], Parameters]


def awq_scale(
    fold: Fold,
    weights: Sequence[jax.Array],
    encodings: Sequence[Encoding],
    statistics: WeightStatistics,
    *,
    ratios: int = RATIOS,
    by_weights: bool = True,
    hessian: bool = True,
) -> jax.Array:
    """The s f32[*B, K'] for the consumers of a fold, weights float[*B, K, N] and how each will be encoded."""
    moments = statistics.hessian if hessian and statistics.outer_total is not None else statistics.mean_square
    spreads = (fold.heads, moments.ndim > weights[0].ndim - 1)
    return _search(
        tuple(weights), statistics.mean_square, moments, tuple(encodings), spreads, candidates(ratios, by_weights)
    )


def candidates(ratios: int, by_weights: bool) -> tuple[tuple[float, float], ...]:
    """Pairs (exponent of the inputs, minus that of the weights), the first of which leaves all as it is."""
    exponents = [i / ratios for i in range(ratios)]
    plain = [(a, 0.0) for a in exponents]
    return (*plain, *((a, 1 - a) for a in exponents)) if by_weights else tuple(plain)


@functools.partial(jax.jit, static_argnames=("encodings", "spreads", "pairs"))
def _search(
    weights: tuple[jax.Array, ...],
    mean_square: jax.Array,
    moments: jax.Array,
    encodings: tuple[Encoding, ...],
    spreads: tuple[tuple[int, ...], bool],
    pairs: tuple[tuple[float, float], ...],
) -> jax.Array:
    heads, full = spreads
    fold = Fold((), "", heads=heads)
    weights = tuple(weight.astype(jnp.float32) for weight in weights)
    of_inputs = fold.pooled(jnp.sqrt(mean_square), jnp.mean)
    shares = [_share(weight, encoding) for weight, encoding in zip(weights, encodings, strict=True)]
    of_weights = fold.pooled(jnp.mean(jnp.stack(shares), axis=0), jnp.mean)

    def attempt(pair: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = scale_of(of_inputs, of_weights, pair)
        rows = fold.spread(scale)
        both = zip(weights, encodings, strict=True)
        errors = [output_error(weight, rounded(weight, rows, encoding), moments, full) for weight, encoding in both]
        return functools.reduce(jnp.add, errors), scale

    def step(best: tuple[jax.Array, jax.Array], pair: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        error, scale = attempt(pair)
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(better[..., None], scale, best[1])), None

    table = jnp.asarray(np.asarray(pairs, np.float32))
    return jax.lax.scan(step, attempt(table[0]), table[1:])[0][1]


def scale_of(of_inputs: jax.Array, of_weights: jax.Array, pair: jax.Array) -> jax.Array:
    """s = r^a / w^b, normalised; f32[*B, K]. A channel that is dead on either side keeps 1."""
    alive = (of_inputs > 0) & (of_weights > 0)
    inputs, weights = (jnp.where(alive, values, 1.0) for values in (of_inputs, of_weights))
    logarithm = pair[0] * jnp.log(inputs) - pair[1] * jnp.log(weights)
    low = jnp.min(jnp.where(alive, logarithm, jnp.inf), axis=-1, keepdims=True)
    high = jnp.max(jnp.where(alive, logarithm, -jnp.inf), axis=-1, keepdims=True)
    return jnp.where(alive, jnp.exp(jnp.clip(logarithm - (low + high) / 2, -10, 10)), 1.0)


def rounded(weight: jax.Array, rows: jax.Array, encoding: Encoding, find: Find = find_parameters) -> jax.Array:
    """What f32[*B, K, N] becomes when its rows are scaled by f32[*B, K], rounded, and scaled back."""
    return round_trip(weight * rows[..., None], encoding, find) / rows[..., None]


def output_error(weight: jax.Array, approximation: jax.Array, moments: jax.Array, full: bool) -> jax.Array:
    """E |x dW|^2, f32[*B], by E[x x^T] (full) or by its diagonal."""
    error = weight - approximation
    if not full:
        return jnp.sum(jnp.square(error) * moments[..., None], axis=(-1, -2))
    return jnp.sum(jnp.matmul(moments, error, precision="highest") * error, axis=(-1, -2))


def _share(weight: jax.Array, encoding: Encoding) -> jax.Array:
    """The mean of each row's |w| relative to its group's largest, f32[*B, K]."""
    size, length = jnp.abs(weight), weight.shape[encoding.axis]

    def share(blocks: jax.Array) -> jax.Array:
        largest = jnp.max(blocks, axis=encoding.axis, keepdims=True)
        return blocks / jnp.where(largest > 0, largest, 1.0)

    return jnp.mean(map_groups(share, size, encoding.axis, min(encoding.group_size or length, length)), axis=-1)
