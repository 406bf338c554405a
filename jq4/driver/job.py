"""What a run has to do, decided before any work from shapes alone, and its identity: all that the result depends on."""

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.axes import contraction_axes
from jq4.chain import BlockSource, Chain
from jq4.driver import end_to_end
from jq4.driver.block import check_dense_leaves
from jq4.driver.calibration_rows import Needs, check_rows, needs_of
from jq4.driver.equalized import RotatedSource
from jq4.driver.journal import digest_of
from jq4.driver.plan import BlockPlan, abstract, paths_of, plan_block, wanted_by
from jq4.driver.streams import Placement
from jq4.equalize import for_model
from jq4.errors import JQ4Error
from jq4.quantize import quantize_report
from jq4.quantize_report import LeafReport
from jq4.recipe import Recipe
from jq4.steps import AFTER, STEPS, Step
from jq4.tuning import with_effort


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of `quantize_blocks`.

    Attributes:
      recipe: with the options of its effort written out.
      source: rotated, if the recipe says so.
      given: the source as it was given.
      plan, outside: what becomes of the leaves of every block, and of those outside of the blocks.
      needs, rows: what is needed of calibration, and the rows i32[R, T] if any are.
      last_step: "distill", if the recipe has it.
      width: D of the activations.
      shapes: of the leaves outside of the blocks, and of a block's.
    """

    chain: Chain
    given: BlockSource
    source: BlockSource
    recipe: Recipe
    plan: BlockPlan
    outside: tuple[LeafReport, ...]
    needs: Needs
    rows: np.ndarray | None
    last_step: Step | None
    width: int
    seed: int
    placement: Placement
    shapes: tuple[Any, Any]

    @property
    def stream_bytes(self) -> int:
        """Of the activations between two blocks."""
        return 0 if self.rows is None else 4 * self.rows.size * self.width * (2 if self.needs.dense else 1)

    def identity(self, provenance: Any) -> dict[str, Any]:
        """Everything that the result depends on, by name; `provenance` tells the source, or all of it is read."""
        from jq4 import __version__

        chain, device = self.chain, self.placement.devices[0]
        return {
            "recipe": digest_of(self.recipe.to_dict()),
            "model": digest_of([chain.num_blocks, chain.stacked, chain.stages]),
            "functions": digest_of(_programs_of(chain, *self.shapes)),
            "source": _digest_of_source(chain, self.given) if provenance is None else digest_of(provenance),
            "calibration rows": None if self.rows is None else digest_of(self.rows),
            "seed": self.seed,
            "devices": [len(self.placement.devices), device.platform, device.device_kind],
            "versions": [__version__, *map(importlib.metadata.version, ("jax", "jaxlib", "numpy"))],
        }


def plan_job(
    chain: Chain,
    source: BlockSource,
    recipe: Recipe,
    rows: Any,
    *,
    effort: str,
    seed: int,
    devices: Sequence[Any] | None,
) -> Job:
    """The job; a JQ4Error for whatever can be known to be wrong before it is begun."""
    _check_order([step.step for step in recipe.after])
    recipe = for_model(with_effort(recipe, effort), chain.folds)
    rotated = RotatedSource(source, chain, recipe) if recipe.before else source
    outside, first = rotated.outside(), rotated.block(0)
    check_dense_leaves("", outside)
    plan = plan_block(chain, outside, first, recipe)
    planned_outside = tuple(quantize_report(outside, plan.recipe).leaves)
    needs = needs_of(recipe, plan, planned_outside)
    last_step = end_to_end.step_of(recipe)
    checked = check_rows(rows, needs, recipe.name)
    if last_step is not None:
        end_to_end.check_memory(outside, first, chain.num_blocks)
    width = jax.eval_shape(chain.embed, outside, jax.ShapeDtypeStruct((1, 2), np.int32)).shape[-1]
    _check_observed(chain, outside, planned_outside, width)
    return Job(
        chain=chain,
        given=source,
        source=rotated,
        recipe=recipe,
        plan=plan,
        outside=planned_outside,
        needs=needs,
        rows=checked,
        last_step=last_step,
        width=width,
        seed=seed,
        placement=Placement(devices),
        shapes=(abstract(outside), abstract(first)),
    )


def _programs_of(chain: Chain, outside: Any, block: Any) -> list[str]:
    """The chain's functions as the compiler is given them: a change of what they compute is a change of these."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    x = jax.eval_shape(chain.embed, outside, tokens)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    calls = (chain.embed, (outside, tokens)), (chain.block, (block, number, x)), (chain.head, (outside, x))
    return [jax.jit(function).lower(*arguments).as_text() for function, arguments in calls]


def _check_order(after: list[str]) -> None:
    wanted = [name for name, kind in STEPS.items() if kind.when == AFTER and name in after]
    if after != wanted:
        raise JQ4Error(
            f"the recipe's steps after its rules are {', '.join(after)}: wanted {', '.join(wanted)}, each once"
        )


def _check_observed(chain: Chain, outside: Any, planned: Sequence[LeafReport], width: int) -> None:
    """Raises JQ4Error for a rule that looks at a leaf's inputs where the leaf has none: a table that is looked up."""
    asking = [path for path, wanted in wanted_by(planned).items() if wanted]
    x = jax.ShapeDtypeStruct((1, 2, width), jnp.float32)
    multiplied = contraction_axes(chain.head, outside, x) if asking else {}
    for path in asking:
        if path not in multiplied:
            raise JQ4Error(
                f"{path}: its rule looks at what it is multiplied by, and this leaf is only looked up: leave it dense, "
                "or give it a rule of its own, of a method that needs no calibration, such as hqq"
            )


def _digest_of_source(chain: Chain, source: BlockSource) -> str:
    parts = [lambda: source.outside(), *(lambda i=i: source.block(i) for i in range(chain.num_blocks))]
    return digest_of([[path, digest_of(np.asarray(leaf))] for read in parts for path, leaf in paths_of(read()).items()])
