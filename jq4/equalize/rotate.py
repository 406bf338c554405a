"""Rotations (Ashkboos et al. 2024, "QuaRot"; Liu et al. 2024, "SpinQuant"): the model in a basis without outliers.

The residual stream x[..., D] may be kept in any orthonormal basis Q: rms(x) does not see it, so a norm without a scale
commutes with it. R1, with the norms' scales g first moved into the weights that read them:

    g -> 1,  W_read -> g * W_read                     q, k, v, gate, up, head
    embedding -> E Q      W_write, b -> W_write Q, b Q     o, down
    W_read -> Q^T W_read

R2 turns each value head: W_v -> W_v R, W_o -> R^T W_o, the same R [head_dim, head_dim] for all heads of a layer. Both
vanish into the weights: nothing is computed at run time. A randomized Hadamard matrix as Q makes every new channel a
sum of all old ones, so that a value a hundred times the rest is spread evenly over inputs and weights.

What is traded: the head cannot share the embedding's table (the final norm's scale goes to one of them alone), models
with norms on what is written (Gemma) take R2 alone, and what enters down_proj, behind the gate, keeps its outliers:
with `inner` its rule rotates them at run time (jq4.input_rotation), which pays where inputs are rounded to 4 bits.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jq4.equalize.folds import Fold, Folds, Residual, leaf_at, replace_leaves
from jq4.equalize.hadamard import randomized
from jq4.errors import JQ4Error


def rotate_outside(outside: Any, folds: Folds, options: Mapping[str, Any]) -> Any:
    """The embedding, the final norm and the head, in the new basis."""
    residual = _residual(folds, options)
    if residual is None:
        return outside
    outside = _without_scale(outside, residual.final_norm)
    rotation = _rotation(residual.width, options)
    (head,) = residual.final_norm.consumers
    return replace_leaves(
        outside,
        {
            residual.embedding: _right(leaf_at(outside, residual.embedding), rotation),
            head: _left(leaf_at(outside, head), rotation),
        },
    )


def rotate_block(tree: Any, folds: Folds, options: Mapping[str, Any]) -> Any:
    """A block (or all of them, stacked): what it reads and writes in the new basis, its value heads turned."""
    residual = _residual(folds, options)
    if residual is not None:
        rotation = _rotation(residual.width, options)
        for norm in residual.norms:
            tree = _without_scale(tree, norm)
            tree = replace_leaves(tree, {path: _left(leaf_at(tree, path), rotation) for path in norm.consumers})
        for path in residual.writers:
            tree = _written(tree, path, rotation)
    if folds.values is not None and is_wanted(options, "heads"):
        tree = _turn_heads(tree, folds.values, options)
    return tree


def _residual(folds: Folds, options: Mapping[str, Any]) -> Residual | None:
    if not is_wanted(options, "residual"):
        return None
    if folds.residual is None:
        raise JQ4Error(
            f"step rotate: the residual stream of this model cannot be rotated: {folds.residual_refused}. "
            "The option `residual: false` turns the value heads alone"
        )
    return folds.residual


def is_wanted(options: Mapping[str, Any], name: str, default: bool = True) -> bool:
    """A yes or no among the options of the step."""
    value = options.get(name, default)
    if not isinstance(value, bool):
        raise JQ4Error(f"step rotate: {name} is {value!r}, wanted true or false")
    return value


def _rotation(width: int, options: Mapping[str, Any]) -> jax.Array:
    return jnp.asarray(_matrix(width, int(options.get("seed", 0))), jnp.float32)


_matrix = functools.cache(randomized)


def _without_scale(tree: Any, norm: Fold) -> Any:
    """The norm's scale moved into the rows of the weights behind it."""
    stored = leaf_at(tree, norm.producer).astype(jnp.float32)
    scale = stored + norm.stored_offset  # f32[*B, K]
    leaves = {path: leaf_at(tree, path).astype(jnp.float32) * scale[..., None] for path in norm.consumers}
    return replace_leaves(tree, leaves | {norm.producer: jnp.full_like(stored, 1 - norm.stored_offset)})


def _written(tree: Any, path: str, rotation: jax.Array) -> Any:
    leaves = {path: _right(leaf_at(tree, path), rotation)}
    bias = f"{path.rpartition('/')[0]}/bias"
    if _has(tree, bias):
        leaves[bias] = _right(leaf_at(tree, bias), rotation)
    return replace_leaves(tree, leaves)


def _turn_heads(tree: Any, fold: Fold, options: Mapping[str, Any]) -> Any:
    width = fold.heads[-1]
    rotation = _rotation(width, options)
    leaves = {name: _by_heads(leaf_at(tree, name), rotation) for name in (fold.producer, fold.bias) if name}
    for path in fold.consumers:
        turned = _by_heads(jnp.swapaxes(leaf_at(tree, path), -1, -2), rotation)  # rows of o: R^T W is (W^T R)^T
        leaves[path] = jnp.swapaxes(turned, -1, -2)
    return replace_leaves(tree, leaves)


def _by_heads(values: jax.Array, rotation: jax.Array) -> jax.Array:
    """float[..., heads * hd] with each head's channels times R[hd, hd]."""
    heads = values.reshape(*values.shape[:-1], -1, rotation.shape[0])
    return _right(heads, rotation).reshape(values.shape)


def _right(values: jax.Array, rotation: jax.Array) -> jax.Array:
    """float[..., D] in the new basis: x Q, f32."""
    return jnp.matmul(values.astype(jnp.float32), rotation, precision="highest")


def _left(weight: jax.Array, rotation: jax.Array) -> jax.Array:
    """float[*B, D, N] for inputs in the new basis: Q^T W, f32."""
    return jnp.einsum("ij,...ik->...jk", rotation, weight.astype(jnp.float32), precision="highest")


def _has(tree: Any, path: str) -> bool:
    try:
        leaf_at(tree, path)
    except JQ4Error:
        return False
    return True
