"""A packed tree, served, against the dense model on rows of tokens; both compiled once for all that is measured."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import jq4
from jq4.evaluate import evaluate


class Served:
    """A model by its dense params."""

    def __init__(self, model: Any, params: Any) -> None:
        self.params = params
        self._dense = jax.jit(model.apply)
        self._packed = jax.jit(jq4.quantized(model.apply, strict=True))

    def figures(self, packed: Any, rows: np.ndarray, names: Sequence[str]) -> dict[str, float]:
        """What `jq4.evaluate.evaluate` finds on rows i32[R, T], by these names of it."""
        found = evaluate(
            lambda tokens: self._packed(packed, tokens),
            rows,
            reference=lambda tokens: self._dense(self.params, tokens),
            batch_size=14,
        )
        return {name: float(getattr(found, name)) for name in names}
