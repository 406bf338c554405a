"""TPU kernels through the production compiler, without the hardware: does it compile, and how fast would it be?

    python -m benchmarks.tpu_compile --chip v5e v6e --rows 16 512 --json FILE --plot FILE.png
    python -m benchmarks.tpu_compile --matrix --cells CELLS.jsonl --json FILE
    python -m benchmarks.tpu_compile --matrix --sample
    python -m benchmarks.tpu_compile --told benchmarks/results/tpu-{decode,prefill}.json --plot FILE.png

The first compiles our kernel, plain bf16 ones and XLA's forms (benchmarks/tpu_lab/contenders.py) for the same product,
counts the bundles of the compiler's schedule, and models the time: the slowest of bundles / clock, MACs / MXU rate and
HBM bytes / bandwidth. The figures are static: no chip ran anything.

The matrix asks of every cell (chips x rows x groups x real shapes x zero points) only whether it compiles or is
refused by a clear error while tracing. CELLS.jsonl keeps what is done: the same command goes on where it stopped.

`TPU_INFERENCE=FOLDER` (a tpu-inference wheel, unpacked) runs that package's kernel beside.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # only worker processes compile, and none of them has a chip

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.aot import missing
from benchmarks.provenance import publish
from benchmarks.tpu_lab import cells
from benchmarks.tpu_lab.chips import CHIPS
from benchmarks.tpu_lab.contenders import CONTENDERS, DENSE, EXPERTS
from benchmarks.tpu_lab.jobs import Job, run
from benchmarks.tpu_lab.tables import plot, table_of, with_speedups
from pallas_kernels.int4_matmul.shapes import SHAPES

PUBLISHED = (
    *("chip", "contender", "rows", "k", "n", "group_size", "asymmetric", "experts", "format", "integers"),
    *("label", "status", "error"),
    *(
        "us",
        "bound",
        "speedup",
        "bundles_us",
        "mxu_us",
        "hbm_us",
        "cycles",
        "hbm_bytes",
        "step_bundles",
        "loop_bundles",
    ),
    *("spills", "unknown_loops", "vmem_bytes", "temp_bytes", "units"),
)


def side_by_side(options: argparse.Namespace) -> list[Job]:
    """The jobs of the table: every contender on every case."""
    jobs = []
    for chip, size, rows, group in itertools.product(options.chip, options.sizes, options.rows, options.group_size):
        case = {"rows": rows, "k": size[0], "n": size[1], "group_size": group, "asymmetric": options.asymmetric}
        case |= {"experts": options.experts} if options.experts else {}
        case |= {} if options.format == "int4" else {"format": options.format}
        case |= {"integers": True} if options.integers else {}
        jobs += [Job(chip, contender, case) for contender in options.contender]
    return jobs


def shown(jobs: Sequence[Job], console: Console, **settings: Any) -> Iterator[dict[str, Any]]:
    """The rows of the jobs, with a bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=len(jobs))
        for row in run(jobs, **settings):
            bar.update(task, advance=1, description=f"{row['chip']} {row['contender']} M={row['rows']}")
            yield row


def run_matrix(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Compiles what is left of the matrix; the summary of all that is done."""
    named = options.named or cells.MATRIX_SHAPES
    jobs = [
        job
        for contender in options.contender
        for job in (
            cells.sample(options.chip, contender) if options.sample else cells.matrix(options.chip, contender, named)
        )
    ]
    done = cells.read(options.cells) if options.cells else {}
    with (options.cells or Path(os.devnull)).open("a") as file:
        for row in shown(cells.left(jobs, done), console, dump=False):
            done[cells.key(row)] = row
            print(json.dumps(row), file=file, flush=True)
    wanted = {cells.key(job.row) for job in jobs}
    return cells.summary(row for place, row in done.items() if place in wanted)


def told_before(files: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of published results."""
    return [row for file in files for row in json.loads(Path(file).read_text())["rows"]]


def main() -> int:
    options = arguments()
    console = Console(stderr=True)
    if reason := missing(CHIPS[options.chip[0]].topology):
        console.print(f"nothing can be compiled: {reason}")
        return 1
    if options.matrix:
        found = run_matrix(options, console)
        console.print_json(json.dumps(found | {"not_compiled": found["not_compiled"][:20]}))
        failed = sum(row["status"] == "failed" for row in found["not_compiled"])
    else:
        rows = told_before(options.told) if options.told else list(shown(side_by_side(options), console, dump=True))
        Console(width=None if console.is_terminal else 220).print(table_of(rows))
        found = {"rows": [{name: row[name] for name in PUBLISHED if name in row} for row in with_speedups(rows)]}
        if options.plot:
            plot(rows, options.plot)
        failed = 0
    if options.json:
        publish(options.json, "tpu_compile", found)
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--chip", nargs="+", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument("--contender", nargs="+", choices=list(CONTENDERS), help="default: all (matrix: tpu)")
    parser.add_argument("--rows", type=int, nargs="+", default=[16])
    parser.add_argument("--group-size", type=int, nargs="+", default=[128], help="0: one scale for each column")
    parser.add_argument("--experts", type=int, default=0, help="each row by one of so many weights")
    parser.add_argument("--asymmetric", action="store_true", help="with zero points")
    parser.add_argument("--format", choices=("int4", "int8", "nf4", "fp4"), default="int4")
    parser.add_argument("--integers", action="store_true", help="x holds whole numbers of at most 127")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--named", nargs="+", choices=sorted(SHAPES), help="default: 8192 x 28672; matrix: all of its own"
    )
    size.add_argument("--shape", type=int, nargs=2, metavar=("K", "N"))
    parser.add_argument("--matrix", action="store_true", help="ask of every cell whether it compiles")
    parser.add_argument("--sample", action="store_true", help="of the matrix, a few cells of every chip")
    parser.add_argument("--cells", type=Path, help="JSON lines of the matrix's cells: what is there is not done again")
    parser.add_argument("--told", nargs="+", metavar="FILE", help="show and draw what was published, compile nothing")
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--plot", help="where to draw them")
    options = parser.parse_args()
    options.contender = options.contender or (["tpu"] if options.matrix else EXPERTS if options.experts else DENSE)
    options.sizes = (
        [tuple(options.shape)]
        if options.shape
        else [SHAPES[name] for name in options.named or ["llama-3-70b/gate_proj"]]
    )
    return options


if __name__ == "__main__":
    sys.exit(main())
