"""jq4 eval: perplexity of a model, and its distance from another."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from jq4.cli import _models

HELP = "measure perplexity, and KLD and top-1 agreement against a reference"
DESCRIPTION = (
    "Perplexity over rows of --context tokens, every one predicted from those before it in its row (mean over "
    "positions 0..context-2). With --reference also KL(reference || model) a token and top-1 agreement. Packed "
    "models run packed, and those that have adapters run with them, which the table says."
)
DEFAULT_CONTEXT = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_models.MODEL)
    add_text_arguments(parser)
    parser.add_argument("--reference", metavar="MODEL", help="the model that KLD and agreement are measured against")


def run(arguments: argparse.Namespace) -> None:
    from jq4.cli import _terminal
    from jq4.report import evaluation_table

    data = measure(arguments)
    if arguments.json:
        _terminal.print_json(data)
        return
    _terminal.console().print(evaluation_table(data))
    if data["dropped_tokens"]:
        _terminal.say(f"{data['dropped_tokens']} tokens at the end, too few for a row, were left out")
    for entry in data["went_dense"]:
        _terminal.say(f"{entry['kind']}: {entry['path']} at {entry['primitive']}: {entry['reason']}")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `jq4 eval --json` prints."""
    from jq4.cli import _terminal
    from jq4.inventory import bytes_on_disk, inventory, totals

    watch = _terminal.Stopwatch()
    given = read_given(arguments)
    model = _models.open_model(arguments.model)
    held = totals(inventory(model.params))
    reference = None if arguments.reference is None else _models.open_model(arguments.reference)
    rows, dropped = given.rows_for(model, arguments.model, arguments.context)
    model = _models.laid_out(model)
    found = _models.evaluated(model, reference, rows, arguments.batch_size)
    return {
        "model": arguments.model,
        "reference": arguments.reference,
        **found.as_dict(),
        "dropped_tokens": dropped,
        **{key: held[key] for key in ("bits_per_weight", "bits_per_weight_packed", "bytes")},
        "bytes_on_disk": bytes_on_disk(arguments.model),
        "adapters": _models.adapters_told(model.adapters),
        "reference_adapters": None if reference is None else _models.adapters_told(reference.adapters),
        "went_dense": _models.went_dense(model),
        "seconds": watch.seconds,
        "versions": _terminal.versions(),
    }


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """What is predicted: --text or --ids, --context, --batch-size."""
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument(
        "--text", metavar="FILE", help="UTF-8 text: tokenized whole, cut into rows, the last short one dropped"
    )
    text.add_argument("--ids", metavar="FILE.npy", help="token ids: integers [rows, tokens], or [tokens] as for --text")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens a row (default: the rows of --ids; the model's longest, at most 2048)",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at a time (default 8)")


@dataclasses.dataclass(frozen=True)
class Given:
    """A file of text or of token ids, read before any model is opened."""

    file: Path
    content: Any

    def rows_for(self, model: Any, folder: str, context: int | None) -> tuple[Any, int]:
        """(rows i32[R, context] of the model's tokens, how many tokens were dropped)."""
        from jq4.evaluate import rows_of

        ids = tokenize(model, self.content, folder) if isinstance(self.content, str) else self.content
        context = choose_context(context, ids.ndim, model.config.max_position_embeddings, ids.size)
        return rows_of(ids, context, vocab_size=model.config.vocab_size, name=str(self.file))

    def described(self, rows: Any, dropped: int) -> dict[str, Any]:
        """What a report says of the tokens: the file, its SHA-256, rows and context."""
        from jq4.cli._models import sha256

        size, context = rows.shape
        return {
            "file": self.file.name,
            "sha256": sha256(self.file),
            "rows": size,
            "context": context,
            "dropped_tokens": dropped,
        }


def read_given(arguments: argparse.Namespace) -> Given:
    """The file of --text or --ids."""
    file = Path(arguments.ids or arguments.text)
    return Given(file, read_ids(file) if arguments.ids else read_text(file))


def choose_context(asked: int | None, ndim: int, longest: int, length: int) -> int | None:
    """Tokens a row: what was asked for; for ids [R, T] the rows as they are (None); else what model and text let."""
    if asked is not None or ndim != 1:
        return asked
    return min(DEFAULT_CONTEXT, longest, length)


def read_ids(file: Path) -> Any:
    """The array of a .npy file; a pickle is refused."""
    import numpy as np

    from jq4.errors import JQ4Error

    try:
        ids = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise JQ4Error(f"{file}: not a .npy file of numbers ({error}); write it with numpy.save") from None
    if not isinstance(ids, np.ndarray):
        raise JQ4Error(f"{file}: an archive of several arrays, wanted one array of token ids; write it with numpy.save")
    return ids


def read_text(file: Path) -> str:
    from jq4.errors import JQ4Error

    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise JQ4Error(f"{file}: not UTF-8 text ({error}); convert it") from None
    if not text.strip():
        raise JQ4Error(f"{file}: the text is empty")
    return text


def tokenize(model: Any, text: str, folder: str) -> Any:
    """The ids of a text by the model's own tokenizer, with the special tokens that it adds by itself."""
    import numpy as np

    from jq4.errors import JQ4Error

    if model.tokenizer is None:
        raise JQ4Error(f"{folder}: there is no tokenizer.json in it; give token ids with --ids instead of --text")
    return np.asarray(model.tokenizer.encode(text).ids, np.int32)
