"""Calibration rows from a file: text, JSONL or token ids, as i32[R, T] and an account of what was taken.

    *.npy          ids [n], cut into rows, or [R, T], each row cut into as many as fit
    *.jsonl        a document a line, its text under one field; the documents' tokens follow each other
    anything else  UTF-8 text, tokenized whole

Of the rows that a file has, `rows` are taken at even distances from its beginning to its end, so that all of it is
heard; with a seed, they are drawn instead. A file that has no whole row is refused: a model calibrated on shorter text
than it will read is calibrated on something else.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jq4.errors import JQ4Error
from jq4.evaluate import rows_of

DEFAULT_ROWS = 128
DEFAULT_FIELD = "text"

Encode = Callable[[str], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Rows i32[R, T], and where they come from.

    Attributes:
      file: its name, without folders.
      sha256: of the whole file.
      rows_in_file: the rows of T tokens that it has.
      seed: by which rows were drawn; None where they were taken at even distances.
    """

    rows: np.ndarray = dataclasses.field(repr=False)
    file: str
    sha256: str
    rows_in_file: int
    seed: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """What a checkpoint's manifest says of its calibration."""
        count, context = self.rows.shape
        about = {"file": self.file, "sha256": f"sha256:{self.sha256}", "rows": count, "context": context}
        return about | {"rows_in_file": self.rows_in_file, "chosen": "evenly" if self.seed is None else "by seed"}


def read_calibration(
    file: str | Path,
    *,
    encode: Encode | None,
    vocab_size: int,
    context: int,
    rows: int = DEFAULT_ROWS,
    field: str = DEFAULT_FIELD,
    seed: int | None = None,
) -> Calibration:
    """The calibration rows of a file.

    Args:
      file: see the module's text; its name's ending says which kind it is.
      encode: text to token ids, for text and JSONL; None where the model has no tokenizer.
      context: tokens a row, for text and ids [n]; ids [R, T] keep their rows unless they are longer.
      rows: how many at most.
      field: of a JSONL line, the one that holds the text.
      seed: draws the rows; None takes them at even distances.

    Raises:
      JQ4Error: naming file and line, for what cannot be read, has no whole row, or has tokens beyond the vocabulary.
    """
    file = Path(file)
    if rows < 1 or context < 2:
        raise JQ4Error(f"{rows} rows of {context} tokens: wanted 1 row or more, of 2 tokens or more")
    content = _content(file)
    ids = _ids_of(file, content, encode, field)
    if ids.ndim == 2:
        context = min(context, ids.shape[1])
    elif ids.size < context:
        raise JQ4Error(
            f"{file}: has {ids.size} tokens, fewer than one row of {context}: give more text, or a shorter --context"
        )
    cut, _ = rows_of(ids, context, vocab_size=vocab_size, name=str(file))
    return Calibration(
        cut[_chosen(len(cut), rows, seed)], file.name, hashlib.sha256(content).hexdigest(), len(cut), seed
    )


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise JQ4Error(f"{file}: there is no such file to calibrate with") from None


def _ids_of(file: Path, content: bytes, encode: Encode | None, field: str) -> np.ndarray:
    if file.suffix == ".npy":
        return _array(file)
    if encode is None:
        raise JQ4Error(f"{file}: text wants a tokenizer, and the model's folder has no tokenizer.json: give .npy ids")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JQ4Error(f"{file}: not UTF-8 text ({error}); convert it") from None
    documents = _documents(file, text, field) if file.suffix in (".jsonl", ".ndjson") else [text]
    return np.concatenate([np.asarray(encode(document), np.int64) for document in documents] or [np.zeros(0, np.int64)])


def _array(file: Path) -> np.ndarray:
    try:
        ids = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise JQ4Error(f"{file}: not a .npy file of numbers ({error}); write it with numpy.save") from None
    if not isinstance(ids, np.ndarray) or ids.ndim not in (1, 2) or ids.dtype.kind not in "iu" or not ids.size:
        found = f"{ids.dtype}{list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive of arrays"
        raise JQ4Error(f"{file}: found {found}, wanted integer token ids [n] or [rows, tokens]")
    return ids


def _documents(file: Path, text: str, field: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise JQ4Error(f"{file}: line {number} is not JSON ({error}); wanted one object a line") from None
        found = value.get(field) if isinstance(value, dict) else None
        if not isinstance(found, str):
            keys = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise JQ4Error(f"{file}: line {number} has no text under {field!r} (found {keys[:80]}); name it: --field")
        documents.append(found)
    return documents


def _chosen(found: int, wanted: int, seed: int | None) -> np.ndarray:
    """The numbers of the rows that are taken, ascending."""
    if found <= wanted:
        return np.arange(found)
    if seed is None:
        return np.arange(wanted) * found // wanted
    return np.sort(np.random.default_rng(seed).choice(found, wanted, replace=False))
