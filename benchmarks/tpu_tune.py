"""Block sizes for the TPU kernel by the compiler's own schedules: writes pallas_kernels/int4_matmul/tuned.json.

    python -m benchmarks.tpu_tune --rows 16 512 --group-size 128 --named llama-3-70b/gate_proj llama-3-8b/down_proj

The analytic model (tpu_model.py) ranks the plans of every product; the best three of each form are compiled, and what
the lab counts of them (benchmarks/tpu_lab) decides. An entry is written where a plan beats the model's first by more
than 1.5 %; where none does the entry goes, so that the table stays small. Entries of other products stay as they are.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.aot import missing
from benchmarks.provenance import ROOT, told
from benchmarks.tpu_lab.chips import CHIPS
from benchmarks.tpu_lab.compiling import DUMP, environment
from pallas_kernels.int4_matmul.shapes import SHAPES
from pallas_kernels.int4_matmul.tpu_blocks import ranked
from pallas_kernels.int4_matmul.tpu_chips import chip_named
from pallas_kernels.int4_matmul.tpu_model import seconds
from pallas_kernels.int4_matmul.tpu_plan import Plan, Problem
from pallas_kernels.int4_matmul.tpu_tuned import BUCKETS, FILE, entry_of, key_of

TABLE = ROOT / "pallas_kernels" / "int4_matmul" / FILE
GAIN = 0.985  # of the first plan's time, from which on another is worth an entry
PLANS_A_FORM = 3
WORTH_COMPILING = 1.15  # times the first plan's modelled time, from which on one is not


def plans_to_compile(problem: Problem, chip: str) -> list[Plan]:
    """The model's first plan, and the next of other widths, form by form; none that copies a stack's codes."""
    device = chip_named(chip)
    plans = ranked(problem, device, exact=False, integers=False, resident=False)
    most = WORTH_COMPILING * seconds(problem, plans[0], device)
    chosen: dict[tuple[Any, ...], Plan] = {}
    for plan in plans:
        place = (plan.form, plan.block_n.bit_length())
        of_form = sum(one.form == plan.form for one in chosen.values())
        if place in chosen or of_form == PLANS_A_FORM or plan.loops > plans[0].loops:
            continue
        if seconds(problem, plan, device) <= most:
            chosen[place] = plan
    return list(chosen.values())


def compiled(problem: Problem, chip: str) -> Iterator[tuple[Plan, dict[str, Any]]]:
    """Each plan and what the lab counts of it."""
    from benchmarks.tpu_lab.contenders import Case, Program, prepared
    from benchmarks.tpu_lab.measure import measured
    from pallas_kernels.int4_matmul.spec import PackedSpec
    from pallas_kernels.int4_matmul.tiles import Packed
    from pallas_kernels.int4_matmul.tpu import int4_matmul_tpu

    group = 0 if problem.groups == 1 else problem.group_size
    case = Case(problem.m, problem.k, problem.n, group, problem.zero_points)
    spec = PackedSpec(problem.k, group_size=case.group, layout="tpu")
    for plan in plans_to_compile(problem, chip):

        def product(x: Any, codes: Any, scale: Any, zero_point: Any, plan: Plan = plan) -> Any:
            packed = Packed(codes, scale, zero_point, None)
            return int4_matmul_tpu(x, packed, spec, dtype=x.dtype, chip=chip_named(chip), plan=plan)

        yield plan, measured(CHIPS[chip], case, Program(str(plan), product, prepared(case)))


def tuned(problem: Problem, chip: str) -> list[Any] | None:
    """The entry of a product, or None where the model's first plan is as good as any."""
    found = [(plan, row) for plan, row in compiled(problem, chip)]
    for plan, row in found:
        print(chip, key_of(problem), *entry_of(plan), row.get("us", row.get("error", "")), row.get("bound", ""))
    counted = [(row["us"], row["bundles_us"], i) for i, (_, row) in enumerate(found) if "us" in row]
    first = found[0][1].get("us", float("inf"))
    best = min(counted, default=(first, 0.0, 0))
    return entry_of(found[best[2]][0]) if best[0] < GAIN * first else None


def problems(options: argparse.Namespace) -> Iterator[tuple[str, Problem]]:
    for chip, name, group, rows, zeros in itertools.product(
        options.chip, options.named, options.group_size, options.rows, options.zero_points
    ):
        k, n = SHAPES[name]
        yield chip, Problem(rows, k, n, -(-k // group) if group else 1, group or k, bool(zeros), out_bytes=2)


def main() -> int:
    options = arguments()
    if reason := missing(CHIPS[options.chip[0]].topology):
        print(f"nothing can be compiled: {reason}", file=sys.stderr)
        return 1
    if DUMP not in os.environ:  # the compiler reads where to dump when its process starts
        with tempfile.TemporaryDirectory(prefix="tpu-tune-") as folder:
            command = [sys.executable, "-m", "benchmarks.tpu_tune", *sys.argv[1:]]
            return subprocess.run(command, env=environment(Path(folder)), cwd=ROOT, check=False).returncode
    for chip, problem in problems(options):
        write(chip, key_of(problem), tuned(problem, chip))
    return 0


def write(chip: str, key: str, entry: list[Any] | None) -> None:
    """Puts an entry into the table, or takes it out."""
    held = json.loads(TABLE.read_text()) if TABLE.is_file() else {"plans": {}}
    own = {name: plan for name, plan in held["plans"].get(chip, {}).items() if name != key}
    plans = held["plans"] | {chip: dict(sorted((own | ({key: entry} if entry else {})).items()))}
    command = " ".join(["python -m benchmarks.tpu_tune", *told(sys.argv[1:])])
    TABLE.write_text(text_of({"command": command, "plans": {name: plans[name] for name in CHIPS if plans.get(name)}}))


def text_of(table: Mapping[str, Any]) -> str:
    """JSON with a line for each plan."""
    chips = []
    for chip, plans in table["plans"].items():
        lines = ",\n".join(f"      {json.dumps(key)}: {json.dumps(entry)}" for key, entry in plans.items())
        chips.append(f"    {json.dumps(chip)}: {{\n{lines}\n    }}")
    joined = ",\n".join(chips)
    return f'{{\n  "command": {json.dumps(table["command"])},\n  "plans": {{\n{joined}\n  }}\n}}\n'


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--chip", nargs="+", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument("--rows", type=int, nargs="+", choices=BUCKETS, default=list(BUCKETS))
    parser.add_argument("--group-size", type=int, nargs="+", default=[128], help="0: one scale for each column")
    parser.add_argument("--zero-points", type=int, nargs="+", choices=(0, 1), default=[0])
    parser.add_argument("--named", nargs="+", choices=sorted(SHAPES), default=["llama-3-70b/gate_proj"])
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
