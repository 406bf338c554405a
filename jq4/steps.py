"""Steps: what a recipe does to a model besides quantizing its leaves one by one.

    before   changes dense weights so that they quantize better, and leaves the function as it is: rotations, scales
             moved from activations to weights (AWQ, SmoothQuant)
    rules    each leaf to codes by its rule's method (jq4.methods)
    after    learns codes, scales and offsets against the dense model's outputs: block by block, or end to end

A step needs to know the model: which norm feeds which weights, where a block begins. So `jq4.quantize`, which sees a
tree alone, refuses a recipe with steps, and `jq4.quantize_blocks` follows it. A new step is a row of the table below.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jq4.errors import JQ4Error

BEFORE, AFTER = "before", "after"


@dataclasses.dataclass(frozen=True)
class StepKind:
    """When a step runs, and the names of its options."""

    when: str
    options: tuple[str, ...] = ()


_DESCENT = (  # jq4.tuning.descent.Settings
    "iterations", "batch_size", "rate", "scale_rate", "shift_rate", "optimizer", "decay", "checks",
)  # fmt: skip

BLOCKWISE = ("adaround", "autoround")  # learn a block's outputs, jq4.tuning.block
STEPS: dict[str, StepKind] = {
    "rotate": StepKind(BEFORE, ("residual", "heads", "inner", "seed")),
    "smoothquant": StepKind(BEFORE, ("alpha",)),
    "awq": StepKind(BEFORE, ("ratios", "by_weights", "finalists", "columns")),
    "adaround": StepKind(AFTER, (*_DESCENT, "held_out", "regularization", "warmup")),
    "autoround": StepKind(AFTER, (*_DESCENT, "held_out")),
    "distill": StepKind(AFTER, (*_DESCENT, "perturbed_rows", "perturbed_share", "held_out")),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a recipe: a key of STEPS and its options, kept as sorted pairs, so that steps can be hashed."""

    step: str
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.step not in STEPS:
            raise JQ4Error(f"unknown step {self.step!r}: wanted one of {', '.join(STEPS)}")
        known = STEPS[self.step].options
        options = dict(self.options)
        for name, value in options.items():
            if name not in known:
                listed = ", ".join(known) or "none"
                raise JQ4Error(f"unknown option {name!r} of step {self.step}, wanted one of {listed}")
            if not isinstance(value, bool | int | float | str) or value != value:  # the last is true of NaN
                raise JQ4Error(f"step {self.step}: option {name} is {value!r}, wanted a number or a word")
        object.__setattr__(self, "options", tuple(sorted(options.items())))

    @property
    def when(self) -> str:
        return STEPS[self.step].when

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.step, **dict(self.options)}

    @classmethod
    def from_dict(cls, value: Any, source: str) -> "Step":
        """The step of `to_dict`'s dict, or of a name alone; `source` is what errors call it."""
        if isinstance(value, str):
            value = {"step": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("step"), str):
            raise JQ4Error(f"{source}: found {value!r}, wanted a mapping with 'step', one of {', '.join(STEPS)}")
        try:
            return cls(value["step"], tuple((key, item) for key, item in value.items() if key != "step"))
        except JQ4Error as error:
            raise JQ4Error(f"{source}: {error}") from None
