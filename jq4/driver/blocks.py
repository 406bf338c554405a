"""The blocks of a model one after another, and the activations that run through them beside.

`x` runs through the dense blocks and `x_hat` through the packed ones; either is None where the recipe
has no use for it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jq4.apply import quantized
from jq4.beside import beside
from jq4.chain import BlockSource, Chain
from jq4.driver.block import BlockQuantizer, check_dense_leaves
from jq4.driver.calibration_rows import Needs
from jq4.driver.equalized import Equalizer
from jq4.driver.plan import BlockPlan, paths_of
from jq4.driver.report import LeafRow
from jq4.driver.rows_learned import rows_learned
from jq4.driver.stage_statistics import Collector
from jq4.driver.streams import Placement, Stream, make_stream
from jq4.freed_pages import give_back_freed_pages
from jq4.observe import observe
from jq4.recipe import Recipe
from jq4.sparing_jit import sparing_jit
from jq4.statistics import Statistics, check_finite
from jq4.steps import BLOCKWISE, Step
from jq4.tuning import tune_block


class BlocksInOrder:
    """Reads, quantizes and runs the blocks of a chain; the next block's number is how many were `skip`ped or made."""

    def __init__(
        self,
        chain: Chain,
        source: BlockSource,
        recipe: Recipe,
        plan: BlockPlan,
        needs: Needs,
        placement: Placement,
        seed: int,
    ) -> None:
        self._source = source
        self._placement = placement
        self._needs = needs
        self._planned = frozenset(plan.wanted)
        self._seed = seed
        self._equalizer = Equalizer(chain, recipe)
        self._quantizer = BlockQuantizer(chain, plan, needs.pairs, keeps_dense=bool(recipe.after))
        self._tuning = [step for step in recipe.after if step.step in BLOCKWISE]
        self._chain = chain
        self._dense_step = sparing_jit(chain.block)
        self._packed_step = sparing_jit(quantized(chain.block))
        self.x: Stream | None = None
        self.x_hat: Stream | None = None
        self.next = 0

    def embed(self, outside: Any, rows: np.ndarray, batch_size: int, folder: Path | None) -> None:
        """Makes the streams of the rows i32[R, T], in files of `folder` if one is given."""
        step = sparing_jit(self._chain.embed)
        outside = self._placement.first(outside)

        def stream(name: str) -> Stream:
            file = None if folder is None else folder / f"{name}.npy"
            return make_stream(rows, lambda tokens: step(outside, tokens), file, batch_size, self._placement)

        self.x_hat = stream("x_hat")
        self.x = stream("x") if self._needs.dense else None

    def skip(self, packed: Callable[[], Any]) -> None:
        """Runs the streams through the next block, which an earlier run has quantized: what `packed` gives."""
        if self.x is not None:
            self._run_dense(self._dense())
        if self.x_hat is not None:
            self._run_packed(self._placement.first(packed()))
        self.next += 1

    def quantize(self, progress: Callable[[str], None]) -> tuple[Any, Any, list[LeafRow]]:
        """The next block as it was quantized from (scales moved), packed, and its rows.

        The first is None where no step follows the rules.
        """
        streams = self.x_hat, self.x
        dense, packed, rows = self._quantizer.quantize(self.next, self._scaled, *streams, progress, self._pass_dense)
        check_dense_leaves(f"block {self.next}: ", packed)
        for step in self._tuning:
            progress(f"block {self.next}: learning its rounding ({step.step})")
            packed, rows = self._tuned(step, dense, packed, rows)
        if self.x_hat is not None:
            self._run_packed(packed)
        self.next += 1
        return dense, packed, rows

    def _scaled(self) -> Any:
        """The next block, dense, with its scales moved."""
        dense = self._dense()
        check_dense_leaves(f"block {self.next}: ", self._without_planned(dense))
        return self._equalizer.scaled(self.next, dense, self.x_hat)

    def _pass_dense(self, block: Any) -> None:
        """x <- block(x), of the block before its scales were moved."""
        if self.x is not None:
            self._run_dense(self._dense() if self._equalizer.moves else block)

    def _without_planned(self, block: Any) -> dict[str, Any]:
        """The leaves by path that no rule means: those that are meant are checked when they are packed."""
        return {path: leaf for path, leaf in paths_of(block).items() if path not in self._planned}

    def _tuned(self, step: Step, dense: Any, packed: Any, rows: list[LeafRow]) -> tuple[Any, list[LeafRow]]:
        """The packed block learned against the dense one's outputs, which x now holds."""
        assert self.x is not None and self.x_hat is not None
        streams = self.x_hat.array, self.x.array
        how = {"step": step.step, "options": dict(step.options), "seed": self._seed}
        packed = tune_block(self._chain.block, dense, packed, *streams, index=self.next, **how)
        return packed, rows_learned(rows, dense, packed)

    def head_statistics(self, outside: Any, wanted: Mapping[str, frozenset[str]]) -> Statistics | None:
        """Statistics of the weights that the head multiplies by, behind all blocks; None where none are asked for."""
        if self.x_hat is None or not any(wanted.values()):
            return None
        head, outside = self._chain.head, self._placement.first(outside)
        found = observe(head, outside, ((x,) for _, x in self.x_hat.units()), collect=Collector(wanted))
        for path in set(wanted) & set(found):
            check_finite(path, found[path])
        return found

    def _dense(self) -> Any:
        return self._placement.first(self._source.block(self.next))

    def _run_dense(self, block: Any) -> None:
        assert self.x is not None
        number = jnp.int32(self.next)
        here = beside(block)
        self.x.advance(lambda x: self._dense_step(here(x), number, x), f"block {self.next}, dense")
        give_back_freed_pages()

    def _run_packed(self, block: Any) -> None:
        assert self.x_hat is not None
        number = jnp.int32(self.next)
        here = beside(block)
        self.x_hat.advance(lambda x: self._packed_step(here(x), number, x), f"block {self.next}, quantized")
        give_back_freed_pages()
