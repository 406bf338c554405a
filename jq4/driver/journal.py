"""How far a run is, so that a killed one goes on: a folder with a lock, an identity, and what became of each block.

    DST.partial/journal.json    {"identity": {...}, "blocks": [rows of block 0, rows of block 1, ...]}
    DST.partial/blocks/         the blocks themselves (jq4.driver.store)
    DST.partial/dense/          the blocks before they were quantized, where the recipe distils the whole model
    DST.partial/streams/        activations that memory would not hold; of no use to a later run

A block counts once the journal names it, and the journal is replaced by one rename after the block's files are synced:
whenever the process is killed, everything that the journal names is there. What is removed, the journal forgets first,
and it goes last. The identity is everything that the result depends on (recipe, source, rows, functions, versions), so
that no run goes on from what another one made. In a folder that holds anything else, nothing is touched.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jq4.checkpoint.atomic import lock_folder, replace_file, unfinished
from jq4.errors import CheckpointError, JQ4Error

_JOURNAL = "journal.json"
_FOLDERS = ("blocks", "dense", "streams")
SUFFIX = ".partial"


class Journal:
    """The journal of one run in `folder`, which this process alone holds."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], blocks: list[list[dict[str, Any]]]) -> None:
        self.folder = folder
        self._identity = dict(identity)
        self._blocks = blocks

    @property
    def blocks(self) -> list[list[dict[str, Any]]]:
        """The report's rows of each block that is done, from block 0 on."""
        return self._blocks

    def add_block(self, rows: list[dict[str, Any]]) -> None:
        """Says that the next block is done; its files must be synced."""
        self._blocks.append(rows)
        self.write()

    def write(self) -> None:
        content = {"identity": self._identity, "blocks": self._blocks}
        replace_file(self.folder / _JOURNAL, json.dumps(content).encode())


@contextlib.contextmanager
def journal_in(folder: Path, identity: Mapping[str, Any], restart: bool) -> Iterator[Journal]:
    """The journal of `folder`, made if need be; kept on a kill or an interrupt, removed when done and on a JQ4Error.

    Raises JQ4Error for the folder of another run, unless `restart` says to throw that away.
    """
    lock = lock_folder(folder, f"{folder}: another run is at work there; wait for it, or choose another destination")
    try:
        _check_ours(folder)
        journal = Journal(folder, identity, [] if restart else _read(folder, identity))
        if journal.blocks:
            journal.write()
        else:
            _clear(journal)
        for name in ("blocks", "dense"):
            (folder / name).mkdir(exist_ok=True)
        try:
            yield journal
        except CheckpointError:  # the save failed, and not the work
            raise
        except JQ4Error:
            _remove(journal)
            raise
        _remove(journal)
    finally:
        os.close(lock)


def digest_of(value: Any) -> str:
    """SHA-256 of an array's dtype, shape and bytes, or of a JSON value."""
    if isinstance(value, np.ndarray):
        content = f"{value.dtype.str}{value.shape}".encode() + np.ascontiguousarray(value).tobytes()
    else:
        content = json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def _read(folder: Path, identity: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    file = folder / _JOURNAL
    if not file.exists():
        return []
    try:
        found = json.loads(file.read_bytes())
        held, blocks = found["identity"], found["blocks"]
    except (ValueError, KeyError, TypeError) as error:
        raise JQ4Error(f"{file}: not a journal of jq4 ({error}); remove {folder}, or restart (--restart)") from error
    if not blocks:  # nothing that could be lost
        return []
    differing = sorted(name for name in {*held, *identity} if held.get(name) != identity.get(name))
    if differing:
        raise JQ4Error(
            f"{folder}: holds the unfinished work of another run, whose {', '.join(differing)} differ: give the same "
            "command to finish that one, or restart (--restart) to throw its work away"
        )
    return blocks


def _check_ours(folder: Path) -> None:
    found = {path.name for path in folder.iterdir()} - {unfinished(folder / _JOURNAL).name}
    ours = {_JOURNAL, *_FOLDERS} if _JOURNAL in found else set()
    if strangers := sorted(found - ours):
        without = "" if ours else " and no journal"
        raise JQ4Error(f"{folder}: holds {strangers[0]}{without}, so it is not ours; remove or rename it")


def _clear(journal: Journal) -> None:
    """Removes the work; a kill on the way leaves a journal that names none of it."""
    journal.blocks.clear()
    journal.write()
    for name in _FOLDERS:
        shutil.rmtree(journal.folder / name, ignore_errors=True)


def _remove(journal: Journal) -> None:
    with contextlib.suppress(OSError):  # what it leaves, the next run clears
        _clear(journal)
        (journal.folder / _JOURNAL).unlink()
        journal.folder.rmdir()
