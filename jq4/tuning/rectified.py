"""A packed leaf as AdaRound learns it (Nagel et al. 2020): each weight between two neighbouring levels, softly.

For a weight with the start's code c0 and its dense value r = (w - o) / s + z in codes, all by the start's scale,

    pair     low, low + 1          c0 and its neighbour on the side of r: floor(r) and ceil(r) where c0 is one of them
    soft     h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)          zeta = 1.1, gamma = -0.1
    weight   (low + h - z) * s + o                                         codebooks: level(low) + h * (their distance)
    penalty  mean of 1 - |2 h - 1|**beta                                   0 where every h is 0 or 1
    stored   low + (h >= 1/2)

The rectified sigmoid reaches 0 and 1 at finite V, where its gradient ends: a weight that has arrived stays. beta falls
from 20 to 2 along a cosine after a warm-up without penalty: at first only the h that are near an end are drawn to it,
at last all are. So the gradient is exact for what it is taken of, where a straight-through one (jq4.tuning.learned) is
exact for nothing; what is traded is that the soft weights are not the stored ones, so that what is learned is judged
by the stored ones, and that a code moves by one at most.

The paper starts at h = r - floor(r), which is the dense weight and rounds to nearest. Here the start is any packed
leaf, such as GPTQ's: h begins as near to that as the start's code allows, MARGIN on its side of one half. Scales and
offsets may be learned beside, straight through their storing, as in jq4.tuning.learned: codes do not follow them, so
that they are least squares for the codes there are. Integer zero points stay.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jq4.qarray import QArray, codes_of
from jq4.tuning import learned
from jq4.tuning.learned import Variables
from pallas_kernels import packing

ZETA, GAMMA = 1.1, -0.1
MARGIN = 0.01  # how far from one half h starts
FIRST_BETA, LAST_BETA = 20.0, 2.0


class Rectified(Variables):
    """Variables whose `rounding` is V, f32[*B, K, N]."""


def begin(q: QArray, weight: jax.Array | None, *, rounding: bool = True, scales: bool = True) -> Rectified:
    """The variables that are stored as the start `q`, f32[*B, K, N] `weight` being the dense one."""
    plain = learned.begin(q, None, rounding=False, scales=scales)
    shift = plain.shift if q.zero_point is None else None
    if not rounding or weight is None:
        return Rectified(None, plain.log_scale, shift)
    low, share, rank = _pair(q, weight)
    h = jnp.where(rank > low, jnp.maximum(share, 0.5 + MARGIN), jnp.minimum(share, 0.5 - MARGIN))
    return Rectified(inverse_of_soft(h), plain.log_scale, shift)


def soft(v: jax.Array) -> jax.Array:
    """h(V)."""
    return jnp.clip(jax.nn.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def inverse_of_soft(h: jax.Array) -> jax.Array:
    """The V of h from 0 to 1."""
    share = (h - GAMMA) / (ZETA - GAMMA)
    return jnp.log(share) - jnp.log1p(-share)


def penalty(v: jax.Array, beta: jax.Array) -> jax.Array:
    """The sum of 1 - |2 h - 1|**beta, f32[]."""
    return jnp.sum(1.0 - jnp.abs(2.0 * soft(v) - 1.0) ** beta)


def beta_at(progress: jax.Array, warmup: float) -> jax.Array:
    """beta after a share `progress` of all steps, of which the first `warmup` are without penalty."""
    rest = jnp.clip((progress - warmup) / (1.0 - warmup), 0.0, 1.0)
    return LAST_BETA + 0.5 * (FIRST_BETA - LAST_BETA) * (1.0 + jnp.cos(rest * jnp.pi))


def soft_weight_of(variables: Variables, q: QArray, weight: jax.Array | None) -> jax.Array:
    """The dense weight f32[*B, K, N] that the variables stand for on their way: what is differentiated."""
    if variables.rounding is None or weight is None:
        return learned.weight_of(variables, q, None)
    low, _, _ = _pair(q, weight)
    first, second = _level(low, q), _level(low + 1, q)
    return learned.weight_from(first + soft(variables.rounding) * (second - first), variables, q)


def weight_of(variables: Variables, q: QArray, weight: jax.Array | None) -> jax.Array:
    """The dense weight f32[*B, K, N] as it is stored."""
    if variables.rounding is None or weight is None:
        return learned.weight_of(variables, q, None)
    low, _, _ = _pair(q, weight)
    return learned.weight_from(_level(low + _up(variables.rounding), q), variables, q)


def harden(variables: Variables, q: QArray, weight: jax.Array | None) -> QArray:
    """The packed leaf that the variables stand for, of the static form of the start `q`; traces."""
    stored = learned.harden(variables._replace(rounding=None), q, None)
    if variables.rounding is None or weight is None:
        return stored
    low, _, rank = _pair(q, weight)
    chosen = low + _up(variables.rounding)
    codes = jnp.where(chosen == rank, codes_of(q), _code_of(chosen, q))
    return dataclasses.replace(stored, codes=packing.pack(codes, q.bits, q.axis))


def _up(v: jax.Array) -> jax.Array:
    """i32: 1 where h(V) is one half or more."""
    return (v >= 0).astype(jnp.int32)


def _pair(q: QArray, weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The lower of the two ranks i32, where w lies between their levels (0 to 1, f32), the start's rank i32.

    A rank is a code's place among the format's levels in rising order.
    """
    exact = learned.ratio_of_start(q, weight)
    rank = _rank_of(codes_of(q), q)
    low = jnp.where(exact >= _level(rank, q), rank, rank - 1)
    low = jnp.clip(low, 0, len(_ordered(q)) - 2)
    first, second = _level(low, q), _level(low + 1, q)
    return low, jnp.clip((exact - first) / (second - first), 0.0, 1.0), rank


def _ordered(q: QArray) -> np.ndarray:
    """The levels f32[ranks] in rising order; of integers with zero points, the codes."""
    form = q.number_format
    if form.levels is not None:
        return np.unique(np.asarray(form.levels, np.float32))
    return np.arange(form.max_code + 1, dtype=np.float32) - (form.center if q.zero_point is None else 0)


def _level(rank: jax.Array, q: QArray) -> jax.Array:
    ordered = _ordered(q)
    if q.number_format.is_integer:
        return rank.astype(jnp.float32) + jnp.float32(ordered[0])
    return jnp.take(jnp.asarray(ordered), rank, axis=0)


def _rank_of(codes: jax.Array, q: QArray) -> jax.Array:
    form = q.number_format
    if form.levels is None:
        return codes.astype(jnp.int32)
    _, ranks = np.unique(np.asarray(form.levels, np.float32), return_inverse=True)
    return jnp.take(jnp.asarray(ranks, jnp.int32), codes.astype(jnp.int32), axis=0)


def _code_of(rank: jax.Array, q: QArray) -> jax.Array:
    """A code u8 of each rank; fp4's two zeros share one."""
    form = q.number_format
    if form.levels is None:
        return rank.astype(jnp.uint8)
    _, first = np.unique(np.asarray(form.levels, np.float32), return_index=True)
    return jnp.take(jnp.asarray(first, jnp.uint8), rank, axis=0)
