"""What a conversion may write to, and the rename that makes its work the destination.

Nothing but DST and DST.partial is touched. An older conversion in DST (it has a jq4-conversion.json; jq4's own folders
a jq4.json) is replaced, as jq4 quantize replaces an older folder of its own; anything else that stands there is
refused. A new DST appears by one rename of a folder whose every byte is on disk.
"""

import os
import shutil
from pathlib import Path

from jq4.checkpoint.atomic import check_ours, overlap, sync_folder
from jq4.checkpoint.conversion.progress import REPLACED, Journal, folder_of
from jq4.checkpoint.manifest import MANIFEST
from jq4.errors import CheckpointError, JQ4Error

REPORT = "jq4-conversion.json"  # software that opens folders of weights looks for files by name, and not for this one


def overlapping(read: Path, out: Path) -> Path | None:
    """Which of OUT and OUT.partial, the work on it, is the folder `read`, lies in it or holds it; None for neither."""
    places = (out.absolute(), out.resolve())  # work on a link's target lies beside the target
    written = (*places, *(folder_of(place) for place in places if place.name))
    return next((each for each in written if overlap(read.resolve(), each.resolve())), None)


def check_apart(read: Path, out: Path) -> None:
    """Refuses to write into what is read, or around it."""
    if written := overlapping(read, out):
        raise JQ4Error(f"{written}: is, lies in or holds {read}, which is read; choose another folder for the result")


def check_convertible(source: Path, destination: Path) -> None:
    """Refuses what would destroy something, before any work is done."""
    there = destination.resolve()
    if not there.name:
        raise JQ4Error(f"{destination}: is no folder to write to; give a name")
    check_apart(source, destination)
    if not os.path.lexists(destination):
        return
    if not destination.is_dir():
        raise JQ4Error(f"{destination}: a file stands there; remove it or choose another path")
    found = sorted(path.name for path in destination.iterdir())
    if MANIFEST in found:
        check_ours(there)
    elif found and REPORT not in found:
        raise JQ4Error(
            f"{destination}: holds something else than a conversion of jq4 (found {', '.join(found[:5])}, wanted "
            f"{REPORT}); choose another path or remove it; nothing was changed"
        )


def check_space(destination: Path, needed: int) -> None:
    """Raises CheckpointError where the disk cannot hold `needed` more bytes."""
    parent = destination.resolve().parent
    free = shutil.disk_usage(next(path for path in (parent, *parent.parents) if path.exists())).free
    if free < needed:
        raise CheckpointError(no_space(destination, needed, free))


def no_space(destination: Path, needed: int, free: int) -> str:
    return (
        f"{destination}: the disk is full: {needed:,} bytes are still to be written and {free:,} are free; make room "
        "and give the same command again, which goes on from what is written"
    )


def install(journal: Journal, destination: Path, single: str | None = None) -> None:
    """Renames the finished work to the destination: the folder, or where the output is a file the file `single`."""
    made = journal.data if single is None else journal.data / single
    if made.exists():
        if destination.is_dir():
            shutil.rmtree(journal.folder / REPLACED, ignore_errors=True)
            destination.rename(journal.folder / REPLACED)
        made.rename(destination)
    sync_folder(destination.parent)
