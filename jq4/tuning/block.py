"""Learned rounding, block by block: the block's outputs are fitted to the dense block's.

    minimise  mean over rows of |block(weights learned, x_hat) - y|**2 / mean over rows of |y|**2

where x_hat are the inputs that the quantized prefix gives, and y the outputs of the dense block on the dense model's
inputs: so a block also makes up for what the blocks before it lost. This is AdaRound's and BRECQ's objective (Nagel et
al. 2020; Li et al. 2021), started from a closed-form solution, with one of two kinds of variables:

    autoround   the straight-through ones of AutoRound (Cheng et al. 2023): what is learned from is what is stored
                (jq4.tuning.learned)
    adaround    AdaRound's own: a soft rounding between two codes, and a penalty that anneals it to either
                (jq4.tuning.rectified); `regularization` is the penalty's weight beside the loss, both relative: a mean
                over weights, and the loss over that of the start

Either is judged by what would be stored, on rows that are not learned from where `held_out` says so.

Held at a time: the block's dense weights, and in f32 for each of its weights V, its gradient, the best V and, with
Adam, two moments (with sign descent none); and the activations of one batch, for the backward pass. The rows stay on
the host.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error
from jq4.tuning.descent import Progress, Rows, Settings, descend, split_rows
from jq4.tuning.effort import ADAROUND, AUTOROUND, defaults
from jq4.tuning.learned_tree import begin_tree, harden_tree, learned_tree, soft_tree
from jq4.tuning.rectified import beta_at, penalty
from jq4.tuning.rounded_inputs import with_rounded_inputs

_LEAST_ENERGY = 1e-30  # of the targets; a block that gives zeros has no relative error


@dataclasses.dataclass(frozen=True)
class BlockLoss:
    """|block(x) - y|**2 of each row over the mean |y|**2 of all, f32[B]."""

    block: Callable[[Any, jax.Array, jax.Array], jax.Array]
    tree_of: Callable[..., Any] = learned_tree

    def __call__(self, variables: Any, context: Any, batch: Any) -> jax.Array:
        packed, dense, index, energy = context  # energy f32[]
        inputs, targets = batch  # [B, T, D] each
        block = with_rounded_inputs(self.block, packed)
        error = block(self.tree_of(variables, packed, dense), index, inputs).astype(jnp.float32) - targets
        return jnp.mean(jnp.square(error), axis=(1, 2)) / energy


@dataclasses.dataclass(frozen=True)
class Annealed:
    """AdaRound's objective: the loss of soft weights, and the penalty on those that are between two codes, f32[]."""

    loss: BlockLoss
    regularization: float
    warmup: float

    def __post_init__(self) -> None:
        if isinstance(self.regularization, bool | str) or not 0 <= self.regularization < math.inf:
            raise JQ4Error(f"regularization is {self.regularization!r}, wanted a number, zero or more")
        if isinstance(self.warmup, bool | str) or not 0 <= self.warmup < 1:
            raise JQ4Error(f"warmup is {self.warmup!r}, wanted a share of the steps, from 0 to below 1")

    def __call__(self, variables: Any, context: Any, batch: Any, progress: jax.Array, start: jax.Array) -> jax.Array:
        beta = beta_at(progress, self.warmup)
        shifts = [each.rounding for each in variables.values() if each.rounding is not None]
        between = sum((penalty(v, beta) for v in shifts), jnp.float32(0)) / max(1, sum(v.size for v in shifts))
        weight = jnp.where(progress < self.warmup, 0.0, self.regularization)
        return jnp.mean(self.loss(variables, context, batch)) / jnp.maximum(start, _LEAST_ENERGY) + weight * between


def tune_block(
    block: Callable[[Any, jax.Array, jax.Array], jax.Array],
    dense: Any,
    packed: Any,
    inputs: Any,
    targets: Any,
    *,
    index: int,
    step: str = AUTOROUND,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Any:
    """The block's tree with its packed leaves tuned; of the same static form, and never worse on its own objective.

    Args:
      block: block(tree, index, x[B, T, D]) -> [B, T, D]; the same function at every call, so that it is compiled once.
      dense, packed: the tree of one block before and after quantizing.
      inputs, targets: [R, T, D] on the host; what the quantized prefix gives, and the dense model's outputs.
      step: "autoround" or "adaround", see the module's text.
      options: see jq4.tuning.effort; what is missing is as in its default effort.
      seed: of the batches' order.

    Raises:
      JQ4Error: for options, shapes or packed leaves that cannot be, and for a loss that is not finite.
    """
    if inputs.shape[:2] != targets.shape[:2] or len(inputs) < 1:
        raise JQ4Error(f"block {index}: inputs {inputs.shape} and targets {targets.shape}, wanted [R, T, D] both")

    def fetch(indices: np.ndarray) -> Any:
        return inputs[indices], np.asarray(targets[indices], np.float32)

    energy = np.mean([np.mean(np.square(np.asarray(row, np.float32)), dtype=np.float64) for row in targets])
    context = (packed, dense, jnp.int32(index), jnp.float32(max(energy, _LEAST_ENERGY)))
    soft = step == ADAROUND
    try:
        chosen = defaults(step, options)
        settings = Settings.of(chosen)
        rows = Rows(fetch, *split_rows(len(inputs), chosen["held_out"]))
        variables = begin_tree(packed, dense, rounding=settings.rate > 0, scales=settings.scale_rate > 0, soft=soft)
        loss, objective = BlockLoss(block), None
        if soft:
            objective = Annealed(BlockLoss(block, soft_tree), chosen["regularization"], chosen["warmup"])
        best, _, _ = descend(loss, variables, context, rows, settings, seed + index, progress, objective)
    except JQ4Error as error:
        raise JQ4Error(f"block {index}: {error}") from None
    return harden_tree(best, packed, dense)
