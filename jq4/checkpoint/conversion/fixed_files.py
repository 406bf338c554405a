"""Output files of known layout, filled weight by weight, in any order and by several threads.

Each file is made at its full size (sparse), so that a tensor is written at its place whatever stands around it, and
written again after a kill: the same bytes at the same place. What was written is told as SHA-256 of each tensor's
bytes, and `holds` reads them back: a record is believed because the bytes are there, not because it was written.
"""

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jq4.checkpoint.atomic import naming, sync_folder, write_synced
from jq4.checkpoint.conversion.layout import Layout, Place
from jq4.checkpoint.conversion.slabs import Part
from jq4.checkpoint.foreign.writing import PIECE_BYTES, Planned
from jq4.checkpoint.safetensors_files import DTYPES
from jq4.errors import JQ4Error

SYNC_BYTES = 256 * 2**20  # dirty pages that a crash of the machine may lose


class FixedFiles:
    """The files of `layout` in `folder`, which exists."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder, self._layout = folder, layout
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._unsynced: dict[str, int] = {}
        for name, head in layout.heads.items():
            with naming(folder / name):
                self._descriptors[name] = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
                os.ftruncate(self._descriptors[name], layout.sizes[name])
                _write_all(self._descriptors[name], head, 0)

    def write(self, planned: Planned, parts: Iterable[Part]) -> dict[str, str]:
        """Writes the tensors of one weight, whose rows come part by part; their digests by name."""
        digests = {name: hashlib.sha256() for name in planned.tensors}
        written = dict.fromkeys(planned.tensors, 0)
        for rows, value in parts:
            for name, pieces in _encoded(planned, value, rows):
                for piece in pieces:
                    content = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
                    self._write_piece(planned, name, content, written[name])
                    digests[name].update(content)
                    written[name] += len(content)
        for name, done in written.items():
            if done != self._layout.places[name].nbytes:
                raise self._other_bytes(planned, name)
        return {name: digest.hexdigest() for name, digest in digests.items()}

    def holds(self, planned: Planned, record: Mapping[str, Any]) -> bool:
        """Whether the files hold what `write` gave `record` for."""
        return set(record) == set(planned.tensors) and all(
            self._digest(self._layout.places[name]) == digest for name, digest in record.items()
        )

    def finish(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Syncs everything and writes the small files."""
        del records
        for name, descriptor in self._descriptors.items():
            with naming(self._folder / name):
                os.fsync(descriptor)
        for name, content in self._layout.beside.items():
            (self._folder / name).unlink(missing_ok=True)
            write_synced(self._folder / name, content)
        sync_folder(self._folder)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _write_piece(self, planned: Planned, name: str, content: memoryview, at: int) -> None:
        """`at`: bytes of the tensor that stand before it."""
        place = self._layout.places[name]
        if at + len(content) > place.nbytes:
            raise self._other_bytes(planned, name)
        with naming(self._folder / place.file):
            _write_all(self._descriptors[place.file], content, place.start + at)
            self._sync_sometimes(place.file, len(content))

    def _other_bytes(self, planned: Planned, name: str) -> JQ4Error:
        wanted = self._layout.places[name].nbytes
        return JQ4Error(f"{planned.weight.name}: {name} was made with other bytes than the {wanted} planned")

    def _sync_sometimes(self, file: str, written: int) -> None:
        with self._lock:
            unsynced = self._unsynced[file] = self._unsynced.get(file, 0) + written
            if unsynced < SYNC_BYTES:
                return
            self._unsynced[file] = 0
        os.fsync(self._descriptors[file])

    def _digest(self, place: Place) -> str:
        digest = hashlib.sha256()
        for start in range(place.start, place.start + place.nbytes, PIECE_BYTES):
            size = min(PIECE_BYTES, place.start + place.nbytes - start)
            digest.update(os.pread(self._descriptors[place.file], size, start))
        return digest.hexdigest()


def _encoded(planned: Planned, value: Any, rows: slice) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
    """The tensors of these rows, cut into pieces; those that have no rows come with the first."""
    if planned.pieces is not None:
        (name,) = planned.tensors
        yield name, planned.pieces(value)
        return
    made = planned.encode(value)
    _check_as_planned(planned, made, rows)
    for name in planned.tensors if rows.start == 0 else planned.by_rows:
        yield name, _cut(made[name])


def _cut(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return (flat[start : start + PIECE_BYTES] for start in range(0, flat.size, PIECE_BYTES))


def _check_as_planned(planned: Planned, made: Mapping[str, np.ndarray], rows: slice) -> None:
    whole = (rows.start, rows.stop) == (0, *planned.weight.shape[:1])
    for name, (dtype, shape) in planned.tensors.items():
        found = made.get(name)
        if found is not None and not whole and name in planned.by_rows:  # the bytes of all rows are counted in the end
            shape = (*found.shape[:1], *shape[1:])
        if found is None or (dtype in DTYPES and (found.shape != shape or found.dtype != DTYPES[dtype])):
            told = "nothing" if found is None else f"{found.dtype}{list(found.shape)}"
            raise JQ4Error(f"{planned.weight.name}: {name} was made as {told}, planned was {dtype}{list(shape)}")


def _write_all(descriptor: int, content: Any, start: int) -> None:
    view = memoryview(content)
    while len(view):
        written = os.pwrite(descriptor, view, start)
        view, start = view[written:], start + written
