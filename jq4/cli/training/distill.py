"""jq4 train distill: a teacher's predictions, by a model that is rounded as it will be served."""

import argparse
from typing import Any

from jq4.cli import _models
from jq4.cli.training import options

HELP = "learn a teacher's predictions, the dense model's own unless told otherwise, with rounded weights"
DESCRIPTION = (
    "Learns to predict as a teacher does (KL divergence), all weights and their quantizers trained (LSQ). The teacher "
    "is the dense MODEL itself, or --teacher."
)
RATE = 0.005


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model_and_text(parser)
    options.add_rounding(parser)
    teaching = parser.add_argument_group("teaching")
    teaching.add_argument("--teacher", metavar="MODEL", help=f"another teacher of the same vocabulary: {_models.MODEL}")
    teaching.add_argument("--temperature", type=float, default=1.0, metavar="X", help="of both predictions (default 1)")
    teaching.add_argument(
        "--perturbed",
        type=float,
        default=PERTURBED,
        metavar="SHARE",
        help="of the tokens of every other row, drawn anew by the teacher (default %(default)s; 0: text alone)",
    )
    options.add_descent(parser, RATE)


PERTURBED = 0.6


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `jq4 train distill --json` prints."""
    from jq4.cli.training import losses, rounded, run
    from jq4.errors import JQ4Error

    if not 0 <= arguments.perturbed <= 1:
        raise JQ4Error(f"--perturbed is {arguments.perturbed}, wanted a share of the tokens from 0 to 1")
    if not 0 < arguments.temperature < float("inf"):
        raise JQ4Error(f"--temperature is {arguments.temperature}, wanted a number above 0")

    def loss(forward: Any, teacher: Any) -> Any:
        return losses.distilled(forward, teacher, arguments.temperature, arguments.perturbed)

    return run.carry_out(rounded.open_task(arguments, loss), arguments)
