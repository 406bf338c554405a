"""What the second-order methods make of a Hessian H = E[x x^T]: dead inputs, damping, the triangular factor.

dead     an input that was never anything but zero has H_kk = 0. As in GPTQ its weights become 0: they multiplied
         nothing that calibration has seen, and 0 is on every grid (up to rounding, on one with a float offset). Its
         diagonal becomes the mean of the others'; GPTQ's 1 would set the damping where the others are small.
damping  H + damping * mean(diag H) * I. Few rows (fewer than K) or inputs that depend on each other leave H without
         a Cholesky factor in f32; then the damping is multiplied by 10 until there is one, and what it came to is
         reported.
factor   H = L L^T with L lower triangular, rows and columns in the order of `slots`. GPTQ's own code takes the upper
         Cholesky factor U of inv(H): with rows and columns reversed, inv(U) is L. So neither inverse is needed.

H may be any multiple of E[x x^T], such as the sum over all rows: nothing here depends on its unit. It is read where it
lies: a reordered copy becomes the factor.
"""

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jq4.methods.slots import Slots
from jq4.methods.triangular import factored

_RAISED = 10.0  # what a damping that failed is multiplied by
_FIRST_RAISED = 1e-4  # what a damping of zero is raised to
_LAST = 1e6  # past this, H does not hold finite numbers
_STRIP = 512  # columns of H that are worked on at a time


def mended_diagonal(hessian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(f32[K], H's diagonal with the others' mean for dead inputs, bool[K] which those are)."""
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1).astype(jnp.float32)
    return jnp.where(dead, jnp.where(mean > 0, mean, 1.0), diagonal), dead


def damped_factor(hessian: jax.Array, slots: Slots, diagonal: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """(L f32[P, P] of H + d * mean(diag H) * I in slots, d f32[] the damping that it took, at least the one asked for).

    Args:
      diagonal: f32[P], see `mended_diagonal`; of the slots, and 1 where there is no row.
    """

    def failed(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return ~jnp.all(jnp.isfinite(jnp.diagonal(state[0]))) & (state[1] < _LAST)

    def raised(damping: jax.Array) -> jax.Array:
        return jnp.maximum(damping * _RAISED, _FIRST_RAISED)

    def again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _attempted(hessian, slots, diagonal, raised(state[1])), raised(state[1])

    start = jnp.asarray(damping, jnp.float32)
    lower = _attempted(hessian, slots, diagonal, start)
    if isinstance(lower, Tracer):
        return jax.lax.while_loop(failed, again, (lower, start))
    while bool(failed((lower, start))):
        del lower  # before the next one is made
        start = raised(start)
        lower = _attempted(hessian, slots, diagonal, start)
    return lower, start


@jax.jit
def _attempted(hessian: jax.Array, slots: Slots, diagonal: jax.Array, damping: jax.Array) -> jax.Array:
    """L of H damped by so much, NaN where there is none."""
    unit = mean_of_rows(slots, diagonal)
    place = jnp.arange(len(slots.row))
    reordered = slots.square(hessian, slots.row, slots.row)
    damped = jnp.where(place[:, None] == place[None, :], (diagonal + damping * unit)[:, None], reordered)
    return factored(damped, slots.section)


def mean_of_rows(slots: Slots, diagonal: jax.Array) -> jax.Array:
    """f32[], the mean of f32[P] over the slots that hold a row."""
    return jnp.sum(jnp.where(slots.holds[:, 0], diagonal, 0.0)) / slots.slot.shape[0]


def towards_dense(weight: jax.Array, hessian: jax.Array, cross: jax.Array) -> jax.Array:
    """(C - H)^T W, f32[K, N]: from W, the way to the weight that undoes what the quantized prefix did to its inputs.

    With inputs x in the dense model, y behind the quantized prefix, C = E[x y^T] (`cross`), H = E[y y^T]:

        argmin_V  E|y^T V - x^T W|^2  =  inv(H) C^T W  =  W + inv(H) (C - H)^T W

    where jq4.methods.triangular takes the inverse of the damped H, which draws the result to W.
    """
    size = len(weight)
    width = min(_STRIP, size)

    def strip(number: jax.Array, found: jax.Array) -> jax.Array:
        start = jnp.minimum(number * width, size - width)
        theirs, mine = (jax.lax.dynamic_slice_in_dim(part, start, width, 1) for part in (cross, hessian))
        product = jnp.matmul(jnp.transpose(theirs - mine), weight, precision="highest")
        return jax.lax.dynamic_update_slice_in_dim(found, product, start, 0)

    return jax.lax.fori_loop(0, -(-size // width), strip, jnp.zeros_like(weight))
