"""What becomes of each leaf of a block, in which order, and what of it needs calibration: known before any work.

The leaves of one stage see the same inputs (jq4.chain), so statistics are collected once a stage, for one leaf of each
kind, and serve the others. Which axis is contracted, the block itself tells by a trace.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jq4 import targets
from jq4.axes import contraction_axes
from jq4.chain import Chain
from jq4.methods import get_method
from jq4.paths import flatten_with_paths
from jq4.quantize import quantize_report
from jq4.quantize_report import LeafReport
from jq4.recipe import Recipe
from jq4.rule import Rule
from jq4.statistics import ContractionAxes

HESSIAN = frozenset(("hessian", "mean", "mean_square", "absmax"))


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """The same for all blocks of a chain.

    Attributes:
      recipe: the rules alone, without steps.
      leaves: the block's leaves in tree order, those to be packed and the others with the reason.
      axes: path -> contracted axis.
      stages: the paths to be packed, in the order of their use.
    """

    recipe: Recipe
    leaves: tuple[LeafReport, ...]
    axes: ContractionAxes
    stages: tuple[tuple[str, ...], ...]

    @property
    def wanted(self) -> dict[str, frozenset[str]]:
        """Path -> what to collect of the inputs of each leaf that is to be packed; empty where nothing is."""
        return wanted_by(self.leaves)


def wanted_by(leaves: Iterable[LeafReport]) -> dict[str, frozenset[str]]:
    """Path -> what the rules of the leaves that are to be packed want to know of their inputs."""
    return {leaf.path: wanted_of(leaf.rule) for leaf in leaves if leaf.is_planned and leaf.rule is not None}


def wanted_of(rule: Rule) -> frozenset[str]:
    """What a leaf's rule wants to know of its inputs: its method, and activations with fixed scales."""
    if get_method(rule.method).needs_statistics:
        return HESSIAN
    activations = rule.input_activations
    return frozenset[str]() if activations is None or activations.dynamic else frozenset(("absmax",))


def is_corrected(rule: Rule) -> bool:
    """Whether a leaf's method undoes what the quantized prefix has done, and so wants the dense model's inputs too."""
    options = get_method(rule.method).options
    return "correction" in options and float(rule.method_options.get("correction", 1.0)) > 0


def rules_of(recipe: Recipe) -> Recipe:
    """The recipe without its steps."""
    return dataclasses.replace(recipe, before=(), after=())


def plan_block(chain: Chain, outside: Any, block: Any, recipe: Recipe) -> BlockPlan:
    """The plan of every block, from the shapes of one."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    outside, block = abstract((outside, block))
    x = jax.eval_shape(chain.embed, outside, tokens)
    axes = contraction_axes(chain.block, block, jax.ShapeDtypeStruct((), jnp.int32), x)
    rules = rules_of(recipe)
    leaves = tuple(quantize_report(block, rules, axes=axes).leaves)
    return BlockPlan(rules, leaves, axes, _stages(chain, [leaf.path for leaf in leaves if leaf.is_planned]))


def _stages(chain: Chain, paths: list[str]) -> tuple[tuple[str, ...], ...]:
    """The paths by the chain's stages; those in none of them come last, each alone."""
    waiting = list(paths)
    stages = []
    for patterns in chain.stages:
        stage = tuple(path for path in waiting if any(targets.matches(pattern, path) for pattern in patterns))
        waiting = [path for path in waiting if path not in stage]
        stages += [stage] if stage else []
    return (*stages, *((path,) for path in waiting))


def abstract(tree: Any) -> Any:
    """The tree's shapes and dtypes."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def paths_of(tree: Any) -> dict[str, Any]:
    """A tree as one flat dict, which jq4.quantize takes as it takes the tree: a leaf keeps its path."""
    return dict(flatten_with_paths(tree))
