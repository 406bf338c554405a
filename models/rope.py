"""Rotary position embedding, and the five ways in which a trained model is stretched to longer texts.

A query and a key are turned, pair by pair, by an angle proportional to their position (Su et al. 2021), so that
their product depends on the distance alone. Pair j turns by `position * theta^(-2j/R)`, where R is the number of
rotated dimensions (all of the head, or a part of it). The pairs are (j, j + R/2), the "half" layout of Hugging Face.

To read beyond the trained length, the frequencies are changed:

- `linear`   all divided by `factor` (Chen et al. 2023).
- `dynamic`  theta grows with the length of the text once that passes the trained one (NTK-aware, bloc97 2023).
- `yarn`     fast pairs are left, slow ones are divided by `factor`, a ramp between (Peng et al. 2023); the
             attention is made sharper by scaling cos and sin.
- `llama3`   the same idea with the ramp laid over wavelengths (Llama 3.1).
- `longrope` one divisor a pair, from a table; another table beyond the trained length (Ding et al. 2024).

`dynamic` and `longrope` depend on the length of the text so far; here on that of each row alone, so that a text's
answer does not depend on what it is batched with. Keys in a cache stay turned as they were when they were written. For
`dynamic` that is how transformers generates, and beyond the trained length it is not what reading the text anew at
each step gives; for `longrope` the text is read anew once, where it passes the trained length (`rereads_at`), by
transformers and by generate.py. The numbers are those of transformers 5 (`modeling_rope_utils.py`), in f32 as there.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class RopeConfig:
    """One rotary embedding. Lengths are in tokens; `factor` is the ratio of the stretched to the trained length."""

    theta: float
    head_dim: int
    kind: str = "default"
    rotary_fraction: float = 1.0
    max_position_embeddings: int = 2048
    original_max_position_embeddings: int = 2048
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def rotary_dim(self) -> int:
        """How many leading dimensions of a head are turned before rounding up to whole pairs."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def rereads_at(self) -> int | None:
        """The length in tokens beyond which all of a text is turned otherwise than before, if there is one."""
        return self.original_max_position_embeddings if self.kind == "longrope" else None


def cos_and_sin(rope: RopeConfig, positions: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The angles' cosines and sines: positions i32[B, T], length i32[B] of each text -> two f32[B, T, R/2]."""
    frequencies = _frequencies(rope, length)  # f32[B or 1, R/2]
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[:, None, :]  # f32[B, T, R/2]
    sharpness = _attention_factor(rope)
    return jnp.cos(angles) * sharpness, jnp.sin(angles) * sharpness


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns x[B, T, H, hd] by the angles of cos and sin, f32[B, T, R/2]; dimensions from R on are left as they are."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = (x[..., part].astype(jnp.float32) for part in (slice(0, half), slice(half, 2 * half)))
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., 2 * half :]], axis=-1)


def _frequencies(rope: RopeConfig, length: jax.Array) -> jax.Array:
    """f32[1, R/2], or f32[B, R/2] where they depend on the length i32[B]."""
    if rope.kind == "dynamic":
        return _dynamic(rope, length)
    if rope.kind == "longrope":
        return _longrope(rope, length)
    fixed = {"default": _plain, "linear": _linear, "yarn": _yarn, "llama3": _llama3}[rope.kind](rope)
    return jnp.asarray(fixed, jnp.float32)[None, :]


def _exponents(rope: RopeConfig) -> np.ndarray:
    dim = rope.rotary_dim
    return np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)  # f32[R/2]: 2j / R


def _plain(rope: RopeConfig) -> np.ndarray:
    return np.float32(1.0) / np.float32(rope.theta) ** _exponents(rope)


def _linear(rope: RopeConfig) -> np.ndarray:
    return _plain(rope) / np.float32(rope.factor)


def _dynamic(rope: RopeConfig, length: jax.Array) -> jax.Array:
    trained, dim = rope.max_position_embeddings, rope.rotary_dim
    stretch = rope.factor * jnp.maximum(length, trained).astype(jnp.float32) / trained - (rope.factor - 1.0)  # f32[B]
    theta = rope.theta * stretch ** (dim / (dim - 2))
    return 1.0 / theta[:, None] ** jnp.asarray(_exponents(rope))[None, :]


def _longrope(rope: RopeConfig, length: jax.Array) -> jax.Array:
    is_long = length[:, None] > rope.original_max_position_embeddings  # bool[B, 1]
    long, short = (np.asarray(table, np.float32) for table in (rope.long_factor, rope.short_factor))
    divisors = jnp.where(is_long, jnp.asarray(long)[None, :], jnp.asarray(short)[None, :])
    return jnp.asarray(_plain(rope))[None, :] / divisors


def _llama3(rope: RopeConfig) -> np.ndarray:
    plain, trained = _plain(rope), rope.original_max_position_embeddings
    wavelength = 2 * np.float32(math.pi) / plain
    blend = (trained / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)  # 0 for the slow pairs, 1 for the fast ones
    return (1.0 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: RopeConfig) -> np.ndarray:
    dim, plain = rope.rotary_dim, _plain(rope)

    def pair_turning(times: float) -> float:
        """The (fractional) dimension whose pair turns so many times within the trained length."""
        trained = rope.original_max_position_embeddings
        return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / width, 0.0, 1.0)  # 0 fast .. 1 slow
    return plain / rope.factor * ramp + plain * (1.0 - ramp)


def _attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by, which sharpens attention over long texts (YaRN, LongRoPE)."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "yarn":
        if rope.mscale and rope.mscale_all_dim:
            return _yarn_sharpness(rope.factor, rope.mscale) / _yarn_sharpness(rope.factor, rope.mscale_all_dim)
        return _yarn_sharpness(rope.factor, 1.0)
    if rope.kind == "longrope" and rope.factor > 1.0:
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))
    return 1.0


def _yarn_sharpness(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
