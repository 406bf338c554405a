"""Oracle: the trees that the saves were given, made again from their numbers: what a killed save leaves is one of them.

Run as a script this file is the victim: it imports JAX and Orbax once, and forks for each save that is to be killed.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jq4 import CheckpointError, QArray
from jq4.checkpoint import read_extra_file, restore, save

RANDOM_KILLS = 105
FIRST_SAVES = 30
KILLED_CALLS = ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir")


def tree_of(generation: int) -> dict[str, Any]:
    """A small model of packed and dense leaves in which every array depends on `generation`."""
    rng = np.random.default_rng(generation)
    packed = QArray(
        codes=jax.device_put(rng.integers(0, 256, (2, 32, 24), dtype=np.uint8)),
        scale=jax.device_put(rng.random((2, 4, 24), np.float32)),
        group_size=16,
    )
    dense = [jax.device_put(rng.random((3, 5), np.float32)) for _ in range(3)]
    return {"generation": generation, "layers": packed, "norms": dense, "bias": rng.random(7).astype(np.float16)}


def extra_of(generation: int) -> dict[str, bytes]:
    return {"config.json": json.dumps({"generation": generation}).encode()}


def generation_in(path: Path, replaced_meanwhile: bool = False) -> int | None:
    """The number of the tree found at `path`, all of it; None where restore says that there is none."""
    try:
        found = restore(path)
    except CheckpointError as error:
        assert "jq4.json: cannot be read" in str(error), error
        return None
    generation = found["generation"]
    wanted = tree_of(generation)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for have, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(have), np.asarray(want))
    if not replaced_meanwhile:
        assert read_extra_file(path, "config.json") == extra_of(generation)["config.json"]
    return generation


class Victim:
    """The process whose children save and are killed."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        )

    def save(self, path: Path, generation: int, **how: Any) -> dict[str, Any]:
        """Saves generation, killed `delay` seconds after the start or before the `call`-th system call, if given."""
        self.start(path, generation, **how)
        return self.wait()

    def start(self, path: Path, generation: int, **how: Any) -> None:
        assert self._process.stdin
        print(json.dumps({"path": str(path), "generation": generation, **how}), file=self._process.stdin, flush=True)

    def wait(self) -> dict[str, Any]:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(timeout=30) == 0


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    process = Victim()
    yield process
    process.close()


def leftovers_of(path: Path) -> list[str]:
    """What stands in the folder beside one manifest and one data folder."""
    names = sorted(entry.name for entry in path.iterdir())
    return [name for name in names if name != "jq4.json" and name != names[0]]


def killed_saves(victim: Victim, paths: Iterator[Path], kills: int, seed: int) -> Iterator[tuple[Path, int, bool]]:
    """Saves generations 2, 3, ... until so many saves were killed; each as (path, generation, whether it was killed).

    The moments are spread over the time that a save takes, which is learned from those that came through.
    """
    rng, finished = random.Random(seed), [victim.save(next(paths), 1)["seconds"]]
    for generation in range(2, 2 + 4 * kills):
        path = next(paths)
        reply = victim.save(path, generation, delay=rng.uniform(0, 1.2 * min(finished[-5:])))
        yield path, generation, reply["killed"]
        kills -= reply["killed"]
        if kills == 0:
            return
        if not reply["killed"]:
            finished.append(reply["seconds"])
    pytest.fail(f"{kills} of the kills came too late")


def test_a_replacing_save_killed_at_random_leaves_the_old_or_the_new_checkpoint(tmp_path, victim):
    path, current, found_old = tmp_path / "model", 1, 0
    for _, generation, killed in killed_saves(victim, itertools.repeat(path), RANDOM_KILLS - FIRST_SAVES, seed=0):
        found = generation_in(path)
        assert found in (current, generation), f"found generation {found} of {current} and {generation}"
        assert killed or found == generation
        found_old += found == current
        current = found
    assert found_old > 20
    save(path, tree_of(1000), extra_files=extra_of(1000))
    assert generation_in(path) == 1000
    assert leftovers_of(path) == []


def test_a_first_save_killed_at_random_leaves_nothing_readable_or_the_checkpoint(tmp_path, victim):
    paths = (tmp_path / f"model{number}" for number in itertools.count())
    found_none = 0
    for path, generation, killed in killed_saves(victim, paths, FIRST_SAVES, seed=1):
        found = generation_in(path)
        assert found in (None, generation)
        assert killed or found == generation
        found_none += found is None
        if found is None and found_none % 3 == 0:
            save(path, tree_of(generation + 1), extra_files=extra_of(generation + 1))
            assert generation_in(path) == generation + 1
            assert leftovers_of(path) == []
    assert found_none > 5


@pytest.mark.parametrize("replaced", [False, True])
def test_a_save_killed_before_each_of_its_system_calls_leaves_the_old_or_the_new_checkpoint(tmp_path, victim, replaced):
    path, old = tmp_path / "model", 1 if replaced else None
    save(tmp_path / "old", tree_of(1), extra_files=extra_of(1))
    outcomes = []
    for call in range(500):
        if replaced:
            shutil.copytree(tmp_path / "old", path)
        reply = victim.save(path, 2, call=call)
        found = generation_in(path)
        assert found in (old, 2), f"killed before call {call}: found generation {found}"
        outcomes.append(found)
        if not reply["killed"]:
            break
        shutil.rmtree(path, ignore_errors=True)
    assert not reply["killed"]
    assert outcomes == sorted(outcomes, key=lambda found: found == 2)
    assert outcomes.count(old) > 15
    assert outcomes.count(2) > (5 if replaced else 1)
    assert leftovers_of(path) == []


def test_a_reader_meets_whole_checkpoints_while_another_process_replaces_them(tmp_path, victim):
    path = tmp_path / "model"
    save(path, tree_of(0), extra_files=extra_of(0))
    victim.start(path, 1, repeat=12, pause=0.05)
    found = [generation_in(path, replaced_meanwhile=True) for _ in range(40)]
    assert not victim.wait()["killed"]
    found.append(generation_in(path))
    assert None not in found
    assert found == sorted(found)
    assert found[-1] == 12


def serve() -> None:
    """Reads one request a line; forks a child that saves, and kills it as asked."""
    import etils.epath  # noqa: F401
    import orbax.checkpoint  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        ready_read, ready_write = os.pipe()
        child = os.fork()
        if child == 0:
            save_in_child(request, ready_write)
        os.close(ready_write)
        os.read(ready_read, 1)
        os.close(ready_read)
        start = time.perf_counter()
        status = killed_after(request["delay"], child) if "delay" in request else os.waitpid(child, 0)[1]
        reply = {"killed": status != 0, "seconds": time.perf_counter() - start}
        print(json.dumps(reply), flush=True)


def killed_after(delay: float, child: int) -> int:
    """The exit status of `child`, which is killed if it still lives after `delay` seconds."""
    deadline = time.perf_counter() + delay
    while (left := deadline - time.perf_counter()) > 0:
        time.sleep(min(left, 0.001))
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def save_in_child(request: dict[str, Any], ready: int) -> None:
    status = 1
    try:
        trees = {n: tree_of(n) for n in range(request["generation"], request["generation"] + request.get("repeat", 1))}
        if "call" in request:
            kill_before_call(request["call"])
        os.write(ready, b"r")
        for generation, tree in trees.items():
            save(request["path"], tree, extra_files=extra_of(generation))
            time.sleep(request.get("pause", 0))
        status = 0
    finally:
        os._exit(status)


def kill_before_call(number: int) -> None:
    """This process dies just before its `number`-th call of those that change what is on disk."""
    count = iter(range(1_000_000))

    def counted(function):
        def call(*args, **kwargs):
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in KILLED_CALLS:
        setattr(os, name, counted(getattr(os, name)))


if __name__ == "__main__":
    serve()
