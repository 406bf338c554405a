"""The report of a quantizing that has just been done: what became of each leaf and layer, time and memory.

The model has predicted nothing yet, so there is no perplexity and no KLD in it: `jq4 report` measures those. Output
errors are those that the methods were told to make small, over the rows of calibration themselves.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from jq4.quality_report.compose import compose_report, leaf_rows
from jq4.quality_report.sections import CALIBRATION
from jq4.quantize_report import QuantizeReport


def quantizing_report(
    *, model: str, report: QuantizeReport, rows: Iterable[Mapping[str, Any]] = (), **about: Any
) -> dict[str, Any]:
    """The data of `compose_report`.

    Args:
      model: what the packed model is called.
      report: of jq4.quantize or jq4.quantize_blocks.
      rows: of a BlocksResult, as plain data: leaf by leaf and block by block.
      about: further arguments of `compose_report`, such as calibration, cost, totals, versions.
    """
    leaves = leaf_rows(report)
    by_path: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("block") is not None:
            by_path.setdefault(row["path"], []).append(_slice(row))
    for leaf in leaves:
        if slices := by_path.get(leaf["path"]):
            leaf["slices"] = slices
            leaf["weighting"] = CALIBRATION if any(each["output_error"] is not None for each in slices) else None
    notes = [f"{row['path']}, layer {each['index'][0]}: {each['note']}" for row in leaves for each in _noted(row)]
    if report.recipe is not None:
        about.setdefault("recipe", report.recipe.to_dict())
    return compose_report(model=model, leaves=leaves, notes=notes, **about)


def _slice(row: Mapping[str, Any]) -> dict[str, Any]:
    names = {"sqnr_db": "sqnr_db", "output_error": "weighted_error", "seconds": "seconds", "note": "note"}
    return {"index": [row["block"]], **{ours: row.get(theirs) for ours, theirs in names.items()}}


def _noted(leaf: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [each for each in leaf.get("slices", ()) if each.get("note")]
