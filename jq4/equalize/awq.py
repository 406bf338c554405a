"""AWQ's scale search (Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression").

A few input channels carry most of the outputs, and rounding their weights costs most. Scaling a channel's weights up by
s before rounding, and its inputs down, makes its share of the rounding error smaller by s, as long as the group's own
scale hardly grows. So find the s for which the outputs suffer least,

    minimise   sum over weights W of E |x (W - W_q(s))|^2 = tr(dW^T H dW),    dW = Q(s * W) / s - W,   H = E[x x^T]

over a family of one exponent, s = r^a, r the root mean square of each input (the paper takes the mean of |x|), a from 0
to 1, and, with `by_weights`, of s = r^a / w^(1-a), w the mean of a row's |W| relative to its group's largest. s is
normalised so that its largest and smallest are inverse to each other. Q is round-to-nearest with the rule's own
encoding. All weights that share the inputs share s: their errors are added. a = 0 is s = 1, always a candidate.

The paper multiplies calibration tokens by every candidate's weights. Here the tokens are one Hessian, and it is asked
of a few: rounding errors of different rows are nearly independent, so its diagonal ranks the candidates (a K-th of the
work), and the whole of it chooses among the best of them and s = 1. Both look at evenly spread output columns, at most
`columns` of each weight: s belongs to the rows, and so many columns tell as well as all.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jq4.equalize.folds import Fold
from jq4.errors import JQ4Error
from jq4.rounding import Encoding, find_parameters, map_groups, round_trip
from jq4.statistics import WeightStatistics

RATIOS, FINALISTS, COLUMNS = 20, 4, 1024


def awq_scale(
    fold: Fold,
    weights: Sequence[jax.Array],
    encodings: Sequence[Encoding],
    statistics: WeightStatistics,
    *,
    ratios: int = RATIOS,
    by_weights: bool = True,
    finalists: int = FINALISTS,
    columns: int = COLUMNS,
) -> jax.Array:
    """The s f32[*B, K'] for the consumers of a fold, weights float[*B, K, N] and how each is encoded along its K.

    Args:
      ratios: how many exponents are tried.
      by_weights: try the second family too.
      finalists: candidates that the whole Hessian judges; 0 leaves it to the diagonal.
      columns: output columns of each weight that are looked at; 0 for all.
    """
    counts = {"ratios": ratios, "finalists": finalists, "columns": columns}
    if not all(isinstance(count, int) and count >= (name == "ratios") for name, count in counts.items()):
        found = ", ".join(f"{name} {count!r}" for name, count in counts.items())
        raise JQ4Error(f"awq: found {found}; wanted ratios 1 or more, finalists and columns 0 or more")
    hessian = statistics.hessian if finalists and statistics.outer_total is not None else None
    seen = tuple(weight[..., :: _stride(weight.shape[-1], int(columns))] for weight in weights)
    pairs = candidates(int(ratios), bool(by_weights))
    finalists = min(int(finalists), len(pairs))
    return _search(seen, statistics.mean_square, hessian, tuple(encodings), fold.heads, pairs, finalists)


def candidates(ratios: int, by_weights: bool) -> tuple[tuple[float, float], ...]:
    """Pairs (exponent of the inputs, minus that of the weights), the first of which leaves all as it is."""
    exponents = [i / ratios for i in range(ratios)]
    plain = [(a, 0.0) for a in exponents]
    return (*plain, *((a, 1 - a) for a in exponents)) if by_weights else tuple(plain)


def _stride(length: int, columns: int) -> int:
    return -(-length // columns) if columns else 1


@functools.partial(jax.jit, static_argnames=("encodings", "heads", "pairs", "finalists"))
def _search(
    weights: tuple[jax.Array, ...],
    mean_square: jax.Array,
    hessian: jax.Array | None,
    encodings: tuple[Encoding, ...],
    heads: tuple[int, ...],
    pairs: tuple[tuple[float, float], ...],
    finalists: int,
) -> jax.Array:
    fold = Fold((), "", heads=heads)
    weights = tuple(weight.astype(jnp.float32) for weight in weights)
    of_inputs = fold.pooled(jnp.sqrt(mean_square), jnp.mean)
    shares = [_share(weight, encoding) for weight, encoding in zip(weights, encodings, strict=True)]
    of_weights = fold.pooled(jnp.mean(jnp.stack(shares), axis=0), jnp.mean)

    def error_of(pair: jax.Array, moments: jax.Array) -> jax.Array:
        """f32[*B], for exponents f32[2, *B]."""
        rows = fold.spread(scale_of(of_inputs, of_weights, pair))
        both = zip(weights, encodings, strict=True)
        errors = [output_error(weight - rounded(weight, rows, encoding), moments) for weight, encoding in both]
        return functools.reduce(jnp.add, errors)

    batch = mean_square.shape[:-1]
    table = jnp.asarray(np.asarray(pairs, np.float32))
    table = jnp.broadcast_to(table.reshape(*table.shape, *(1,) * len(batch)), (*table.shape, *batch))  # [C, 2, *B]
    errors = jax.lax.map(lambda pair: error_of(pair, mean_square[..., None]), table)  # [C, *B]
    best = jnp.argsort(errors, axis=0)[: max(finalists, 1)]  # i32[F, *B]
    chosen = jnp.take_along_axis(table, best[:, None], axis=0)  # [F, 2, *B]
    if hessian is not None:
        chosen = jnp.concatenate([table[:1], chosen])
        judged = jax.lax.map(lambda pair: error_of(pair, hessian), chosen)
        chosen = jnp.take_along_axis(chosen, jnp.argmin(judged, axis=0)[None, None], axis=0)
    return scale_of(of_inputs, of_weights, chosen[0])


def scale_of(of_inputs: jax.Array, of_weights: jax.Array, pair: jax.Array) -> jax.Array:
    """s = r^a / w^b, normalised; f32[*B, K] for exponents f32[2, *B]. A channel that is dead on either side keeps 1."""
    alive = (of_inputs > 0) & (of_weights > 0)
    inputs, weights = (jnp.where(alive, values, 1.0) for values in (of_inputs, of_weights))
    logarithm = pair[0][..., None] * jnp.log(inputs) - pair[1][..., None] * jnp.log(weights)
    low = jnp.min(jnp.where(alive, logarithm, jnp.inf), axis=-1, keepdims=True)
    high = jnp.max(jnp.where(alive, logarithm, -jnp.inf), axis=-1, keepdims=True)
    return jnp.where(alive, jnp.exp(jnp.clip(logarithm - (low + high) / 2, -10, 10)), 1.0)


def rounded(weight: jax.Array, rows: jax.Array, encoding: Encoding) -> jax.Array:
    """What f32[*B, K, N] becomes when its rows are scaled by f32[*B, K], rounded, and scaled back."""
    return round_trip(weight * rows[..., None], encoding, find_parameters) / rows[..., None]


def output_error(error: jax.Array, moments: jax.Array) -> jax.Array:
    """E |x dW|^2, f32[*B], by the Hessian f32[*B, K, K] or its diagonal f32[*B, K, 1]."""
    if moments.shape[-1] == 1:
        return jnp.sum(jnp.square(error) * moments, axis=(-1, -2))
    return jnp.sum(jnp.matmul(moments, error, precision="highest") * error, axis=(-1, -2))


def _share(weight: jax.Array, encoding: Encoding) -> jax.Array:
    """The mean of each row's |w| relative to its group's largest, f32[*B, K]."""
    size, length = jnp.abs(weight), weight.shape[encoding.axis]

    def share(blocks: jax.Array) -> jax.Array:
        largest = jnp.max(blocks, axis=encoding.axis, keepdims=True)
        return blocks / jnp.where(largest > 0, largest, 1.0)

    return jnp.mean(map_groups(share, size, encoding.axis, min(encoding.group_size or length, length)), axis=-1)
