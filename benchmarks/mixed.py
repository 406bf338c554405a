"""Mixed precision against one format for all, at equal average bits, chosen on calibration rows alone.

    python -m benchmarks.mixed [--bits 4.5] [--method hqq gptq ...] [--json FILE]

On TinyStories-656K, by the command line as a user would: `jq4 mixed` chooses on calibration_ids.npy, `jq4 quantize`
makes the mix and the uniform METHOD-w4g32 (4.5 bits a weight), `jq4 eval` measures both on evaluation_ids.npy, which
nothing was chosen on. `predicted` is the sum of the leaves' own losses and `on_calibration` the mix's measured one,
both on calibration rows that no method was fitted to: how nearly losses add up.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.provenance import publish

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT.parent / "shared" / "data" / "tinystories-656k"
UNIFORM = "w4g32"
FORMATS = ("w3g32", "w4g128", UNIFORM, "w4g32-asym")


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


def compare(method: str, bits: float, work: Path) -> list[dict[str, Any]]:
    """The row of the mix, and of the uniform format."""
    formats = ",".join([*(f"{method}-{each}" for each in FORMATS), "rtn-w8gc"])
    recipe = work / f"{method}.yaml"
    given = ["--bits", str(bits), "--calibration", MODEL / "calibration_ids.npy", "--formats", formats, "--out", recipe]
    chosen = run("mixed", MODEL, *given)
    mix = {name: chosen["mix"][name] for name in ("chosen", "predicted", "gap")}
    mix["on_calibration"] = chosen["mix"]["measured"]
    name = f"{method}-{UNIFORM}"
    return [
        {"formats": f"mix of {formats}", **measure(recipe, work / f"{method}-mix"), **mix},
        {"formats": name, **measure(name, work / name)},
    ]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table()
    for heading in ("formats", "bits", "KLD", "±", "p99", "perplexity", "top-1", "predicted", "on calibration"):
        table.add_column(heading, justify="left" if heading == "formats" else "right")
    for row in rows:
        more = [f"{row[key]:.4f}" if key in row else "" for key in ("predicted", "on_calibration")]
        table.add_row(
            row["formats"],
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
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for method in arguments.method for row in compare(method, arguments.bits, Path(folder))]
    show(rows, console)
    if arguments.json:
        publish(arguments.json, "mixed", {"rows": rows})


if __name__ == "__main__":
    main()
