"""Packed products on a CPU against `jnp.dot` of the dense float32 weight, in one run.

    python -m benchmarks.cpu_matmul [--shape K N | --named NAME] [--rows 1 16 64] [--seconds S] [--json FILE]

A call is what decoding does: x by WEIGHTS different weights, one after the other, so that weights come from memory and
temporaries from the cache; times are of one product. Every form is called in turn, again and again, until the time is
up (the slow ones in every tenth turn only): whatever else the machine does, it does to all of them. A row shows the
best and the median time and their ratio to the float32 product's in the same run (above 1: the form is faster).
Memory is XLA's own count: arguments that hold one weight, and temporaries.

    f32 dot                 x @ W, W float32 [K, N]
    bf16 dot                the same in bfloat16
    dequantize and dot      W unpacked as a whole, then multiplied: what a library without a packed form does
    packed [K, N], [N, K]   jq4's CPU form, weights in either order, neutral bytes
    torch int4pack          torch's own 4-bit CPU kernel for bfloat16 rows, where torch is installed
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads must not spin while JAX is being timed

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from pallas_kernels.int4_matmul import PackedSpec, int4_matmul
from pallas_kernels.int4_matmul.reference import int4_matmul_reference
from pallas_kernels.int4_matmul.shapes import SHAPES

WEIGHTS = 4
SLOW = 5.0  # times the float32 product

Form = tuple[Callable[[], Any], int, int]  # call and wait, bytes of the weight, bytes of temporaries


def forms(k: int, n: int, rows: int, group_size: int) -> dict[str, Form]:
    """The forms to time, each with its weight made from one and the same set of codes."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (k, n)).astype(np.uint8)
    scale = rng.uniform(0.5, 1.5, (k // group_size, n)).astype(np.float32) * 0.01
    dense = (codes.astype(np.float32) - 8) * np.repeat(scale, group_size, axis=0)
    x = jnp.asarray(rng.normal(size=(rows, k)), jnp.float32)
    packed = codes[0::2] | (codes[1::2] << 4)  # u8[K/2, N]
    kn, nk = PackedSpec(k, group_size=group_size), PackedSpec(k, group_size=group_size, orientation="nk")
    turned = (np.ascontiguousarray(packed.T), np.ascontiguousarray(scale.T))
    wanted = np.asarray(x, np.float64) @ dense
    made = {
        "f32 dot": jax_form(jnp.dot, x, dense),
        "bf16 dot": jax_form(jnp.dot, x.astype(jnp.bfloat16), jnp.asarray(dense, jnp.bfloat16)),
        "dequantize and dot": jax_form(
            lambda x, c, s: int4_matmul_reference(x, c, s, None, None, spec=kn), x, packed, scale
        ),
        "packed [K, N]": jax_form(lambda x, c, s: int4_matmul(x, c, s, spec=kn), x, packed, scale),
        "packed [N, K]": jax_form(lambda x, c, s: int4_matmul(x, c, s, spec=nk), x, *turned),
        **torch_forms(np.asarray(x), codes, scale, group_size),
    }
    for name, (call, *_) in made.items():
        error = np.linalg.norm(np.asarray(call(), np.float64) - wanted) / np.linalg.norm(wanted)
        assert error < (1e-2 if "bf16" in name else 1e-5), f"{name} is wrong: relative error {error:.1e}"
    return made


def jax_form(function: Callable[..., jax.Array], *args: Any) -> Form:
    args = tuple(map(jnp.asarray, args))
    compiled = jax.jit(function).lower(*args).compile()
    held = sum(arg.nbytes for arg in args[1:])
    x, *weight = args
    weights = [jax.tree.map(jnp.copy, weight) for _ in range(WEIGHTS)]
    return lambda: one_after_the_other(compiled, x, weights), held, compiled.memory_analysis().temp_size_in_bytes


def one_after_the_other(product: Callable[..., jax.Array], x: jax.Array, weights: list[list[jax.Array]]) -> jax.Array:
    for weight in weights:
        out = product(x, *weight)
    return out.block_until_ready()


def torch_forms(x: np.ndarray, codes: np.ndarray, scale: np.ndarray, group_size: int) -> dict[str, Form]:
    """torch's `_weight_int4pack_mm_for_cpu`; nothing where torch is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    aten = torch.ops.aten
    packed = aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(codes.T.astype(np.int32)), 2)
    scales = torch.from_numpy(np.stack([scale, np.zeros_like(scale)], -1))  # [G, N, 2]: scale, offset of code 8

    def form(dtype: Any) -> Form:
        rows, both = torch.from_numpy(x).to(dtype), scales.to(dtype)
        weights = [packed.clone() for _ in range(WEIGHTS)]

        def call() -> np.ndarray:
            for weight in weights:
                out = aten._weight_int4pack_mm_for_cpu(rows, weight, group_size, both)
            return out.float().numpy()

        return call, packed.nbytes + both.nbytes, 0

    return {"torch int4pack bf16": form(torch.bfloat16)}


def time_in_turn(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds of one product of each form, in turn until `seconds` are over; the first of three calls warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        for name, call in calls.items():
            if turn % 10 and times[name][-1] > SLOW * times["f32 dot"][-1]:
                continue
            call()
            for _ in range(2):
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) / WEIGHTS)
        turn += 1
    return times


def measure(k: int, n: int, rows: int, group_size: int, seconds: float) -> list[dict[str, Any]]:
    made = forms(k, n, rows, group_size)
    times = time_in_turn({name: call for name, (call, *_) in made.items()}, seconds)
    best = {name: min(taken) for name, taken in times.items()}
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    return [
        {
            "rows": rows, "form": name, "calls": len(times[name]),
            "best_ms": round(best[name] * 1e3, 3), "median_ms": round(middle[name] * 1e3, 3),
            "speed_vs_f32_best": round(best["f32 dot"] / best[name], 3),
            "speed_vs_f32_median": round(middle["f32 dot"] / middle[name], 3),
            "weight_bytes": held, "temp_bytes": temporary,
        }
        for name, (_, held, temporary) in made.items()
    ]  # fmt: skip


def show(results: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for heading in (
        "M",
        "form",
        "best ms",
        "median ms",
        "f32 = 1 (best)",
        "f32 = 1 (median)",
        "weight MiB",
        "temp MiB",
    ):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for r in results:
        table.add_row(
            str(r["rows"]), r["form"], f"{r['best_ms']:.2f}", f"{r['median_ms']:.2f}", f"{r['speed_vs_f32_best']:.2f}",
            f"{r['speed_vs_f32_median']:.2f}", f"{r['weight_bytes'] / 2**20:.1f}", f"{r['temp_bytes'] / 2**20:.1f}",
            end_section=r["form"] == results[-1]["form"],
        )  # fmt: skip
    Console().print(table)


def machine() -> str:
    """The processor and how many cores this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """The commit that was measured; with a + if its files had been changed since."""
    described = ["git", "describe", "--always", "--abbrev=12", "--exclude", "*", "--dirty=+"]
    done = subprocess.run(described, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], metavar=("K", "N"))
    size.add_argument("--named", choices=sorted(SHAPES), help="a shape of a real model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=15.0, help="time for each number of rows")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    k, n = SHAPES[options.named] if options.named else options.shape
    results = [r for m in options.rows for r in measure(k, n, m, options.group_size, options.seconds)]
    show(results, f"x[M, {k}] @ W[{k}, {n}], groups of {options.group_size}, JAX {jax.__version__}, {machine()}")
    if options.json:
        report = {
            "benchmark": "cpu_matmul",
            "command": f"python -m benchmarks.cpu_matmul --shape {k} {n} --rows {' '.join(map(str, options.rows))} "
            f"--group-size {options.group_size} --seconds {options.seconds:g}",
            "date": date.today().isoformat(),
            "commit": commit(),
            "machine": machine(),
            "load": [round(load, 1) for load in os.getloadavg()],
            "python": platform.python_version(),
            "jax": jax.__version__,
            "shape": [k, n],
            "results": results,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
