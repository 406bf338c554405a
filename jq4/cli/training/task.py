"""What a verb of `jq4 train` hands to the run: what is trained, on what, and what becomes of it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jq4.cli.training.text import Text


@dataclasses.dataclass(frozen=True)
class Task:
    """A training that is set up, and has not begun.

    Attributes:
      model: the dense model; its config and tokenizer are the result's.
      reference: whom the result is measured against on held-out rows; None for perplexity alone.
      recipe: the result's; None where nobody tells it.
      given: by name, where the model and others came from, with their files' SHA-256.
      loss: of (trained, fixed, part).
      start: (folder, rows) -> the packed params that training starts from, made in `folder` if need be.
      fixed: those -> what the loss looks at and does not change.
      begin: those -> what is trained.
      served: (what was trained, those) -> the model that is written.
      batch_size: rows a step.
      beside: (OUT, the model) -> further files that were written there, by kind.
    """

    model: Any
    reference: Any
    text: Text
    recipe: Any
    given: dict[str, Any]
    loss: Callable[[Any, Any, Any], Any]
    start: Callable[[Path, Any], Any]
    fixed: Callable[[Any], Any]
    begin: Callable[[Any], Any]
    served: Callable[[Any, Any], Any]
    batch_size: int
    beside: Callable[[Path, Any], dict[str, str]] = lambda out, model: {}

    @property
    def tokens_a_step(self) -> int:
        return self.batch_size * self.text.rows.shape[1]
