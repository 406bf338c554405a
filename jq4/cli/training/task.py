"""What a verb of `jq4 train` hands to the run: what is trained, on what, and what becomes of it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jq4.cli.training.text import Text


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of a run with a loss of its own: fewer bits than in the one before, say.

    Attributes:
      stop: steps done at its end.
      loss: of (trained, fixed, part).
      forward: (trained, fixed, tokens i32[B, T]) -> logits as they will be served, to measure by.
      enter: what was trained before -> what is trained in it. Moments of the optimizer begin anew there.
    """

    stop: int
    loss: Callable[[Any, Any, Any], Any]
    forward: Callable[[Any, Any, Any], Any]
    enter: Callable[[Any], Any] = lambda trained: trained


@dataclasses.dataclass(frozen=True)
class Task:
    """A training that is set up, and has not begun.

    Attributes:
      model: the dense model; its config and tokenizer are the result's.
      reference: whom the result is measured against on held-out rows; None for perplexity alone.
      recipe: the result's; None where nobody tells it.
      given: by name, where the model and others came from, with their files' SHA-256.
      phases: the last one ends with the run.
      start: (folder, rows) -> what training starts from (packed params, and adapters), made in `folder` if need be.
      fixed: that -> what the losses look at and do not change.
      begin: that -> what is trained.
      served: (what was trained, that) -> the model that is written.
      before: that -> the model that held-out rows are measured by before training.
      judged_by: the figure of `jq4.evaluate` that training means to make small.
      batch_size: rows a step.
      along: what a batch holds of its rows beside their tokens (jq4.train.running.rows); made before the first step.
      beside: (OUT, the model) -> further files that were written there, by kind.
    """

    model: Any
    reference: Any
    text: Text
    recipe: Any
    given: dict[str, Any]
    phases: tuple[Phase, ...]
    start: Callable[[Path, Any], Any]
    fixed: Callable[[Any], Any]
    begin: Callable[[Any], Any]
    served: Callable[[Any, Any], Any]
    before: Callable[[Any], Any]
    judged_by: str
    batch_size: int
    along: Callable[[], dict[str, Any]] = dict
    beside: Callable[[Path, Any], dict[str, str]] = lambda out, model: {}

    @property
    def tokens_a_step(self) -> int:
        return self.batch_size * self.text.rows.shape[1]
