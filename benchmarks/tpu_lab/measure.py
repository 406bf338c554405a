"""One case of one contender on one chip: compiled, and counted where the compiler dumps its schedule."""

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

from benchmarks.tpu_lab import bundles, compiling, hlo, traffic
from benchmarks.tpu_lab.chips import CHIPS, Chip
from benchmarks.tpu_lab.contenders import CONTENDERS, Case, Program, RefusedError
from benchmarks.tpu_lab.model import time_of

TRACE, COMPILE = "trace", "compile"


def measure(chip: str, contender: str, case: Case) -> dict[str, Any]:
    """A row: the fastest of the contender's programs by the model (of several), or why there is none.

    status is "ok"; "refused", by a clear error while tracing, before the compiler was asked; or "failed" in it.
    """
    found, row = [], {"chip": chip, "contender": contender, **dataclasses.asdict(case)}
    try:
        programs = list(CONTENDERS[contender](case, CHIPS[chip]))
        if not programs:
            raise RefusedError("no block sizes of it divide the weight")
    except ValueError as error:
        return row | {"status": "refused", "error": _one_line(error)}
    for program in programs:
        found.append(measured(CHIPS[chip], case, program))
    best = min(found, key=lambda one: (one["status"] != "ok", one["status"] != "refused", one.get("us", 0.0)))
    return row | best


def measured(chip: Chip, case: Case, program: Program) -> dict[str, Any]:
    """What is known of one program: whether it compiles, and its counts where the compiler dumps."""
    start, stage = time.perf_counter(), TRACE
    compiling.fresh()
    try:
        trace = compiling.traced(chip, program.function, program.arguments)
        stage = COMPILE
        executable = compiling.compiled(chip, trace)
    except Exception as error:  # what a compiler raises has no common type
        status = "refused" if stage == TRACE and isinstance(error, (ValueError, NotImplementedError)) else "failed"
        return {"label": program.label, "status": status, "error": f"{type(error).__name__}: {_one_line(error)}"}
    memory = executable.memory_analysis()
    row = {
        "label": program.label,
        "status": "ok",
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "seconds": round(time.perf_counter() - start, 2),
    }
    folder = compiling.dump_folder()
    return row if folder is None else row | counted(chip, case.macs, trace, executable, folder)


def counted(chip: Chip, macs: int, trace: Any, executable: Any, folder: Path) -> dict[str, Any]:
    """What the dumped schedules say of a program."""
    schedules = bundles.read_dump(folder)
    pallas = {kernel.name: kernel for kernel in traffic.kernels(trace.jaxpr)}
    cycles = nbytes = spills = unknown = 0
    largest: tuple[int, Any, Any] = (-1, None, None)
    for operation in hlo.Program(executable.as_text()).operations():
        kernel = pallas.get(re.sub(r"\.\d+$", "", operation.name)) if operation.target else None
        moved = kernel.nbytes if kernel and kernel.nbytes is not None else operation.nbytes
        nbytes += operation.times * moved
        schedule = schedules.get(operation.name)
        if schedule is None:
            continue
        steps = -(-kernel.steps // chip.cores) if kernel and kernel.steps else operation.steps
        issued = operation.times * schedule.cycles(steps)
        cycles, spills, unknown = cycles + issued, spills + schedule.spills, unknown + schedule.unknown_trips
        largest = max(largest, (issued, schedule, operation), key=lambda one: one[0])
    limits = time_of(chip, cycles, macs, nbytes)
    return {
        "cycles": cycles,
        "hbm_bytes": nbytes,
        "bundles_us": round(limits.bundles, 2),
        "mxu_us": round(limits.mxu, 2),
        "hbm_us": round(limits.hbm, 2),
        "us": round(limits.modelled, 2),
        "bound": limits.bound,
        "spills": spills,
        "unknown_loops": unknown,
        **_of_largest(*largest[1:]),
    }


def _of_largest(schedule: bundles.Schedule | None, operation: hlo.Operation | None) -> dict[str, Any]:
    """The operation that issues most bundles: its step, its hottest loop, and the units used there."""
    if schedule is None or operation is None:
        return {}
    loop, main = schedule.hottest, schedule.main
    return {
        "operation": operation.name,
        "step_bundles": main.bundles if main else schedule.bundles,
        "loop_bundles": loop.bundles if loop else schedule.bundles,
        "units": {unit: part for unit, part in schedule.utilization(loop).items() if part},
        "vmem_bytes": operation.scoped,
        "xla_estimated_cycles": operation.estimate,
    }


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:400]
