"""Low-rank adapters on packed bases against the same on the dense base: same data, same seeds, same number of steps.

    python -m benchmarks.qlora [--bases NAME ...] [--steps N] [--seeds N] [--json FILE]

TinyStories-656K is taught Shakespeare: adapters of rank 16 beside its 14 linear layers, next-token loss, Adam at a rate
that falls along a cosine, in float32. A seed says where A begins and which rows come in which order, so that bases see
the same of both. Bases are presets, with `+residual` or `+loftq` for where the adapters begin (jq4.lora, jq4.loftq),
and "dense", which is LoRA. For each base, over its seeds:

    curve      mean training loss of every tenth of the steps, nats a token, averaged over seeds
    held_out   loss on rows that nothing is trained on, before and after
    gap        held-out loss afterwards less the dense base's of the same seed: mean, and its standard error
    noise      standard deviation over seeds of the dense base's own held-out loss

A packed base begins behind the dense one by what quantizing lost; the gap afterwards is what of it is left.
"""

import argparse
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
from models.decoder import Decoder
from models.hf import load_config, load_params
from models.tokenizer import Tokenizer

BASES = ("dense", "nf4-dq", "hqq-w4g32", "nf4-dq+loftq")
RANK, BATCH, LENGTH, RATE, HELD_OUT = 16, 4, 64, 5e-3, 32
TEXT = TINYSTORIES.parent / "tinyshakespeare"


def rows_of_text() -> tuple[np.ndarray, np.ndarray]:
    """(rows to learn from, rows to judge by), i32[*, LENGTH + 1]: the text's first nine tenths, and its last."""
    tokenizer = Tokenizer.from_files(lambda name: (TINYSTORIES / name).read_bytes(), str(TINYSTORIES))
    assert tokenizer is not None
    text = next(TEXT.glob("*.txt")).read_text()
    rows = []
    for part in (text[: len(text) // 10 * 9], text[len(text) // 10 * 9 :]):
        ids = np.asarray(tokenizer.inner.encode(part, add_special_tokens=False).ids, np.int32)
        rows.append(ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1))
    return rows[0], rows[1][np.linspace(0, len(rows[1]) - 1, HELD_OUT).astype(int)]


def begin(base: str, params: Any, seed: int) -> tuple[Any, jq4.Adapters]:
    """(the base, its adapters)."""
    key, (recipe, _, start) = jax.random.key(seed), base.partition("+")
    if recipe == "dense":
        return params, jq4.lora(params, RANK, key=key)
    if start == "loftq":
        return jq4.loftq(params, recipe, RANK, key=key)
    packed = jq4.quantize(params, recipe)
    if start == "residual":
        return packed, jq4.lora(packed, RANK, init="residual", reference=params)
    return packed, jq4.lora(packed, RANK, key=key)


def trainer(model: Decoder, steps: int) -> Any:
    """A compiled (params, adapters, batches i32[steps, BATCH, LENGTH + 1], held out) -> (losses, before, after)."""
    forward = jq4.with_lora(model.apply, strict=True)
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))

    def loss(adapters: Any, params: Any, rows: jax.Array) -> jax.Array:
        logits = forward((params, adapters), rows[:, :-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]))

    @jax.jit
    def run(params: Any, adapters: Any, batches: jax.Array, held_out: jax.Array) -> Any:
        def step(carry: Any, rows: jax.Array) -> Any:
            adapters, state = carry
            value, gradients = jax.value_and_grad(loss)(adapters, params, rows)
            updates, state = optimizer.update(gradients, state, adapters)
            return (optax.apply_updates(adapters, updates), state), value

        (trained, _), losses = jax.lax.scan(step, (adapters, optimizer.init(adapters)), batches)
        return losses, loss(adapters, params, held_out), loss(trained, params, held_out)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=list(BASES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config, console = load_config(TINYSTORIES), Console()
    params = {"params": load_params(TINYSTORIES, config, dtype=np.float32)}
    rows, held_out = rows_of_text()
    found: dict[str, Any] = {}
    for base in options.bases:
        run, begun = trainer(Decoder(config), options.steps), time.perf_counter()
        results = []
        for seed in range(options.seeds):
            order = np.random.default_rng(seed).permutation(len(rows))[: options.steps * BATCH]
            batches = rows[order].reshape(options.steps, BATCH, -1)
            results.append([np.asarray(each) for each in run(*begin(base, params, seed), batches, held_out)])
        losses, before, after = (np.stack(each) for each in zip(*results, strict=True))
        tenths = losses.mean(0).reshape(10, -1).mean(1)
        found[base] = {
            "base": base, "curve": [round(float(each), 4) for each in tenths],
            "held_out_before": round(float(before.mean()), 4), "held_out": [round(float(each), 4) for each in after],
            "seconds": round(time.perf_counter() - begun, 1),
        }  # fmt: skip
        dense = np.asarray(found.get("dense", found[base])["held_out"])
        gap = after - dense
        found[base] |= {"gap": round(float(gap.mean()), 4), "noise": round(float(dense.std(ddof=1)), 4)}
        found[base]["gap_error"] = round(float(gap.std(ddof=1) / len(gap) ** 0.5), 4)
        console.print(found[base], highlight=False)
    if options.json:
        settings = {"rank": RANK, "batch": BATCH, "length": LENGTH, "rate": RATE, "steps": options.steps}
        publish(
            options.json, "qlora", {"model": TINYSTORIES.name, "text": TEXT.name, **settings, "rows": [*found.values()]}
        )


if __name__ == "__main__":
    main()
