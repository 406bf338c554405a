"""The record of what a function could not do on packed weights: which leaf, where, why, and how many bytes it cost.

    dense    the leaf was dequantized at an operation that has no packed rule
    relaid   the leaf stayed packed but is re-packed into another layout at every call (`jq4.prepare` does it once)
    uncut    the leaf lies on several devices, and its product is left to XLA, which cuts no kernel
    merged   the leaf was dense already, and its adapter was added to it as a dense matrix (jq4.with_lora)
    unused   the leaf has an adapter, and the function multiplied nothing by it

`jq4.quantized` opens a record for each trace; operations below it (jq4.qarray_ops, jq4.matmul, jq4.partition) reach the
running one through `note_relay` and `note_uncut`, which do nothing where none is running.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

DENSE = "dense"
RELAID = "relaid"
UNCUT = "uncut"
MERGED = "merged"
UNUSED = "unused"


class DensifiedWarning(UserWarning):
    """A packed leaf was dequantized because an operation has no packed rule."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf at one primitive.

    Attributes:
      kind: "dense", "relaid", "uncut", "merged" or "unused".
      path: the leaf's path in its argument.
      primitive: the JAX primitive that met it.
      reason: why it could not stay as it was.
      nbytes: bytes of the dense array, or of the packed one that was re-laid or left uncut, once.
      times: how many equations of the trace did this; a scan's body counts once.
    """

    kind: str
    path: str
    primitive: str
    reason: str
    nbytes: int
    times: int = 1


class Record:
    """Entries of one trace, in the order they were met. True if a leaf, or an adapter, went dense."""

    nothing = "every packed leaf stayed packed"

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str, str, str], Entry] = {}

    @property
    def entries(self) -> list[Entry]:
        return list(self._entries.values())

    @property
    def dense(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind == DENSE]

    @property
    def relaid(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind == RELAID]

    @property
    def uncut(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind == UNCUT]

    def note(self, kind: str, path: str, primitive: str, reason: str, nbytes: int) -> bool:
        """Adds one event; True if it is the first of its kind, leaf and primitive."""
        first = not any((kind, path, primitive) == known[:3] for known in self._entries)
        key = (kind, path, primitive, reason)
        before = self._entries.get(key)
        times = before.times + 1 if before else 1
        self._entries[key] = Entry(kind, path, primitive, reason, max(nbytes, before.nbytes if before else 0), times)
        return first

    def clear(self) -> None:
        self._entries.clear()

    def __bool__(self) -> bool:
        return any(entry.kind in (DENSE, MERGED) for entry in self.entries)

    def __len__(self) -> int:
        return len(self._entries)

    def to_json(self) -> str:
        """A JSON array of the entries."""
        return json.dumps([dataclasses.asdict(entry) for entry in self.entries], indent=1)

    def report(self) -> str:
        """The entries as a readable table."""
        if not self._entries:
            return self.nothing
        rows = [("kind", "leaf", "primitive", "MiB", "times", "why")]
        rows += [
            (entry.kind, entry.path, entry.primitive, f"{entry.nbytes / 2**20:.2f}", str(entry.times), entry.reason)
            for entry in self.entries
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join("  ".join([*map(str.ljust, row[:5], widths), row[5]]) for row in rows)

    __repr__ = report


_running: contextvars.ContextVar[tuple[Record, str, str] | None] = contextvars.ContextVar("jq4_record", default=None)


@contextlib.contextmanager
def recording(record: Record, path: str, primitive: str) -> Iterator[None]:
    """Whatever is noted inside belongs to this leaf at this primitive."""
    token = _running.set((record, path, primitive))
    try:
        yield
    finally:
        _running.reset(token)


def note_relay(q: Any, reason: str) -> None:
    """Notes that the weight `q` is re-laid at every call, if a transform is running."""
    _note(RELAID, q, reason)


def relay_to_note(q: Any, reason: str) -> Callable[[], Any] | None:
    """What notes later, of the transform that is running now, that the weight `q` is re-laid at every call."""
    if (running := _running.get()) is None:
        return None
    record, path, primitive = running
    return functools.partial(record.note, RELAID, path, primitive, reason, q.nbytes)


def note_uncut(q: Any, reason: str) -> None:
    """Notes that the product of the sharded weight `q` is left to XLA, if a transform is running."""
    _note(UNCUT, q, reason)


def _note(kind: str, q: Any, reason: str) -> None:
    if (running := _running.get()) is not None:
        record, path, primitive = running
        record.note(kind, path, primitive, reason, q.nbytes)
