"""Training with few bits against calibrating for them: same model, same calibration rows, same held-out rows.

    python -m benchmarks.qat [--model tinystories|tiny] [--recipes FORM ...] [--steps N ...] [--best EFFORT]
                             [--from-best] [--peer PYTHON] [--held-out] [--json FILE]
    python -m benchmarks.qat --speed ROUNDS [--model ...] [--recipes FORM ...]

A FORM is the end of a preset's name, as w2g32-asym or w4g32-a8. Its `gptq-` preset, by `jq4.quantize_blocks` as a user
runs it, is where training starts, scales and codes, and the first row; with `--best` the strongest calibrated preset
is the next, and with `--from-best` the start. Then all params and the quantizers are trained by one optimizer to have
the dense model's own predictions. What is measured is what is served: `jq4.quantized` on what `jq4.harden` packed, in
float32, on the evaluation rows, which nothing was fitted to. `--held-out` measures on 15 % of the calibration rows
instead, which it does not learn from then.

    loss       KL(dense || trained) at every position, no temperature
    batches    of 8 rows: four of text, four with six tokens in ten drawn anew by the dense model (jq4.tuning.perturb)
    start      jq4.train.begin_at
    optimizer  that of `jq4 train`: Adam relative to its leaves, a rate for the bits and the start, warmed up, falling
               along a cosine
    margin     0.5 (jq4.train.lsq)

What was tried at 2 bits, w2g32, KLD 0.496 as calibrated, by plain Adam at 3e-3, which is much the same there (the
middles of codes, text written from nothing and Muon by scripts that are not kept):

    400 steps of 2 rows   0.351; earlier, from another start: 0.348 at twice the rate; 0.378 where the quantizers' rate
                          is four times the params', 0.340 against 0.340 at a quarter of it; 0.344 from the dense
                          weights under the calibrated scales; 0.341 by made rows alone
    400 steps of 8 rows   0.302; 0.304 by two rows of text and six of which three tokens in ten are drawn anew;
                          0.391 by text that the dense model wrote from nothing, which is unlike the text judged by
    200 steps of 8 rows   0.381 where weights begin in the middle of what rounds to their codes, and not at its edge:
                          the first losses are much lower (0.43, not 0.54), the last ones are not
    the same, evaluation  0.328; kernels by Muon 0.371 (its rate 3e-3 where an update's rms is .2) and 0.385 (1.5e-2)

By the optimizer of `jq4 train`, from best-w2g32 (light, 0.378), evaluation (but for the first two, by a script that is
not kept):

    steps                 0.317 in 200, 0.257 in 3,200 (their loss at the end 0.279 and 0.201)
    zero points           from 0.344: 0.293 in 200, 0.296 in 800
    rate                  400 steps: 0.288 at 5e-3 (their loss at the end 0.242), 0.299 at 2e-2 (0.236): the 97 rows are
                          learned better, and others worse
    rounded by degrees    w + a (Q(w) - w) of the dense weights, a from 0 to 1: over the first half of 200 steps 0.334,
                          over four fifths 0.372, as 1 - (1 - t)^3 0.331, and at 2e-3 0.404

At 4 bits plain Adam and edges did harm: w4g32-a8 went from 0.025 to 0.028 at 1e-3 (results/qat-held-out.json), and at
2e-4 to 0.039 with the weights held still (a script that is not kept): the least change of a step throws weights at an
edge back to other codes. From the middles, by rates relative to leaves, it comes to 0.0235 at 7e-4 and 0.0241 at 2e-4
in 60 steps of 8 rows (held out).

`--peer` runs torchao's fake quantization in a Python that holds it, on the same batches, with the same optimizer and
loss (benchmarks.peer_qat); `--peer-options "--rate X"` gives it a rate of its own. `--speed` times a step of training
(8 rows, next-token loss, gradients and Adam), fake-quantized and dense by turns, and gives the ratio of the medians.
"""

import argparse
import dataclasses
import functools
import json
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
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
from benchmarks.served import Served
from jq4.chain import TreeSource
from jq4.divergence import divergence
from jq4.driver import quantize_blocks
from jq4.qarray import is_qarray
from jq4.train import begin_at
from jq4.train.running.optimizer import OptimizerOptions, make_optimizer, rate_for
from jq4.tuning.descent import draw_batches, split_rows
from jq4.tuning.perturb import perturb
from models.chain import LAYERS, decoder_chain
from models.decoder import Decoder
from models.hf import load_config, load_params

FORMS = ("w2g32", "w2g32-asym", "w3g32", "w4g32-a8", "w4g32-a4-asym")
SHARE, SEED, HELD_OUT, WARMUP = 0.6, 0, 0.15, 20  # a twentieth of the steps
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
        """The packed tree of a preset, and the seconds that it took."""
        begun = time.perf_counter()
        chain, source = decoder_chain(self.model.config), TreeSource(self.params["params"], LAYERS)
        packed = {"params": quantize_blocks(chain, source, recipe, self.calibration, effort=effort).params}
        return packed, time.perf_counter() - begun

    def bits(self, form: str) -> float:
        """A packed weight's, scales and zero points included."""
        packed = filter(is_qarray, jax.tree.leaves(jq4.quantize(self.params, f"rtn-{form}"), is_leaf=is_qarray))
        sizes = [(leaf.nbytes, leaf.size) for leaf in packed]
        return 8 * sum(held for held, _ in sizes) / sum(size for _, size in sizes)

    def measure(self, packed: Any) -> dict[str, float]:
        """Of a packed tree, served, against the dense model."""
        return self.served.figures(packed, self.evaluation, FIGURES)

    @functools.cached_property
    def served(self) -> Served:
        return Served(self.model, self.params)

    def batches(self, steps: int, size: int) -> np.ndarray:
        """i32[steps, size, T]: text in one half of each batch, made rows in the other."""
        half = size // 2
        made = perturb(self.model.apply, self.params, self.calibration, steps * half, SHARE, SEED)
        text = draw_batches(np.arange(len(self.calibration)), steps, size - half, SEED)
        return np.concatenate([self.calibration[text], made.reshape(steps, half, -1)], axis=1)


def train(
    bench: Bench, recipe: jq4.Recipe, start: Any, batches: np.ndarray, rate: float, margin: float
) -> tuple[Any, float, list[float]]:
    """(params, quantizers) after the steps, the seconds that they took without compiling, and the losses."""
    pair: Any = begin_at(bench.params, recipe, start, margin=margin)
    forward = jq4.fake_quantized(bench.model.apply, recipe, strict=True)
    optimizer = make_optimizer(OptimizerOptions(rate, warmup=len(batches) // WARMUP), len(batches))

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


def quality(bench: Bench, form: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each method, and number of steps."""
    of_form = {"form": form, "bits_per_weight": bench.bits(form)}
    recipe, start = jq4.Recipe.preset(f"gptq-{form}"), None
    if not options.peers_alone:
        start, seconds = bench.calibrated(f"gptq-{form}")
        yield {"method": "gptq", **of_form, "steps": 0, "seconds": seconds, **bench.measure(start)}
    if options.best:
        packed, seconds = bench.calibrated(f"best-{form}", options.best)
        yield {"method": "best", "effort": options.best, **of_form, "seconds": seconds, **bench.measure(packed)}
        start = packed if options.from_best else start
    rate = options.rate or rate_for(recipe, learned=options.from_best)
    for steps in options.steps:
        batches = bench.batches(steps, options.batch)
        settings = {"steps": steps, "batch": options.batch}
        if start is not None:
            pair, seconds, losses = train(bench, recipe, start, batches, rate, options.margin)
            mine = {"rate": rate, "margin": options.margin, "last_losses": float(np.mean(losses[-25:]))}
            mine |= {"start": "best"} if options.from_best else {}
            figures = bench.measure(jq4.harden(*pair, recipe))
            yield {"method": "jq4", **of_form, **settings, **mine, "seconds": seconds, **figures}
        for words in options.peer_options if options.peer else ():
            found = peer(bench, form, batches, f"--rate {rate} {words}", options)
            yield {"method": f"torchao {words}".rstrip(), **of_form, **settings, **found}


def peer(bench: Bench, form: str, batches: np.ndarray, words: str, options: argparse.Namespace) -> dict[str, Any]:
    """What torchao makes of the same batches; the last word of an option counts, so that `--rate` may be given."""
    found = re.fullmatch(r"w(\d)g(\d+)(-asym)?(?:-a(\d)(?:-asym)?)?", form)  # its inputs always have zero points
    assert found is not None
    more = ["--bits", found[1], "--group", found[2], *(["--asym"] if found[3] else [])]
    more += ["--inputs", found[4]] if found[4] else []
    with tempfile.TemporaryDirectory() as work:
        data, out = Path(work) / "batches.npz", Path(work) / "out.json"
        np.savez(data, batches=batches, evaluation=bench.evaluation)
        command = [options.peer, "-m", "benchmarks.peer_qat", bench.folder, data, out, *more]
        done = subprocess.run(
            [*map(str, command), *words.split()], cwd=ROOT, check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr[-3000:]}")
        return json.loads(out.read_text())


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


def keep(rows: list[dict[str, Any]], bench: Bench, options: argparse.Namespace) -> None:
    if options.json:
        publish(
            options.json, "qat", {"model": bench.folder.name, "held_out_calibration": options.held_out, "rows": rows}
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tinystories", "tiny"), default="tinystories")
    parser.add_argument("--recipes", nargs="+", default=list(FORMS), metavar="FORM")
    parser.add_argument("--steps", nargs="+", type=int, default=[200])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, help="instead of the bits' own")
    parser.add_argument("--margin", type=float, default=0.5)
    parser.add_argument("--best", choices=("light", "default", "best"), metavar="EFFORT")
    parser.add_argument("--from-best", action="store_true", help="training starts from what --best made")
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--peers-alone", action="store_true", help="train nothing of ours")
    parser.add_argument("--peer-options", nargs="+", default=["", "--learned"], metavar="WORDS")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--speed", type=int, default=0, metavar="ROUNDS")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.from_best and (options.peers_alone or not options.best):
        parser.error("--from-best trains ours from what --best EFFORT made: give that, without --peers-alone")
    console, bench, rows = Console(), Bench.open(options.model, options.held_out), []
    for form in options.recipes:
        if options.speed:
            rows.append(speed(bench, form, options.speed))
            ratios = {name: rows[-1][f"{name}_ratio"] for name in ("straight_through", "learned")}
            console.print(f"{form}: {told(ratios)} of the dense step", highlight=False)
            keep(rows, bench, options)
            continue
        for row in quality(bench, form, options):
            steps = f", {row['steps']} steps" if row.get("steps") else ""
            line = f"{form}: {row['method']}{steps}: KLD {row['kld_mean']:.4f} in {row['seconds']:.0f} s"
            console.print(line, highlight=False)
            rows.append(row)
            keep(rows, bench, options)  # row by row: all of them take long on a busy machine


if __name__ == "__main__":
    main()
