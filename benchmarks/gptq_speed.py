"""How long GPTQ takes for one weight: ours, compiled and run, against a peer's on the same cores in the same run.

    python -m benchmarks.gptq_speed [--peer PYTHON] [--size 4096] [--tokens 2048] [--repeats 2] [--json FILE]

One weight [size, size] at W4 g128, symmetric, and the Hessian of `tokens` rows whose features depend on each other.
`paper` is GPTQ as its paper has it (ranges of the extremes, natural order, no refinement), which is what the peer does;
`sweep` searches the range of each group and takes important inputs first; `default`, what the presets do, then refines
twice.
The peer (llm-compressor's `quantize_weight`) runs in a Python of its own, by `benchmarks.peer_gptq`, before and after
ours, and the faster of its runs counts, as of ours; so that a machine that is busy is busy for both. `error` is
E|x^T Q - x^T W|^2 / E|x^T W|^2 over those rows, measured the same way for both.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks.provenance import publish
from jq4.methods import gptq
from jq4.rounding import Encoding
from jq4.statistics import WeightStatistics

GROUP = 128
WAYS = {
    "paper": (Encoding(group_size=GROUP), {"refinements": 0, "actorder": "none"}),
    "sweep": (Encoding(group_size=GROUP, observer="mse"), {"refinements": 0}),
    "default": (Encoding(group_size=GROUP, observer="mse"), {}),
}


def problem(size: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(weight f32[K, N], inputs f32[tokens, K])."""
    random = np.random.default_rng(0)
    mixing = random.normal(size=(size // 4, size)) / np.sqrt(size // 4)
    inputs = random.normal(size=(tokens, size // 4)) @ mixing + 0.3 * random.normal(size=(tokens, size))
    return random.normal(size=(size, size)).astype(np.float32) * 0.02, inputs.astype(np.float32)


def relative_error(weight: np.ndarray, quantized: np.ndarray, inputs: np.ndarray) -> float:
    return float(np.square(inputs @ (quantized - weight)).sum() / np.square(inputs @ weight).sum())


def timed(compiled: Any, arguments: tuple[Any, ...]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = jax.block_until_ready(compiled(*arguments))
    return time.perf_counter() - start, found


def run_ours(name: str, weight: np.ndarray, inputs: np.ndarray, repeats: int) -> dict[str, Any]:
    encoding, options = WAYS[name]
    outer = jnp.asarray(inputs.T @ inputs)
    arguments = (jnp.asarray(weight), WeightStatistics(count=jnp.int32(len(inputs)), outer_total=outer))
    start = time.perf_counter()
    compiled = jax.jit(lambda w, s: gptq.quantize(w, s, encoding, **options)).lower(*arguments).compile()
    compiling = time.perf_counter() - start
    seconds, q = min((timed(compiled, arguments) for _ in range(repeats)), key=lambda found: found[0])
    error = relative_error(weight, np.asarray(q.dequantize()), inputs)
    return {"method": f"jq4 {name}", "compile_seconds": compiling, "run_seconds": seconds, "error": error}


def run_peer(python: str, folder: Path, weight: np.ndarray, inputs: np.ndarray) -> dict[str, Any]:
    command = [python, "-m", "benchmarks.peer_gptq", str(folder), "--group", str(GROUP)]
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1], stdout=subprocess.DEVNULL)
    found = json.loads((folder / "peer.json").read_text())
    error = relative_error(weight, np.load(folder / "quantized.npy").T, inputs)
    return found | {"compile_seconds": 0.0, "error": error}


def measure(arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    weight, inputs = problem(arguments.size, arguments.tokens)
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        console.print(
            f"{row['method']}: compiled in {row['compile_seconds']:.1f} s, ran in {row['run_seconds']:.1f} s, "
            f"error {row['error']:.5f}",
            highlight=False,
        )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "weight.npy", weight.T)  # torch's [out, in]
        np.save(folder / "hessian.npy", inputs.T @ inputs / len(inputs))
        if arguments.peer:
            keep(run_peer(arguments.peer, folder, weight, inputs))
        for way in arguments.ways:
            keep(run_ours(way, weight, inputs, arguments.repeats))
        if arguments.peer:
            keep(run_peer(arguments.peer, folder, weight, inputs))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    load = os.getloadavg()[0]
    rows = measure(arguments, console)
    if arguments.json:
        about = {
            "size": arguments.size,
            "tokens": arguments.tokens,
            "cores": os.cpu_count(),
            "load_before": round(load, 1),
        }
        publish(arguments.json, "gptq_speed", about | {"rows": rows})


if __name__ == "__main__":
    main()
