"""What was measured of a model, gathered in one dict of plain numbers, strings and lists.

format, version   "jq4-quality-report", 1
model, reference  what they are called
recipe, source    how the model was made, and from what (names and SHA-256)
evaluation        jq4.evaluate's figures, `text` (on which tokens), `kld_histogram` {edges, counts}
calibration       on what the methods were calibrated
leaves            a row a leaf: path, shape, format, group_size, bytes, bits_per_weight, sqnr_db, output_error, ...
                  and its slices (jq4.leaf_errors)
experts           a row a stack of experts: tokens of the least, the median and the most seen, and how many starved
totals            parameters, bytes, bits a weight: of the weights, adapters apart
adapters          ranks, parameters, bytes, and a row a leaf that has one (jq4.train.adapters.adapter_inventory)
cost              seconds and peak memory of quantizing
compared          other models on the same tokens: name, bits_per_weight, kld_mean, ...
notes, versions
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jq4.drawing import count_klds, kld_edges
from jq4.evaluate import Evaluation
from jq4.inventory import Leaf
from jq4.leaf_errors import LeafError
from jq4.plain_json import plain
from jq4.quantize_report import LeafReport, QuantizeReport

FORMAT, VERSION = "jq4-quality-report", 1


def compose_report(
    *,
    model: str,
    leaves: Iterable[Mapping[str, Any]] = (),
    evaluation: Evaluation | Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    reference: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    experts: Sequence[Mapping[str, Any]] = (),
    totals: Mapping[str, Any] | None = None,
    adapters: Mapping[str, Any] | None = None,
    cost: Mapping[str, Any] | None = None,
    compared: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The report's data. Every argument is what the module's text says of its key; all but `model` may be missing.

    Args:
      leaves: of `leaf_rows`, or such rows made elsewhere.
      evaluation: of jq4.evaluate; its KLD of every token becomes the histogram.
      text: what was predicted: {"file", "sha256", "dropped_tokens", ...}.
      calibration: {"file", "rows", "context", "sha256", "chosen", ...}, whatever of these is known.
      cost: {"seconds", "peak_memory_bytes"}.
    """
    parts = {
        "reference": reference,
        "recipe": recipe,
        "source": source,
        "evaluation": _evaluation(evaluation, text),
        "calibration": calibration,
        "leaves": [dict(row) for row in leaves],
        "experts": [dict(row) for row in experts],
        "totals": totals,
        "adapters": adapters,
        "cost": cost,
        "compared": [dict(row) for row in compared],
        "notes": list(notes),
        "versions": versions,
    }
    given = {key: value for key, value in parts.items() if value not in (None, [], {})}
    return plain({"format": FORMAT, "version": VERSION, "model": model, **given})


def leaf_rows(leaves: Iterable[Leaf] | QuantizeReport, errors: Iterable[LeafError] = ()) -> list[dict[str, Any]]:
    """Rows for `compose_report`, from what a model holds or from what `jq4.quantize` reported, with errors by path."""
    by_path = {error.path: error for error in errors}
    listed = leaves.leaves if isinstance(leaves, QuantizeReport) else leaves
    rows = [_leaf_row(leaf) for leaf in listed if leaf.shape is not None]
    for row in rows:
        if (error := by_path.get(row["path"])) is not None:
            row |= error.as_dict()
    return rows


def expert_coverage(stats: Any, paths: Iterable[str]) -> list[dict[str, Any]]:
    """How many tokens each expert saw, a row for each stack of experts: a layer's, or a leaf's own.

    A leaf is stacked by experts where its slices along its last stacked axis saw different numbers of tokens, or its
    path says "expert". An expert is starved where it saw fewer tokens than it has inputs: its Hessian is singular.
    """
    return [row for path in paths if path in stats for row in _experts_of(path, stats[path])]


def _experts_of(path: str, statistics: Any) -> list[dict[str, Any]]:
    counts = np.asarray(statistics.count)
    if not counts.ndim or not ("expert" in path.lower() or np.ptp(counts, axis=-1).any()):
        return []
    features = next((int(v.shape[-1]) for v in (statistics.square_total, statistics.absmax) if v is not None), 1)
    rows = []
    for index in np.ndindex(*counts.shape[:-1]):
        tokens = counts[index]
        rows.append(
            {
                "path": path,
                "index": list(index),
                "experts": len(tokens),
                "features": features,
                "least": int(tokens.min()),
                "median": float(np.median(tokens)),
                "most": int(tokens.max()),
                "unseen": int((tokens == 0).sum()),
                "starved": int((tokens < features).sum()),
                "tokens": tokens.tolist(),
            }
        )
    return rows


def _leaf_row(leaf: Leaf | LeafReport) -> dict[str, Any]:
    if isinstance(leaf, Leaf):
        return leaf.as_dict()
    names = ("path", "shape", "status", "group_size", "axis", "sqnr_db", "starved", "note")
    size = max(1, math.prod(leaf.shape or ()))
    packed = leaf.is_packed or leaf.status == "packed already"
    return {name: getattr(leaf, name) for name in names} | {
        "format": leaf.format if packed else leaf.dtype,
        "packed": packed,
        "bytes": leaf.nbytes,
        "dense_bytes": leaf.dense_nbytes,
        "bits_per_weight": 8 * leaf.nbytes / size,
    }


def _evaluation(found: Evaluation | Mapping[str, Any] | None, text: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    figures = found.as_dict() if isinstance(found, Evaluation) else dict(found)
    if isinstance(found, Evaluation) and found.kld is not None:
        edges = kld_edges([found.kld])
        figures["kld_histogram"] = {"edges": edges.tolist(), "counts": count_klds(found.kld, edges).tolist()}
    return figures | ({} if text is None else {"text": dict(text)})
