"""jq4 train distill: a teacher's predictions, by a model that is rounded as it will be served."""

import argparse
from pathlib import Path
from typing import Any

from jq4.cli import _models
from jq4.cli.training import options

HELP = "learn a teacher's predictions, the dense model's own unless told otherwise, with rounded weights"
DESCRIPTION = (
    "Learns to predict as a teacher does (KL divergence), all weights and their quantizers trained (LSQ). The teacher "
    "is the dense MODEL itself, or --teacher."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model_and_text(parser)
    options.add_rounding(parser)
    teaching = parser.add_argument_group("teaching")
    teaching.add_argument("--teacher", metavar="MODEL", help=f"another teacher of the same vocabulary: {_models.MODEL}")
    teaching.add_argument("--temperature", type=float, default=1.0, metavar="X", help="of both predictions (default 1)")
    teaching.add_argument(
        "--perturbed",
        type=float,
        metavar="SHARE",
        help="of the tokens of every other row, drawn anew by the teacher (default .6; 0: text alone, as with "
        "--teacher-cache)",
    )
    teaching.add_argument(
        "--hidden",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="leaves, such as down_proj, whose inputs shall be the teacher's too (default: none)",
    )
    teaching.add_argument(
        "--hidden-weight", type=float, metavar="X", help="what their relative error counts (default 1)"
    )
    cache = parser.add_argument_group("a teacher on disk")
    cache.add_argument(
        "--teacher-cache",
        metavar="DIR",
        help="ask the teacher once and keep its predictions of the text there, for this run and others",
    )
    cache.add_argument(
        "--top-k", type=int, metavar="K", help=f"likeliest tokens kept, and the mass of the rest (default {TOP_K})"
    )
    options.add_descent(parser)


PERTURBED = 0.6
TOP_K = 64


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `jq4 train distill --json` prints."""
    from jq4.cli.training import losses, rounded, run, teacher

    check(arguments)

    def loss(forward: Any, taught: Any) -> Any:
        if arguments.teacher_cache is not None:
            return losses.distilled_from_disk(forward)
        weight = arguments.hidden_weight
        return losses.distilled(forward, taught, arguments.temperature, arguments.perturbed, weight)

    asks = None if arguments.teacher_cache is None else teacher.from_disk(arguments)
    task = rounded.open_task(arguments, loss, teacher.seen(arguments.hidden), asks)
    teacher.check_hidden(arguments.hidden, task)
    if arguments.teacher_cache is not None and arguments.top_k is None:
        arguments.top_k = min(TOP_K, task.model.config.vocab_size)
    return run.carry_out(task, arguments)


def check(arguments: argparse.Namespace) -> None:
    """Raises JQ4Error for numbers that cannot be, and for what does not go together; fills in what was left out."""
    from jq4.checkpoint.conversion.destination import overlapping
    from jq4.errors import JQ4Error

    cached = arguments.teacher_cache is not None
    if arguments.perturbed is None:
        arguments.perturbed = 0.0 if cached else PERTURBED
    if not 0 <= arguments.perturbed <= 1:
        raise JQ4Error(f"--perturbed is {arguments.perturbed}, wanted a share of the tokens from 0 to 1")
    if not 0 < arguments.temperature < float("inf"):
        raise JQ4Error(f"--temperature is {arguments.temperature}, wanted a number above 0")
    if arguments.hidden_weight is not None and not arguments.hidden:
        raise JQ4Error("--hidden-weight is of --hidden, and there is none; name leaves too, or leave it out")
    if arguments.hidden_weight is None:
        arguments.hidden_weight = 1.0
    if not 0 < arguments.hidden_weight < float("inf"):
        raise JQ4Error(f"--hidden-weight is {arguments.hidden_weight}, wanted a number above 0")
    if not cached:
        if arguments.top_k is not None:
            raise JQ4Error("--top-k is of a --teacher-cache, and there is none; give its folder too, or leave it out")
        return
    folder = arguments.teacher_cache
    if written := overlapping(Path(folder), Path(arguments.out)):
        raise JQ4Error(
            f"{folder}: --teacher-cache is, lies in or holds {written}, which --out is made in; choose another folder "
            "for one of them"
        )
    asked = {
        "--temperature": (arguments.temperature != 1, "a tail's mass has no temperature"),
        "--perturbed": (arguments.perturbed > 0, "tokens drawn anew want the teacher anew"),
        "--hidden": (bool(arguments.hidden), "its hidden states are not kept"),
    }
    for option, (given, why) in asked.items():
        if given:
            raise JQ4Error(f"{option} does not go with --teacher-cache: {why}; leave out one of them")
