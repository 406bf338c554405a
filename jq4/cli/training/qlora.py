"""jq4 train qlora: the text's next tokens, by low-rank adapters beside weights that stay packed."""

import argparse
from typing import Any

from jq4.cli.training import options

HELP = "learn the text's next tokens with low-rank adapters beside packed weights (QLoRA)"
DESCRIPTION = (
    "Learns to predict the text's next tokens with adapters beside the weights of MODEL, which stay packed as they "
    "are, or are packed by --recipe where they are dense. The adapters lie in OUT/adapters, and as PEFT has them in "
    "OUT/peft."
)
RATE = 1e-3
RECIPE = "nf4-dq"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model_and_text(parser)
    adapters = parser.add_argument_group("adapters")
    adapters.add_argument("--recipe", metavar="NAME|FILE", help=f"packs a dense MODEL (default {RECIPE})")
    adapters.add_argument(
        "--calibration-rows", type=int, default=128, metavar="N", help="rows of the text for packing (default 128)"
    )
    adapters.add_argument("--rank", type=int, default=16, metavar="R", help="of the adapters (default 16)")
    adapters.add_argument("--alpha", type=float, metavar="X", help="their product counts alpha/rank (default: rank)")
    adapters.add_argument("--dropout", type=float, default=0.0, metavar="SHARE", help="of their inputs (default 0)")
    adapters.add_argument(
        "--targets", nargs="+", default=["Linear"], metavar="PATTERN", help="leaves with adapters (default: Linear)"
    )
    adapters.add_argument(
        "--init",
        choices=("zero", "residual", "loftq"),
        default="zero",
        help="begin at nothing, at what packing a dense MODEL lost, or with codes and adapters fitted to it together "
        "(default zero)",
    )
    adapters.add_argument("--loftq-iter", type=int, metavar="N", help="turns of --init loftq (default 5)")
    options.add_descent(parser, RATE)


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `jq4 train qlora --json` prints."""
    from jq4.cli.training import adapted, run

    return run.carry_out(adapted.open_task(arguments), arguments)
