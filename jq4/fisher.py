"""What the model's outputs lose by an error in a weight, estimated from one backward pass a row: the Fisher term.

For small errors D of one weight W[K, N], to second order and in nats a token,

    KL(p_W || p_(W - D)) = 1/2 <D, F D>,    F = E[G G^T],    G = grad_W log p(y | context),  y drawn from p itself

and a product's gradient is an outer product of its input and what comes back, G = x g^T. F has (K N)**2 entries; kept
are its diagonal, and the correlations of the inputs, which calibration knows already:

    F[kn, ln']  ~  sqrt(F_kn) sqrt(F_ln) C_kl  where n = n', else 0        C_kl = H_kl / sqrt(H_kk H_ll),  H = E[x x^T]

so that the loss is 1/2 sum over n of v_n^T C v_n with v = sqrt(F_diagonal) * D. With C = 1 this is the diagonal Fisher
(LeCun et al. 1990; SqueezeLLM, Kim et al. 2023), which is right for errors that are independent from input to input,
as round-to-nearest makes them; GPTQ makes errors of its inputs cancel, which only C sees. With F_kn = H_kk a_n it is
K-FAC's form (Martens & Grosse 2015) without its assumption that x and g are independent, wrong where one token has
much of both.

y is drawn, not read from the text: the gradient at the text's own next token (the "empirical" Fisher) also holds how
far the model is from the text, which says nothing of its distance from itself. Since drawn gradients of different
tokens have mean zero each given its context, the square of a row's summed gradient has the right expectation, and one
backward pass serves all tokens of a row, all leaves, all formats. Held at a time: the gradient and the sum of its
squares, f32, both of the size of the leaves that are asked for.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error
from jq4.leaf_errors import as_matrices, fits_leaf, matrix_shape
from jq4.paths import flatten_with_paths, leaf_path
from jq4.sqnr import as_float32

LEAST_PASSES = 48  # backward passes; fewer rows are gone through more than once, with other draws

Logits = Callable[[Any, jax.Array], jax.Array]  # (tree, tokens i32[B, T]) -> [B, T, V]


def fisher_diagonal(
    logits: Logits, params: Any, rows: Any, paths: Collection[str], *, seed: int = 0
) -> dict[str, jax.Array]:
    """Path -> E[G**2] a token, f32 of the leaf's shape, over rows i32[R, T] of which the last token predicts nothing.

    Raises:
      JQ4Error: rows of fewer than two tokens, or a gradient that is not finite.
    """
    rows = np.asarray(rows, np.int32)
    if rows.ndim != 2 or not len(rows) or rows.shape[1] < 2:
        raise JQ4Error(f"fisher_diagonal: rows of shape {rows.shape}, wanted [rows, tokens], two tokens or more")
    wanted = {path: leaf for path, leaf in flatten_with_paths(params) if path in paths}
    total = {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in wanted.items()}
    passes = len(rows) * -(-LEAST_PASSES // len(rows))
    for number in range(passes):
        key = jax.random.fold_in(jax.random.key(seed), number)
        total = _with_row(total, wanted, params, rows[number % len(rows)][None], key, logits=logits)
    for path, squares in total.items():
        if not bool(jnp.all(jnp.isfinite(squares))):
            raise JQ4Error(
                f"{path}: its gradient is not finite on the rows given; look for overflow in the model's dtype"
            )
    tokens = jnp.float32(passes * (rows.shape[1] - 1))
    return {path: squares / tokens for path, squares in total.items()}


@functools.partial(jax.jit, static_argnames="logits", donate_argnums=0)
def _with_row(
    total: dict[str, jax.Array], wanted: dict[str, Any], params: Any, row: jax.Array, key: jax.Array, *, logits: Logits
) -> dict[str, jax.Array]:
    """The total with the squared gradient of one row i32[1, T], at tokens that the model draws."""

    def log_likelihood(leaves: dict[str, Any]) -> jax.Array:
        tree = jax.tree_util.tree_map_with_path(lambda keys, leaf: leaves.get(leaf_path(keys), leaf), params)
        log_p = jax.nn.log_softmax(logits(tree, row)[0, :-1].astype(jnp.float32))  # f32[T-1, V]
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(log_p))  # i32[T-1]
        return jnp.sum(jnp.take_along_axis(log_p, drawn[:, None], axis=1))

    gradient = jax.grad(log_likelihood)(wanted)
    return {path: total[path] + jnp.square(gradient[path].astype(jnp.float32)) for path in total}


def fisher_loss(weight: Any, approximation: Any, fisher: jax.Array, statistics: Any = None, *, axis: int) -> float:
    """The expected KLD a token, in nats, of a model in which this leaf alone is approximated.

    Args:
      weight, approximation: arrays or QArrays of one shape.
      fisher: E[G**2] of that shape, of fisher_diagonal.
      statistics: jq4.statistics of the leaf's inputs, whose Hessian tells C; without one C is the identity.
      axis: the contracted one, negative.
    """
    if tuple(weight.shape) != tuple(approximation.shape):
        raise JQ4Error(f"fisher_loss: shape {tuple(approximation.shape)}, wanted {tuple(weight.shape)}, the weight's")
    correlated = fits_leaf(weight.shape, axis, statistics) and statistics.outer_total is not None
    statistics = statistics if correlated else None
    shape = matrix_shape(tuple(weight.shape), axis, statistics)
    hessian = None if statistics is None else statistics.hessian
    return float(_loss(weight, approximation, fisher, hessian, shape=shape, axis=axis))


@functools.partial(jax.jit, static_argnames=("shape", "axis"))
def _loss(
    weight: Any, approximation: Any, fisher: jax.Array, hessian: jax.Array | None, *, shape: Any, axis: int
) -> jax.Array:
    scaled = jnp.sqrt(fisher) * (as_float32(weight) - as_float32(approximation))
    if hessian is None:
        return jnp.sum(jnp.square(scaled)) / 2
    scaled = as_matrices(scaled, shape, axis)  # v, f32[*B, K, N]
    rms = jnp.sqrt(jnp.diagonal(hessian, axis1=-2, axis2=-1))[..., None]  # f32[*B, K, 1]
    seen = rms > 0  # inputs that calibration never saw are correlated with none
    shares = jnp.where(seen, scaled / jnp.where(seen, rms, 1.0), 0.0)
    together = shares * jnp.einsum("...kl,...ln->...kn", hessian, shares, precision="highest")
    return jnp.sum(jnp.where(seen, together, jnp.square(scaled))) / 2
