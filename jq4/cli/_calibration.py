"""Rows of a calibration text for an opened model, as the verbs take them: text, JSONL or .npy ids."""

import argparse
from typing import Any

from jq4.calibration import DEFAULT_FIELD, DEFAULT_ROWS, Calibration, read_calibration
from jq4.cli import _terminal

DEFAULT_CONTEXT = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=int, default=DEFAULT_ROWS, metavar="N", help="rows of a text, at most (default %(default)s)"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens a row (default: the model's longest, at most 2048)"
    )
    parser.add_argument("--field", default=DEFAULT_FIELD, metavar="NAME", help="where a JSONL line has its text")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at a time (default 8)")


def choose_context(asked: int | None, longest: int) -> int:
    """Tokens a row: as asked, or as many as the model takes, at most DEFAULT_CONTEXT."""
    if asked is not None and asked > longest:
        _terminal.say(f"--context {asked} is more than the {longest} positions that the model was made for")
    return min(DEFAULT_CONTEXT, longest) if asked is None else asked


def read_rows(
    tokenizer: Any, config: Any, file: str, arguments: argparse.Namespace, context: int | None = None
) -> Calibration:
    """The rows of a file by a model's tokenizer (if it has one) and config; `context` tokens each, else --context."""
    return read_calibration(
        file,
        encode=None if tokenizer is None else lambda text: tokenizer.encode(text).ids,
        vocab_size=config.vocab_size,
        context=context or choose_context(arguments.context, config.max_position_embeddings),
        rows=arguments.rows,
        field=arguments.field,
    )
