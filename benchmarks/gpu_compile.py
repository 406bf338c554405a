"""The GPU kernels through the production compiler, without a GPU: do they compile, are they right, how fast could
they be?

    JQ4_CUDA_PLUGIN=DIR python -m benchmarks.gpu_compile --rows 1 16 64 512 --json FILE
    JQ4_CUDA_PLUGIN=DIR python -m benchmarks.gpu_compile --rows 64 --experts 8 --bits 8
    JQ4_CUDA_PLUGIN=DIR python -m benchmarks.gpu_compile --device a100 l40s --rows 1 16 64 256
    JQ4_CUDA_PLUGIN=DIR python -m benchmarks.gpu_compile --device h200 a100 --matrix

The first ones compile a kernel for an H200, or the devices named, and count the machine code of its inner loop
(benchmarks/gpu_lab/sass.py needs ptxas and nvdisasm): a thread's instructions a weight, tensor core instructions,
registers, spills, shared memory. The time is modelled (pallas_kernels/int4_matmul/gpu_blocks.py, gpu_blocks_mma.py,
with the counted instructions beside the assumed ones); `bf16_us` is the least that a dense bf16 product can take there,
by its bytes or its multiply-adds. No GPU ran anything.

The matrix compiles small products of every form, format and tail and runs what the compiler left on the CPU,
instruction by instruction (benchmarks/gpu_lab/device.py), against float64.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import aot
from benchmarks.gpu_lab import sass
from benchmarks.gpu_lab.cases import Case, operands
from benchmarks.gpu_lab.compiling import compiled, missing
from benchmarks.gpu_lab.device import run_kernel
from benchmarks.gpu_lab.host_code import launch_of
from benchmarks.gpu_lab.ptx import parse
from benchmarks.gpu_lab.small_cases import small_cases
from benchmarks.provenance import publish
from pallas_kernels.int4_matmul.gpu_blocks import GpuPlan
from pallas_kernels.int4_matmul.gpu_chips import LANES
from pallas_kernels.int4_matmul.registry import FITS
from pallas_kernels.int4_matmul.shapes import SHAPES

COLUMNS = ("device", "rows", "experts", "k", "n", "bits", "group_size", "dtype", "label")
COLUMNS += ("us", "hbm_us", "issue_us", "bf16_us", "per_weight", "mma", "registers", "spilled_bytes", "shared_kib")
COLUMNS += ("warnings",)


def emulated(case: Case, row: dict[str, Any], seed: int = 0) -> float:
    """The relative error of what the compiled program computes, run on the CPU."""
    launch = launch_of(row["host"])
    given = operands(case, row["plan"], seed)
    run_kernel(parse(row["ptx"]), launch, given.arrays, seed)
    return float(np.linalg.norm(given.result - given.wanted) / np.linalg.norm(given.wanted))


def counted(case: Case, row: dict[str, Any]) -> dict[str, Any]:
    """The machine code's counts and the modelled times of a compiled case."""
    gpu = case.gpu
    counts, plan = sass.counts_of(row["ptx"]), GpuPlan(**row["plan"])
    per_weight = counts.instructions / (plan.strips * 64 * plan.tile_k / 128)
    row_blocks = case.problem.row_blocks(plan.tile_m)
    return {
        "label": f"{plan.form} {plan.tile_m}x{plan.warpgroups}x{plan.strips}x64x{plan.tile_k} "
        f"stages {plan.stages} splits {plan.splits}",
        "us": round(1e6 * case.model.modelled_seconds(case.problem, plan, gpu), 1),
        "hbm_us": round(1e6 * case.nbytes / gpu.bandwidth, 1),
        "issue_us": round(1e6 * per_weight * case.weights * row_blocks / (LANES * gpu.clock * gpu.cores), 1),
        "bf16_us": round(1e6 * least_bf16_seconds(case), 1),
        "per_weight": round(per_weight, 2),
        "mma": sum(count for name, count in counts.loop.items() if sass.TENSOR.match(name)),
        "registers": counts.registers, "spilled_bytes": counts.spilled_bytes, "stack_bytes": counts.stack_bytes,
        "shared_kib": round(launch_of(row["host"]).shared_bytes / 1024), "warnings": list(counts.warnings),
        "loop": dict(counts.loop.most_common()), "plan": row["plan"], "jax": row["jax"], "seconds": row["seconds"],
    }  # fmt: skip


def least_bf16_seconds(case: Case) -> float:
    """Of the dense product, at the datasheet's rates."""
    nbytes = 2 * (case.problem.matrices * case.weights + case.rows * (case.k + case.n))
    multiplying = case.rows * case.weights / (case.gpu.macs * case.gpu.cores * case.gpu.clock)
    return max(nbytes / case.gpu.bandwidth, multiplying)


def rows_of(cases: list[Case]) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="gpu-lab-") as folder:
        for case, row in zip(cases, compiled(cases, Path(folder)), strict=True):
            told = {"rows": case.rows, "k": case.k, "n": case.n, "group_size": case.group_size}
            told |= {"asymmetric": case.asymmetric, "dtype": case.fits or case.dtype}
            told |= {"bits": case.bits, "experts": case.experts, "device": case.device}
            yield told | ({"error": row["error"]} if "error" in row else counted(case, row))


def run_matrix(console: Console, devices: Sequence[str]) -> dict[str, Any]:
    """Compiles and emulates the `small_cases` of the devices.

    bf16 results and weights rounded in registers are within 2^-8 of float64.
    """
    cases, worst, wrong = [case for case in small_cases() if case.device in devices], 0.0, []
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
    table = Table(title="counted machine code, modelled time")
    for name in COLUMNS:
        table.add_column(name.replace("_", " "), no_wrap=name == "label")
    for row in rows:
        cells = {**row, "label": row.get("error") or row["label"], "warnings": len(row.get("warnings", ()))}
        table.add_row(*(str(cells.get(name, "")) for name in COLUMNS))
    return table


def main() -> int:
    options = arguments()
    console = Console(stderr=True)
    reasons = (*map(missing, options.device), None if options.matrix else sass.missing())
    if reason := next(filter(None, reasons), None):
        console.print(f"nothing can be compiled: {reason}")
        return 1
    if options.matrix:
        found = run_matrix(console, options.device)
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
                dtype="bfloat16" if options.dtype in FITS else options.dtype,
                fits=options.dtype if options.dtype in FITS else "",
                transposed=options.transposed,
                device=device,
            )
            for device in options.device
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
    parser.add_argument("--device", nargs="+", choices=list(aot.CAPABILITIES), default=["h200"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--group-size", type=int, nargs="+", default=[128], help="0: one scale for each column")
    parser.add_argument("--named", nargs="+", choices=sorted(SHAPES), default=["llama-3-70b/gate_proj"])
    parser.add_argument("--asymmetric", action="store_true", help="with zero points")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", *filter(None, FITS)], default="bfloat16", help="of x"
    )
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4)
    parser.add_argument("--transposed", action="store_true", help="the product by the transpose, of dy")
    parser.add_argument("--experts", type=int, default=0, help="rows sorted by so many experts; 0: one weight")
    parser.add_argument("--matrix", action="store_true", help="emulate small products of every form instead")
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    if set(options.device) != {"h200"} and (options.transposed or options.experts or options.dtype in FITS):
        parser.error("transposed products, experts and rows of 8 bits have kernels for the h200 alone")
    return options


if __name__ == "__main__":
    sys.exit(main())
