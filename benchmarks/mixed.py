"""Mixed precision against one format for all, at equal average bits, chosen on calibration rows alone.

    python -m benchmarks.mixed [--bits 4.5] [--method hqq gptq ...] [--json FILE]

On TinyStories-656K. `ranks`: how well each weighting (jq4.sensitivity) tells, without a trial, the KLD of single leaves
in single formats; methods and weightings see every other calibration row, the KLD is measured on the rows between.
Spearman's correlation is of all (leaf, format) pairs, and within a format over its leaves (the mean over formats),
which is what a choice between leaves goes by; `predicted_over_measured` is told where both are KLDs.

`rows`, by the command line as a user would: `jq4 mixed` chooses on calibration_ids.npy, by trials or by a weighting
alone, `jq4 quantize` makes the mix and the uniform METHOD-w4g32 (4.5 bits a weight), `jq4 eval` measures them on
evaluation_ids.npy, which nothing was chosen on. `predicted` is the sum of the leaves' own losses and `on_calibration`
the mix's measured one, both on calibration rows that no method was fitted to: how nearly losses add up.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jq4
from benchmarks.provenance import publish
from jq4.fisher import fisher_diagonal, fisher_loss
from jq4.paths import flatten_with_paths
from jq4.sensitivity import FISHER, HESSIAN, packed_leaf, sensitivity
from models.decoder import Decoder
from models.hf import load_config, load_params

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT.parent / "shared" / "data" / "tinystories-656k"
UNIFORM = "w4g32"
FORMATS = ("w3g32", "w4g128", UNIFORM, "w4g32-asym")
CHOOSERS = {  # how `jq4 mixed` is told to find losses
    "trials": ["--trials", "all"],
    FISHER: ["--trials", "none", "--weighting", FISHER],
    HESSIAN: ["--trials", "none", "--weighting", HESSIAN],
}


def formats_of(method: str) -> list[str]:
    return [*(f"{method}-{each}" for each in FORMATS), "rtn-w8gc"]


def ranks(method: str) -> dict[str, Any]:
    """How estimates of one leaf's loss agree with its measured KLD, over leaves and formats."""
    config = load_config(MODEL)
    model, params = Decoder(config), load_params(MODEL, config)
    rows = np.load(MODEL / "calibration_ids.npy")
    fitted, held_out = rows[::2], rows[1::2]

    def logits(tree: Any, tokens: jax.Array) -> Any:
        return model.apply({"params": tree}, tokens)

    batches = (fitted[i : i + 8] for i in range(0, len(fitted), 8))
    stats = jq4.observe(logits, params, batches, collect=("mean_square", "hessian", "absmax", "mean"))
    found = sensitivity(logits, params, formats_of(method), held_out, stats)
    weights = dict(flatten_with_paths(params))
    fisher = fisher_diagonal(logits, params, fitted, [leaf.path for leaf in found.leaves])

    def predicted(path: str, option: Any) -> float:
        packed = packed_leaf(path, option.rule, params, stats)
        return fisher_loss(weights[path], packed, fisher[path], stats[path], axis=packed.axis)

    shape = (len(found.leaves), len(found.leaves[0].options))
    every = [(leaf.path, option) for leaf in found.leaves for option in leaf.options]
    measured = np.asarray([option.kld for _, option in every]).reshape(shape)
    estimates = {
        HESSIAN: np.asarray([option.output_error for _, option in every]).reshape(shape),
        FISHER: np.asarray([predicted(path, option) for path, option in every]).reshape(shape),
    }
    told: dict[str, Any] = {name: agreement(each, measured) for name, each in estimates.items()}
    ratio = estimates[FISHER] / measured
    told[FISHER]["predicted_over_measured"] = [float(np.quantile(ratio, q)) for q in (0, 0.5, 1)]
    return {"method": method, "pairs": measured.size, **told}


def agreement(estimate: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Correlations of f64[leaves, formats] with f64[leaves, formats]."""
    within = [spearman(*columns) for columns in zip(estimate.T, measured.T, strict=True)]
    logarithms = np.corrcoef(np.log(estimate).ravel(), np.log(measured).ravel())
    return {
        "spearman": spearman(estimate.ravel(), measured.ravel()),
        "spearman_within_formats": float(np.mean(within)),
        "pearson": float(np.corrcoef(estimate.ravel(), measured.ravel())[0, 1]),
        "pearson_of_logarithms": float(logarithms[0, 1]),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Of values without ties."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def run(*command: str | Path) -> Any:
    words = [sys.executable, "-m", "jq4", *map(str, command), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def measure(recipe: str | Path, packed: Path) -> dict[str, Any]:
    """Figures of a recipe on the evaluation rows."""
    run("quantize", MODEL, packed, "--recipe", recipe, "--calibration", MODEL / "calibration_ids.npy")
    found = run("eval", packed, "--ids", MODEL / "evaluation_ids.npy", "--reference", MODEL)
    names = ("kld_mean", "kld_mean_standard_error", "kld_p99", "perplexity", "top1_agreement")
    return {"bits": found["bits_per_weight_packed"], **{name: found[name] for name in names}}


def compare(method: str, bits: float, choosers: Sequence[str], work: Path) -> list[dict[str, Any]]:
    """The rows of the mixes, and of the uniform format."""
    formats = ",".join(formats_of(method))
    name = f"{method}-{UNIFORM}"
    rows = [{"formats": name, **measure(name, work / name)}]
    for by in choosers:
        recipe = work / f"{method}-{by}.yaml"
        given = ["--bits", str(bits), "--calibration", MODEL / "calibration_ids.npy", "--formats", formats]
        chosen = run("mixed", MODEL, *given, *CHOOSERS[by], "--out", recipe)
        mix = {name: chosen["mix"][name] for name in ("chosen", "predicted", "gap")}
        mix |= {"on_calibration": chosen["mix"]["measured"], "seconds": chosen["seconds"]}
        rows.append({"formats": f"mix of {formats}", "by": by, **measure(recipe, work / f"{method}-{by}"), **mix})
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table()
    for heading in ("formats", "by", "bits", "KLD", "±", "p99", "perplexity", "top-1", "predicted", "on calibration"):
        table.add_column(heading, justify="left" if heading in ("formats", "by") else "right")
    for row in rows:
        more = [f"{row[key]:.4f}" if key in row else "" for key in ("predicted", "on_calibration")]
        table.add_row(
            row["formats"],
            row.get("by", ""),
            f"{row['bits']:.3f}",
            f"{row['kld_mean']:.4f}",
            f"{row['kld_mean_standard_error']:.4f}",
            f"{row['kld_p99']:.3f}",
            f"{row['perplexity']:.2f}",
            f"{row['top1_agreement']:.3f}",
            *more,
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, default=4.5)
    parser.add_argument("--method", nargs="+", default=["hqq", "gptq"])
    parser.add_argument("--by", nargs="*", choices=CHOOSERS, default=list(CHOOSERS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    told = [ranks(method) for method in arguments.method]
    console.print_json(data=told)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows = [row for method in arguments.method for row in compare(method, arguments.bits, arguments.by, place)]
    show(rows, console)
    if arguments.json:
        publish(arguments.json, "mixed", {"ranks": told, "rows": rows})


if __name__ == "__main__":
    main()
