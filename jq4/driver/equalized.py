"""The steps before the rules, block by block (jq4.equalize): rotated sources, and scales moved by statistics.

A rotation needs no data, so a rotated model is a source like any other, and both streams run in its basis. Scales are
found on the inputs that the block will meet, those behind the quantized blocks before it.
"""

from typing import Any

import jax.numpy as jnp

from jq4.chain import BlockSource, Chain
from jq4.driver.streams import Stream
from jq4.equalize import collects, rotate_block, rotate_outside, scale_block
from jq4.observe import Programs, observe
from jq4.recipe import Recipe
from jq4.statistics import check_finite

_ROTATE = "rotate"


class RotatedSource:
    """The blocks of another source, rotated as the recipe says; as they are where it says nothing."""

    def __init__(self, source: BlockSource, chain: Chain, recipe: Recipe) -> None:
        self._source = source
        self._chain = chain
        self._recipe = recipe

    def outside(self) -> dict[str, Any]:
        return rotate_outside(self._source.outside(), self._chain.folds, self._recipe)

    def block(self, index: int) -> dict[str, Any]:
        return rotate_block(self._source.block(index), self._chain.folds, self._recipe)


class Equalizer:
    """Moves scales between the leaves of each block; `moves` tells whether the recipe says so."""

    def __init__(self, chain: Chain, recipe: Recipe) -> None:
        self._chain = chain
        self._recipe = recipe
        self._collects = collects(recipe, chain.folds)
        self._programs = Programs()
        self.moves = any(step.step != _ROTATE for step in recipe.before)

    def scaled(self, index: int, block: Any, inputs: Stream | None) -> Any:
        """The dense block with its scales moved, of the same function."""
        if not self.moves:
            return block
        assert inputs is not None
        batches = ((jnp.int32(index), x) for _, x in inputs.units())
        found = observe(self._chain.block, block, batches, collect=self._collects, programs=self._programs)
        for path, statistics in found.items():
            check_finite(f"block {index}: {path}", statistics)
        return scale_block(block, self._chain.folds, self._recipe, found)
