"""AWQ for one weight (Lin et al. 2023): its inputs' scales kept beside the codes, its ranges searched by their weight.

    w[k, n] ~ Q(s * w)[k, n] / s[k]          input_scale = 1 / s, which a product multiplies its inputs by

The scales are found as jq4.equalize.awq says, for this weight alone. Where a norm or a linear layer precedes it, the
step of the same name puts them there instead, at no cost at run time and for all weights that share the inputs
together; `multiplier: 0` then leaves them out here. What remains is the paper's clipping: for each group, of the
ranges that the observer "mse" tries, the one whose error hurts the outputs least,

    minimise   sum over k in the group of  E[x_k^2] / s_k^2 * (s_k w_k - q_k)^2

that is, with the Hessian's diagonal. (The paper takes the outputs of the group's inputs themselves, and does not clip
queries and keys; a range that is not cut is always among those tried.) Any other observer is taken as it is.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jq4.equalize.awq import COLUMNS, FINALISTS, RATIOS, awq_scale
from jq4.equalize.folds import Fold
from jq4.errors import JQ4Error
from jq4.methods.canonical import Canonical
from jq4.qarray import QArray
from jq4.rounding import (
    Encoding,
    Parameters,
    codes_of_blocks,
    dequantize_blocks,
    find_parameters,
    find_range,
    keep_better,
    map_groups,
    parameters_of_range,
    storable_scale,
)
from jq4.statistics import WeightStatistics


def quantize(
    weight: jax.Array,
    statistics: WeightStatistics,
    encoding: Encoding,
    *,
    multiplier: int = 1,
    ratios: int = RATIOS,
    by_weights: int = 1,
    finalists: int = FINALISTS,
    columns: int = COLUMNS,
) -> QArray:
    """Quantizes a weight float[*B, K, N], given statistics with mean_square, and a Hessian unless `finalists` is 0.

    Args:
      multiplier: 0 leaves the inputs' scales out.
      ratios, by_weights, finalists, columns: of the search for them, as jq4.equalize.awq.awq_scale's.
    """
    if getattr(statistics, "square_total", None) is None:
        raise JQ4Error("method awq wants mean_square of the weight's inputs: pass stats=jq4.observe(...) with it")
    moments = statistics.mean_square  # f32[*B, K]
    canonical = Canonical.of(weight.shape, encoding, (*moments.shape, moments.shape[-1]))
    matrices = canonical.matrices(weight).astype(jnp.float32)  # f32[S, K, N]
    flat = jax.tree.map(lambda leaf: leaf.reshape(matrices.shape[0], *leaf.shape[canonical.stacked :]), statistics)
    inner = dataclasses.replace(encoding, axis=-2, group_size=canonical.group_size)
    inverse = jnp.ones(matrices.shape[:2], jnp.float32)  # 1 / s
    if multiplier and _groups_fill_runs(canonical):
        simple = dataclasses.replace(inner, observer="absmax" if inner.symmetric else "minmax")
        scale = awq_scale(
            Fold((), ""), [matrices], [simple], flat,
            ratios=ratios, by_weights=bool(by_weights), finalists=finalists, columns=columns,
        )  # fmt: skip
        inverse = storable_scale(1 / scale, encoding.scale_dtype)
    codes, parameters = _encode(matrices / inverse[..., None], flat.mean_square * inverse**2, inner, canonical.runs)
    packed = canonical.packed(codes, parameters, encoding, jnp.dtype(weight.dtype).name)
    if not multiplier:
        return packed
    return dataclasses.replace(packed, input_scale=_beside(inverse, canonical).astype(encoding.scale_dtype))


def _groups_fill_runs(canonical: Canonical) -> bool:
    """Whether groups counted along all features end where runs of the grouped axis do."""
    return canonical.runs == 1 or canonical.length % canonical.group_size == 0


def _beside(inverse: jax.Array, canonical: Canonical) -> jax.Array:
    """f32[S, K] with the weight's axes: K's own lengths, 1 for the outputs."""
    return canonical.restored(inverse[..., None], canonical.length)


def _encode(weight: jax.Array, importance: jax.Array, encoding: Encoding, runs: int) -> tuple[jax.Array, Parameters]:
    """Codes u8[S, K, N] and parameters f32[S, R * G, N] of a weight f32[S, K, N] with the importance f32[S, K]."""
    slices, features, _ = weight.shape
    both = jnp.concatenate([weight, importance[..., None]], axis=-1)  # groups are cut in both alike

    def encode(blocks: jax.Array) -> tuple[jax.Array, Parameters]:
        weights, importances = blocks[..., :-1], blocks[..., -1:]
        found = _find(weights, importances, encoding)
        return codes_of_blocks(weights, found, encoding.number_format), found

    by_runs = both.reshape(slices, runs, features // runs, -1)
    encoded = map_groups(encode, by_runs, -2, int(encoding.group_size or 0))
    return jax.tree.map(lambda part: part.reshape(slices, -1, part.shape[-1]), encoded)


def _find(blocks: jax.Array, importance: jax.Array, encoding: Encoding) -> Parameters:
    """Parameters f32[..., G, 1, N] for blocks f32[..., G, g, N], by the importance f32[..., G, g, 1]."""
    if encoding.observer != "mse":
        return find_parameters(blocks, encoding)
    low, high = find_range(blocks, encoding)

    def attempt(shrink: jax.Array) -> tuple[jax.Array, Parameters]:
        parameters = parameters_of_range(low * (1 - shrink), high * (1 - shrink), encoding)
        error = jnp.square(blocks - dequantize_blocks(blocks, parameters, encoding.number_format)) * importance
        return jnp.sum(error, axis=encoding.reduced_axes, keepdims=True), parameters

    shrinks = jnp.linspace(0.0, encoding.max_shrink, encoding.steps + 1, dtype=jnp.float32)
    return jax.lax.scan(lambda best, s: (keep_better(best, attempt(s)), None), attempt(shrinks[0]), shrinks[1:])[0][1]
