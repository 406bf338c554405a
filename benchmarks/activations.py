"""What rounding activations costs, and what moving scales or rotating first gains: perplexity and KLD against dense.

    python -m benchmarks.activations [--model tinystories|tiny] [--recipes NAME ...] [--select] [--json FILE]

Each recipe runs as a user's does: `jq4.quantize_blocks` on the model's calibration rows, then the packed model against
the dense one on its evaluation rows (`jq4.quantized`, strict). `--select` measures on the last rows of calibration
instead, left out of it: how defaults such as SmoothQuant's alpha were chosen. A name may end in an option of its step:
`:alpha=NUMBER`, or `:inner=true` for rotations of inputs as they come (jq4.input_rotation). A rotation
gives a tied model a head of its own first (models.folds.untied), dense like the other's.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import jq4
from benchmarks.best import open_rows
from benchmarks.provenance import publish
from jq4.chain import TreeSource
from jq4.driver import quantize_blocks
from jq4.evaluate import evaluate
from jq4.steps import Step
from models.chain import LAYERS, decoder_chain
from models.decoder import Decoder
from models.folds import untied
from models.hf import load_config, load_params

RECIPES = (
    "rtn-w8gc", "rtn-w8gc-a8", "smoothquant-w8a8:alpha=0.5", "smoothquant-w8a8",
    "smoothquant-w8a8-static:alpha=0.5", "smoothquant-w8a8-static",
    "rtn-w4g128", "rtn-w4g128-a8", "awq-w4g128", "awq-w4g128-a8", "rtn-w4g32", "awq-w4g32", "awq-w4g32-asym",
    "hqq-w4g128", "rotate-rtn-w4g128", "rotate-hqq-w4g128", "rotate-awq-w4g128",
    "rtn-w4g128-a4", "rotate-rtn-w4g128-a4:inner=false", "rotate-rtn-w4g128-a4",
)  # fmt: skip
HELD_OUT = 17


def recipe_of(name: str) -> jq4.Recipe:
    """The preset, with the option of its first step that stands after a colon."""
    preset, _, option = name.partition(":")
    recipe = jq4.Recipe.preset(preset)
    if not option:
        return recipe
    key, _, value = option.partition("=")
    options = {"alpha": float(value)} if key == "alpha" else {key: value == "true"}
    before = (Step(recipe.before[0].step, tuple(options.items())), *recipe.before[1:])
    return dataclasses.replace(recipe, before=before)


class Bench:
    """A model with its rows, and what is measured of a recipe on it."""

    def __init__(self, folder: Path, calibration: np.ndarray, rows: np.ndarray) -> None:
        self.config = load_config(folder)
        self.params = load_params(folder, self.config, dtype=np.float32)
        self.calibration, self.rows = calibration, rows
        self.dense = self._logits(jax.jit(Decoder(self.config).apply), self.params)
        self.packed = {config: jax.jit(jq4.quantized(Decoder(config).apply, strict=True)) for config in (self.config,)}

    def measure(self, name: str) -> dict[str, Any]:
        recipe = recipe_of(name)
        config, params = self.config, self.params
        if any(step.step == "rotate" for step in recipe.before):
            config, params = untied(config, params)
        start = time.perf_counter()
        chain = decoder_chain(config)
        found = quantize_blocks(chain, TreeSource(params, LAYERS), recipe, self.calibration)
        seconds = time.perf_counter() - start
        if config not in self.packed:
            self.packed[config] = jax.jit(jq4.quantized(Decoder(config).apply, strict=True))
        logits = self._logits(self.packed[config], found.params)
        result = evaluate(logits, self.rows, reference=self.dense, batch_size=17)
        assert result.reference_perplexity is not None
        weights = sum(int(np.prod(leaf.shape or ())) for leaf in found.report.packed)
        return {
            "recipe": name,
            "bits_per_weight": 8 * sum(leaf.nbytes for leaf in found.report.packed) / weights,
            "kld_mean": result.kld_mean,
            "perplexity": result.perplexity,
            "reference_perplexity": result.reference_perplexity,
            "above_dense_percent": 100 * (result.perplexity / result.reference_perplexity - 1),
            "top1_agreement": result.top1_agreement,
            "seconds_to_quantize": seconds,
        }

    @staticmethod
    def _logits(apply: Any, params: Any) -> Any:
        return lambda tokens: apply({"params": params}, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tinystories", "tiny"), default="tinystories")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--select", action="store_true", help="measure on rows left out of calibration")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder, *files = open_rows(arguments.model, Path(work))
        calibration, rows = (np.load(file).astype(np.int32) for file in files)
    if arguments.select:
        calibration, rows = calibration[:-HELD_OUT], calibration[-HELD_OUT:]
    bench, console, found = Bench(folder, calibration, rows), Console(), []
    for name in arguments.recipes:
        row = bench.measure(name)
        found.append(row)
        console.print(
            f"{name}: KLD {row['kld_mean']:.5f}, perplexity {row['perplexity']:.3f}, "
            f"{row['above_dense_percent']:+.2f} % of dense",
            highlight=False,
        )
        if arguments.json:
            value = {"model": arguments.model, "held_out_calibration": arguments.select, "rows": found}
            publish(arguments.json, "activations", value)


if __name__ == "__main__":
    main()
