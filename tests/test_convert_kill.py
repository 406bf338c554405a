"""Oracle: the files of a conversion that nobody killed; those of one killed again and again are the same, byte by byte.

Run as a script this file is the victim: it imports jq4 once, and forks for each conversion that is to be killed.
"""

import contextlib
import io
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.small_checkpoints import write_gptq

KILLS = 4
COUNTED = ((os, "pwrite"), (os, "write"), (os, "fsync"), (os, "rename"), (os, "ftruncate"), (shutil, "rmtree"))


CONVERSIONS: dict[str, Sequence[str]] = {
    "sharded": ("--to", "compressed-tensors", "--shard-size", "30kB"),
    "orbax": ("--to", "orbax"),
}


def run(words: Sequence[str], kill_at: int | None = None) -> tuple[dict[str, Any], int]:
    """`jq4 convert WORDS --json`; before step `kill_at` (a write, sync, rename, removal) the process kills itself."""
    from jq4.cli import main

    steps, lock = 0, threading.Lock()

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            with lock:
                if steps == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                steps += 1
            return function(*args, **kwargs)

        return call

    kept = [getattr(module, name) for module, name in COUNTED]
    for (module, name), function in zip(COUNTED, kept, strict=True):
        setattr(module, name, counted(function))
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            assert main(["convert", *words, "--json"]) == 0
    finally:
        for (module, name), function in zip(COUNTED, kept, strict=True):
            setattr(module, name, function)
    return json.loads(out.getvalue()), steps


class Victim:
    """The process whose children convert and are killed."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
                "XLA_FLAGS": "",
            },
        )

    def run(self, words: Sequence[Any], kill_at: int | None = None, kill_after: float | None = None) -> dict[str, Any]:
        """{"killed": bool, "seconds": float, "steps": int or None, "resumed": weights found done}.

        Killed before its step `kill_at`, by itself, or `kill_after` seconds from its start, from without.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([list(map(str, words)), kill_at, kill_after]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def victim():
    process = Victim()
    yield process
    process.close()


@pytest.fixture(scope="module", params=list(CONVERSIONS))
def undisturbed(request, victim, tmp_path_factory):
    """The words of a conversion but for the destination, its files, and how many steps it took."""
    folder = tmp_path_factory.mktemp(request.param)
    source, how = folder / "source", CONVERSIONS[request.param]
    write_gptq(source)
    done = victim.run([source, folder / "out", *how])
    assert not done["killed"] and done["resumed"] == 0
    return (source, how), contents(folder / "out"), done["steps"]


def test_killed_at_random_steps_it_gives_the_same_bytes(undisturbed, victim, tmp_path):
    (source, how), wanted, steps = undisturbed
    draw, target = random.Random(0), tmp_path / "out"
    for _ in range(KILLS):
        done = victim.run([source, target, *how], kill_at=draw.randrange(3, steps // 4))
        assert done["killed"] and not target.exists()
    done = victim.run([source, target, *how])
    assert done["resumed"] >= 3
    assert contents(target) == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_near_the_end_it_gives_the_same_bytes(undisturbed, victim, tmp_path):
    (source, how), wanted, steps = undisturbed
    for before in (1, 3, 6):
        target = tmp_path / f"out{before}"
        assert victim.run([source, target, *how], kill_at=steps - before)["killed"]
        assert not target.exists() or contents(target) == wanted
        assert not victim.run([source, target, *how])["killed"]
        assert contents(target) == wanted and not target.with_name(f"out{before}.partial").exists()


def test_killed_while_it_replaces_an_older_one_it_gives_the_same_bytes(undisturbed, victim, tmp_path):
    (source, how), wanted, steps = undisturbed
    victim.run([source, tmp_path / "older", "--to", "gptq"])
    for before in (2, 4):
        target = tmp_path / f"out{before}"
        shutil.copytree(tmp_path / "older", target)
        was = contents(target)
        assert victim.run([source, target, *how], kill_at=steps + 1 - before)["killed"]
        assert not target.exists() or contents(target) in (was, wanted)
        assert not victim.run([source, target, *how])["killed"]
        assert contents(target) == wanted and not target.with_name(f"out{before}.partial").exists()


def serve() -> None:
    """One line in, a forked run, one line out."""
    import orbax.checkpoint
    import tensorstore

    import jq4.checkpoint.convert
    import jq4.cli._conversion

    assert jq4.checkpoint.convert and jq4.cli._conversion and orbax.checkpoint and tensorstore
    for line in sys.stdin:
        words, kill_at, kill_after = json.loads(line)
        reader, writer = os.pipe()
        started = time.perf_counter()
        child = os.fork()
        if not child:
            found, steps = run(words, kill_at=kill_at)
            os.write(writer, json.dumps({"steps": steps, "resumed": found["resumed"]}).encode())
            os._exit(0)
        os.close(writer)
        if kill_after is not None and not select.select([reader], [], [], kill_after)[0]:
            os.kill(child, signal.SIGKILL)
        with os.fdopen(reader) as pipe:
            told = pipe.read()
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, status
        answer = {"killed": not told, "seconds": time.perf_counter() - started, "steps": None, "resumed": None}
        print(json.dumps(answer | (json.loads(told) if told else {})), flush=True)


if __name__ == "__main__":
    serve()
