"""What verbs print with: results to stdout (tables, or one JSON object), progress and warnings to stderr."""

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from jq4 import plain_json

Step = Callable[..., None]  # (done, of all, description=None)


def console() -> Any:
    """A rich console on stdout, as wide as the terminal, and 120 columns where there is none."""
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)


def print_json(data: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(plain_json.dumps(data, indent=2) + "\n")


@contextlib.contextmanager
def progress(description: str) -> Iterator[Step]:
    """A bar with the time left, on stderr; nothing at all where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total, description=None: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total, description=None: bar.update(
            task, completed=done, total=total, description=description
        )


@contextlib.contextmanager
def plain_warnings(verb: str) -> Iterator[None]:
    """Warnings as one line each, without the source line that Python shows."""

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        print(f"jq4 {verb}: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def say(message: str) -> None:
    """A remark for the reader, on stderr, so that stdout stays data."""
    print(message, file=sys.stderr)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


def versions() -> dict[str, str]:
    """What a figure depends on: jq4, JAX, Python and the device."""
    import platform

    import jax

    from jq4 import __version__

    device = jax.devices()[0].device_kind
    return {"jq4": __version__, "jax": jax.__version__, "python": platform.python_version(), "device": device}
