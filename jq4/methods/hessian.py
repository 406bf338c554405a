"""What the second-order methods make of a Hessian H = E[x x^T]: dead inputs, damping, the triangular factor.

dead     an input that was never anything but zero has H_kk = 0. As in GPTQ its weights become 0: they multiplied
         nothing that calibration has seen, and 0 is on every grid (up to rounding, on one with a float offset). Its
         diagonal becomes the mean of the others'; GPTQ's 1 would set the damping where the others are small.
damping  H + damping * mean(diag H) * I. Few rows (fewer than K) or inputs that depend on each other leave H without
         a Cholesky factor in f32; then the damping is multiplied by 10 until there is one, and what it came to is
         reported.
factor   H = R R^T with R upper triangular: the Cholesky factor of H with its rows and columns reversed. GPTQ's own
         code takes the upper Cholesky factor U of inv(H), and R = inv(U): so neither inverse is needed.
"""

import jax
import jax.numpy as jnp

_RAISED = 10.0  # what a damping that failed is multiplied by
_FIRST_RAISED = 1e-4  # what a damping of zero is raised to
_LAST = 1e6  # past this, H does not hold finite numbers


def with_dead_inputs(hessian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(f32[K, K] with the others' mean on the diagonal of dead inputs, bool[K] which those are)."""
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1).astype(jnp.float32)
    return hessian + jnp.diag(jnp.where(dead, jnp.where(mean > 0, mean, 1.0), 0.0)), dead


def damped_factor(matrix: jax.Array, unit: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """(R f32[K, K] of matrix + d * unit * I = R R^T, d f32[] the damping that it took, at least the one asked for)."""
    identity = jnp.eye(matrix.shape[0], dtype=jnp.float32)

    def attempt(damping: jax.Array) -> jax.Array:
        backwards = (matrix + damping * unit * identity)[::-1, ::-1]
        return jax.lax.linalg.cholesky(backwards, symmetrize_input=False)[::-1, ::-1]

    def failed(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return ~jnp.all(jnp.isfinite(state[1])) & (state[0] < _LAST)

    def again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        raised = jnp.maximum(state[0] * _RAISED, _FIRST_RAISED)
        return raised, attempt(raised)

    start = jnp.asarray(damping, jnp.float32)
    final, upper = jax.lax.while_loop(failed, again, (start, attempt(start)))
    return upper, final


def corrected(weight: jax.Array, cross: jax.Array, matrix: jax.Array, upper: jax.Array, strength: float) -> jax.Array:
    """The weight f32[K, N] that undoes `strength` of what the quantized prefix did to this layer's inputs.

    With inputs x in the dense model, y behind the quantized prefix, C = E[x y^T] (`cross`), H = E[y y^T] (`matrix`):

        argmin_V  E|y^T V - x^T W|^2  =  inv(H) C^T W  =  W + inv(H) (C - H)^T W

    where inv(H) is that of the damped H = R R^T (`upper` is R), which draws the result to W.
    """
    towards = jnp.matmul(jnp.transpose(cross) - matrix, weight, precision="highest")
    solve = jax.lax.linalg.triangular_solve
    half = solve(upper, towards, left_side=True, lower=False)
    return weight + strength * solve(upper, half, left_side=True, lower=False, transpose_a=True)
