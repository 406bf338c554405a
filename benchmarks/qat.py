"""Training with few bits against calibrating for them: same model, same calibration rows, same held-out rows.

    python -m benchmarks.qat [--recipes NAME ...] [--steps N] [--held-out] [--speed] [--json FILE]

TinyStories-656K. A recipe's name is that of a preset of `gptq-*`, whose solution on the calibration rows training
starts from, scales and codes: `ptq_kld` is what that gives, served packed. Then all params and the quantizers are
trained by one optimizer (Adam, a rate that falls along a cosine) to have the dense model's own predictions, on batches
of 8 rows: half of them text, half with six tokens in ten drawn anew by the dense model (jq4.tuning.perturb). What is
measured is what is served: `jq4.quantized` on what `jq4.harden` packed, in float32, on the 97 evaluation rows, which
nothing was fitted to. `--held-out` measures on 14 of the calibration rows instead, which it does not learn from: rates
are to be chosen by it.

`--speed` times a step of training (a batch of 8 rows, next-token loss, gradients and Adam), fake-quantized and dense by
turns, and gives the ratio of the medians.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import jq4
from benchmarks.best import TINYSTORIES
from benchmarks.provenance import publish
from jq4.divergence import divergence
from jq4.evaluate import evaluate
from jq4.tuning.descent import draw_batches, split_rows
from jq4.tuning.perturb import perturb
from models.decoder import Decoder
from models.hf import load_config, load_params

RECIPES = ("gptq-w2g32-asym", "gptq-w2g32", "gptq-w3g32", "gptq-w4g32-a8")
BATCH, SHARE, SEED = 8, 0.6, 0
HELD_OUT = 0.15


@dataclasses.dataclass(frozen=True)
class Bench:
    """The model, and rows of its text."""

    model: Any
    params: Any
    calibration: np.ndarray
    evaluation: np.ndarray

    @classmethod
    def open(cls, held_out: bool) -> "Bench":
        config = load_config(TINYSTORIES)
        params = {"params": load_params(TINYSTORIES, config, dtype=np.float32)}
        rows, evaluation = (
            np.asarray(np.load(TINYSTORIES / f"{name}_ids.npy"), np.int32) for name in ("calibration", "evaluation")
        )
        if held_out:
            learned, judges = split_rows(len(rows), HELD_OUT)
            rows, evaluation = rows[learned], rows[judges]
        return cls(Decoder(config), params, rows, evaluation)

    def kld(self, packed: Any) -> dict[str, float]:
        """Of a packed tree, served, against the dense model."""
        dense, served = jax.jit(self.model.apply), jax.jit(jq4.quantized(self.model.apply, strict=True))
        found = evaluate(
            lambda tokens: served(packed, tokens),
            self.evaluation,
            reference=lambda tokens: dense(self.params, tokens),
            batch_size=25,
        )
        names = ("kld_mean", "kld_p99", "perplexity", "reference_perplexity", "top1_agreement")
        return {name: float(getattr(found, name)) for name in names}


def train(bench: Bench, recipe: jq4.Recipe, start: Any, options: argparse.Namespace, console: Console) -> Any:
    """(params, quantizers) after the steps, and the seconds that they took without compiling."""
    pair = (
        jq4.move_to_codes(bench.params, start),
        jq4.quantizers(bench.params, recipe, start=start, margin=options.margin),
    )
    made = perturb(bench.model.apply, bench.params, bench.calibration, BATCH * options.steps // 4, SHARE, SEED)
    rows = np.concatenate([bench.calibration, made])
    learners = np.concatenate([np.resize(np.arange(len(bench.calibration)), len(made)), np.arange(len(made))])
    learners[len(made) :] += len(bench.calibration)
    forward = jq4.fake_quantized(bench.model.apply, recipe, strict=True)
    optimizer = optax.adam(optax.cosine_decay_schedule(options.rate, options.steps), b2=0.99)

    @jax.jit
    def step(pair: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        teacher = bench.model.apply(bench.params, tokens)
        loss, gradient = jax.value_and_grad(lambda pair: jnp.mean(divergence(forward(pair, tokens), teacher)))(pair)
        updates, state = optimizer.update(gradient, state, pair)
        return optax.apply_updates(pair, updates), state, loss

    state, seconds, losses = optimizer.init(pair), 0.0, []
    for done, indices in enumerate(draw_batches(learners, options.steps, BATCH, SEED), 1):
        begun = time.perf_counter()
        pair, state, loss = jax.block_until_ready(step(pair, state, jnp.asarray(rows[indices])))
        seconds += time.perf_counter() - begun if done > 1 else 0.0
        losses.append(float(loss))
        if done % 25 == 0:
            console.print(f"  {done} steps: {np.mean(losses[-25:]):.4f} nats, {seconds:.0f} s", highlight=False)
    return pair, seconds


def quality(bench: Bench, name: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    recipe = jq4.Recipe.preset(name)
    batches = [jnp.asarray(bench.calibration[i : i + 25]) for i in range(0, len(bench.calibration), 25)]
    stats = jq4.observe(bench.model.apply, bench.params, batches, collect=("hessian",))
    start = jq4.quantize(bench.params, recipe, stats)
    before = bench.kld(start)
    console.print(f"{name}: calibrated {before['kld_mean']:.4f}", highlight=False)
    pair, seconds = train(bench, recipe, start, options, console)
    packed = jq4.harden(*pair, recipe)
    found = bench.kld(packed)
    share = found["kld_mean"] / before["kld_mean"]
    console.print(f"{name}: trained {found['kld_mean']:.4f}, {share:.2f} of calibrated", highlight=False)
    report = jq4.QuantizeReport(measure=False)
    jq4.quantize(bench.params, recipe, stats, report=report)
    weights = sum(int(np.prod(leaf.shape or ())) for leaf in report.packed)
    return {
        "recipe": name,
        "bits_per_weight": 8 * sum(leaf.nbytes for leaf in report.packed) / weights,
        "ptq_kld": before["kld_mean"],
        "share_of_ptq": share,
        **found,
        "steps": options.steps,
        "rate": options.rate,
        "margin": options.margin,
        "seconds": seconds,
    }


def speed(bench: Bench, name: str, rounds: int) -> dict[str, Any]:
    """Seconds of a step, dense and fake-quantized by turns."""
    recipe = jq4.Recipe.preset(name)
    forward = jq4.fake_quantized(bench.model.apply, recipe, strict=True)
    optimizer = optax.adam(1e-4)
    tokens = jnp.asarray(bench.calibration[:BATCH])

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
    return {"recipe": name, "seconds": medians, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--margin", type=float, default=0.5)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--speed", type=int, default=0, metavar="ROUNDS")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console, bench = Console(), Bench.open(options.held_out)
    if options.speed:
        rows = [speed(bench, name.replace("gptq", "rtn"), options.speed) for name in options.recipes]
        for row in rows:
            ratios = f"straight-through {row['straight_through_ratio']:.2f}, learned {row['learned_ratio']:.2f}"
            console.print(f"{row['recipe']}: {ratios} of the dense step", highlight=False)
    else:
        rows = [quality(bench, name, options, console) for name in options.recipes]
    if options.json:
        publish(options.json, "qat", {"model": TINYSTORIES.name, "rows": rows})


if __name__ == "__main__":
    main()
