"""The logits of a whole tree, from the functions of a chain of blocks (jq4.chain): what distillation runs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jq4.chain import Chain


@functools.lru_cache(maxsize=8)
def logits_of_chain(chain: Chain, remat: bool = False) -> Callable[[Any, jax.Array], jax.Array]:
    """logits(tree, tokens i32[B, T]) -> f32[B, T, V] of dense params, stacked under `chain.stacked`.

    One chain has one function, so that what is compiled for it is found again. remat keeps a block's inputs only for
    the backward pass and computes the rest again: a third more time, for activations of one block instead of all.
    """
    block = jax.checkpoint(chain.block) if remat else chain.block

    def logits(tree: Any, tokens: jax.Array) -> jax.Array:
        def one(x: jax.Array, item: tuple[jax.Array, Any]) -> tuple[jax.Array, None]:
            index, layer = item
            return block({chain.stacked: layer}, index, x), None

        indices = jnp.arange(chain.num_blocks, dtype=jnp.int32)
        x, _ = jax.lax.scan(one, chain.embed(tree, tokens), (indices, tree[chain.stacked]))
        return chain.head(tree, x)

    return logits
