"""SmoothQuant (Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for LLMs").

Activations of language models have a few channels a hundred times larger than the rest: a scale per token must reach
them, and leaves nothing to the others. Weights have none. So half of the difficulty is moved over, channel by channel,

    s = max|x|**alpha / max|w|**(1 - alpha)         x / s,  s * W

with max|x| over the calibration tokens and max|w| over all weights that share the input. At alpha = 1/2 both have the
same range in each channel; nearer to 1, the inputs are flatter still, which is better for weights with a scale for each
output channel: .8 is the default, by rows of calibration that were held out (benchmarks/activations.py). What is
traded: weights in few bits suffer from what activations in 8 bits gain, so this is for weights in 8 bits; for 4, see
jq4.equalize.awq. A channel that is dead on either side keeps s = 1.

The paper scales at norms alone; value heads and the gated MLP's inner channels pass scales on just as exactly, and are
scaled as well.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jq4.equalize.folds import Fold
from jq4.errors import JQ4Error

ALPHA = 0.8
_MOST = 4096.0  # s and 1 / s: what calibration hardly saw must not drown all else where it is seen


def smooth_scale(fold: Fold, weights: Sequence[jax.Array], absmax: jax.Array, alpha: float) -> jax.Array:
    """The s f32[*B, K'] of a fold, for its consumers' weights float[*B, K, N] and their inputs' max |x| f32[*B, K]."""
    if isinstance(alpha, bool | str) or not 0 <= alpha <= 1:
        raise JQ4Error(f"step smoothquant: alpha is {alpha!r}, wanted a number from 0 to 1")
    of_inputs = fold.pooled(absmax, jnp.max)
    largest = [jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=-1) for weight in weights]
    of_weights = fold.pooled(jnp.max(jnp.stack(largest), axis=0), jnp.max)
    scale = of_inputs**alpha / of_weights ** (1 - alpha)
    return jnp.where((of_inputs > 0) & (of_weights > 0), jnp.clip(scale, 1 / _MOST, _MOST), 1.0)
