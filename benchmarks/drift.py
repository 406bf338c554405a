"""Does a model that was calibrated on one text lose on another, and does jq4.drift see it coming?

    python -m benchmarks.drift [--model tinystories|tiny ...] [--recipe NAME] [--json FILE]

Calibration is on rows of the first half of tinyshakespeare, WikiText-2 (validation) or C4 (a sample), deployment on
rows of the second half of each: a matrix of KLD against the dense model, in float32, rows of 256 tokens. Beside it the
same recipe by round-to-nearest, which knows no text, and the drift of the inputs: `divergence` over `threshold`, the
mean over all weights, and the share of weights that moved. `lost` is KLD where calibration was on the row's text, over
KLD where it was on the text of deployment itself: what recalibrating would win back.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jq4
from benchmarks.provenance import publish
from jq4.drift import drift, merge_statistics
from jq4.evaluate import evaluate
from jq4.observe import Programs
from models.language_model import LanguageModel

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
MODELS = {"tinystories": DATA / "tinystories-656k", "tiny": ROOT / "models" / "tiny"}
CONTEXT, CALIBRATION_ROWS, DEPLOYED_ROWS, PARTS, BATCH = 256, 96, 64, 8, 12


def read_texts() -> dict[str, str]:
    lines = (DATA / "c4_sample" / "c4_en_validation_sample.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "tinyshakespeare": (DATA / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8"),
        "wikitext2": (DATA / "wikitext2" / "valid.txt").read_text(encoding="utf-8"),
        "c4": "\n\n".join(json.loads(line)["text"] for line in lines),
    }


def rows_of_half(ids: np.ndarray, half: int, wanted: int) -> np.ndarray:
    """Rows i32[wanted, CONTEXT] at even distances in one half of a text."""
    rows = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    rows = rows[: len(rows) // 2] if half == 0 else rows[len(rows) // 2 :]
    return rows[np.arange(min(wanted, len(rows))) * len(rows) // min(wanted, len(rows))]


@dataclasses.dataclass
class Measured:
    """One model on all texts."""

    model: LanguageModel
    recipe: jq4.Recipe
    calibration: dict[str, np.ndarray]
    deployed: dict[str, np.ndarray]
    programs: Programs = dataclasses.field(default_factory=Programs)

    def observe(self, rows: np.ndarray) -> jq4.Statistics:
        batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        collect = ("absmax", "mean", "mean_square", "hessian")
        return jq4.observe(self.run, self.model.params, batches, collect=collect, programs=self.programs)

    def run(self, params: Any, tokens: Any) -> jax.Array:
        return self.model.apply({"params": params}, tokens)

    def klds(self, params: Any) -> dict[str, dict[str, Any]]:
        """KLD on each text's deployed rows."""
        packed = dataclasses.replace(self.model, params=params)
        found = {
            name: evaluate(packed.logits, rows, reference=self.model.logits, batch_size=16).as_dict()
            for name, rows in self.deployed.items()
        }
        names = ("kld_mean", "kld_mean_standard_error", "perplexity", "reference_perplexity", "top1_agreement")
        return {text: {name: figures[name] for name in names} for text, figures in found.items()}

    def rounded(self) -> dict[str, dict[str, Any]]:
        rules = tuple(dataclasses.replace(rule, method="rtn", options=()) for rule in self.recipe.rules)
        return self.klds(jq4.quantize(self.model.params, dataclasses.replace(self.recipe, rules=rules)))


def measure(name: str, recipe: str, say: Callable[[str], None]) -> dict[str, Any]:
    model = LanguageModel.from_folder(MODELS[name])
    assert model.tokenizer is not None
    ids = {text: np.asarray(model.tokenizer.encode(whole).ids, np.int32) for text, whole in read_texts().items()}
    calibration = {text: rows_of_half(each, 0, CALIBRATION_ROWS) for text, each in ids.items()}
    deployed = {text: rows_of_half(each, 1, DEPLOYED_ROWS) for text, each in ids.items()}
    measured = Measured(model, jq4.Recipe.preset(recipe), calibration, deployed)
    parts = {text: [measured.observe(part) for part in np.split(rows, PARTS)] for text, rows in calibration.items()}
    new = {text: measured.observe(rows) for text, rows in deployed.items()}
    klds = {}
    for text, statistics in parts.items():
        klds[text] = measured.klds(jq4.quantize(model.params, measured.recipe, merge_statistics(statistics)))
        say(f"{name}: calibrated on {text}")
    rows = []
    for old in calibration:
        for text in deployed:
            found = drift([cheap(each) for each in parts[old]], cheap(new[text]))
            ratios = [each.divergence / each.threshold for each in found.slices if each.divergence and each.threshold]
            rows.append(
                {
                    "calibrated_on": old,
                    "deployed_on": text,
                    **klds[old][text],
                    "lost": klds[old][text]["kld_mean"] / klds[text][text]["kld_mean"],
                    "share_moved": found.share_moved,
                    "divergence_over_threshold": float(np.mean(ratios)),
                }
            )
    return {"model": name, "recipe": recipe, "rows": rows, "round_to_nearest": measured.rounded()}


def cheap(stats: jq4.Statistics) -> jq4.Statistics:
    """The statistics without Hessians, which `jq4 drift` compares by default."""
    weights = {path: dataclasses.replace(each, outer_total=None) for path, each in stats.items()}
    return dataclasses.replace(stats, weights=weights)


def show(found: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{found['model']}, {found['recipe']}")
    for heading in ("calibrated on", "deployed on", "KLD", "±", "by rounding", "lost", "moved", "divergence/threshold"):
        table.add_column(heading, justify="left" if heading.endswith(" on") else "right")
    for row in found["rows"]:
        table.add_row(
            row["calibrated_on"],
            row["deployed_on"],
            f"{row['kld_mean']:.4f}",
            f"{row['kld_mean_standard_error']:.4f}",
            f"{found['round_to_nearest'][row['deployed_on']]['kld_mean']:.4f}",
            f"{row['lost']:.2f}",
            f"{row['share_moved']:.0%}",
            f"{row['divergence_over_threshold']:.2f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--recipe", default="gptq-w4g32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    found = [measure(name, arguments.recipe, console.print) for name in arguments.model]
    for each in found:
        show(each, console)
    if arguments.json:
        publish(arguments.json, "drift", {"models": found})


if __name__ == "__main__":
    main()
