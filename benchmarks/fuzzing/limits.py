"""Runs one file within limits: CPU seconds, memory, its own folder, and JQ4Error as the only way out."""

import contextlib
import resource
import signal
import time
import traceback
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.fuzzing import paths
from jq4.errors import JQ4Error

SECONDS = 1.0  # of CPU, for a file of a few KB
HEADROOM = 384 * 2**20  # of address space beyond what the process has when a campaign begins
TRACED = 8 * 2**20  # bytes at a time that a file of a few KB may take, where it is measured
OUTCOMES = OPENED, REFUSED, MISBEHAVED = "opened", "refused", "misbehaved"


class TooSlowError(BaseException):
    """Not an Exception, so that no reader can turn it into an error of its own."""


def _too_slow(*_: Any) -> None:
    raise TooSlowError


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """No allocation beyond HEADROOM; warnings are errors, as in the tests."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + HEADROOM, hard))
    previous = signal.signal(signal.SIGPROF, _too_slow)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        signal.signal(signal.SIGPROF, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(work: Callable[[], Any], traced: bool = False) -> tuple[str, str]:
    """(what became of it, the error's text or the traceback). Within `bounded_memory`, and `paths.watched`."""
    signal.setitimer(signal.ITIMER_PROF, 4 * SECONDS)
    start = time.process_time()
    paths.strayed()  # what laying the file out touched
    if traced:
        tracemalloc.start()
    try:
        work()
        found = OPENED, ""
    except JQ4Error as error:
        found = _said(error)
    except TooSlowError:
        found = MISBEHAVED, f"took more than {4 * SECONDS} seconds\n{traceback.format_exc()}"
    except BaseException:
        found = MISBEHAVED, traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        peak = tracemalloc.get_traced_memory()[1] if traced else 0
        if traced:
            tracemalloc.stop()
    seconds = time.process_time() - start
    if touched := paths.strayed():
        return MISBEHAVED, f"left its folder: {', '.join(touched[:5])}; {found[1]}"
    if found[0] != MISBEHAVED and peak > TRACED:
        return MISBEHAVED, f"took {peak} bytes; {found[1]}"
    if found[0] != MISBEHAVED and seconds > SECONDS * (3 if traced else 1):
        return MISBEHAVED, f"took {seconds:.1f} seconds; {found[1]}"
    return found


def _said(error: JQ4Error) -> tuple[str, str]:
    text = str(error)
    try:
        text.encode()
    except UnicodeEncodeError:
        return MISBEHAVED, f"an error that cannot be printed: {text!r}"
    if len(text) < 20 or len(text) > 4000:
        return MISBEHAVED, f"an error of {len(text)} characters: {text[:200]}"
    return REFUSED, text


def kind_of(said: str) -> str:
    """What a traceback has in common with others of the same defect: its last lines."""
    lines = [line for line in said.splitlines() if line.strip().startswith("File ")]
    return lines[-1] if lines else said[:60]
