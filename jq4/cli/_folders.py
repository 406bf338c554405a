"""Folders that verbs write their results to."""

from collections.abc import Collection
from pathlib import Path

from jq4.errors import JQ4Error


def overlapping(read: Path, out: Path) -> Path | None:
    """Which of OUT and OUT.partial, the work on it, is the folder `read`, lies in it or holds it; None for neither."""
    from jq4.checkpoint.atomic import overlap
    from jq4.checkpoint.conversion.progress import folder_of

    places = (out.absolute(), out.resolve())  # work on a link's target lies beside the target
    written = (*places, *(folder_of(place) for place in places if place.name))
    return next((each for each in written if overlap(read.resolve(), each.resolve())), None)


def check_only_ours(out: Path, written: Collection[str], whose: str, option: str = "--out") -> None:
    """Refuses to write among other files than those `written` by an earlier run; `whose` says so of a stranger."""
    if out.exists() and not out.is_dir():
        raise JQ4Error(f"{out}: a file stands there, wanted a folder; choose another with {option}")
    strangers = sorted({path.name for path in out.iterdir()} - set(written)) if out.is_dir() else []
    if strangers:
        raise JQ4Error(f"{out}: holds {strangers[0]}, which {whose}; choose another folder with {option}")
