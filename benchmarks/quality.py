"""Quality at equal bits: KLD, perplexity and top-1 agreement of recipes on a real Llama, packed, against itself dense.

    python -m benchmarks.quality [--model FOLDER] [--ids FILE.npy] [--recipes NAME ...] [--json FILE]

The default is TinyStories-656K on the rows that the peers were measured on (97 rows of 256 tokens, mean over the
positions 0..254 of each; f32; every linear layer but the embedding and the head). The model runs on packed weights
through `jq4.quantized(strict=True)`. `peer` is the KLD measured there for a peer's RTN
(llm-compressor 0.14) or HQQ (hqq 0.2.8, float zero points). A name may end in `:float16` or `:float32`, for the dtype
of the scales.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jq4
from benchmarks.provenance import publish
from jq4.evaluate import evaluate
from models.decoder import Decoder
from models.hf import load_config, load_params

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinystories-656k"
RECIPES = (
    "rtn-w8gc", "rtn-w4g32", "rtn-w4g32:float16", "rtn-w4g32:float32", "rtn-w4g32-asym", "rtn-w4g128", "rtn-w3g32",
    "nf4-g32", "fp4-g32", "hqq-w4g32", "hqq-w4g32-asym", "hqq-w4g32-asym:float16", "hqq-w4g32-asym:float32",
    "hqq-w4g64-asym", "hqq-w4g128", "hqq-w4g128-asym", "hqq-w4gc-asym", "hqq-w3g32", "hqq-w3g32-asym",
    "hqq-w2g32-asym", "hqq-nf4-g32",
)  # fmt: skip
PEERS = {
    "rtn-w4g32": 0.0813,
    "rtn-w4g32-asym": 0.0528,
    "rtn-w4g128": 0.1230,
    "rtn-w3g32": 0.4876,
    "hqq-w4g32-asym": 0.0498,
    "hqq-w4g128-asym": 0.0859,
    "hqq-w3g32-asym": 0.2392,
}


def recipe_of(name: str) -> jq4.Recipe:
    """The preset, with the scales' dtype that stands after a colon."""
    preset, _, scale_dtype = name.partition(":")
    recipe = jq4.Recipe.preset(preset)
    if not scale_dtype:
        return recipe
    rules = tuple(dataclasses.replace(rule, scale_dtype=scale_dtype) for rule in recipe.rules)
    return dataclasses.replace(recipe, rules=rules, name=name)


def measure(folder: Path, ids: np.ndarray, names: list[str], console: Console) -> list[dict[str, Any]]:
    """One row of figures for each recipe."""
    config = load_config(folder)
    params = {"params": load_params(folder, config, dtype=np.float32)}
    model = Decoder(config)
    dense, packed = jax.jit(model.apply), jax.jit(jq4.quantized(model.apply, strict=True))
    kept: dict[bytes, jax.Array] = {}

    def reference(tokens: jax.Array) -> jax.Array:
        key = np.asarray(tokens).tobytes()
        if key not in kept:
            kept[key] = dense(params, tokens)
        return kept[key]

    rows = []
    for name in names:
        report = jq4.QuantizeReport()
        start = time.perf_counter()
        qparams = jax.block_until_ready(jq4.quantize(params, recipe_of(name), report=report))
        seconds = time.perf_counter() - start
        found = evaluate(lambda tokens, q=qparams: packed(q, tokens), ids, reference=reference, batch_size=25)
        weights = sum(int(np.prod(leaf.shape or ())) for leaf in report.packed)
        rows.append(
            {
                "recipe": name,
                "bits_per_weight": 8 * sum(leaf.nbytes for leaf in report.packed) / weights,
                "kld_mean": found.kld_mean,
                "kld_p99": found.kld_p99,
                "perplexity": found.perplexity,
                "reference_perplexity": found.reference_perplexity,
                "top1_agreement": found.top1_agreement,
                "sqnr_db_mean": float(np.mean([leaf.sqnr_db for leaf in report.packed])),
                "peer_kld": PEERS.get(name),
                "seconds_to_quantize_with_compiling": seconds,
            }
        )
        console.print(f"{name}: KLD {found.kld_mean:.4f}, perplexity {found.perplexity:.2f}", highlight=False)
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=f"dense perplexity {rows[0]['reference_perplexity']:.3f}")
    for heading in ("recipe", "bits", "KLD", "peer", "p99", "perplexity", "top-1", "SQNR dB"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    for row in rows:
        table.add_row(
            row["recipe"],
            f"{row['bits_per_weight']:.3f}",
            f"{row['kld_mean']:.4f}",
            f"{row['peer_kld']:.4f}" if row["peer_kld"] else "",
            f"{row['kld_p99']:.3f}",
            f"{row['perplexity']:.2f}",
            f"{row['top1_agreement']:.3f}",
            f"{row['sqnr_db_mean']:.2f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DATA)
    parser.add_argument("--ids", type=Path, help="integers [rows, context]; the model's evaluation_ids.npy by default")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ids = np.load(arguments.ids or arguments.model / "evaluation_ids.npy")
    console = Console()
    rows = measure(arguments.model, ids, arguments.recipes, console)
    show(rows, console)
    if arguments.json:
        publish(arguments.json, "quality", {"model": arguments.model.name, "rows": rows})


if __name__ == "__main__":
    main()
