"""Kill `jq4 convert` at random points, give the same command again, and compare every byte with a run left in peace.

    python -m benchmarks.convert_kills [--kills 50] [--seed 0] [--layers 6] [--json FILE]

The conversions and the victim are those of tests/test_convert_kill.py: a process that is killed (SIGKILL) by itself,
before a step that is drawn from all steps of a whole run (a write, a sync, a rename, a removal), or from without, at a
moment that is drawn from the seconds that a whole run takes; each every other time. A destination is killed until a run
comes to its end; then its files are compared, and another one is begun, until enough kills are counted. While it is
unfinished, the destination must not exist.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import publish
from tests.killed_runs import contents
from tests.small_checkpoints import write_gptq
from tests.test_convert_kill import CONVERSIONS, Converting


def kill_and_compare(
    victim: Converting, folder: Path, source: Path, how: Sequence[str], kills: int, draw: random.Random
) -> list[dict[str, Any]]:
    """One entry for each destination: its kills, the weights that the last run found done, sameness."""
    folder.mkdir()
    steps = victim.run([source, folder / "peace", *how])["steps"]
    seconds = victim.run([source, folder / "timed", *how])["seconds"]
    wanted, found, left = contents(folder / "peace"), [], kills
    while left > 0:
        target = folder / f"out-{len(found)}"
        entry: dict[str, Any] = {"kills": 0, "hidden_until_whole": True}
        while True:
            when: dict[str, Any] = {}
            if left > 0:
                at_step = {"kill_at": draw.randrange(steps)}
                when = draw.choice([at_step, {"kill_after": draw.uniform(0, seconds)}])
            done = victim.run([source, target, *how], **when)
            if not done["killed"]:
                break
            left, entry["kills"] = left - 1, entry["kills"] + 1
            entry["hidden_until_whole"] &= not target.exists() or contents(target) == wanted
        same = contents(target) == wanted and not target.with_name(f"{target.name}.partial").exists()
        found.append({**entry, "weights_found_done": done["resumed"], "identical": same})
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50, help="of each conversion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--json", help="a file to write")
    arguments = parser.parse_args()
    draw, data = random.Random(arguments.seed), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_gptq(folder / "source", arguments.layers)
        victim = Converting()
        for conversion, how in CONVERSIONS.items():
            found = kill_and_compare(victim, folder / conversion, folder / "source", how, arguments.kills, draw)
            data[conversion] = {
                "words": list(how),
                "kills": sum(each["kills"] for each in found),
                "identical": all(each["identical"] for each in found),
                "hidden_until_whole": all(each["hidden_until_whole"] for each in found),
                "destinations": found,
            }
        victim.close()
    if arguments.json:
        publish(arguments.json, "convert_kills", data)
    for conversion, told in data.items():
        same = "identical" if told["identical"] and told["hidden_until_whole"] else "NOT IDENTICAL"
        print(f"{conversion}: {told['kills']} kills of {len(told['destinations'])} destinations: {same}")
    sys.exit(not all(told["identical"] and told["hidden_until_whole"] for told in data.values()))


if __name__ == "__main__":
    main()
