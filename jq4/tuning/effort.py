"""What `--effort light | default | best` means: the numbers behind the steps "autoround" and "distill".

A recipe's step names the options that it wants other than these. All figures were chosen by rows held out of the
calibration rows; a step of "distill" is forward and backward through the whole model, twice forward through the dense
one, so its time goes with iterations * batch_size * T.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jq4.errors import JQ4Error
from jq4.recipe import Recipe
from jq4.steps import AFTER

EFFORTS = ("light", "default", "best")
BLOCK, END_TO_END = "autoround", "distill"

_SHARED: dict[str, dict[str, Any]] = {
    BLOCK: {"batch_size": 8, "rate": 5e-3, "scale_rate": 2e-3, "shift_rate": 2e-3, "optimizer": "adam"},
    END_TO_END: {
        "batch_size": 8,
        "rate": 5e-3,
        "scale_rate": 2e-3,
        "shift_rate": 2e-3,
        "optimizer": "adam",
        "perturbed_share": 0.3,
    },
}
_BY_EFFORT: dict[str, dict[str, dict[str, Any]]] = {
    "light": {BLOCK: {"iterations": 100}, END_TO_END: {"iterations": 300, "perturbed_rows": 500}},
    "default": {BLOCK: {"iterations": 200}, END_TO_END: {"iterations": 1000, "perturbed_rows": 1000}},
    "best": {BLOCK: {"iterations": 400}, END_TO_END: {"iterations": 2500, "perturbed_rows": 2000}},
}


def defaults(step: str, options: Mapping[str, Any] | None = None, effort: str = "default") -> dict[str, Any]:
    """All options of a step: those given, and the effort's for the others."""
    if effort not in EFFORTS:
        raise JQ4Error(f"unknown effort {effort!r}: wanted one of {', '.join(EFFORTS)}")
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
