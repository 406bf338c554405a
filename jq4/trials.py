"""Trials: the KLD of a model with one leaf in another format, or with any of them, against the dense one.

A packed leaf goes into the dense tree dequantized, so that one program runs every trial. The dense model's logits are
kept where there is room for them.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jq4.evaluate import evaluate
from jq4.paths import leaf_path
from jq4.qarray import is_qarray

_REFERENCE_BYTES = 2**30  # of reference logits, above which they are computed again for each trial


class Trials:
    """Runs the model with one leaf replaced, and compares it with the dense one."""

    def __init__(self, logits: Any, params: Any, rows: Any, batch_size: int) -> None:
        self._logits, self._params = jax.jit(logits), params
        self._rows, self._batch_size = np.asarray(rows), batch_size
        self._kept: dict[bytes, jax.Array] = {}

    def __call__(self, path: str, packed: Any) -> float:
        return self.kld(_with_leaf(self._params, path, packed))

    def kld(self, params: Any) -> float:
        """The mean KLD of a tree against the dense one."""
        tree = jax.tree.map(lambda leaf: _dequantized(leaf) if is_qarray(leaf) else leaf, params, is_leaf=is_qarray)
        run = self._logits
        found = evaluate(
            lambda tokens: run(tree, tokens), self._rows, reference=self._reference, batch_size=self._batch_size
        )
        assert found.kld_mean is not None
        return max(found.kld_mean, 0.0)

    def _reference(self, tokens: jax.Array) -> jax.Array:
        key = np.asarray(tokens).tobytes()
        if key in self._kept:
            return self._kept[key]
        found = self._logits(self._params, tokens)
        if found.nbytes * (len(self._rows) / len(tokens)) <= _REFERENCE_BYTES:
            self._kept[key] = found
        return found


@jax.jit
def _dequantized(leaf: Any) -> jax.Array:
    return leaf.dequantize()


def _with_leaf(params: Any, path: str, packed: Any) -> Any:
    def pick(keys: Any, leaf: Any) -> Any:
        return packed if leaf_path(keys) == path else leaf

    return jax.tree_util.tree_map_with_path(pick, params, is_leaf=is_qarray)


def kld_of_params(
    logits: Callable[[Any, jax.Array], jax.Array], params: Any, rows: Any, batch_size: int = 8
) -> Callable[[Any], float]:
    """A function from a tree, packed or not, to its mean KLD against `params`, as trials measure it."""
    return Trials(logits, params, rows, batch_size).kld
