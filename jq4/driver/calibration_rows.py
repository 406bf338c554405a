"""The rows of calibration: token ids i32[R, T], checked before any work, and whether a recipe needs them."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jq4.driver.plan import BlockPlan, is_corrected, wanted_of
from jq4.errors import JQ4Error
from jq4.methods import get_method
from jq4.quantize_report import LeafReport
from jq4.recipe import Recipe
from jq4.rule import Rule
from jq4.steps import BLOCKWISE

_STEPS_WITHOUT_ROWS = ("rotate",)


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a recipe needs of calibration.

    Attributes:
      rows: activations of the quantized model; nothing is run through it otherwise.
      pairs: those of the dense model beside them, for methods that undo what the quantized prefix did.
      dense: the activations of the dense model between blocks, for pairs and for learning a block's outputs.
      why: what needs rows, in words.
    """

    rows: bool
    pairs: bool
    dense: bool
    why: str = ""


def needs_of(recipe: Recipe, plan: BlockPlan, outside: Sequence[LeafReport]) -> Needs:
    """What this recipe needs for these leaves."""
    planned = [leaf.rule for leaf in (*plan.leaves, *outside) if leaf.is_planned and leaf.rule is not None]
    why = _in_need(recipe, planned)
    pairs = any(is_corrected(rule) for rule in planned)
    learned = any(step.step in BLOCKWISE for step in recipe.after)
    return Needs(bool(why), pairs, pairs or learned, " and ".join(why))


def may_need_rows(recipe: Recipe) -> bool:
    """Whether a rule or a step of the recipe looks at calibration."""
    return bool(_in_need(recipe, recipe.rules))


def _in_need(recipe: Recipe, rules: Iterable[Rule]) -> list[str]:
    """What looks at calibration, of these rules and of the recipe's steps, in words."""
    needing = [rule for rule in rules if not rule.is_dense and wanted_of(rule)]
    methods = sorted({rule.method for rule in needing if get_method(rule.method).needs_statistics})
    fixed = any(not get_method(rule.method).needs_statistics for rule in needing)
    steps = [s.step for s in (*recipe.before, *recipe.after) if s.step not in _STEPS_WITHOUT_ROWS]
    words = [f"method {', '.join(methods)}"] * bool(methods) + [f"step {', '.join(steps)}"] * bool(steps)
    return words + ["activations with fixed scales"] * fixed


def check_rows(rows: Any, needs: Needs, name: str | None) -> np.ndarray | None:
    """Rows i32[R, T] where they are needed, else None. Raises JQ4Error for rows that are missing or no rows."""
    if not needs.rows:
        return None
    if rows is None:
        raise JQ4Error(
            f"the recipe{f' {name}' if name else ''} needs calibration ({needs.why}), and none was given: pass rows "
            "(--calibration FILE: text, JSONL or .npy ids), or use a recipe that needs none, such as hqq-w4g64-asym"
        )
    rows = np.asarray(rows)
    if rows.dtype.kind not in "iu" or rows.ndim != 2 or not rows.size:
        raise JQ4Error(f"calibration rows are {rows.dtype}{list(rows.shape)}, wanted integers [rows, tokens]")
    if rows.min() < 0:
        raise JQ4Error(f"calibration rows hold the token {int(rows.min())}, wanted token ids of 0 or more")
    return rows.astype(np.int32)
