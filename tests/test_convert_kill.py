"""Oracle: the files of a conversion that nobody killed; those of one killed again and again are the same, byte by byte.

Run as a script this file is the victim: it imports jq4 once, and forks for each conversion that is to be killed.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from tests.killed_runs import Victim, contents, serve
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


def answer(words: Sequence[str], kill_at: int | None) -> dict[str, Any]:
    found, steps = run(words, kill_at=kill_at)
    return {"steps": steps, "resumed": found["resumed"]}


class Converting(Victim):
    """The process whose children convert and are killed."""

    def __init__(self) -> None:
        super().__init__(__file__)

    def run(self, words: Sequence[Any], kill_at: int | None = None, kill_after: float | None = None) -> dict[str, Any]:
        """{"killed", "seconds"}, and of one that came through "steps" and "resumed", the weights that it found done.

        Killed before its step `kill_at`, by itself, or `kill_after` seconds from its start, from without.
        """
        return self.ask(kill_after, words=list(map(str, words)), kill_at=kill_at)


@pytest.fixture(scope="module")
def victim():
    process = Converting()
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


if __name__ == "__main__":
    import orbax.checkpoint
    import tensorstore

    import jq4.checkpoint.convert
    import jq4.cli._conversion

    assert jq4.checkpoint.convert and jq4.cli._conversion and orbax.checkpoint and tensorstore
    serve(answer)
