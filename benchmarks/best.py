"""The best at equal bits? Our calibrated presets and the peers' methods, same model, same rows, one script.

    python -m benchmarks.best [--model tinystories|tiny] [--ours NAME ...] [--effort EFFORT] [--peer METHOD=PYTHON ...]
                              [--json FILE]

Ours are made by `jq4 quantize` and everything is measured by `jq4 eval`, as a user would: KLD, perplexity and top-1
agreement against the dense model, in float32, on rows that calibrated nothing. Peers (`auto-round`,
`llmcompressor-gptq`, `bitsandbytes-nf4`, `bitsandbytes-nf4-nested`, `gguf-q4_0`, `gguf-q4_1`) run in Pythons of their
own by `benchmarks.peer_quantize`, on the same calibration rows, over the same linear layers; `bits` is what their own
files hold a weight (float16 scales, packed zero points). `target` is the figure to reach on TinyStories-656K: 0.8 of
the best peer's when this project began.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import publish
from models.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TINYSTORIES = ROOT.parent / "shared" / "data" / "tinystories-656k"
TINY = ROOT / "models" / "tiny"
CELLS = ("w4g32", "w4g32-asym", "w4g128", "w3g32")
TARGETS = {"w4g32": 0.0237, "w4g32-asym": 0.0245, "w4g128": 0.0320, "w3g32": 0.0902}
CONTEXT = 256


def rows_of_text(folder: Path, text: Path) -> np.ndarray:
    """A text as rows i32[R, 256] of the model's own tokens."""
    tokenizer = Tokenizer.from_files(lambda name: (folder / name).read_bytes(), str(folder))
    assert tokenizer is not None
    ids = np.asarray(tokenizer.encode(text.read_text(encoding="utf-8")).ids, np.int32)
    return ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)


def open_rows(model: str, work: Path) -> tuple[Path, Path, Path]:
    """The model's folder, and the files of its calibration and evaluation rows."""
    if model == "tinystories":
        return TINYSTORIES, TINYSTORIES / "calibration_ids.npy", TINYSTORIES / "evaluation_ids.npy"
    files = {}
    for name in ("calibration", "heldout"):
        files[name] = work / f"{name}.npy"
        np.save(files[name], rows_of_text(TINY, TINY / f"{name}.txt"))
    return TINY, files["calibration"], files["heldout"]


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr[-3000:]}")
    return done.stdout


def measure(packed: Path, dense: Path, ids: Path) -> dict[str, Any]:
    found = json.loads(run(sys.executable, "-m", "jq4", "eval", packed, "--ids", ids, "--reference", dense, "--json"))
    names = ("kld_mean", "kld_p99", "perplexity", "reference_perplexity", "top1_agreement")
    return {name: found[name] for name in names} | {"bits": found["bits_per_weight_packed"]}


def run_ours(name: str, effort: str, work: Path, dense: Path, calibration: Path, ids: Path) -> dict[str, Any]:
    out, start = work / name, time.perf_counter()
    options = ["--recipe", name, "--effort", effort, "--calibration", calibration]
    run(sys.executable, "-m", "jq4", "quantize", dense, out, *options, "--json")
    seconds = time.perf_counter() - start
    return {"method": name, "seconds": seconds, **measure(out, dense, ids)}


def run_peer(method: str, python: str, cell: str, work: Path, dense: Path, calibration: Path, ids: Path) -> Any:
    found = re.fullmatch(r"w(\d)g(\d+)(-asym)?", cell)
    options = [] if found is None else ["--bits", found[1], "--group", found[2], *(["--asym"] if found[3] else [])]
    name = f"{method}-{cell}".rstrip("-")
    run(python, "-m", "benchmarks.peer_quantize", method, dense, calibration, work / name, *options)
    held = json.loads((work / name / "peer.json").read_text())
    measured = measure(work / name, dense, ids)
    return {"method": name, "seconds": held["seconds"], **measured, "bits": held["bits"]}


def cells_of(method: str) -> tuple[str, ...]:
    """The formats that a peer is run at; the others have one of their own."""
    return CELLS if method in ("auto-round", "llmcompressor-gptq") else ("",)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=f"dense perplexity {rows[0]['reference_perplexity']:.3f}")
    for heading in ("method", "bits", "KLD", "target", "p99", "perplexity", "top-1", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['bits']:.3f}",
            f"{row['kld_mean']:.4f}",
            f"{row['target']:.4f}" if row["target"] else "",
            f"{row['kld_p99']:.3f}",
            f"{row['perplexity']:.2f}",
            f"{row['top1_agreement']:.3f}",
            f"{row['seconds']:.0f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tinystories", "tiny"), default="tinystories")
    defaults = [f"{method}-{cell}" for method in ("gptq", "best") for cell in CELLS]
    parser.add_argument("--ours", nargs="*", default=defaults, metavar="NAME")
    parser.add_argument("--effort", choices=("light", "default", "best"), default="default")
    parser.add_argument("--peer", action="append", default=[], metavar="METHOD=PYTHON")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console, rows = Console(), []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        dense, calibration, ids = open_rows(arguments.model, work)
        jobs: list[tuple[Any, tuple[str, ...]]] = [(run_ours, (name, arguments.effort)) for name in arguments.ours]
        peers = [peer.split("=", 1) for peer in arguments.peer]
        jobs += [(run_peer, (*peer, cell)) for peer in peers for cell in cells_of(peer[0])]
        for job, names in jobs:
            row = job(*names, work, dense, calibration, ids)
            cell = next((cell for cell in CELLS if row["method"].endswith(cell)), "")
            of_best = row["method"].startswith("best") and arguments.model == "tinystories"
            rows.append(row | {"target": TARGETS.get(cell) if of_best else None})
            console.print(f"{row['method']}: KLD {row['kld_mean']:.4f} in {row['seconds']:.0f} s", highlight=False)
            if arguments.json:  # row by row: all of them take hours on a busy machine
                publish(arguments.json, "best", {"rows": rows})
    show(rows, console)


if __name__ == "__main__":
    main()
