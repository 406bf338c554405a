"""What `--effort light | default | best` means: the numbers behind the steps that learn.

A recipe's step names the options that it wants other than these. The figures were chosen on rows held out of the
calibration rows of TinyStories-656K (17 of 97), from GPTQ's codes, at 4 bits in groups of 32:

    rate          a weight's way is rate * iterations / 2 codes at most: from 0.75 to 1.5 it makes no difference, at
                  0.4 it stops short; so more iterations take a lower rate
    scale_rate    a quarter of that or less: scales that move as far as codes do are worse on other text
    optimizer     Adam; the sign of the gradient measured worse at equal steps, block by block
    perturbed     six tokens in ten drawn anew measured better than three
    held_out      of the rows, those that "distill" judges by
    decay         of "adaround" none: its penalty does most of its work in the last steps, and wants their rate
    regularization  of "adaround", at 300 steps from round-to-nearest at 3 bits, 50 measured better than 10 (the first
                  block's error .029 of its outputs against .030), and 1 stops far short
    batch_size    of "distill", where none is named: as many rows as TOKENS make, for a step holds their logits

A step of "distill" is forward and backward through the whole model and forward through the dense one, so its time goes
with 2 (phases) * iterations * batch_size * T: 0.33 CPU seconds for that model and 8 rows of 256. One of "autoround"
or "adaround" takes a block forward and backward alone.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jq4.errors import JQ4Error
from jq4.recipe import Recipe
from jq4.steps import AFTER, STEPS

EFFORTS = ("light", "default", "best")
ADAROUND, AUTOROUND, END_TO_END = "adaround", "autoround", "distill"
TOKENS = 2048

_SHARED: dict[str, dict[str, Any]] = {
    ADAROUND: {
        "batch_size": 8,
        "scale_rate": 5e-4,
        "shift_rate": 5e-4,
        "optimizer": "adam",
        "decay": "constant",
        "held_out": 0.15,
        "regularization": 50.0,
        "warmup": 0.2,
    },
    AUTOROUND: {"held_out": 0.0, "batch_size": 8, "scale_rate": 1e-3, "shift_rate": 1e-3, "optimizer": "adam"},
    END_TO_END: {
        "scale_rate": 5e-4,
        "shift_rate": 5e-4,
        "optimizer": "adam",
        "perturbed_share": 0.6,
        "held_out": 0.15,
        "checks": 8,
    },
}
_BY_EFFORT: dict[str, dict[str, dict[str, Any]]] = {
    "light": {
        ADAROUND: {"iterations": 200, "rate": 0.1},
        AUTOROUND: {"iterations": 100, "rate": 5e-3},
        END_TO_END: {"iterations": 200, "rate": 5e-3, "perturbed_rows": 600},
    },
    "default": {
        ADAROUND: {"iterations": 500, "rate": 0.1},
        AUTOROUND: {"iterations": 200, "rate": 3e-3},
        END_TO_END: {"iterations": 500, "rate": 3e-3, "perturbed_rows": 2000},
    },
    "best": {
        ADAROUND: {"iterations": 1500, "rate": 0.1},
        AUTOROUND: {"iterations": 400, "rate": 3e-3},
        END_TO_END: {"iterations": 1200, "rate": 2e-3, "perturbed_rows": 4000},
    },
}


def defaults(step: str, options: Mapping[str, Any] | None = None, effort: str = "default") -> dict[str, Any]:
    """All options of a step: those given, and the effort's for the others."""
    if effort not in EFFORTS:
        raise JQ4Error(f"unknown effort {effort!r}: wanted one of {', '.join(EFFORTS)}")
    known = STEPS[step].options
    for name in options or {}:
        if name not in known:
            raise JQ4Error(f"unknown option {name!r} of step {step}, wanted one of {', '.join(known)}")
    return {**_SHARED[step], **_BY_EFFORT[effort][step], **(options or {})}


def with_effort(recipe: Recipe, effort: str) -> Recipe:
    """The recipe with every option of its tuning steps written out; those that it names itself stay."""
    steps = [
        dataclasses.replace(step, options=tuple(defaults(step.step, dict(step.options), effort).items()))
        if step.step in _SHARED
        else step
        for step in recipe.after
    ]
    return dataclasses.replace(recipe, **{AFTER: tuple(steps)})
