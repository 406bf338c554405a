"""Train the bundled model, `models/tiny`: a small Llama that has read Python's own documentation.

    python -m benchmarks.train_tiny --steps 1180                 # train, then write models/tiny
    python -m benchmarks.train_tiny --steps 1180 --resume        # go on after a stop
    python -m benchmarks.train_tiny --steps 1180 --export-only   # write the folder from the last checkpoint

Objective: the next token's cross-entropy over random crops of the training part (`tiny_corpus`), in f32, by Muon
(Jordan et al. 2024; sized as in Liu et al. 2025), which came to the same loss in fewer steps than AdamW. The text is
short, so it is read six times over: dropout on both residual branches (Srivastava et al. 2014) slows its learning
it by heart; the decoder knows nothing of it, a Flax interceptor adds it. The learning rate warms up, stays,
and falls to zero over the last part of the run (warmup-stable-decay, Hu et al. 2024). Until the fall begins a run
does not depend on its length: `--resume` with another `--steps` gives what that number would have given from the
start, on a machine whose speed is not known beforehand. Each step's crops and dropout come from (seed, step), so that
a resumed run is the same run.

XLA takes and frees its buffers at every step. With glibc, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 in the
environment keeps them from going back to the system each time, which otherwise takes about a quarter of the
processor time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from benchmarks import tiny_corpus, tiny_export
from models.config import DecoderConfig
from models.decoder import Decoder

REPOSITORY = Path(__file__).parents[1]
Params = Any


@dataclass(frozen=True)
class Text:
    """The corpus in tokens: `training` is one i32[T] stream, `held_out` is i32[R, context]."""

    corpus: tiny_corpus.Corpus
    tokenizer: Tokenizer
    training: np.ndarray
    held_out: np.ndarray
    sha256: str


def read_text(vocab_size: int, context: int) -> Text:
    """Gather the corpus, train the tokenizer on its training part, and encode both parts."""
    corpus = tiny_corpus.gather_corpus()
    tokenizer = tiny_corpus.train_tokenizer(corpus.training, vocab_size)
    joined = tiny_corpus.join_documents(corpus.training)
    held_out = tiny_corpus.encode(tokenizer, tiny_corpus.join_documents(corpus.held_out))
    return Text(
        corpus,
        tokenizer,
        tiny_corpus.encode(tokenizer, joined),
        tiny_corpus.rows_of(held_out, context),
        hashlib.sha256(joined.encode()).hexdigest(),
    )


def initial_params(model: Decoder, seed: int, layers: int) -> Params:
    """Normal(0, 0.02), the projections back into the residual stream by 1/sqrt(2 layers), norms at one (GPT-2)."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    paths, treedef = jax.tree_util.tree_flatten_with_path(nn.unbox(shapes))
    leaves = []
    for number, (path, shape) in enumerate(paths):
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            leaves.append(jnp.ones(shape.shape, jnp.float32))
            continue
        deviation = 0.02 / np.sqrt(2 * layers) if "o_proj" in name or "down_proj" in name else 0.02
        key = jax.random.fold_in(jax.random.key(seed), number)
        leaves.append(jax.random.normal(key, shape.shape, jnp.float32) * jnp.float32(deviation))
    return jax.tree.unflatten(treedef, leaves)


def training_interceptor(key: jax.Array, rate: float) -> Callable[..., Any]:
    """What training adds to the decoder: dropout on what the attention and the MLP add to the residual stream.

    Scanned layers share one trace, hence one key; folding an activation's bits into it gives each its own mask.
    Dense layers are given rows x[B * T, K]: XLA's CPU compiler then takes the weights' gradients a fifth faster.
    """

    def intercept(next_method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            x = args[0]  # f32[B, T, K]
            return next_method(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        result = next_method(*args, **kwargs)
        if context.method_name != "__call__" or context.module.name not in ("attention", "mlp"):
            return result
        branch, *rest = result if isinstance(result, tuple) else (result,)
        bits = jax.lax.bitcast_convert_type(branch[0, -1, 0], jnp.uint32)
        keep = jax.random.bernoulli(jax.random.fold_in(key, bits), 1.0 - rate, branch.shape)
        branch = jnp.where(keep, branch / jnp.float32(1.0 - rate), jnp.float32(0))
        return (branch, *rest) if isinstance(result, tuple) else branch

    return intercept


def make_optimizer(weight_decay: float) -> optax.GradientTransformation:
    """Muon for the layers' matrices [L, K, N], each on its own; Adam for the embedding and the norms. Unit rate."""

    def how(path: Any, _: Any) -> optax.contrib.MuonDimensionNumbers | None:
        is_matrix = "kernel" in jax.tree_util.keystr(path)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if is_matrix else None

    return optax.contrib.muon(
        1.0,
        weight_decay=weight_decay,
        consistent_rms=0.2,  # the size of Adam's updates, so that one learning rate serves both
        muon_weight_dimension_numbers=partial(jax.tree_util.tree_map_with_path, how),
    )


def make_step(model: Decoder, optimizer: optax.GradientTransformation, dropout: float, seed: int):
    """The jitted step: (params, state, tokens i32[B, T + 1], learning rate, step) -> (params, state, loss)."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, tokens: jax.Array, learning_rate: jax.Array, number: jax.Array):
        key = jax.random.fold_in(jax.random.key(seed, impl="unsafe_rbg"), number)

        def loss_of(params: Params) -> jax.Array:
            with nn.intercept_methods(training_interceptor(key, dropout)):
                logits: Any = model.apply({"params": params}, tokens[:, :-1])  # f32[B, T, V]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.map(lambda p, u: p + learning_rate * u, params, updates), state, loss

    return step


def learning_rate_at(step: int, options: argparse.Namespace) -> float:
    """Linear warmup, a plateau, and a linear fall to zero over the last `--decay` of the steps."""
    warm = min(1.0, (step + 1) / options.warmup)
    fall = min(1.0, (options.steps - step) / (options.decay * options.steps))
    return options.learning_rate * warm * fall


def crops(text: np.ndarray, options: argparse.Namespace, step: int) -> np.ndarray:
    """Random crops of the training stream for one step, i32[B, context + 1]."""
    generator = np.random.default_rng((options.seed, step))
    starts = generator.integers(0, len(text) - options.context - 1, options.batch)
    return text[starts[:, None] + np.arange(options.context + 1)]


def save_checkpoint(path: Path, tree: Any, about: dict[str, Any]) -> None:
    """Write the leaves in tree order beside `about`, under a temporary name and then in one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path, template: Any, corpus_sha256: str) -> tuple[Any, dict[str, Any]]:
    """The inverse of `save_checkpoint`; refuses a checkpoint trained on another text."""
    with np.load(path) as file:
        about = json.loads(file["about"].tobytes())
        if about["corpus_sha256"] != corpus_sha256:
            raise SystemExit(f"{path} was trained on another text (another Python?): start without --resume")
        leaves = [jnp.asarray(file[f"leaf_{i}"]) for i in range(len(jax.tree.leaves(template)))]
    return jax.tree.unflatten(jax.tree.structure(template), leaves), about


class Training:
    """One run: its text, model, state and the files it writes."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.text = read_text(options.vocab, options.context)
        self.config = DecoderConfig.from_hf(tiny_export.hf_config(options))
        self.model = Decoder(self.config)
        self.params = initial_params(self.model, options.seed, options.layers)
        self.optimizer = make_optimizer(options.weight_decay)
        self.state = self.optimizer.init(self.params)
        self.about: dict[str, Any] = {"step": 0, "seconds": 0.0, "corpus_sha256": self.text.sha256}
        self.checkpoint = Path(options.work) / "checkpoint.npz"
        self.stopped = False

    def resume(self) -> None:
        tree, self.about = load_checkpoint(self.checkpoint, (self.params, self.state), self.text.sha256)
        self.params, self.state = tree

    def save(self) -> None:
        save_checkpoint(self.checkpoint, (self.params, self.state), self.about)

    def log(self, **row: Any) -> None:
        with (Path(self.options.work) / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def perplexity(self, rows: np.ndarray) -> float:
        return tiny_export.perplexity(self.model, tiny_export.rounded_to_bf16(self.params), rows)

    def run(self) -> None:
        """Train from where the state stands to the last step, or to a SIGTERM or Ctrl-C."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        step = make_step(self.model, self.optimizer, self.options.dropout, self.options.seed)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            task = progress.add_task("training", total=self.options.steps, completed=self.about["step"])
            losses: list[jax.Array] = []
            mark = time.monotonic()
            while self.about["step"] < self.options.steps and not self.stopped:
                number = self.about["step"]
                rate = jnp.float32(learning_rate_at(number, self.options))
                tokens = jnp.asarray(crops(self.text.training, self.options, number))
                self.params, self.state, loss = step(self.params, self.state, tokens, rate, jnp.uint32(number))
                losses.append(loss)
                self.about["step"] = number + 1
                if self.about["step"] % self.options.report_every == 0:
                    mark = self._report(losses, mark, float(rate))
                    progress.update(task, completed=number + 1, description=f"loss {float(loss):.3f}")
            self._report(losses, mark, learning_rate_at(self.about["step"], self.options))

    def _stop(self, *_: object) -> None:
        self.stopped = True

    def _report(self, losses: list[jax.Array], mark: float, rate: float) -> float:
        """One line of metrics and a checkpoint; returns the new time mark. Empties `losses`."""
        if not losses:
            return mark
        loss = float(jnp.mean(jnp.stack(losses)))
        elapsed = time.monotonic() - mark
        self.about["seconds"] += elapsed
        per_step = self.options.batch * self.options.context
        row = {"step": self.about["step"], "loss": loss, "learning_rate": rate, "seconds": self.about["seconds"]}
        row["tokens_per_second"] = len(losses) * per_step / elapsed
        if self.about["step"] % (4 * self.options.report_every) == 0:
            row["held_out_perplexity"] = self.perplexity(self.text.held_out[::4])
        self.log(**row)
        self.save()
        losses.clear()
        return time.monotonic()


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, required=True, help="length of the whole run")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --work")
    parser.add_argument("--export-only", action="store_true", help="write the folder from the last checkpoint")
    parser.add_argument("--work", default="tiny_training", help="folder of the checkpoint and of metrics.jsonl")
    parser.add_argument("--out", default=str(REPOSITORY / "models" / "tiny"), help="folder of the trained model")
    parser.add_argument("--seed", type=int, default=0)
    for name, value in {"vocab": 4096, "context": 256, "width": 256, "layers": 3, "heads": 4, "kv-heads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ffn", type=int, default=768, help="width of the MLP")
    parser.add_argument("--batch", type=int, default=16, help="crops of --context tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--decay", type=float, default=0.35, help="fraction of the steps in which the rate falls to 0")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--report-every", type=int, default=50, help="steps between metrics, and checkpoints")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    Path(options.work).mkdir(parents=True, exist_ok=True)
    training = Training(options)
    if options.resume or options.export_only:
        training.resume()
    if not options.export_only:
        training.run()
    if not training.stopped:
        text = training.text
        tiny_export.export(
            Path(options.out), training.model, training.params, options, training.about, text.corpus, text.tokenizer
        )


if __name__ == "__main__":
    main()
