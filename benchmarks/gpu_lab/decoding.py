"""Tokens a second of a Llama-3-8B-shaped decoder with random weights, dense and packed: what a product becomes."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

import jq4
from benchmarks.gpu_lab.running import HOPPER_KIND
from jq4.layouts import prepare
from models.config import DecoderConfig
from models.decoder import Decoder
from models.kv_cache import KVCache, empty_cache
from models.rope import RopeConfig

LLAMA_3_8B = (128256, 4096, 14336, 32, 32, 8, 128)
TINY = (512, 256, 512, 2, 4, 2, 64)


def config_of(sizes: tuple[int, ...]) -> DecoderConfig:
    vocab, hidden, inner, layers, heads, kv_heads, width = sizes
    return DecoderConfig(
        vocab, hidden, inner, layers, heads, kv_heads, width, rope=RopeConfig(head_dim=width, theta=5e5)
    )


def tokens_per_second(config: DecoderConfig, packed: bool, batch: int, tokens: int) -> float:
    """Of greedy decoding, all rows together: each step's program is asked for before the last one has ended."""
    model = Decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = random_params(model, packed)
    apply = jq4.quantized(model.apply) if packed else model.apply

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params: Any, last: jax.Array, cache: KVCache) -> Any:
        logits, grown = apply({"params": params}, last, cache=cache)
        return jnp.argmax(logits, -1).astype(jnp.int32), grown

    last, cache = jnp.ones((batch, 1), jnp.int32), empty_cache(config, batch, tokens + 1, jnp.bfloat16)
    last, cache = jax.block_until_ready(step(params, last, cache))
    start = time.perf_counter()
    for _ in range(tokens):
        last, cache = step(params, last, cache)
    jax.block_until_ready(last)
    return batch * tokens / (time.perf_counter() - start)


def random_params(model: Decoder, packed: bool) -> Any:
    """Parameters of the decoder's shapes; packed, the layers' kernels are int4 in groups of 128 for Hopper."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    flat, structure = jax.tree_util.tree_flatten_with_path(shapes)
    leaves = [_leaf(path, leaf, packed, i) for i, (path, leaf) in enumerate(flat)]
    return jax.tree_util.tree_unflatten(structure, leaves)


def _leaf(path: Any, shape: Any, packed: bool, seed: int) -> Any:
    names = [str(getattr(key, "key", "")) for key in path]
    key = jax.random.key(seed)
    if not packed or names[-1] != "kernel" or "layers" not in names or len(shape.shape) != 3:
        return (jax.random.normal(key, shape.shape, jnp.float32) * 0.02).astype(shape.dtype)
    layers, k, n = shape.shape
    codes = jax.random.randint(key, (layers, k // 2, n), 0, 256, jnp.int32).astype(jnp.uint8)
    scale = jnp.full((layers, k // 128, n), 0.005, jnp.bfloat16)
    return prepare(jq4.QArray(codes, scale, group_size=128, dtype="bfloat16"), HOPPER_KIND, layout="hopper")
