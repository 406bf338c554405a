"""The decoder as a chain of blocks (see jq4.chain): the same mathematics as `Decoder`, a layer at a time.

Rows are whole texts of one length, without padding and without a cache, which is how calibration runs them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jq4.chain import Chain
from models.config import DecoderConfig
from models.decoder import (
    Block,
    RMSNorm,
    layer_arrays,
    logits_of,
    scaled_embedding,
    shared_by_layers,
)
from models.folds import decoder_folds
from models.kv_cache import look

LAYERS = "layers"
_STAGES = (
    ("attention/q_proj", "attention/k_proj", "attention/v_proj"),
    ("attention/o_proj",),
    ("mlp/gate_proj", "mlp/up_proj"),
    ("mlp/down_proj",),
)


def decoder_chain(config: DecoderConfig, dtype: Any = jnp.float32) -> Chain:
    """The chain of a decoder that computes in `dtype`."""

    def embed(outside: Any, tokens: jax.Array) -> jax.Array:
        return scaled_embedding(config, jnp.take(outside["embed"]["embedding"], tokens, axis=0).astype(dtype))

    def block(tree: Any, index: jax.Array, x: jax.Array) -> jax.Array:
        sight, _ = look(x.shape[:2], None, None, None)
        layer = jax.tree.map(
            lambda array: jax.lax.dynamic_index_in_dim(array, index, keepdims=False), layer_arrays(config)
        )
        carry: Any = Block(config, dtype, dtype).apply(
            {"params": tree[LAYERS]}, (x, None), shared_by_layers(config, sight), layer
        )
        return carry[0][0]

    def head(outside: Any, x: jax.Array) -> jax.Array:
        normed: Any = RMSNorm(config, dtype, dtype).apply({"params": outside["final_norm"]}, x)
        kernel = None if config.tied_embeddings else outside["lm_head"]["kernel"]
        return logits_of(config, normed, outside["embed"]["embedding"], kernel)

    return Chain(config.num_layers, LAYERS, embed, block, head, tuple(_STAGES), decoder_folds(config))
