"""Kill `quantize_blocks` at random points, go on with the same call, and compare every byte with a run left in peace.

    python -m benchmarks.kill_resume [--kills 20] [--seed 0] [--json FILE]

The model, the recipe (GPTQ) and the victim are those of tests/test_driver_resume.py: a process kills itself (SIGKILL)
before a step that is drawn at random from all steps of a whole run (a report of progress, a sync, a rename), so that
kills fall into statistics, methods, writes and the save alike. A folder is killed until a run on it ends in peace; then
its files are compared, and another folder is begun, until enough kills are counted.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.provenance import publish
from tests.test_driver_resume import RECIPE, Victim, contents


def kill_and_compare(victim: Victim, folder: Path, kills: int, draw: random.Random) -> list[dict[str, Any]]:
    """One entry for each folder: the steps at which its runs were killed, blocks that the last one found, sameness."""
    done = victim.run(folder / "peace")
    wanted, steps = contents(folder / "peace"), done["steps"]
    found: list[dict[str, Any]] = []
    while sum(len(each["killed_at"]) for each in found) < kills:
        place, killed_at = folder / f"out-{len(found)}", []
        while True:
            left = kills - sum(len(each["killed_at"]) for each in found) - len(killed_at)
            kill_at = draw.randrange(steps) if left > 0 else None
            done = victim.run(place, kill_at=kill_at)
            if not done["killed"]:
                break
            killed_at.append(kill_at)
        same = contents(place) == wanted and not place.with_name(place.name + ".partial").exists()
        found.append({"killed_at": killed_at, "of_steps": steps, "blocks_found": done["resumed"], "identical": same})
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="a file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        victim = Victim(Path(folder) / "compiled")
        folders = kill_and_compare(victim, Path(folder), arguments.kills, random.Random(arguments.seed))
        victim.close()
    data = {
        "recipe": RECIPE,
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
