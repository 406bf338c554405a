"""Fuzzes the readers by coverage: what reaches code that nothing reached before is kept, and changed further.

    python -m benchmarks.fuzz_coverage [--seconds 60] [--seed 0] [--reader gguf ...] [--keep FOLDER] [--json FILE]

`benchmarks.fuzz` changes sound files once and opens each; here Atheris (pip install atheris; CPython 3.11) drives the
same changes and the same readers, judged alike (benchmarks/fuzzing/limits.py). Each reader runs in a process of its
own, for so many seconds. `--keep` keeps corpora and findings, and goes on from them when given again; `--only FILE`
opens one input again, for which Atheris is not needed.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fuzzing import limits, paths
from benchmarks.fuzzing.as_bytes import input_of
from benchmarks.fuzzing.readers import READERS
from benchmarks.provenance import ROOT, publish

GUIDED = tuple(sorted({*READERS} - {"checkpoint"}))
_COVERED = re.compile(r"^#\d+\s+(?P<event>\w+)\s+cov: (?P<branches>\d+) ft: \d+ corp: (?P<kept>\d+)/", re.MULTILINE)


def available() -> bool:
    return importlib.util.find_spec("atheris") is not None


def campaign(name: str, seconds: int, seed: int, folder: Path) -> dict[str, Any]:
    """Counts of one reader, the branches of jq4 and models that sound files reach and that were reached in the end."""
    for inner in ("corpus", "seeds", "found", "work"):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    (folder / "outcomes").unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.fuzzing.guided", name, str(folder.resolve()), str(seconds), str(seed)]
    environment = os.environ | {"PYTHONHASHSEED": "0", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace")
    letters = (folder / "outcomes").read_text() if (folder / "outcomes").exists() else ""
    counts = {what: letters.count(what[0]) for what in limits.OUTCOMES}
    told = list(_COVERED.finditer(ran.stderr))
    if ran.returncode or not told:  # ended by something else than its time
        counts[limits.MISBEHAVED] += 1
        print(ran.stderr[-4000:], file=sys.stderr, flush=True)
    began = next((one for one in told if one["event"] == "INITED"), None)
    return {
        "reader": name,
        "files": sum(counts.values()),
        **counts,
        "branches_of_seeds": int(began["branches"]) if began else None,
        "branches": int(told[-1]["branches"]) if told else None,
        "kept": int(told[-1]["kept"]) if told else None,
        "seconds": seconds,
    }


def once(name: str, file: Path) -> None:
    """Opens one input again, and says what becomes of it."""
    with tempfile.TemporaryDirectory() as folder:
        reader = input_of(name, Path(folder))
        reader.warm_up()
        work = reader.work(file.read_bytes())
        with limits.bounded_memory(), paths.watched(Path(folder)):
            print(*limits.outcome(work, True), sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", nargs="+", choices=GUIDED, default=GUIDED)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where corpora and findings stay")
    parser.add_argument("--only", type=Path, metavar="FILE", help="open one input of one --reader again")
    parser.add_argument("--json", help="a file to write")
    arguments = parser.parse_args(argv)
    if arguments.only:
        return once(arguments.reader[0], arguments.only)
    if not available():
        sys.exit("benchmarks.fuzz_coverage: atheris is not installed; pip install atheris")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.reader:
            folder = (arguments.keep or Path(temporary)) / name
            rows.append(campaign(name, arguments.seconds, arguments.seed, folder))
            print(rows[-1], flush=True)
            for file in sorted((folder / "found").glob("*.txt")):
                print(f"{file.with_suffix('')}\n{file.read_text()}", file=sys.stderr, flush=True)
            if arguments.json:
                totals = {key: sum(row[key] for row in rows) for key in ("files", *limits.OUTCOMES, "seconds")}
                publish(arguments.json, "fuzz_coverage", totals | {"rows": rows})
    return sys.exit(1 if any(row[limits.MISBEHAVED] for row in rows) else 0)


if __name__ == "__main__":
    main()
