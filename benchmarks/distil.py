"""What a packed model should be held to while it is trained: the text, its teacher, hidden states, or less.

    python -m benchmarks.distil [--recipes NAME ...] [--steps N] [--ways WAY ...] [--held-out] [--json FILE]

TinyStories-656K, from GPTQ's solution (scales and codes) on the calibration rows, by `jq4.train.self_distill`: the same
steps, batches, rate and rows of text for every way, and what is measured is what is served, packed and strictly:

    next_token   the text alone: -log p of the next token
    both         half of that, half of the teacher's predictions
    teacher      KL to the dense model's own predictions
    hidden       and its hidden states, by the inputs of q_proj, gate_proj and the tied head
    top16 top64  KL to the teacher's k likeliest tokens, read from disk (jq4.train.TeacherCache)
    generated    no text at all: rows that the dense model wrote, for GPTQ's statistics and for training

KLD is in nats against the dense model, on the evaluation rows, which nothing was fitted to. `--held-out` measures on 14
of the calibration rows instead, which are then not learned from: choices are to be made by it.
"""

import argparse
import dataclasses
import functools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jq4
from benchmarks.best import TINYSTORIES
from benchmarks.provenance import publish
from benchmarks.served import Served
from jq4.train import Lesson, TeacherCache, generated_rows, self_distill
from jq4.tuning.descent import split_rows
from models.config import DecoderConfig
from models.decoder import Decoder
from models.generate import generate
from models.hf import load_config, load_params

RECIPES = ("gptq-w2g32-asym", "gptq-w3g32")
HIDDEN = ("q_proj", "gate_proj", "embedding")
WAYS = ("next_token", "both", "teacher", "hidden", "top16", "top64", "generated")
FIGURES = ("kld_mean", "kld_mean_standard_error", "perplexity", "top1_agreement")
HELD_OUT, SEED = 0.15, 0


@dataclasses.dataclass(frozen=True)
class Bench:
    """The model, and rows of its text."""

    config: DecoderConfig
    model: Any
    params: Any
    rows: np.ndarray
    judges: np.ndarray

    @classmethod
    def open(cls, held_out: bool, length: int) -> "Bench":
        config = load_config(TINYSTORIES)
        params = {"params": load_params(TINYSTORIES, config, dtype=np.float32)}
        rows, judges = (
            np.load(TINYSTORIES / f"{name}_ids.npy").astype(np.int32) for name in ("calibration", "evaluation")
        )
        if held_out:
            learned, held = split_rows(len(rows), HELD_OUT)
            rows, judges = rows[learned], rows[held]
        return cls(config, Decoder(config), params, rows.reshape(-1, length), judges)

    def calibrated(self, recipe: str, rows: np.ndarray) -> Any:
        whole = len(rows) // 16 * 16
        batches = [jnp.asarray(batch) for batch in rows[:whole].reshape(-1, 16, rows.shape[1])]
        stats = jq4.observe(self.model.apply, self.params, batches, collect=("hessian",))
        return jq4.quantize(self.params, recipe, stats)

    @functools.cached_property
    def served(self) -> Served:
        return Served(self.model, self.params)

    def measure(self, packed: Any) -> dict[str, float]:
        """Of a packed tree, served, against the dense model."""
        return self.served.figures(packed, self.judges, FIGURES)

    def generated(self, count: int) -> np.ndarray:
        def write(tokens: jax.Array, more: int, temperature: float, seed: int) -> jax.Array:
            options: Any = {"max_new_tokens": more, "temperature": temperature, "seed": seed}
            return generate(self.model.apply, self.params["params"], self.config, tokens, **options)

        length, vocabulary = self.rows.shape[1], self.config.vocab_size
        return generated_rows(write, count, length, np.arange(3, vocabulary), batch_size=64, seed=SEED)


def arranged(bench: Bench, way: str, options: argparse.Namespace, folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The rows of a way, and what it gives `self_distill`."""
    lessons = {
        "next_token": Lesson(share=0.0),
        "both": Lesson(share=0.5),
        "hidden": Lesson(hidden=HIDDEN, hidden_weight=options.hidden_weight),
    }
    rows = bench.generated(len(bench.rows)) if way == "generated" else bench.rows
    given: dict[str, Any] = {"lesson": lessons.get(way)}
    if way.startswith("top"):
        k = int(way.removeprefix("top"))
        given["teacher"] = TeacherCache.write(folder / way, bench.model.apply, bench.params, rows, k=k, batch_size=16)
    return rows, given


def bytes_a_token(cache: TeacherCache) -> float:
    """As the files have it."""
    return sum(file.stat().st_size for file in cache.folder.iterdir()) / (cache.job.rows * cache.job.length)


def learn(bench: Bench, recipe: str, start: Any, way: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains one way and measures it; `start` is the solution that is calibrated on text, and its figures."""
    packed, before = start
    rows, given = arranged(bench, way, options, folder)
    if way == "generated":
        packed = bench.calibrated(recipe, rows)
        before = bench.measure(packed)
    trained = self_distill(
        bench.model.apply, bench.params, recipe, rows, start=packed, steps=options.steps, batch_size=options.batch,
        seed=SEED, **given,
    )  # fmt: skip
    row = {"recipe": recipe, "way": way, "ptq_kld": before["kld_mean"], **bench.measure(trained)}
    row |= {"share_of_ptq": row["kld_mean"] / row["ptq_kld"], "steps": options.steps}
    row |= {"tokens_a_step": options.batch * options.length}
    if "teacher" in given:
        row["cache_bytes_a_token"] = bytes_a_token(given["teacher"])
    if way == "hidden":
        row["hidden_weight"] = options.hidden_weight
    told = f"{row['kld_mean']:.4f} ({row['share_of_ptq']:.2f} of its start), perplexity {row['perplexity']:.2f}"
    print(f"  {recipe} {way:12} {told}", flush=True)
    return row


def learn_all(bench: Bench, recipe: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    packed = bench.calibrated(recipe, bench.rows)
    start = packed, bench.measure(packed)
    print(f"{recipe}: calibrated {start[1]['kld_mean']:.4f}", flush=True)
    with ThreadPoolExecutor(options.at_once) as pool:
        return list(pool.map(lambda way: learn(bench, recipe, start, way, options, folder), options.ways))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="of the rows that are learned from, in tokens")
    parser.add_argument("--hidden-weight", type=float, default=1.0)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--at-once", type=int, default=1, help="ways that are trained side by side")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench = Bench.open(options.held_out, options.length)
    with tempfile.TemporaryDirectory() as work:
        found = [learn_all(bench, recipe, options, Path(work, recipe)) for recipe in options.recipes]
    rows = [row for each in found for row in each]
    if options.json:
        publish(options.json, "distil", {"model": TINYSTORIES.name, "held_out": options.held_out, "rows": rows})


if __name__ == "__main__":
    main()
