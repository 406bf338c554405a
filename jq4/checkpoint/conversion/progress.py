"""The journal of a conversion: which weights are done, so that a killed one goes on.

    DST.partial/journal.jsonl   {"identity": {...}}, then {"done": weight, "wrote": digests} for each weight, one a line
    DST.partial/data/           what DST will be
    DST.partial/replaced/       what DST was, for the moment between two renames

A line is appended once its weight's bytes are written, and neither waits for the disk: the next run believes a line
because the bytes that it tells of have its digests. So a killed process loses the weights in hand and no other, a
crash of the machine what the disk did not have yet, and a line torn in the middle is no line. The identity is
everything that the bytes depend on; no run goes on from what another one made. In a folder that holds anything else,
nothing is touched.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jq4.checkpoint.atomic import lock_folder, naming, sync_folder
from jq4.errors import CheckpointError, JQ4Error

JOURNAL, DATA, REPLACED = "journal.jsonl", "data", "replaced"
SUFFIX = ".partial"


class Journal:
    """The journal of one conversion in `folder`, which this process alone holds."""

    def __init__(self, folder: Path, descriptor: int, records: dict[str, dict[str, Any]], finished: bool) -> None:
        self.folder = folder
        self.records = records
        self.finished = finished
        self._descriptor = descriptor
        self._lock = threading.Lock()

    @property
    def data(self) -> Path:
        return self.folder / DATA

    def add(self, weight: str, record: Mapping[str, Any]) -> None:
        """Says that a weight is written."""
        with self._lock:
            self.records[weight] = dict(record)
            self._append({"done": weight, **record})

    def finish(self) -> None:
        """Says that all is written and synced, and only the rename is left."""
        self._append({"finished": True})
        os.fsync(self._descriptor)
        self.finished = True

    def _append(self, entry: Mapping[str, Any]) -> None:
        with naming(self.folder / JOURNAL):
            line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
            while line:
                line = line[os.write(self._descriptor, line) :]


def folder_of(destination: Path) -> Path:
    """Where the unfinished work for a destination lies."""
    return destination.with_name(destination.name + SUFFIX)


@contextlib.contextmanager
def journal_for(destination: Path, identity: Mapping[str, Any], restart: bool) -> Iterator[Journal]:
    """The journal of `destination`, made if need be; kept on a kill, an interrupt, a full disk, and removed otherwise.

    Raises JQ4Error for the folder of another conversion, unless `restart` says to throw that away.
    """
    folder = folder_of(destination)
    lock = lock_folder(folder, f"{folder}: another run is at work there; wait for it, or choose another destination")
    try:
        _check_ours(folder)
        records, finished, length = ({}, False, 0) if restart else _read(folder, identity)
        if finished and not destination.exists() and not _holds_data(folder):  # it was done, and was removed since
            records, finished, length = {}, False, 0
        if not length:
            _put_back(destination)
            _clear(folder)
        journal = _opened(folder, identity, records, finished, length)
        try:
            yield journal
        except CheckpointError:  # the disk failed, and not the work
            raise
        except JQ4Error:
            _remove(folder)
            raise
        finally:
            os.close(journal._descriptor)
        _remove(folder)
    finally:
        os.close(lock)


def _opened(folder: Path, identity: Mapping[str, Any], records: Any, finished: bool, length: int) -> Journal:
    with naming(folder / JOURNAL):
        descriptor = os.open(folder / JOURNAL, os.O_WRONLY | os.O_CREAT, 0o666)
        os.ftruncate(descriptor, length)
        os.lseek(descriptor, length, os.SEEK_SET)
    journal = Journal(folder, descriptor, records, finished)
    if not length:
        journal._append({"identity": dict(identity)})
    if not finished:
        journal.data.mkdir(exist_ok=True)
    sync_folder(folder)
    return journal


def _read(folder: Path, identity: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], bool, int]:
    """Records by weight, whether it is finished, and the length of the lines that are whole."""
    file = folder / JOURNAL
    if not file.exists():
        return {}, False, 0
    entries, length = _whole_lines(file.read_bytes())
    if not entries:
        return {}, False, 0
    if "identity" not in entries[0]:
        raise JQ4Error(f"{file}: not a journal of jq4 convert; remove {folder}, or restart (--restart)")
    if len(entries) == 1:  # nothing that could be lost
        return {}, False, 0
    held, wanted = entries[0]["identity"], json.loads(json.dumps(identity))
    differing = sorted(name for name in {*held, *wanted} if held.get(name) != wanted.get(name))
    if differing:
        raise JQ4Error(
            f"{folder}: holds the unfinished work of another conversion, whose {', '.join(differing)} differ: give the "
            "same command to finish that one, or restart (--restart) to throw its work away"
        )
    records = {entry.pop("done"): entry for entry in entries[1:] if "done" in entry}
    return records, any("finished" in entry for entry in entries), length


def _whole_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    entries: list[dict[str, Any]] = []
    length = 0
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            entry = None
        if entry is None or not _is_line(entry):
            break
        entries.append(entry)
        length += len(line)
    return entries, length


def _is_line(entry: Any) -> bool:
    """Whether it is what `Journal` writes; files that it tells of lie in the folder."""
    if not isinstance(entry, dict) or not isinstance(entry.get("identity", {}), dict):
        return False
    wrote = entry.get("wrote") if "done" in entry else {}
    if not isinstance(entry.get("done", ""), str) or not isinstance(wrote, dict):
        return False
    return all(isinstance(told, str) or _is_file(name, told) for name, told in wrote.items())


def _is_file(name: str, told: Any) -> bool:
    """A path in the folder, with a size and a digest."""
    inside = not name.startswith("/") and ".." not in name.split("/") and "\0" not in name
    return inside and isinstance(told, list) and [type(one) for one in told] == [int, str]


def _check_ours(folder: Path) -> None:
    found = {path.name for path in folder.iterdir()}
    ours = {JOURNAL, DATA, REPLACED} if JOURNAL in found else set()
    if strangers := sorted(found - ours):
        without = "" if ours else " and no journal"
        raise JQ4Error(f"{folder}: holds {strangers[0]}{without}, so it is not ours; remove or rename it")


def _holds_data(folder: Path) -> bool:
    return (folder / DATA).exists() and any((folder / DATA).iterdir())


def _put_back(destination: Path) -> None:
    """What stood in the destination, where a kill came between the two renames of another conversion."""
    replaced = folder_of(destination) / REPLACED
    if replaced.exists() and not destination.exists():
        replaced.rename(destination)


def _clear(folder: Path) -> None:
    """Removes the work; a kill on the way leaves a journal, so that the folder is known as ours."""
    with contextlib.suppress(FileNotFoundError):
        os.truncate(folder / JOURNAL, 0)
    for name in (DATA, REPLACED):
        shutil.rmtree(folder / name, ignore_errors=True)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # what it leaves, the next run clears
        shutil.rmtree(folder / DATA, ignore_errors=True)
        shutil.rmtree(folder / REPLACED, ignore_errors=True)
        (folder / JOURNAL).unlink()
        folder.rmdir()
