"""The command line: `jq4 VERB ...`. A verb is a file here with HELP, DESCRIPTION, add_arguments(parser) and run(args).

Verbs import what is slow inside `run`, so that `jq4 --help` stays quick.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from jq4 import __version__
from jq4.cli import (
    _terminal,
    convert,
    demo,
    drift,
    eval,
    generate,
    inspect,
    merge,
    mixed,
    plan,
    quantize,
    report,
    train,
)
from jq4.errors import JQ4Error

_VERBS = {
    "demo": demo,
    "quantize": quantize,
    "convert": convert,
    "eval": eval,
    "report": report,
    "drift": drift,
    "mixed": mixed,
    "generate": generate,
    "inspect": inspect,
    "plan": plan,
    "train": train,
    "merge": merge,
}
_EXIT_CODES = "exit codes: 0 done, 1 an error in what was given (one line on stderr), 2 wrong usage, 130 interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code and prints no traceback for errors that are the user's to mend."""
    verb = ""
    try:
        arguments = _parser().parse_args(argv)
        verb = arguments.verb
        with _terminal.plain_warnings(verb):
            code = _VERBS[verb].run(arguments)
        sys.stdout.flush()
        return code or 0
    except SystemExit as stop:  # argparse: --help, --version, wrong usage
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        _terminal.say(f"jq4 {verb}: interrupted")
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (JQ4Error, OSError, MemoryError) as error:
        return _told(verb, _one_line(error) or "out of memory")
    except RuntimeError as error:  # JAX's
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _told(verb, f"out of memory; use less at a time ({_one_line(error)[:120]})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jq4", description="INT4 models in JAX.", epilog=_EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"jq4 {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in _VERBS.items():
        added = verbs.add_parser(name, help=module.HELP, description=module.DESCRIPTION, epilog=_EXIT_CODES)
        module.add_arguments(added)
        added.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else")
    return parser


def _told(verb: str, message: str) -> int:
    _terminal.say(f"jq4 {verb}: error: {message}")
    return 1


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
