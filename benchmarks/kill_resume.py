"""Kill `quantize_blocks` at random points, go on with the same call, and compare every byte with a run left in peace.

    python -m benchmarks.kill_resume [--kills 20] [--at steps|times] [--seed 0] [--json FILE]

The model, the recipe (GPTQ) and the victim are those of tests/test_driver_resume.py: a process that is killed (SIGKILL)

    at steps    by itself, before a step that is drawn from all steps of a whole run (a report of progress, a sync, a
                rename), so that kills fall into statistics, methods, writes and the save alike
    at times    from without, at a moment drawn from the seconds that a whole run takes: most kills fall into what takes
                longest, and any may fall into the middle of a computation or a write

A folder is killed until a run on it ends in peace; then its files are compared, and another folder is begun, until
enough kills are counted.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.provenance import publish
from tests.killed_runs import contents
from tests.test_driver_resume import RECIPE, Quantizing

STEPS, TIMES = "steps", "times"


def kill_and_compare(
    victim: Quantizing, folder: Path, kills: int, at: str, draw: random.Random
) -> list[dict[str, Any]]:
    """One entry for each folder: where its runs were killed, blocks that the last one found, sameness."""
    steps = victim.run(folder / "peace")["steps"]
    wanted = contents(folder / "peace")
    seconds = victim.run(folder / "timed")["seconds"]  # the second run, since the first one compiled
    found: list[dict[str, Any]] = []
    while sum(len(each["killed_at"]) for each in found) < kills:
        place = folder / f"out-{len(found)}"
        killed_at: list[float] = []
        while True:
            left = kills - sum(len(each["killed_at"]) for each in found) - len(killed_at)
            when: dict[str, Any] = {}
            if left > 0:
                when = {"kill_at": draw.randrange(steps)} if at == STEPS else {"kill_after": draw.uniform(0, seconds)}
            done = victim.run(place, **when)
            if not done["killed"]:
                break
            killed_at += [round(point, 3) for point in when.values()]
        same = contents(place) == wanted and not place.with_name(place.name + ".partial").exists()
        whole = {"of_steps": steps} if at == STEPS else {"of_seconds": round(seconds, 3)}
        found.append({"killed_at": killed_at, **whole, "blocks_found": done["resumed"], "identical": same})
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--at", choices=(STEPS, TIMES), default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="a file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        victim = Quantizing(Path(folder) / "compiled")
        drawn = random.Random(arguments.seed)
        folders = kill_and_compare(victim, Path(folder), arguments.kills, arguments.at, drawn)
        victim.close()
    data = {
        "recipe": RECIPE,
        "at": arguments.at,
        "kills": sum(len(each["killed_at"]) for each in folders),
        "identical": all(each["identical"] for each in folders),
        "folders": folders,
    }
    if arguments.json:
        publish(arguments.json, "kill_resume", data)
    print(f"{data['kills']} kills in {len(folders)} folders: {'identical' if data['identical'] else 'NOT IDENTICAL'}")
    sys.exit(not data["identical"])


if __name__ == "__main__":
    main()
