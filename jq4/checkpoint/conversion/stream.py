"""A few weights at a time through reading, encoding and writing, within a bound of memory.

Each of a few threads takes a weight all the way (numpy, hashing and the system's writes let other threads run), so one
reads or encodes while another waits for the disk. Where the output puts each byte does not depend on their order.

What a weight holds on its way is estimated from its sizes: its packed bytes (mapped pages of the file among them) and
what is made of them, with the copies that transposing and unpacking make, and its values where it is rounded anew; a
weight that is made in pieces holds a few of those, and of one that lies by rows in both files it is that of a slab
(slabs.py). A thread begins a weight only while the sum stays within the bound; a weight beyond the bound by itself is
an error before anything is written.
"""

import dataclasses
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from jq4.checkpoint.conversion.progress import Journal
from jq4.checkpoint.conversion.slabs import Part, lies_by_rows, parts, share
from jq4.checkpoint.foreign.writing import PIECE_BYTES, Planned
from jq4.checkpoint.safetensors_files import DTYPES
from jq4.errors import JQ4Error
from jq4.freed_pages import give_back_freed_pages
from jq4.report import format_bytes

MEMORY = 10**9
_LEAST_ROOM = 2**28
COPIES = 3  # of what is read and what is made, as measured for GPTQ, whose codes are transposed
PIECES = 8
THREADS = 3  # more than most machines need to be busy: one of them mostly waits for the disk
_GIVE_BACK = 64 * 2**20


class Output(Protocol):
    """Files that weights are written to: FixedFiles, OrbaxFiles."""

    def write(self, planned: Planned, parts: Iterable[Part]) -> dict[str, Any]: ...

    def holds(self, planned: Planned, record: Mapping[str, Any]) -> bool: ...

    def finish(self, records: Iterable[Mapping[str, Any]]) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Target:
    """What is to be written.

    Attributes:
      planned: each weight as it is written; names are unique.
      nbytes_of: bytes that each takes, by the weight's name.
      nbytes: bytes of the whole output.
      identity: JSON that tells the output from any other.
      open: opens the output in a folder that exists; what is there already stays.
      single: the name of the file in that folder where the output is a file.
    """

    planned: tuple[Planned, ...]
    nbytes_of: Mapping[str, int]
    nbytes: int
    identity: Any
    open: Callable[[Path], Output]
    single: str | None = None


def stream(
    target: Target,
    output: Output,
    journal: Journal,
    room: int,
    progress: Callable[[int, int], None],
    notes_of: Callable[[Planned], Mapping[str, Any]],
) -> int:
    """Writes every weight that the journal does not have, or whose bytes are not there; the number found done.

    `progress` is told bytes done and of all. `notes_of`: what the journal keeps of a weight beside its digests.
    """
    budget, found = _Budget(room), 0
    sizes, done, total = target.nbytes_of, 0, sum(target.nbytes_of.values())
    before = dict(journal.records)

    def take(each: Planned) -> tuple[str, bool]:
        name = each.weight.name
        if name in before and output.holds(each, before[name]["wrote"]):
            return name, True
        with budget.held(held_bytes(each, sizes[name])):
            wrote = output.write(each, parts(each, sizes[name]))
            journal.add(name, {"wrote": wrote, **notes_of(each)})
        budget.give_back_sometimes(sizes[name] + each.weight.nbytes)
        return name, False

    progress(0, total)
    with ThreadPoolExecutor(THREADS) as pool:
        running, rest = set(), iter(target.planned)
        try:
            while True:
                while len(running) <= THREADS and (following := next(rest, None)) is not None:
                    running.add(pool.submit(take, following))
                if not running:
                    return found
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for name, was_done in (future.result() for future in ended):
                    done, found = done + sizes[name], found + was_done
                    progress(done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def held_bytes(planned: Planned, made: int) -> int:
    """What a weight holds in memory, at most, while it is read and becomes `made` bytes."""
    given, held = planned.weight.nbytes, share(planned, made)
    if planned.pieces is not None:
        packed = COPIES * math.ceil(given * held) if planned.weight.packed else 0
        return packed + min(PIECES * PIECE_BYTES, 4 * (given + made))
    anew = planned.requantized or any(dtype not in DTYPES for dtype, _ in planned.tensors.values())
    values = 4 * math.prod(planned.weight.shape) if anew else 0  # in float32, where a weight is rounded as a whole
    return COPIES * math.ceil((given + made + values) * held)


def default_memory() -> int:
    """1 GB, or where the program itself takes nearly that (jax on an accelerator does), a little more than it takes."""
    return max(MEMORY, resident_bytes() + _LEAST_ROOM)


def room_within(memory: int) -> int:
    """What of `memory`, the bound of the process, is left for weights; 0 where there is none."""
    return max(0, memory - resident_bytes())


def resident_bytes() -> int:
    """Memory of this process, where the system tells."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def check_fits(target: Target, room: int, memory: int) -> None:
    """Raises JQ4Error naming the weight that needs the most memory, where that is more than there is."""
    needed = {each.weight.name: held_bytes(each, target.nbytes_of[each.weight.name]) for each in target.planned}
    name = max(needed, key=lambda each: needed[each], default="")
    if name and needed[name] > room:
        least = needed[name] + resident_bytes()
        planned = next(each for each in target.planned if each.weight.name == name)
        in_parts = lies_by_rows(planned) or not planned.weight.packed
        whole = "" if in_parts else " as a whole (one of the two formats does not keep its rows apart)"
        raise JQ4Error(
            f"{name}: converting it{whole} takes about "
            f"{format_bytes(needed[name])} of memory, and of --memory {format_bytes(memory)} the program itself leaves "
            f"{format_bytes(room)}; give --memory {-(-least // 10**7) / 100:g}GB or more"
        )


class _Budget:
    """Lets weights in while what they hold together stays within the bound; one alone always."""

    def __init__(self, room: int) -> None:
        self._room, self._held, self._passed = room, 0, 0
        self._changed = threading.Condition()

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._room)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()

    def give_back_sometimes(self, passed: int) -> None:
        with self._changed:
            self._passed += passed
            if self._passed < _GIVE_BACK:
                return
            self._passed = 0
        give_back_freed_pages()
