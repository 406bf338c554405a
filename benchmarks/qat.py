"""Training with few bits against calibrating for them: same model, same calibration rows, same held-out rows.

    python -m benchmarks.qat [--model tinystories|tiny] [--recipes FORM ...] [--steps N ...] [--best EFFORT]
                             [--peer PYTHON] [--held-out] [--json FILE]
    python -m benchmarks.qat --speed ROUNDS [--model ...] [--recipes FORM ...]

A FORM is the end of a preset's name, as w2g32-asym or w4g32-a8. Its `gptq-` preset, by `jq4.quantize_blocks` as a user
runs it, is where training starts, scales and codes; `gptq_kld` is what that gives, and `best_kld`, with `--best`, what
the strongest calibrated preset gives. Then all params and the quantizers are trained by one optimizer to have the
dense model's own predictions. What is measured is what is served: `jq4.quantized` on what `jq4.harden` packed, in
float32, on the evaluation rows, which nothing was fitted to. `--held-out` measures on 15 % of the calibration rows
instead, which it does not learn from then: by it the defaults below were chosen, on TinyStories-656K at 2 bits.

    loss       KL(dense || trained) at every position, no temperature
    batches    of 4 rows: two of text, two with six tokens in ten drawn anew by the dense model (jq4.tuning.perturb)
    optimizer  Adam, b2 of 0.99, a rate of 4e-3 for params and quantizers alike that falls along a cosine
    margin     0.5 (jq4.train.lsq)

`--peer` runs torchao's fake quantization in a Python that holds it, on the same batches, with the same optimizer and
loss (benchmarks.peer_qat). `--speed` times a step of training (8 rows, next-token loss, gradients and Adam),
fake-quantized and dense by turns, and gives the ratio of the medians.
"""

import argparse
import dataclasses
import json
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import jq4
from benchmarks.best import ROOT, open_rows
from benchmarks.provenance import publish
from jq4.chain import TreeSource
from jq4.divergence import divergence
from jq4.driver import quantize_blocks
from jq4.evaluate import evaluate
from jq4.tuning.descent import draw_batches, split_rows
from jq4.tuning.perturb import perturb
from models.chain import LAYERS, decoder_chain
from models.decoder import Decoder
from models.hf import load_config, load_params

FORMS = ("w2g32", "w2g32-asym", "w3g32", "w4g32-a8", "w4g32-a4")
SHARE, SEED, B2, HELD_OUT = 0.6, 0, 0.99, 0.15
FIGURES = ("kld_mean", "kld_p99", "perplexity", "reference_perplexity", "top1_agreement")


@dataclasses.dataclass(frozen=True)
class Bench:
    """The model, and rows of its text."""

    folder: Path
    model: Any
    params: Any
    calibration: np.ndarray
    evaluation: np.ndarray

    @classmethod
    def open(cls, name: str, held_out: bool) -> "Bench":
        with tempfile.TemporaryDirectory() as work:
            folder, *files = open_rows(name, Path(work))
            rows, evaluation = (np.load(file).astype(np.int32) for file in files)
        config = load_config(folder)
        params = {"params": load_params(folder, config, dtype=np.float32)}
        if held_out:
            learned, judges = split_rows(len(rows), HELD_OUT)
            rows, evaluation = rows[learned], rows[judges]
        return cls(folder, Decoder(config), params, rows, evaluation)

    def calibrated(self, recipe: str, effort: str = "default") -> tuple[Any, float]:
        """The packed tree of a preset, and its bits a weight."""
        chain, source = decoder_chain(self.model.config), TreeSource(self.params["params"], LAYERS)
        found = quantize_blocks(chain, source, recipe, self.calibration, effort=effort)
        weights = sum(int(np.prod(leaf.shape or ())) for leaf in found.report.packed)
        return {"params": found.params}, 8 * sum(leaf.nbytes for leaf in found.report.packed) / weights

    def measure(self, packed: Any) -> dict[str, float]:
        """Of a packed tree, served, against the dense model."""
        dense, served = jax.jit(self.model.apply), jax.jit(jq4.quantized(self.model.apply, strict=True))
        found = evaluate(
            lambda tokens: served(packed, tokens),
            self.evaluation,
            reference=lambda tokens: dense(self.params, tokens),
            batch_size=14,
        )
        return {name: float(getattr(found, name)) for name in FIGURES}

    def batches(self, steps: int, size: int) -> np.ndarray:
        """i32[steps, size, T]: text in one half of each batch, made rows in the other."""
        half = size // 2
        made = perturb(self.model.apply, self.params, self.calibration, steps * half, SHARE, SEED)
        text = draw_batches(np.arange(len(self.calibration)), steps, size - half, SEED)
        return np.concatenate([self.calibration[text], made.reshape(steps, half, -1)], axis=1)


def train(
    bench: Bench, recipe: jq4.Recipe, start: Any, batches: np.ndarray, options: argparse.Namespace
) -> tuple[Any, float, list[float]]:
    """(params, quantizers) after the steps, the seconds that they took without compiling, and the losses."""
    pair = (
        jq4.move_to_codes(bench.params, start),
        jq4.quantizers(bench.params, recipe, start=start, margin=options.margin),
    )
    forward = jq4.fake_quantized(bench.model.apply, recipe, strict=True)
    optimizer = optax.adam(optax.cosine_decay_schedule(options.rate, len(batches)), b2=B2)

    @jax.jit
    def step(pair: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        teacher = bench.model.apply(bench.params, tokens)
        loss, gradient = jax.value_and_grad(lambda pair: jnp.mean(divergence(forward(pair, tokens), teacher)))(pair)
        updates, state = optimizer.update(gradient, state, pair)
        return optax.apply_updates(pair, updates), state, loss

    state = optimizer.init(pair)
    jax.block_until_ready(step(pair, state, batches[0]))
    begun, losses = time.perf_counter(), []
    for tokens in batches:
        pair, state, loss = step(pair, state, tokens)
        losses.append(float(loss))
    return pair, time.perf_counter() - begun, losses


def quality(bench: Bench, form: str, options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """A row for each number of steps."""
    start, bits = bench.calibrated(f"gptq-{form}")
    calibrated = {"gptq_kld": bench.measure(start)["kld_mean"]}
    if options.best:
        packed, _ = bench.calibrated(f"best-{form}", options.best)
        calibrated["best_kld"] = bench.measure(packed)["kld_mean"]
    console.print(f"{form}: {told(calibrated)}", highlight=False)
    recipe, rows = jq4.Recipe.preset(f"gptq-{form}"), []
    for steps in options.steps:
        batches = bench.batches(steps, options.batch)
        pair, seconds, losses = train(bench, recipe, start, batches, options)
        found = bench.measure(jq4.harden(*pair, recipe))
        console.print(
            f"{form}: kld {found['kld_mean']:.4f} after {steps} steps in {seconds:.0f} s, "
            f"the last losses {np.mean(losses[-25:]):.4f}",
            highlight=False,
        )
        shares = {f"share_of_{name}": found["kld_mean"] / kld for name, kld in calibrated.items()}
        settings = {name: getattr(options, name) for name in ("batch", "rate", "margin")}
        row = {"form": form, "bits_per_weight": bits, "steps": steps, **settings, "seconds": seconds}
        rows.append(row | calibrated | shares | found)
        if options.peer:
            rows[-1]["torchao"] = peers(bench, form, batches, options, console)
    return rows


def peers(
    bench: Bench, form: str, batches: np.ndarray, options: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """torchao on the same batches: scales found anew and learned, by each of the peer's rates."""
    found = re.fullmatch(r"w(\d)g(\d+)(-asym)?(?:-a(\d))?", form)
    assert found is not None
    words = ["--bits", found[1], "--group", found[2], *(["--asym"] if found[3] else [])]
    words += ["--inputs", found[4]] if found[4] else []
    rows = []
    with tempfile.TemporaryDirectory() as work:
        data, out = Path(work) / "batches.npz", Path(work) / "out.json"
        np.savez(data, batches=batches, evaluation=bench.evaluation)
        for extra in [*options.peer_options]:
            command = [options.peer, "-m", "benchmarks.peer_qat", bench.folder, data, out, *words, "--b2", B2]
            subprocess.run([*map(str, command), *extra.split()], cwd=ROOT, check=True, capture_output=True)
            rows.append({"options": extra, **json.loads(out.read_text())})
            console.print(f"{form}: torchao {extra}: kld {rows[-1]['kld_mean']:.4f}", highlight=False)
    return rows


def speed(bench: Bench, form: str, rounds: int) -> dict[str, Any]:
    """Seconds of a step, dense and fake-quantized by turns."""
    recipe = jq4.Recipe.preset(f"rtn-{form}")
    forward = jq4.fake_quantized(bench.model.apply, recipe, strict=True)
    optimizer = optax.adam(1e-4)
    tokens = jnp.asarray(bench.calibration[:8])

    def stepper(apply: Any) -> Any:
        def loss(tree: Any) -> jax.Array:
            logits = apply(tree, tokens[:, :-1])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

        @jax.jit
        def step(tree: Any, state: Any) -> tuple[Any, Any]:
            updates, state = optimizer.update(jax.grad(loss)(tree), state, tree)
            return optax.apply_updates(tree, updates), state

        return step

    trees = {
        "dense": (stepper(bench.model.apply), bench.params),
        "straight_through": (stepper(forward), bench.params),
        "learned": (stepper(forward), (bench.params, jq4.quantizers(bench.params, recipe))),
    }
    states = {key: (tree, optimizer.init(tree)) for key, (_, tree) in trees.items()}
    times: dict[str, list[float]] = {key: [] for key in trees}
    for _ in range(rounds + 1):
        for key, (step, _) in trees.items():
            begun = time.perf_counter()
            states[key] = jax.block_until_ready(step(*states[key]))
            times[key].append(time.perf_counter() - begun)
    medians = {key: statistics.median(each[1:]) for key, each in times.items()}
    ratios = {f"{key}_ratio": medians[key] / medians["dense"] for key in ("straight_through", "learned")}
    return {"form": form, "seconds": medians, **ratios}


def told(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tinystories", "tiny"), default="tinystories")
    parser.add_argument("--recipes", nargs="+", default=list(FORMS), metavar="FORM")
    parser.add_argument("--steps", nargs="+", type=int, default=[400])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--margin", type=float, default=0.5)
    parser.add_argument("--best", choices=("light", "default", "best"), metavar="EFFORT")
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--peer-options", nargs="+", default=["--rate 4e-3", "--rate 4e-3 --learned"], metavar="WORDS")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--speed", type=int, default=0, metavar="ROUNDS")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console, bench, rows = Console(), Bench.open(options.model, options.held_out), []
    for form in options.recipes:
        if options.speed:
            rows.append(speed(bench, form, options.speed))
            ratios = {name: rows[-1][f"{name}_ratio"] for name in ("straight_through", "learned")}
            console.print(f"{form}: {told(ratios)} of the dense step", highlight=False)
        else:
            rows += quality(bench, form, options, console)
        if options.json:  # form by form: all of them take long on a busy machine
            publish(options.json, "qat", {"model": bench.folder.name, "rows": rows})


if __name__ == "__main__":
    main()
