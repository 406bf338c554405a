"""Where scales and rotations can go in the decoder (jq4.equalize.folds): the table for all of its families.

    input_norm -> q, k, v      post_attention_norm (Gemma: pre_feedforward_norm) -> gate, up
    v -> o                     up -> down
    final_norm -> lm_head

A scale cannot pass a norm, and Gemma has one after each sublayer too: what they write to the residual stream cannot
be rotated, and R1 is refused. A tied head shares the embedding's table, and the final norm's scale, which a rotation
moves into the head, is not the embedding's: `untied` gives such a model a head of its own.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jq4.equalize import Fold, Folds, Residual
from models.config import DecoderConfig

_LAYERS = "layers"


def decoder_folds(config: DecoderConfig) -> Folds:
    """The folds of a decoder, with paths from its params on."""
    offset = 1.0 if config.gemma else 0.0
    before_mlp = "pre_feedforward_norm" if config.gemma else "post_attention_norm"
    attention, mlp = f"{_LAYERS}/attention", f"{_LAYERS}/mlp"
    heads = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
    attended = Fold(_kernels(attention, "q_proj", "k_proj", "v_proj"), f"{_LAYERS}/input_norm/scale", "", offset)
    fed = Fold(_kernels(mlp, "gate_proj", "up_proj"), f"{_LAYERS}/{before_mlp}/scale", "", offset)
    values = Fold(
        _kernels(attention, "o_proj"),
        f"{attention}/v_proj/kernel",
        f"{attention}/v_proj/bias" if config.qkv_bias else "",
        heads=heads,
    )
    inner = Fold(_kernels(mlp, "down_proj"), f"{mlp}/up_proj/kernel", f"{mlp}/up_proj/bias" if config.mlp_bias else "")
    scaled = (attended, values, fed, inner)
    refused = _refusal(config)
    if refused:
        return Folds(scaled, residual_refused=refused, values=values, inner=inner.consumers)
    residual = Residual(
        width=config.hidden_size,
        norms=(attended, fed),
        writers=(*_kernels(attention, "o_proj"), *_kernels(mlp, "down_proj")),
        embedding="embed/embedding",
        final_norm=Fold(("lm_head/kernel",), "final_norm/scale", "", offset),
    )
    return Folds(scaled, residual, values=values, inner=inner.consumers)


def untied(config: DecoderConfig, params: Mapping[str, Any]) -> tuple[DecoderConfig, dict[str, Any]]:
    """The same model with a head of its own, a copy of the embedding; one that has it is returned as it is."""
    if not config.tied_embeddings:
        return config, dict(params)
    config = untied_config(config)
    inner = params.get("params", params)
    headed = {**inner, "lm_head": {"kernel": jnp.asarray(inner["embed"]["embedding"]).T}}
    return config, {**params, "params": headed} if "params" in params else headed


def untied_config(config: DecoderConfig) -> DecoderConfig:
    """The config of the same model with a head of its own."""
    source = json.dumps(json.loads(config.source or "{}") | {"tie_word_embeddings": False}, sort_keys=True)
    return dataclasses.replace(config, tied_embeddings=False, source=source if config.source else "")


def _kernels(group: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{group}/{name}/kernel" for name in names)


def _refusal(config: DecoderConfig) -> str:
    if config.gemma:
        return f"{config.family} has a norm after each sublayer, whose scale does not commute with a rotation"
    if config.tied_embeddings:
        return (
            "the head is tied to the embedding, and the final norm's scale, which a rotation moves into the head, is "
            "not the embedding's: models.folds.untied(config, params) gives the model a head of its own"
        )
    return ""
