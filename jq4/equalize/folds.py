"""Where a scale or a rotation of activations can hide in the weights around them; plain data, filled in by a model.

A Fold names the weights that see the same inputs x and the leaf that makes those inputs, channel by channel. With any
s > 0, x / s and s * W give the same product, and the producer takes the 1 / s:

    a norm's scale      scale / s         Gemma stores scale - 1: `stored_offset` is that one
    a linear layer      W[:, k] / s[k]    and its bias; right where what lies between passes scales on: the up_proj of a
                                          gated MLP, the v_proj of attention
    heads               with grouped queries one value head feeds several blocks of the consumers' inputs, which must
                        then share their s: `heads` is (key-value heads, query heads of each, head_dim)

A Residual names what reads and writes the residual stream, for rotations of it; `jq4.equalize.rotate` says how.
Paths are those of jq4.paths, from the model's params on; leaves may have leading axes (layers) or be one layer's.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jq4.errors import JQ4Error
from jq4.paths import leaf_path


@dataclasses.dataclass(frozen=True)
class Fold:
    """Consumers float[*B, K, N] of one input, and its producer: a norm's scale [*B, K] or a kernel [*B, J, K'].

    Attributes:
      consumers: paths of the weights.
      producer: path of the leaf that takes 1 / s along its last axis.
      bias: path of the producer's bias [*B, K'], "" where it has none.
      stored_offset: what is added to the stored producer before it is used: 1 for Gemma's norms.
      heads: () or (key-value heads, query heads of each, head_dim): K' = heads * head_dim, K that times the queries.
    """

    consumers: tuple[str, ...]
    producer: str
    bias: str = ""
    stored_offset: float = 0.0
    heads: tuple[int, ...] = ()

    def pooled(self, values: jax.Array, pool: Callable[..., jax.Array]) -> jax.Array:
        """f32[*B, K] of the consumers' inputs to f32[*B, K'] of the producer's channels."""
        if not self.heads:
            return values
        return pool(values.reshape(*values.shape[:-1], *self.heads), axis=-2).reshape(*values.shape[:-1], -1)

    def spread(self, values: jax.Array) -> jax.Array:
        """f32[*B, K'] of the producer's channels to f32[*B, K] of the consumers' inputs."""
        if not self.heads:
            return values
        heads, queries, width = self.heads
        split = values.reshape(*values.shape[:-1], heads, 1, width)
        wide = jnp.broadcast_to(split, (*values.shape[:-1], heads, queries, width))
        return wide.reshape(*values.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class Residual:
    """The residual stream x[..., D]: the norms that read it (with the weights behind them), and what writes to it.

    Attributes:
      width: D.
      norms: of a block, one Fold for each norm that reads the stream.
      writers: of a block, paths of the kernels [*B, J, D] that add to it; a bias stands beside its kernel.
      embedding: path of the table [V, D].
      final_norm: the norm before the head, and the head's kernel [D, V].
    """

    width: int
    norms: tuple[Fold, ...]
    writers: tuple[str, ...]
    embedding: str
    final_norm: Fold


@dataclasses.dataclass(frozen=True)
class Folds:
    """All that a model says of itself to the steps before the rules.

    Attributes:
      scaled: where scales can go, in the order of the block.
      residual: None where the stream cannot be rotated, and `residual_refused` says why.
      values: the fold from v_proj to o_proj, for rotations within a head; None where there is none.
      inner: paths of the weights behind a gate (down_proj), whose inputs no rotation can be folded into.
    """

    scaled: tuple[Fold, ...] = ()
    residual: Residual | None = None
    residual_refused: str = ""
    values: Fold | None = None
    inner: tuple[str, ...] = ()

    @property
    def consumers(self) -> tuple[str, ...]:
        return tuple(path for fold in self.scaled for path in fold.consumers)


def leaf_at(tree: Any, path: str) -> Any:
    """The leaf whose path is, or ends in, `path`."""
    found = [leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree) if _is_at(leaf_path(keys), path)]
    if len(found) != 1:
        raise JQ4Error(f"{path}: found {len(found)} leaves of that path in the tree, wanted one: folds of this model")
    return found[0]


def replace_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree with other leaves at some paths; in the dtypes that were there."""

    def replaced(keys: Any, leaf: Any) -> Any:
        path = leaf_path(keys)
        new = next((value for name, value in leaves.items() if _is_at(path, name)), None)
        return leaf if new is None else new.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(replaced, tree)


def scale_inputs(tree: Any, fold: Fold, scale: jax.Array) -> Any:
    """The tree with the consumers' rows times s and the producer's channels divided by it; s f32[*B, K']."""
    rows = fold.spread(scale)[..., None]  # f32[*B, K, 1]
    leaves = {path: leaf_at(tree, path).astype(jnp.float32) * rows for path in fold.consumers}
    producer = leaf_at(tree, fold.producer).astype(jnp.float32)
    # a scale has the axes of s, a kernel has one more on the left of the channels
    divisor = scale if producer.ndim == scale.ndim else scale[..., None, :]
    leaves[fold.producer] = (producer + fold.stored_offset) / divisor - fold.stored_offset
    if fold.bias:
        leaves[fold.bias] = leaf_at(tree, fold.bias).astype(jnp.float32) / scale
    return replace_leaves(tree, leaves)


def _is_at(path: str, name: str) -> bool:
    return path == name or path.endswith(f"/{name}")
