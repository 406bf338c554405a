"""A file of figures, one JSON object a line and one line a step, that goes on where a killed run stopped.

What was told after the state that the run goes on from will be told again: those lines are taken off, and with them a
last line that the kill cut short.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jq4 import plain_json
from jq4.checkpoint.atomic import replace_file


class Metrics:
    """The file, open for what comes after step `done`."""

    def __init__(self, file: Path, done: int = 0) -> None:
        kept = [line for line in _whole_lines(file) if json.loads(line)["step"] <= done]
        replace_file(file, "".join(f"{line}\n" for line in kept).encode())
        self._stream = file.open("a", encoding="utf-8")

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes a line, for other processes to see."""
        self._stream.write(plain_json.dumps(row) + "\n")
        self._stream.flush()

    def sync(self) -> None:
        """Waits until the disk has every line."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of figures; without a last one that was cut short."""
    return [json.loads(line) for line in _whole_lines(file)]


def _whole_lines(file: Path) -> list[str]:
    if not file.exists():
        return []
    *whole, _ = file.read_text(encoding="utf-8").split("\n")
    return whole
