"""Which paths Python opens, makes or removes while a hostile file is read: all of them must lie in the file's folder.

By their names, before links are followed: a link that lies in the folder was put there by whoever opens it (Hugging
Face's cache is made of them), and a name that leaves the folder was put there by the file. Python's own files are let
be, which modules that load late are read from.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_EVENTS = ("open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir", "os.truncate")
_HOME = Path(__file__).resolve().parents[2]
_inside: str | None = None
_strayed: list[str] = []
_hooked = False


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Notes what is touched outside of the folder, for `strayed`."""
    global _inside, _hooked
    if not _hooked:  # for good: Python has no way to take a hook away
        sys.addaudithook(_note)
        _hooked = True
    _inside = os.path.abspath(folder)  # noqa: PTH100
    try:
        yield
    finally:
        _inside = None


def strayed() -> list[str]:
    """What was touched outside since this was asked last."""
    found = _strayed.copy()
    _strayed.clear()
    return found


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _inside is None or event not in _EVENTS:
        return
    for path in arguments[: 2 if event == "os.rename" else 1]:
        if isinstance(path, str | bytes | os.PathLike) and not _is_allowed(os.path.abspath(os.fsdecode(path))):  # noqa: PTH100
            _strayed.append(f"{event} {path!r}")


def _is_allowed(path: str) -> bool:
    """`path`: absolute, without "..", links not followed."""
    owned = (_inside or "", str(_HOME), sys.prefix, sys.base_prefix, *filter(None, sys.path), "/proc/self", "/dev/null")
    return any(path == one or path.startswith(one.rstrip("/") + "/") for one in owned)
