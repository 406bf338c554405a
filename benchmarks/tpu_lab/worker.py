"""Compiles what it is told: one line of JSON a job on standard input, one a row on standard output.

A process of its own, because libtpu reads where to dump once, and because a compiler that aborts takes its process
along (jobs.py starts the next).
"""

import json
import os
import sys

from benchmarks.tpu_lab.contenders import Case
from benchmarks.tpu_lab.measure import measure


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    for line in sys.stdin:
        job = json.loads(line)
        row = measure(job["chip"], job["contender"], Case(**job["case"]))
        print(json.dumps(row), file=answers, flush=True)


if __name__ == "__main__":
    main()
