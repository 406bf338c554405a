"""Compiles cases for their GPUs and keeps what the compiler leaves; a process of its own, told by lines of JSON.

The compiler is told by the environment where to leave its PTX and host code, before jax is imported, and one that
aborts takes its process along.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import aot
from benchmarks.gpu_lab import sass
from benchmarks.gpu_lab.cases import Case
from pallas_kernels.int4_matmul.gpu_chips import AMPERE, gpu_named, refusal_of_jax

ROOT = Path(__file__).resolve().parents[2]


def missing(device: str) -> str | None:
    """Why this machine cannot compile the kernels of a device, or None."""
    reason = None if gpu_named(aot.DEVICE_KINDS[device], AMPERE) is None else refusal_of_jax()
    return aot.missing(device) or (reason and f"the kernel of {device} {reason}")


def compiled(cases: Iterable[Case], folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each case: its plan, "ptx", "host" (texts), "registers"; or "error"."""
    with contextlib.ExitStack() as stack:
        workers: dict[str, Callable[[Case], dict[str, Any]]] = {}
        for case in cases:
            if case.device not in workers:
                workers[case.device] = stack.enter_context(_worker(case.device, folder / case.device))
            yield workers[case.device](case)


@contextlib.contextmanager
def _worker(device: str, folder: Path) -> Iterator[Callable[[Case], dict[str, Any]]]:
    """A process for one GPU: Mosaic GPU keeps telling ptxas the first that it compiled for."""
    folder.mkdir()
    environment = aot.environment(device) | {
        "MOSAIC_GPU_DUMP_TO": str(folder),
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_HOST_LLVM": "1",
        "MOSAIC_GPU_CUDA_ROOT": str(folder),  # looked at, not needed
        "PATH": sass.search_path(),  # the compiler writes PTX of the version that the ptxas it finds can read
    }
    with tempfile.TemporaryFile("w+") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_lab.compiling"],
            env=environment, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
        asked, answers = worker.stdin, worker.stdout
        assert asked is not None and answers is not None

        def row_of(case: Case) -> dict[str, Any]:
            print(json.dumps(dataclasses.asdict(case)), file=asked, flush=True)
            line = answers.readline()
            if not line:
                log.seek(0)
                raise RuntimeError(f"the compiler ended its process at {case}:\n{log.read()[-3000:]}")
            return json.loads(line)

        try:
            yield row_of
        finally:
            worker.kill()
            worker.communicate()


def compile_case(case: Case, folder: Path) -> dict[str, Any]:
    """Compiles one case and reads what is left in `folder`."""
    import jax

    from pallas_kernels.int4_matmul.gpu_blocks import GpuPlan

    gpu = case.gpu
    plan = GpuPlan(**case.plan) if case.plan else case.model.choose_plan(case.problem, gpu)
    for old in folder.iterdir():
        old.unlink()
    same = _kernel_of(case, plan)
    start = time.perf_counter()
    with aot.traced_for_gpu(case.device, gpu.cores):
        sharding = jax.sharding.SingleDeviceSharding(aot.compile_device(case.device))
        placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in _arguments(case)]
        program = jax.jit(lambda x, *w: _product(case, plan, gpu, x, w)).trace(*placed)
        program.lower(lowering_platforms=("cuda",)).compile()
    if same not in _left:  # a kernel is compiled, and dumped, once in a process
        _left[same] = {name: _text(folder, suffix) for name, suffix in (("ptx", "ptx"), ("host", "ll"))}
    seconds = round(time.perf_counter() - start, 2)
    return {"jax": jax.__version__, "plan": dataclasses.asdict(plan), "seconds": seconds, **_left[same]}


_left: dict[Any, dict[str, str]] = {}


def _kernel_of(case: Case, plan: Any) -> Any:
    """What two cases with the same kernel have in common."""
    from pallas_kernels.int4_matmul.mosaic_gpu import COLUMN_MULTIPLE, ROW_MULTIPLE

    rows = case.rows if case.experts else -(-case.rows // ROW_MULTIPLE)
    depth = -(-case.k // COLUMN_MULTIPLE)
    return dataclasses.replace(case, rows=rows, k=depth, plan=None, group_size=case.group), case.groups, plan


def _arguments(case: Case) -> list[Any]:
    """x, rows of each expert, words, scale and zero points, as shapes."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.int4_matmul.gpu_fragments import STRIP, padded_length

    by_group = (*case.lead, case.groups, case.n)
    shapes = [
        jax.ShapeDtypeStruct((case.rows, case.n if case.transposed else case.k), jnp.dtype(case.dtype)),
        *[jax.ShapeDtypeStruct(case.lead, jnp.int32)] * bool(case.experts),
        jax.ShapeDtypeStruct((*case.lead, case.n // STRIP, 2 * case.bits * padded_length(case.k)), jnp.int32),
        jax.ShapeDtypeStruct(by_group, jnp.dtype(case.scale_dtype)),
    ]
    return [*shapes, jax.ShapeDtypeStruct(by_group, jnp.uint8)] if case.asymmetric else shapes


def _product(case: Case, plan: Any, gpu: Any, x: Any, w: Any) -> Any:
    from pallas_kernels.grouped_int4_matmul.mosaic_gpu import grouped_int4_matmul_mosaic_gpu
    from pallas_kernels.grouped_int4_matmul.mosaic_gpu_transposed import grouped_int4_matmul_mosaic_gpu_transposed
    from pallas_kernels.int4_matmul import gpu_blocks_mma
    from pallas_kernels.int4_matmul.mosaic_gpu import int4_matmul_mosaic_gpu
    from pallas_kernels.int4_matmul.mosaic_gpu_mma import int4_matmul_mosaic_gpu_mma
    from pallas_kernels.int4_matmul.mosaic_gpu_transposed import int4_matmul_mosaic_gpu_transposed
    from pallas_kernels.int4_matmul.spec import HOPPER, PackedSpec
    from pallas_kernels.int4_matmul.tiles import Packed

    spec = PackedSpec(case.k, case.bits, group_size=case.group, layout=HOPPER)
    asked = {"dtype": x.dtype, "gpu": gpu, "plan": plan}
    if case.experts:
        sizes, *w = w
        if case.transposed:
            return grouped_int4_matmul_mosaic_gpu_transposed(x, Packed(*w), sizes, spec, **asked)
        return grouped_int4_matmul_mosaic_gpu(x, Packed(*w), sizes, spec, fits=case.fits, **asked)
    if case.transposed:
        return int4_matmul_mosaic_gpu_transposed(x, Packed(*w), spec, **asked)
    if case.model is gpu_blocks_mma:
        return int4_matmul_mosaic_gpu_mma(x, Packed(*w), spec, **asked)
    return int4_matmul_mosaic_gpu(x, Packed(*w), spec, fits=case.fits, **asked)


def _text(folder: Path, suffix: str) -> str:
    (file,) = folder.glob(f"*.{suffix}")
    return file.read_text()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    folder = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    for line in sys.stdin:
        case = Case(**json.loads(line))
        try:
            row = compile_case(case, folder)
        except Exception as error:  # what a compiler raises has no common type
            row = {"error": f"{type(error).__name__}: {str(error)[:1000]}"}
        print(json.dumps(row), file=answers, flush=True)


if __name__ == "__main__":
    main()
