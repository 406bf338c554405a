"""Converts a checkpoint: streams its weights into DST.partial, and makes that DST once every byte is there.

What is written, where each byte goes and what is lost is known before the first weight is read (conversion/); what
was done survives a kill, and the same call goes on from there. The source is never written to.
"""

import dataclasses
import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jq4.checkpoint.conversion.destination import check_convertible, check_space, install, no_space
from jq4.checkpoint.conversion.progress import Journal, journal_for
from jq4.checkpoint.conversion.requantize import Requantizer
from jq4.checkpoint.conversion.stream import Output, Target, check_fits, default_memory, room_within, stream
from jq4.checkpoint.manifest import MANIFEST
from jq4.errors import CheckpointError, JQ4Error


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was done.

    Attributes:
      weights: how many were written; `resumed` of them by a run that was killed.
      nbytes: bytes of the output.
    """

    weights: int
    resumed: int
    nbytes: int


def convert(
    source: str | Path,
    destination: str | Path,
    target: Target,
    *,
    about: Mapping[str, Any],
    memory: int | None = None,
    restart: bool = False,
    requantizer: Requantizer | None = None,
    check: Callable[[Path], None] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Converted:
    """Writes `target` to `destination`, whole or not at all.

    Args:
      source: the folder or file that the target's weights are read from; it must not change meanwhile.
      destination: a new folder (or file, where the target is one), or an older conversion, which is replaced.
      about: JSON that tells this conversion from another one of the same files: formats, options.
      memory: bytes that the process may hold; None for 1 GB, or somewhat more where the process holds that already.
      restart: throws away what another conversion left unfinished beside the destination.
      requantizer: what rounds weights again, and measures that.
      check: called with the finished output before it becomes the destination; what it raises leaves it where it is.
      progress: told bytes done and of all.

    Raises:
      JQ4Error: bad input, or a weight that the target turns out not to hold; CheckpointError: a full disk, or a source
        that changed; OSError. The destination is as it was then.
    """
    source, destination = Path(source), Path(destination).resolve()
    check_convertible(source, destination)
    memory = default_memory() if memory is None else memory
    room = room_within(memory)
    check_fits(target, room, memory)
    listed = _listing(source)
    identity = {**about, "source": listed, "output": _digest(target.identity), "versions": _versions()}
    destination.parent.mkdir(parents=True, exist_ok=True)
    with journal_for(destination, identity, restart) as journal:
        if journal.finished:
            resumed = len(target.planned)
        else:
            check_space(destination, target.nbytes - _written(target, journal))
            resumed = _write(target, journal, destination, room, requantizer, progress)
            if _listing(source) != listed:
                raise CheckpointError(f"{source}: changed while it was converted; give the same command with --restart")
        made = journal.data if target.single is None else journal.data / target.single
        if check is not None and made.exists():
            check(made)
        journal.finish()
        install(journal, destination, target.single)
    return Converted(len(target.planned), resumed, target.nbytes)


def _write(
    target: Target,
    journal: Journal,
    destination: Path,
    room: int,
    requantizer: Requantizer | None,
    progress: Callable[[int, int], None],
) -> int:
    errors = {} if requantizer is None else requantizer.errors
    errors.update({name: record["error"] for name, record in journal.records.items() if "error" in record})

    def notes_of(planned: Any) -> dict[str, Any]:
        name = planned.weight.name
        return {"error": errors[name]} if name in errors else {}

    output: Output | None = None
    try:
        output = target.open(journal.data)
        resumed = stream(target, output, journal, room, progress, notes_of)
        output.finish([journal.records[each.weight.name]["wrote"] for each in target.planned])
        return resumed
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(destination.parent).free
        raise CheckpointError(no_space(destination, target.nbytes - _written(target, journal), free)) from error
    finally:
        if output is not None:
            output.close()


def _written(target: Target, journal: Journal) -> int:
    return sum(target.nbytes_of.get(name, 0) for name in journal.records)


def _listing(source: Path) -> list[list[Any]]:
    """The files of the source by name, size and time of change; jq4's own folders by their manifest, which has sums."""
    if (source / MANIFEST).exists():
        return [[MANIFEST, hashlib.sha256((source / MANIFEST).read_bytes()).hexdigest()]]
    files = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]
    if not files:
        raise JQ4Error(f"{source}: holds no files; give a checkpoint")
    return [[path.name, (stat := path.stat()).st_size, stat.st_mtime_ns] for path in files]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _versions() -> dict[str, str]:
    import numpy as np

    from jq4 import __version__

    return {"jq4": __version__, "numpy": np.__version__}
