"""The rows that `jq4 train` learns from and those that it is judged by."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from jq4.cli import _calibration

_ALL = 2**40  # rows


@dataclasses.dataclass(frozen=True)
class Text:
    """Rows i32[R, T] to learn from, rows that nothing is learned from (or None), and where they come from."""

    rows: Any
    held_out: Any
    about: dict[str, Any]


def read(model: Any, arguments: argparse.Namespace) -> Text:
    """The rows of --text and --held-out by the model's tokenizer."""
    import numpy as np

    from jq4.errors import JQ4Error
    from jq4.tuning.descent import split_rows

    share = _share(arguments.held_out)
    read = [_rows(model, file, arguments, "train on") for file in arguments.text]
    lengths = sorted({each.rows.shape[1] for each in read})
    if len(lengths) > 1:
        raise JQ4Error(f"--text: rows of {lengths[0]} and of {lengths[1]} tokens; cut all alike with --context")
    rows = np.concatenate([each.rows for each in read])
    about = {"text": [each.as_dict() for each in read]}
    if arguments.held_out is None:
        return Text(rows, None, about)
    if share is not None:
        learned, judges = split_rows(len(rows), share)
        if len(judges) == len(rows):
            raise JQ4Error(f"--held-out {arguments.held_out}: no row of {len(rows)}; give a larger share, or a file")
        return Text(rows[learned], rows[judges], about | {"held_out": {"share": share, "rows": len(judges)}})
    other = _rows(model, arguments.held_out, arguments, "measure on", rows.shape[1])
    return Text(rows, other.rows, about | {"held_out": other.as_dict()})


def _rows(model: Any, file: str, arguments: argparse.Namespace, purpose: str, context: int | None = None) -> Any:
    from jq4.errors import JQ4Error

    if not Path(file).is_file():
        raise JQ4Error(f"{file}: there is no such file to {purpose}")
    taken = argparse.Namespace(rows=_ALL, field=arguments.field, context=arguments.context)
    return _calibration.read_rows(model.tokenizer, model.config, file, taken, context)


def _share(given: str | None) -> float | None:
    """--held-out as a share; None where it names a file."""
    from jq4.errors import JQ4Error

    try:
        share = float(given or "")
    except ValueError:
        return None
    if not 0 < share <= 0.5:
        raise JQ4Error(f"--held-out is {given}, wanted a share of the rows above 0 and at most 0.5, or a file")
    return share


def spread(rows: Any, count: int) -> Any:
    """At most `count` of the rows, at even distances."""
    import numpy as np

    count = min(len(rows), count)
    return rows[np.arange(count) * len(rows) // count]
