"""The Hopper kernels through the production compiler, without a GPU: do they compile, are they right, how fast could
they be?

    JQ4_CUDA_PLUGIN=DIR python -m benchmarks.gpu_compile --rows 1 16 64 512 --json FILE
    JQ4_CUDA_PLUGIN=DIR python -m benchmarks.gpu_compile --rows 64 --experts 8 --bits 8
    JQ4_CUDA_PLUGIN=DIR python -m benchmarks.gpu_compile --matrix

The first ones compile a kernel for an H200 and counts the machine code of its inner loop (benchmarks/gpu_lab/sass.py
needs ptxas and nvdisasm): a thread's instructions a weight, tensor core instructions, registers, spills, shared memory.
The time is modelled (pallas_kernels/int4_matmul/gpu_blocks.py, with the counted instructions beside the assumed ones);
no GPU ran anything.

The matrix compiles small products of every form, format and tail and runs what the compiler left on the CPU,
instruction by instruction (benchmarks/gpu_lab/device.py), against float64.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import aot
from benchmarks.gpu_lab import sass
from benchmarks.gpu_lab.cases import Case, operands
from benchmarks.gpu_lab.compiling import DEVICE, compiled
from benchmarks.gpu_lab.device import run_kernel
from benchmarks.gpu_lab.host_code import launch_of
from benchmarks.gpu_lab.ptx import parse
from benchmarks.provenance import publish
from pallas_kernels.int4_matmul.gpu_blocks import GpuPlan, modelled_seconds
from pallas_kernels.int4_matmul.gpu_chips import LANES, gpu_named
from pallas_kernels.int4_matmul.shapes import SHAPES

COLUMNS = ("rows", "experts", "k", "n", "bits", "group_size", "dtype", "label")
COLUMNS += ("us", "hbm_us", "issue_us", "per_weight", "hgmma", "registers", "spilled_bytes", "shared_kib", "warnings")


def emulated(case: Case, row: dict[str, Any], seed: int = 0) -> float:
    """The relative error of what the compiled program computes, run on the CPU."""
    launch = launch_of(row["host"])
    given = operands(case, row["plan"], seed)
    run_kernel(parse(row["ptx"]), launch, given.arrays, seed)
    return float(np.linalg.norm(given.result - given.wanted) / np.linalg.norm(given.wanted))


def counted(case: Case, row: dict[str, Any]) -> dict[str, Any]:
    """The machine code's counts and the modelled times of a compiled case."""
    gpu = gpu_named(aot.DEVICE_KINDS[DEVICE])
    assert gpu is not None
    counts, plan = sass.counts_of(row["ptx"]), GpuPlan(**row["plan"])
    per_weight = counts.instructions / (plan.strips * 64 * plan.tile_k / 128)
    row_blocks = case.problem.row_blocks(plan.tile_m)
    return {
        "label": f"{plan.form} {plan.tile_m}x{plan.warpgroups}x{plan.strips}x64x{plan.tile_k} "
        f"stages {plan.stages} splits {plan.splits}",
        "us": round(1e6 * modelled_seconds(case.problem, plan, gpu), 1),
        "hbm_us": round(1e6 * case.nbytes / gpu.bandwidth, 1),
        "issue_us": round(1e6 * per_weight * case.weights * row_blocks / (LANES * gpu.clock * gpu.cores), 1),
        "per_weight": round(per_weight, 2),
        "hgmma": sum(count for name, count in counts.loop.items() if sass.TENSOR.match(name)),
        "registers": counts.registers, "spilled_bytes": counts.spilled_bytes, "stack_bytes": counts.stack_bytes,
        "shared_kib": round(launch_of(row["host"]).shared_bytes / 1024), "warnings": list(counts.warnings),
        "loop": dict(counts.loop.most_common()), "plan": row["plan"], "jax": row["jax"], "seconds": row["seconds"],
    }  # fmt: skip


def rows_of(cases: list[Case]) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="gpu-lab-") as folder:
        for case, row in zip(cases, compiled(cases, Path(folder)), strict=True):
            told = {"rows": case.rows, "k": case.k, "n": case.n, "group_size": case.group_size}
            told |= {"asymmetric": case.asymmetric, "dtype": "int8" if case.integers else case.dtype}
            told |= {"bits": case.bits, "experts": case.experts}
            yield told | ({"error": row["error"]} if "error" in row else counted(case, row))


def small_cases() -> list[Case]:
    """Forms, formats and tails, small enough to be emulated."""
    plans: list[dict[str, Any] | None] = [
        None,
        {"form": "sums", "tile_m": 16, "tile_k": 128, "strips": 2, "splits": 2},
        {"form": "sums", "tile_m": 8, "tile_k": 256, "stages": 2},
        {"form": "weights", "tile_m": 128, "warpgroups": 2, "tile_k": 64, "stages": 3},
        {"form": "weights", "tile_m": 16, "warpgroups": 3, "tile_k": 256, "stages": 4},
        {"form": "sums", "tile_m": 32, "warpgroups": 1, "strips": 2, "splits": 2},
    ]
    sizes = [(1, 300, 64), (1, 512, 320), (20, 300, 320), (20, 512, 64)]
    chosen = [Case(*size, g, z) for size, g, z in itertools.product(sizes, (32, 64, 128, 0), (False, True))]
    planned = [Case(20, 640, 192, 128, zeros, plan=plan) for plan, zeros in itertools.product(plans[1:], (False, True))]
    halves = [
        Case(9, 256, 128, group, True, "float16", scales) for group in (32, 128) for scales in ("float16", "float32")
    ]
    return [*chosen, *planned, *halves, *grouped_cases(), *wide_cases(), *integer_cases(), *transposed_cases()]


def grouped_cases() -> list[Case]:
    """Experts: tiles of several experts, experts without rows, rows without one, splits, forms."""
    split = {"form": "sums", "tile_m": 8, "tile_k": 128, "splits": 2}
    deep = {"form": "weights", "tile_m": 16, "warpgroups": 2, "tile_k": 128, "strips": 1, "stages": 3}
    return [
        *(Case(m, 256, 64, g, z, experts=4) for m, g, z in itertools.product((3, 40), (32, 128, 0), (False, True))),
        Case(30, 300, 320, 64, True, experts=5),
        Case(24, 512, 128, 128, True, plan=split, experts=3),
        Case(50, 256, 192, 64, plan=deep, experts=3),
        Case(20, 256, 128, 64, True, experts=3, bits=8),
        Case(20, 256, 128, 64, True, experts=3, integers=True),
        Case(9, 256, 64, 128, True, "float16", "float32", experts=2),
    ]


def wide_cases() -> list[Case]:
    """Codes of 8 bits."""
    split = {"form": "sums", "tile_m": 16, "tile_k": 128, "strips": 1, "splits": 2}
    weights = {"form": "weights", "tile_m": 128, "warpgroups": 2, "tile_k": 64, "stages": 3}
    chosen = itertools.product((32, 128, 0), (False, True), ("bfloat16", "float16"))
    planned = itertools.product((split, weights), (False, True))
    return [
        *(Case(20, 300, 128, group, zeros, dtype, bits=8) for group, zeros, dtype in chosen),
        *(Case(20, 640, 192, 128, zeros, plan=plan, bits=8) for plan, zeros in planned),
        Case(1, 512, 320, 64, True, bits=8),
    ]


def integer_cases() -> list[Case]:
    """Rows of int8, by codes of 4 bits, and of 8 without zero points."""
    kinds, groups = [(4, False), (4, True), (8, False)], (64, 128, 0)
    sizes = [(20, 300, group) for group in groups] + [(1, 512, 128), (130, 300, 64), (130, 300, 0)]
    split = {"form": "sums", "tile_m": 16, "splits": 2}
    return [
        *(Case(m, k, 128, g, z, bits=bits, integers=True) for (m, k, g), (bits, z) in itertools.product(sizes, kinds)),
        Case(20, 640, 192, 128, True, plan=split, integers=True),
    ]


def transposed_cases() -> list[Case]:
    """Products by the transpose: x is dy."""
    split = {"form": "transposed", "tile_m": 16, "tile_k": 128, "warpgroups": 2, "stages": 3, "splits": 2}
    chosen = itertools.product((32, 64, 128, 0), (False, True))
    return [
        *(Case(20, 300, 320, group, zeros, transposed=True) for group, zeros in chosen),
        Case(1, 300, 64, 128, True, transposed=True),
        Case(130, 256, 192, 256, True, transposed=True),
        Case(20, 200, 128, 64, True, bits=8, transposed=True),
        Case(20, 200, 128, 64, True, "float16", "float32", transposed=True),
        Case(20, 256, 640, 128, True, plan=split, transposed=True),
        Case(40, 256, 192, 64, True, experts=4, transposed=True),
        Case(24, 200, 320, 128, plan=split | {"tile_m": 8}, experts=3, transposed=True),
    ]


def run_matrix(console: Console) -> dict[str, Any]:
    """Compiles and emulates `small_cases`; bf16 results and weights rounded in registers are within 2^-8 of float64."""
    cases, worst, wrong = small_cases(), 0.0, []
    with tempfile.TemporaryDirectory(prefix="gpu-lab-") as folder:
        for i, (case, row) in enumerate(zip(cases, compiled(cases, Path(folder)), strict=True)):
            error = row.get("error") or emulated(case, row, seed=i)
            if isinstance(error, str) or not error < 2**-8:
                wrong.append(f"{case}: {error}")
                console.print(wrong[-1])
            else:
                worst = max(worst, error)
    return {"cases": len(cases), "wrong": wrong, "worst_error": worst}


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="compiled for an H200: counted machine code, modelled time")
    for name in COLUMNS:
        table.add_column(name.replace("_", " "), no_wrap=name == "label")
    for row in rows:
        cells = {**row, "label": row.get("error") or row["label"], "warnings": len(row.get("warnings", ()))}
        table.add_row(*(str(cells.get(name, "")) for name in COLUMNS))
    return table


def main() -> int:
    options = arguments()
    console = Console(stderr=True)
    if reason := aot.missing(DEVICE) or (None if options.matrix else sass.missing()):
        console.print(f"nothing can be compiled: {reason}")
        return 1
    if options.matrix:
        found = run_matrix(console)
        console.print_json(json.dumps(found))
        failed = bool(found["wrong"])
    else:
        sizes = [SHAPES[name] for name in options.named]
        cases = [
            Case(
                rows,
                k,
                n,
                group,
                options.asymmetric,
                experts=options.experts,
                bits=options.bits,
                dtype="bfloat16" if options.dtype == "int8" else options.dtype,
                integers=options.dtype == "int8",
                transposed=options.transposed,
            )
            for k, n in sizes
            for group in options.group_size
            for rows in options.rows
        ]
        found = {"rows": list(rows_of(cases))}
        Console(width=None if console.is_terminal else 240).print(table_of(found["rows"]))
        failed = any("error" in row for row in found["rows"])
    if options.json:
        publish(options.json, "gpu_compile", found)
    return int(failed)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--group-size", type=int, nargs="+", default=[128], help="0: one scale for each column")
    parser.add_argument("--named", nargs="+", choices=sorted(SHAPES), default=["llama-3-70b/gate_proj"])
    parser.add_argument("--asymmetric", action="store_true", help="with zero points")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "int8"], default="bfloat16", help="of x")
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4)
    parser.add_argument("--transposed", action="store_true", help="the product by the transpose, of dy")
    parser.add_argument("--experts", type=int, default=0, help="rows sorted by so many experts; 0: one weight")
    parser.add_argument("--matrix", action="store_true", help="emulate small products of every form instead")
    parser.add_argument("--json", help="where to write the figures")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
