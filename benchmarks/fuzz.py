"""Opens files that were changed to do harm, and counts what became of them: opened, refused, misbehaved.

    python -m benchmarks.fuzz [--files 10000] [--seed 0] [--reader gptq gguf ...] [--json FILE]

Small sound files of every format are changed on the level of their parts, their headers, their text and their bytes
(benchmarks/fuzzing), then opened; every weight is read, dequantized and written in other formats. To misbehave is any
exception but JQ4Error, more than a second of CPU, memory beyond a bound, a path outside of the file's folder, or an
error that cannot be printed. A file is made by (reader, seed, number) alone, so that `--only READER:SEED:NUMBER` opens
a single one again, and shows the error.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fuzzing import limits, paths
from benchmarks.fuzzing.readers import READERS
from benchmarks.provenance import publish

_TRACED = 16  # every so many files memory is measured, which is slow
_SHOWN = 20
_SLOW = {"checkpoint": 10}  # a restore takes Orbax as long as ten files take others


def campaign(name: str, files: int, seed: int, folder: Path) -> dict[str, Any]:
    """Counts of one reader, and what misbehaved."""
    reader, counts, found = READERS[name](folder), Counter[str](), {}
    reader.warm_up()
    start = time.monotonic()
    with limits.bounded_memory(), paths.watched(folder):
        for number in range(files):
            work = reader.prepared(random.Random(f"{name}:{seed}:{number}"))
            what, said = limits.outcome(work, number % _TRACED == 0)
            counts[what] += 1
            if what == limits.MISBEHAVED and len(found) < _SHOWN:
                found.setdefault(limits.kind_of(said), f"{name}:{seed}:{number}\n{said}")
    for said in found.values():
        print(said, file=sys.stderr, flush=True)
    outcomes = {what: counts[what] for what in limits.OUTCOMES}
    return {"reader": name, "files": files, **outcomes, "seconds": round(time.monotonic() - start, 1)}


def once(what: str, folder: Path) -> None:
    """Opens a single file again, and leaves it in the folder."""
    name, seed, number = what.split(":")
    reader = READERS[name](folder)
    reader.warm_up()
    work = reader.prepared(random.Random(f"{name}:{seed}:{number}"))
    with limits.bounded_memory(), paths.watched(folder):
        print(*limits.outcome(work, True), sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--files", type=int, default=10_000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", nargs="+", choices=sorted(READERS), default=sorted(READERS))
    parser.add_argument("--only", metavar="READER:SEED:NUMBER", help="open one file again")
    parser.add_argument("--json", help="a file to write")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only:
            return once(arguments.only, Path(folder))
        rows: list[dict[str, Any]] = []
        for name in arguments.reader:
            files = arguments.files // _SLOW.get(name, 1)
            rows.append(campaign(name, files, arguments.seed, Path(folder)))
            print(rows[-1], flush=True)
            if arguments.json:
                totals = {key: sum(row[key] for row in rows) for key in ("files", *limits.OUTCOMES)}
                publish(arguments.json, "fuzz", totals | {"rows": rows})
    return sys.exit(1 if any(row[limits.MISBEHAVED] for row in rows) else 0)


if __name__ == "__main__":
    main()
