"""Runs that can be killed: a process that has imported all they need and forks for each.

A run is asked for by a line of JSON and answered by one. The parent never asks for JAX's devices, so that a child may:
it only imports. A test module that is its own script says what a run is (`serve`) and asks for runs (`Victim`).
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Victim:
    """The process whose children run and are killed; `script` calls `serve`."""

    def __init__(self, script: str, **environment: str) -> None:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": _flags_of_one_device(), **environment},
        )

    def ask(self, kill_after: float | None = None, **request: Any) -> dict[str, Any]:
        """A run's answer beside {"killed": bool, "seconds": float}; killed from without `kill_after` seconds on."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"kill_after": kill_after, "request": request}), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


def _flags_of_one_device() -> str:
    """The tests' own flags, so that killed runs are compiled as quickly as other tests."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(flag for flag in flags if "device_count" not in flag)


def serve(run: Callable[..., dict[str, Any]]) -> None:
    """Answers every request by a forked `run(**request)`, whose answer is JSON."""
    for line in sys.stdin:
        asked = json.loads(line)
        reader, writer = os.pipe()
        started = time.perf_counter()
        child = os.fork()
        if not child:
            os.write(writer, json.dumps(run(**asked["request"])).encode())
            os._exit(0)
        os.close(writer)
        if asked["kill_after"] is not None and not select.select([reader], [], [], asked["kill_after"])[0]:
            os.kill(child, signal.SIGKILL)
        with os.fdopen(reader) as pipe:
            told = pipe.read()
        _, status = os.waitpid(child, 0)
        assert status == 0 or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL), status
        answer = {"killed": not told, "seconds": time.perf_counter() - started}
        print(json.dumps(answer | (json.loads(told) if told else {})), flush=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Path within the folder -> bytes, of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
