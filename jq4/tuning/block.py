"""Learned rounding, block by block: the block's outputs are fitted to the dense block's.

    minimise  mean over rows of |block(weights learned, x_hat) - y|**2 / mean over rows of |y|**2

where x_hat are the inputs that the quantized prefix gives, and y the outputs of the dense block on the dense model's
inputs: so a block also makes up for what the blocks before it lost. This is AdaRound's and BRECQ's objective (Nagel et
al. 2020; Li et al. 2021) with the straight-through variables of AutoRound (Cheng et al. 2023), see jq4.tuning.learned,
started from a closed-form solution; what is stored is what was measured, no annealing of a soft rounding is needed.

Held at a time: the block's dense weights, and in f32 for each of its weights V, its gradient, the best V and, with
Adam, two moments (with sign descent none); and the activations of one batch, for the backward pass. The rows stay on
the host.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error
from jq4.tuning.descent import Progress, Rows, Settings, descend
from jq4.tuning.effort import BLOCK, defaults
from jq4.tuning.learned_tree import begin_tree, harden_tree, learned_tree

_LEAST_ENERGY = 1e-30  # of the targets; a block that gives zeros has no relative error


@dataclasses.dataclass(frozen=True)
class BlockLoss:
    """|block(x) - y|**2 of each row over the mean |y|**2 of all, f32[B]."""

    block: Callable[[Any, jax.Array, jax.Array], jax.Array]

    def __call__(self, variables: Any, context: Any, batch: Any) -> jax.Array:
        packed, dense, index, energy = context  # energy f32[]
        inputs, targets = batch  # [B, T, D] each
        error = self.block(learned_tree(variables, packed, dense), index, inputs).astype(jnp.float32) - targets
        return jnp.mean(jnp.square(error), axis=(1, 2)) / energy


def tune_block(
    block: Callable[[Any, jax.Array, jax.Array], jax.Array],
    dense: Any,
    packed: Any,
    inputs: Any,
    targets: Any,
    *,
    index: int,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Any:
    """The block's tree with its packed leaves tuned; of the same static form, and never worse on its own objective.

    Args:
      block: block(tree, index, x[B, T, D]) -> [B, T, D]; the same function at every call, so that it is compiled once.
      dense, packed: the tree of one block before and after quantizing.
      inputs, targets: [R, T, D] on the host; what the quantized prefix gives, and the dense model's outputs.
      options: see jq4.tuning.effort; what is missing is as in its default effort.
      seed: of the batches' order.

    Raises:
      JQ4Error: for options, shapes or packed leaves that cannot be, and for a loss that is not finite.
    """
    if inputs.shape[:2] != targets.shape[:2] or len(inputs) < 1:
        raise JQ4Error(f"block {index}: inputs {inputs.shape} and targets {targets.shape}, wanted [R, T, D] both")
    everyone = np.arange(len(inputs))

    def fetch(indices: np.ndarray) -> Any:
        return inputs[indices], np.asarray(targets[indices], np.float32)

    energy = np.mean([np.mean(np.square(np.asarray(row, np.float32)), dtype=np.float64) for row in targets])
    context = (packed, dense, jnp.int32(index), jnp.float32(max(energy, _LEAST_ENERGY)))
    rows = Rows(fetch, everyone, everyone)
    try:
        settings = Settings.of(defaults(BLOCK, options))
        variables = begin_tree(packed, dense, rounding=settings.rate > 0, scales=settings.scale_rate > 0)
        best, _, _ = descend(BlockLoss(block), variables, context, rows, settings, seed + index, progress)
    except JQ4Error as error:
        raise JQ4Error(f"block {index}: {error}") from None
    return harden_tree(best, packed, dense)
