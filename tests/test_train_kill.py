"""Oracle: the losses of a run that nobody killed; those of a run killed again and again are the same, to the last bit.

Run as a script this file is the victim: it imports JAX once, and forks for each run that is to be killed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

KILLS, MOST_RUNS = 6, 12


def run(folder: Path, kill_at: int | None, delay: float) -> None:
    """The run of tests/test_train_loop.py; `delay` seconds after the figures of step `kill_at` it kills itself."""
    from test_train_loop import run_in

    from jq4.train.running.run_folder import RunFolder

    told = RunFolder.figures

    def figures(self: Any, step: int, found: dict[str, float]) -> None:
        told(self, step, found)
        if step == kill_at:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    RunFolder.figures = figures
    losses, resumed = run_in(folder, keep_every=2)
    folder.with_suffix(".json").write_text(json.dumps([losses, resumed]))


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    root = str(Path(__file__).resolve().parents[1])
    compiled_once = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **compiled_once, "PYTHONPATH": path},
    )
    assert process.stdin is not None and process.stdout is not None

    def run(folder, kill_at=None, delay=0.0):
        """[losses, steps it went on from], or None of a run that was killed."""
        process.stdin.write(json.dumps([str(folder), kill_at, delay]) + "\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        assert code in (0, -signal.SIGKILL)
        return None if code else json.loads(folder.with_suffix(".json").read_text())

    yield run
    process.communicate()
    assert process.returncode == 0


def test_killed_at_random_points_it_gives_the_same_losses_to_the_last_bit(victim, tmp_path):
    """Kills fall into steps, states under way, and what comes after them."""
    wanted, _ = victim(tmp_path / "peace")
    assert len(set(wanted)) == len(wanted)
    draw, kills, went_on_from = random.Random(0), 0, []
    for number in range(MOST_RUNS):
        while True:
            kill_at = draw.randrange(1, len(wanted)) if kills < KILLS else None
            done = victim(tmp_path / f"run-{number}", kill_at, draw.choice([0.0, 0.02, 0.1]))
            if done is not None:
                break
            kills += 1
        assert done[0] == wanted
        went_on_from.append(done[1])
        if kills == KILLS:
            break
    assert kills == KILLS and max(went_on_from) > 0


def _serve() -> None:
    import test_train_loop  # noqa: F401 imported once, before the forks

    for line in sys.stdin:
        folder, kill_at, delay = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                run(Path(folder), kill_at, delay)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
