"""The step "distill" after the rules: all packed leaves learned together, with the whole model in memory.

The one step that is not done block by block. Whether a machine can hold it is estimated before any work: the dense
weights, the learned ones, their gradient and the optimizer's two moments, float32 each, and the best so far.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jq4.chain import Chain
from jq4.errors import JQ4Error
from jq4.recipe import Recipe
from jq4.steps import Step
from jq4.tuning import distill, logits_of_chain

STEP = "distill"
_COPIES = 7  # of the model's weights in float32


def step_of(recipe: Recipe) -> Step | None:
    return next((step for step in recipe.after if step.step == STEP), None)


def check_memory(outside: Any, block: Any, num_blocks: int) -> None:
    """Raises JQ4Error where the whole model cannot be learned at once."""
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (outside, block)]
    needed, there = 4 * _COPIES * (sizes[0] + num_blocks * sizes[1]), _memory()
    if there is not None and needed > there:
        raise JQ4Error(
            f"step {STEP}: learning all of this model at once takes about {needed / 2**30:.1f} GiB, and this machine "
            f"has {there / 2**30:.1f}: take the step out of the recipe (gptq-* are the same presets without it, "
            "autoround-* learn block by block), or use a larger machine"
        )


def distilled(
    chain: Chain,
    dense: Any,
    packed: Any,
    rows: np.ndarray,
    step: Step,
    seed: int,
    say: Callable[[int, int, str], None],
) -> Any:
    """The whole packed tree, learned against the whole dense one."""
    return distill(
        logits_of_chain(chain),
        dense,
        packed,
        rows,
        options=dict(step.options),
        seed=seed,
        progress=lambda done, total, loss: say(done, total, f"learning end to end, at {loss:.4g}"),
    )


def _memory() -> int | None:
    """Bytes that the device, or the machine of a CPU device, has; None where it does not say."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
