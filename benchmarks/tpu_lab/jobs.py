"""Jobs for worker processes: rows in the order of the jobs, also when a compiler aborts or hangs in one of them."""

import dataclasses
import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.tpu_lab.compiling import environment

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Job:
    """One case of one contender on one chip; `case` has the fields of contenders.Case."""

    chip: str
    contender: str
    case: dict[str, Any]

    @property
    def row(self) -> dict[str, Any]:
        return {"chip": self.chip, "contender": self.contender, **self.case}


def run(jobs: Iterable[Job], *, dump: bool, timeout: float = 600) -> Iterator[dict[str, Any]]:
    """The row of each job. With `dump` the schedules are counted; without, it is only asked whether it compiles."""
    with tempfile.TemporaryDirectory(prefix="tpu-lab-") as folder:
        worker = None
        try:
            for job in jobs:
                worker = worker or _Worker(Path(folder), dump)
                row = worker.ask(job, timeout)
                if row is None:
                    row = job.row | {"status": "failed", "error": worker.stop()}
                    worker = None
                yield row
        finally:
            if worker is not None:
                worker.stop()


class _Worker:
    """A process that runs worker.py."""

    def __init__(self, folder: Path, dump: bool) -> None:
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.tpu_lab.worker"],
                env=environment(folder / "llo" if dump else None), cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip

    def ask(self, job: Job, timeout: float) -> dict[str, Any] | None:
        """None where the process died, or took too long."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(dataclasses.asdict(job)), file=self.process.stdin, flush=True)
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        line = self.process.stdout.readline() if ready else ""
        return json.loads(line) if line else None

    def stop(self) -> str:
        """Ends the process; why it did not answer, in a line."""
        late = self.process.poll() is None
        self.process.kill()
        self.process.communicate()
        if late:
            return "the compiler took too long"
        last = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        return f"the compiler ended its process with code {self.process.returncode}: {''.join(last)[:300]}"
