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
lies, all of it or its squares on and above the diagonal (jq4.upper_squares): a reordered copy becomes the factor, above
which it stays readable (jq4.methods.factored_hessian).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jq4.methods.factored_hessian import FactoredHessian
from jq4.methods.slots import Slots
from jq4.methods.triangular import factored
from jq4.upper_squares import diagonal as diagonal_of

_RAISED = 10.0  # what a damping that failed is multiplied by
_FIRST_RAISED = 1e-4  # what a damping of zero is raised to
_LAST = 1e6  # past this, H does not hold finite numbers
_STRIP = 512  # columns of H that are worked on at a time


def mended_diagonal(hessian: Any) -> tuple[jax.Array, jax.Array]:
    """(f32[K], H's diagonal with the others' mean for dead inputs, bool[K] which those are)."""
    diagonal = diagonal_of(hessian)
    dead = diagonal == 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1).astype(jnp.float32)
    return jnp.where(dead, jnp.where(mean > 0, mean, 1.0), diagonal), dead


def damped_factor(hessian: Any, slots: Slots, diagonal: jax.Array, damping: float) -> tuple[FactoredHessian, jax.Array]:
    """(H + d * mean(diag H) * I in slots and its factor, d f32[] the damping that it took, at least the one asked for).

    Args:
      diagonal: f32[P], see `mended_diagonal`; of the slots, and 1 where there is no row.
    """

    def failed(state: tuple[FactoredHessian, jax.Array]) -> jax.Array:
        return ~jnp.all(jnp.isfinite(state[0].pivots)) & (state[1] < _LAST)

    def raised(damping: jax.Array) -> jax.Array:
        return jnp.maximum(damping * _RAISED, _FIRST_RAISED)

    def again(state: tuple[FactoredHessian, jax.Array]) -> tuple[FactoredHessian, jax.Array]:
        return _attempted(hessian, slots, diagonal, raised(state[1])), raised(state[1])

    start = jnp.asarray(damping, jnp.float32)
    both = _attempted(hessian, slots, diagonal, start)
    if isinstance(both.squares, Tracer):
        return jax.lax.while_loop(failed, again, (both, start))
    while bool(failed((both, start))):
        del both  # before the next one is made
        start = raised(start)
        both = _attempted(hessian, slots, diagonal, start)
    return both, start


@jax.jit
def _attempted(hessian: Any, slots: Slots, diagonal: jax.Array, damping: jax.Array) -> FactoredHessian:
    """H damped by so much and its L, NaN where there is none."""
    unit = mean_of_rows(slots, diagonal)
    place = jnp.arange(len(slots.row))
    reordered = slots.square(hessian, slots.row, slots.row)
    damped = jnp.where(place[:, None] == place[None, :], (diagonal + damping * unit)[:, None], reordered)
    own = jax.vmap(lambda rows: slots.square(hessian, rows, rows))(slots.row.reshape(-1, slots.section))
    return FactoredHessian(factored(damped, slots.section), own)


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
