"""One reader under Atheris (libFuzzer for Python): python -m benchmarks.fuzzing.guided READER FOLDER SECONDS SEED.

A process of its own, for three reasons: jq4 must be loaded for the first time under Atheris' eyes, which put a counter
at every branch of its bytecode; libFuzzer ends the process when its time is up; and a reader that ends it in
another way is thereby known. In FOLDER, which `benchmarks.fuzz_coverage` makes:

    corpus/      the inputs that reached new code, kept by libFuzzer; those of an earlier run are where this one begins
    seeds/       the sound ones
    outcomes     a letter for each input (o opened, r refused, m misbehaved), written as it happens
    found/       the inputs that misbehaved, one of each kind, and beside each what it did (.txt)
"""

import hashlib
import os
import random
import sys
from pathlib import Path

import atheris  # pyright: ignore[reportMissingImports]

_TRACED = 16  # every so many inputs memory is measured, which is slow


def main(name: str, folder: Path, seconds: str, seed: str) -> None:
    with atheris.instrument_imports(include=["jq4", "models"], enable_loader_override=False):
        from benchmarks.fuzzing import limits, paths
        from benchmarks.fuzzing.as_bytes import LONGEST, input_of

        work = folder / "work"
        reader = input_of(name, work)
        reader.warm_up()
    for number, content in enumerate(reader.seeds()):
        (folder / "seeds" / str(number)).write_bytes(content)
    outcomes = os.open(folder / "outcomes", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    kinds: set[str] = set()
    count = 0

    def one(content: bytes) -> None:
        nonlocal count
        count += 1
        what, said = limits.outcome(reader.work(content), count % _TRACED == 0)
        os.write(outcomes, what[:1].encode())
        if what == limits.MISBEHAVED and (kind := limits.kind_of(said)) not in kinds:
            kinds.add(kind)
            file = folder / "found" / hashlib.sha256(content).hexdigest()[:12]
            file.write_bytes(content)
            file.with_suffix(".txt").write_text(said, errors="backslashreplace")

    def changed(content: bytes, longest: int, number: int) -> bytes:
        return reader.changed(random.Random(number), content, atheris.Mutate)[:longest]

    flags = [f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={LONGEST}", "-rss_limit_mb=0", "-timeout=60"]
    flags += ["-mutate_depth=2", "-report_slow_units=60", f"-artifact_prefix={folder}/found/"]
    corpora = [str(folder / "corpus"), str(folder / "seeds")]
    atheris.Setup([sys.argv[0], *flags, *corpora], one, custom_mutator=changed)
    with limits.bounded_memory(), paths.watched(folder):
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4])
