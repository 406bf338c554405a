"""Kill `jq4 train` at random times, go on with the same command, and compare every loss with a run left in peace.

    python -m benchmarks.train_kills [--kills 20] [--devices 1 2] [--seed 0] [--json FILE]

A random Llama of two layers (tests/random_model.py) is distilled to three bits, a state kept every four of 40 steps. A
process is killed (SIGKILL) from without, at a moment drawn from the seconds that a whole run takes, so that kills fall
into the calibrated start, steps, states under way, the save and what comes between. A folder is killed until a run on
it ends in peace; then the losses of all its steps, to the last bit, and the files of the trained model are compared
with those of the undisturbed run, and another folder is begun, until enough kills are counted. Half of the kills are
for each number of devices (of the host, which XLA is told to take for several), weights cut over all of them.
"""

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS, SAVE_EVERY = 40, 4


def command(source: Path, out: Path, devices: int) -> list[str]:
    """The one command that is given again and again."""
    options = {"--recipe": "gptq-w3g32", "--steps": STEPS, "--save-every": SAVE_EVERY, "--context": 16, "--seed": 1}
    options |= {"--devices": devices, "--fsdp": devices, "--batch-size": 8, "--accumulate": 2, "--calibration-rows": 8}
    words = ["train", "distill", source, "--text", source / "text.txt", "--out", out]
    return [str(word) for word in (*words, *(part for pair in options.items() for part in pair))]


def run(words: list[str], kill_after: float | None = None) -> tuple[bool, float]:
    """(whether it was killed, seconds) of a process of its own; this one has imported what takes long to import."""
    from jq4.cli import main

    with tempfile.TemporaryFile() as said:
        begun, child = time.perf_counter(), os.fork()
        if child == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            os._exit(main(words))
        status = waited_for(child, None if kill_after is None else begun + kill_after)
        killed, seconds = os.WIFSIGNALED(status), time.perf_counter() - begun
        if not killed and os.waitstatus_to_exitcode(status):
            said.seek(0)
            code, last = os.waitstatus_to_exitcode(status), said.read()[-3000:].decode(errors="replace")
            raise SystemExit(f"jq4 {' '.join(words)}: exit code {code}\n{last}")
    return killed, seconds


def waited_for(child: int, deadline: float | None) -> int:
    """How a process ended, which is killed at the deadline."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if deadline is not None and time.perf_counter() >= deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.002)


def results(out: Path) -> dict[str, Any]:
    """The losses of every step, as they were written, and the name of the model's data: the hash of its files."""
    lines = (out / "training" / "metrics.jsonl").read_text().splitlines()
    return {
        "losses": [json.loads(line)["loss"] for line in lines],
        "data": json.loads((out / "jq4.json").read_text())["data"],
    }


def states_of(out: Path) -> int:
    """The newest state of a run that was killed, by steps; 0 for none."""
    folder = out.with_name(out.name + ".partial") / "states"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def kill_and_compare(source: Path, folder: Path, devices: int, kills: int, draw: random.Random) -> list[dict[str, Any]]:
    """One entry for each folder: when its runs were killed, the steps that they went on from, sameness."""
    run(command(source, folder / "compiles", devices))
    _, whole = run(command(source, folder / "peace", devices))
    wanted = results(folder / "peace")
    assert len(wanted["losses"]) == STEPS and len(set(wanted["losses"])) == STEPS
    found: list[dict[str, Any]] = []
    counted = 0
    while counted < kills:
        out, killed_at, states = folder / f"out-{len(found)}", [], []
        while True:
            moment = draw.uniform(0, whole) if counted < kills else None
            killed, _ = run(command(source, out, devices), moment)
            if not killed:
                break
            assert moment is not None
            counted += 1
            killed_at.append(round(moment, 3))
            states.append(states_of(out))
        entry = {"devices": devices, "killed_at": killed_at, "of_seconds": round(whole, 3), "went_on_from": states}
        found.append(entry | {"identical": results(out) == wanted})
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="a file to write")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(name) / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(arguments.devices)}"
        source = model_of(Path(name) / "model")
        folders = []
        for devices in arguments.devices:
            place = Path(name) / f"on-{devices}"
            place.mkdir()
            folders += kill_and_compare(source, place, devices, arguments.kills // len(arguments.devices), draw)
    kills = sum(len(each["killed_at"]) for each in folders)
    data = {"kills": kills, "identical": all(each["identical"] for each in folders), "steps": STEPS, "folders": folders}
    if arguments.json:
        from benchmarks.provenance import publish

        publish(arguments.json, "train_kills", data)
    print(f"{kills} kills in {len(folders)} folders: {'identical' if data['identical'] else 'NOT IDENTICAL'}")
    sys.exit(not data["identical"])


def model_of(folder: Path) -> Path:
    """A model in a process of its own: JAX must not run here, where processes are forked from."""
    child = os.fork()
    if child == 0:
        from tests.random_model import make_random_model

        folder.mkdir()
        make_random_model(folder)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    for name in ("jq4.cli.training.descent", "jq4.driver", "jq4.train.running.states", "models.language_model"):
        importlib.import_module(name)

    return folder


if __name__ == "__main__":
    main()
