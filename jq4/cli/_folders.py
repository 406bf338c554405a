"""Folders that verbs write their results to."""

from collections.abc import Collection
from pathlib import Path

from jq4.errors import JQ4Error


def check_destination(read: Path, out: Path) -> None:
    """Refuses what would destroy something, before any work is done."""
    from jq4.checkpoint.atomic import check_ours
    from jq4.checkpoint.conversion.destination import check_apart

    check_apart(read, out)
    check_ours(out.resolve())


def check_without_adapters(out: Path) -> None:
    """Refuses to replace weights that adapters were trained beside, and which no others can take the place of."""
    from jq4.cli import _models
    from models.adapted import ADAPTERS

    adapters = out / ADAPTERS
    if _models.is_checkpoint(adapters):
        raise JQ4Error(
            f"{adapters}: adapters that were trained beside the weights in {out}, and would be left without them: "
            f"choose another folder, or keep what they learned by jq4 merge {out} OUT and remove them"
        )


def check_only_ours(out: Path, written: Collection[str], whose: str, option: str = "--out") -> None:
    """Refuses to write among other files than those `written` by an earlier run; `whose` says so of a stranger."""
    if out.exists() and not out.is_dir():
        raise JQ4Error(f"{out}: a file stands there, wanted a folder; choose another with {option}")
    strangers = sorted({path.name for path in out.iterdir()} - set(written)) if out.is_dir() else []
    if strangers:
        raise JQ4Error(f"{out}: holds {strangers[0]}, which {whose}; choose another folder with {option}")
