"""A decoder-only transformer in plain Flax: Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, Phi-3.

One block, stacked: `nn.scan` runs it over weights with a leading axis L, so that compiling takes as long for 80 layers
as for one (layers whose weights cannot be one stack are scanned in runs, see models.layer_runs). What differs from
layer to layer (the window, which of two rotary embeddings) is scanned along as an array, not chosen by Python. The
key-value cache is the scan's carry, so that XLA updates it in place.

    x = embed(tokens)                                                         x[B, T, D]
    x = x + attention(norm(x));  x = x + mlp(norm(x))                         L times
    logits = head(norm(x))                                                    f32[B, T, V]

Nothing here knows of quantization: `jq4.quantized(Decoder(config).apply)` runs the same function on packed weights.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import NO_WINDOW, DecoderConfig
from models.kv_cache import KVCache, Sight, look
from models.layer_runs import LAYERS, bounds, run_name
from models.rope import cos_and_sin, rotate

_ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
}
_initializer = nn.initializers.normal(0.02)


class Shared(NamedTuple):
    """What all layers of a call look at: who sees whom, and the angles' cosines and sines f32[ropes, B, T, R/2]."""

    sight: Sight
    cosines: jax.Array
    sines: jax.Array


class Layer(NamedTuple):
    """What tells one layer from another: its number, its window in tokens, and its rotary embedding. i32[L] each."""

    number: jax.Array
    window: jax.Array
    rope: jax.Array


class Decoder(nn.Module):
    """The model. `dtype` is what it computes in, `param_dtype` what `init` makes; logits are f32 in any case.

    `runs` are the first layers of the runs that params are held in; empty where all layers are one stack.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False
    runs: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: KVCache | None = None,
        select: jax.Array | None = None,
    ) -> Any:
        """tokens i32[B, T] -> logits f32[B, T, V], or (logits, cache) when a cache is given.

        positions i32[B, T]: by default they follow the cache's tokens and count valid tokens only.
        mask bool[B, T]: which tokens are text and which padding (on any side); logits at padding mean nothing.
        select i32[B]: the one index along T whose logits are wanted in each row; the result is then [B, 1, V].
        """
        config = self.config
        sight, cache = look(tokens.shape, positions, mask, cache)
        embed = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=_initializer,
            name="embed",
        )
        x = scaled_embedding(config, embed(tokens))  # [B, T, D]
        store = None if cache is None else (cache.keys, cache.values, cache.used)
        x, store = self._layers()((x, store), shared_by_layers(config, sight), layer_arrays(config))[0]
        if select is not None:
            x = jnp.take_along_axis(x, select[:, None, None].astype(jnp.int32), axis=1)  # [B, 1, D]
        x = RMSNorm(config, self.dtype, self.param_dtype, name="final_norm")(x)
        logits = self._head(x, embed)
        if cache is None:
            return logits
        return logits, cache._replace(keys=store[0], values=store[1], used=cache.used + tokens.shape[1])

    def _layers(self) -> Any:
        arguments = (self.config, self.dtype, self.param_dtype)
        if self.runs:
            return LayerRuns(*arguments, self.remat, self.runs, name=LAYERS)
        return _scanned(self.remat, self.config.num_layers)(*arguments, name=LAYERS)

    def _head(self, x: jax.Array, embed: nn.Embed) -> jax.Array:
        """x[B, T, D] -> f32[B, T, V]; the products are summed and kept in f32, whatever the decoder computes in."""
        config = self.config
        head = None if config.tied_embeddings else LanguageHead(config, self.param_dtype, name="lm_head")()
        return logits_of(config, x, embed.embedding, head)


class LanguageHead(nn.Module):
    """The untied head's kernel [D, V] (nn.Dense cannot say that its result is wider than its inputs)."""

    config: DecoderConfig
    param_dtype: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        shape = (self.config.hidden_size, self.config.vocab_size)
        return self.param("kernel", _initializer, shape, self.param_dtype)


class LayerRuns(nn.Module):
    """The layers in runs, each stacked and scanned on its own, one after the other."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    remat: bool
    runs: tuple[int, ...]

    @nn.compact
    def __call__(self, carry: Any, shared: Shared, layers: Layer) -> tuple[Any, None]:
        for first, last in bounds(self.config, self.runs):
            scanned = _scanned(self.remat, last - first)
            run = scanned(self.config, self.dtype, self.param_dtype, name=run_name(self.config, first))
            carry, _ = run(carry, shared, Layer(*(each[first:last] for each in layers)))
        return carry, None


def _scanned(remat: bool, length: int) -> Any:
    """`length` layers over weights [length, ...]."""
    return nn.scan(
        nn.remat(Block, prevent_cse=False) if remat else Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
        length=length,
    )


class Block(nn.Module):
    """One layer. The carry is x[B, T, D] and the cache's keys and values [L, B, S, Hkv, hd] (or None)."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, Any], shared: Shared, layer: Layer) -> tuple[Any, None]:
        x, store = carry
        arguments = (self.config, self.dtype, self.param_dtype)
        attended, store = Attention(*arguments, name="attention")(
            RMSNorm(*arguments, name="input_norm")(x), store, shared, layer
        )
        if self.config.gemma:
            x = x + RMSNorm(*arguments, name="post_attention_norm")(attended)
            fed = MLP(*arguments, name="mlp")(RMSNorm(*arguments, name="pre_feedforward_norm")(x))
            x = x + RMSNorm(*arguments, name="post_feedforward_norm")(fed)
        else:
            x = x + attended
            x = x + MLP(*arguments, name="mlp")(RMSNorm(*arguments, name="post_attention_norm")(x))
        return (x, store), None


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, store: Any, shared: Shared, layer: Layer) -> tuple[jax.Array, Any]:
        config = self.config
        queries = self._heads(x, "q_proj", config.num_heads)  # [B, T, Hq, hd]
        keys = self._heads(x, "k_proj", config.num_kv_heads)  # [B, T, Hkv, hd]
        values = self._heads(x, "v_proj", config.num_kv_heads)
        if config.qk_norm:
            queries = RMSNorm(config, self.dtype, self.param_dtype, name="q_norm")(queries)
            keys = RMSNorm(config, self.dtype, self.param_dtype, name="k_norm")(keys)
        angles = [jax.lax.dynamic_index_in_dim(each, layer.rope, keepdims=False) for each in shared[1:]]
        queries, keys = rotate(queries, *angles), rotate(keys, *angles)
        if store is not None:
            store, keys, values = _through_cache(store, keys, values, layer.number)  # now [B, S, Hkv, hd]
        attended = self._attend(queries, keys, values, shared.sight.visible(layer.window))
        return _dense(self, config.hidden_size, config.output_bias, "o_proj")(attended), store

    def _heads(self, x: jax.Array, name: str, heads: int) -> jax.Array:
        flat = _dense(self, heads * self.config.head_dim, self.config.qkv_bias, name)(x)
        return flat.reshape(*x.shape[:2], heads, self.config.head_dim)

    def _attend(self, queries: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array) -> jax.Array:
        """queries [B, T, Hq, hd], keys and values [B, S, Hkv, hd], visible bool[B, T, S] -> [B, T, Hq * hd]."""
        config = self.config
        batch, length = queries.shape[:2]
        grouped = queries.reshape(batch, length, config.num_kv_heads, -1, config.head_dim)
        scale = config.attention_scale or config.head_dim**-0.5
        scores = jnp.einsum("bthgd,bshd->bhgts", grouped, keys, preferred_element_type=jnp.float32) * scale
        scores = _softcap(scores, config.attention_softcap)
        scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        return jnp.einsum("bhgts,bshd->bthgd", weights, values).reshape(batch, length, -1)


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        gate = _dense(self, config.intermediate_size, config.mlp_bias, "gate_proj")(x)
        up = _dense(self, config.intermediate_size, config.mlp_bias, "up_proj")(x)
        return _dense(self, config.hidden_size, config.mlp_bias, "down_proj")(
            _ACTIVATIONS[config.activation](gate) * up
        )


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in f32; Gemma's scale is stored as its distance from one."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        initial = nn.initializers.zeros if self.config.gemma else nn.initializers.ones
        scale = self.param("scale", initial, (x.shape[-1],), self.param_dtype)
        scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.config.norm_eps)
        return (x * (1.0 + scale if self.config.gemma else scale)).astype(self.dtype)


def scaled_embedding(config: DecoderConfig, x: jax.Array) -> jax.Array:
    """What the first layer sees of the embeddings x[B, T, D]."""
    return x * jnp.asarray(config.hidden_size**0.5, x.dtype) if config.gemma else x


def logits_of(config: DecoderConfig, x: jax.Array, embedding: jax.Array, head: jax.Array | None) -> jax.Array:
    """x[B, T, D], embedding [V, D], an untied head's kernel [D, V] -> f32[B, T, V]."""
    weight, contracted = (embedding, 1) if head is None else (head, 0)
    axes = (((2,), (contracted,)), ((), ()))
    logits = jax.lax.dot_general(x, weight.astype(x.dtype), axes, preferred_element_type=jnp.float32)
    return _softcap(logits, config.final_softcap)


def _dense(owner: Any, features: int, bias: bool, name: str) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=owner.dtype,
        param_dtype=owner.param_dtype,
        kernel_init=_initializer,
        name=name,
    )


def _softcap(x: jax.Array, cap: float | None) -> jax.Array:
    return x if cap is None else jnp.tanh(x / cap) * cap


def shared_by_layers(config: DecoderConfig, sight: Sight) -> Shared:
    ropes = [config.rope] if config.local_rope is None else [config.rope, config.local_rope]
    angles = [cos_and_sin(rope, sight.query_positions, sight.length) for rope in ropes]
    return Shared(sight, *(jnp.stack(each) for each in zip(*angles, strict=True)))


def layer_arrays(config: DecoderConfig) -> Layer:
    windows = config.windows or (NO_WINDOW,) * config.num_layers
    local = [int(config.local_rope is not None and window != NO_WINDOW) for window in windows]
    return Layer(
        number=jnp.arange(config.num_layers, dtype=jnp.int32),
        window=jnp.asarray(windows, jnp.int32),
        rope=jnp.asarray(local, jnp.int32),
    )


def _through_cache(
    store: Any, keys: jax.Array, values: jax.Array, layer: jax.Array
) -> tuple[Any, jax.Array, jax.Array]:
    """Writes a layer's new keys and values [B, T, Hkv, hd] after those already there; reads all, [B, S, Hkv, hd]."""
    old_keys, old_values, used = store
    zero = jnp.zeros((), jnp.int32)
    start = (layer, zero, used, zero, zero)
    all_keys = jax.lax.dynamic_update_slice(old_keys, keys[None].astype(old_keys.dtype), start)
    all_values = jax.lax.dynamic_update_slice(old_values, values[None].astype(old_values.dtype), start)
    read = [jax.lax.dynamic_index_in_dim(each, layer, keepdims=False) for each in (all_keys, all_values)]
    return (all_keys, all_values, used), read[0], read[1]
