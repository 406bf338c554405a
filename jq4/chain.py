"""A model as blocks one after another, so that calibration holds one block at a time.

    x = embed(outside, tokens)                      tokens i32[B, T] -> x[B, T, D]
    x = block(tree_i, i, x)                         for i in 0 .. num_blocks - 1
    logits = head(outside, x)                       x[B, T, D] -> f32[B, T, V]

All blocks have one shape, so that `block` is compiled once, the block's number being an array. `outside` is the tree
of params without the blocks; `tree_i` is the tree of params with the stacked leaves' i-th slices and nothing else: a
leaf has the same path in all three.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from jq4.equalize.folds import Folds


@dataclasses.dataclass(frozen=True)
class Chain:
    """The functions of a model that is a chain of blocks; all of them trace.

    Attributes:
      num_blocks: how many.
      stacked: the key of the tree under which leaves have a leading axis of blocks.
      embed, block, head: see the module's text.
      stages: the weights of a block in the order of their use, as patterns of jq4.targets; those of one stage see the
        same inputs.
      folds: where scales and rotations can go, for the steps before the rules (jq4.equalize); None if not known.
    """

    num_blocks: int
    stacked: str
    embed: Callable[[Any, jax.Array], jax.Array]
    block: Callable[[Any, jax.Array, jax.Array], jax.Array]
    head: Callable[[Any, jax.Array], jax.Array]
    stages: tuple[tuple[str, ...], ...]
    folds: Folds | None = None


class BlockSource(Protocol):
    """Where the dense params of a chain come from: a tree in memory, or a folder that is read block by block."""

    def outside(self) -> dict[str, Any]:
        """The params that belong to no block."""
        ...

    def block(self, index: int) -> dict[str, Any]:
        """{stacked: ...}: the params of one block, without the axis of blocks."""
        ...


@dataclasses.dataclass(frozen=True)
class TreeSource:
    """The blocks of a tree that is in memory whole."""

    params: Mapping[str, Any]
    stacked: str

    def outside(self) -> dict[str, Any]:
        return {key: value for key, value in self.params.items() if key != self.stacked}

    def block(self, index: int) -> dict[str, Any]:
        return {self.stacked: jax.tree.map(lambda leaf: leaf[index], self.params[self.stacked])}
