"""jq4 train qat: the text's next tokens, by a model that is rounded as it will be served."""

import argparse
from typing import Any

from jq4.cli.training import options

HELP = "learn the text's next tokens with rounded weights (quantization-aware training)"
DESCRIPTION = "Learns to predict the text's next tokens, all weights and their quantizers trained (LSQ)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model_and_text(parser)
    options.add_rounding(parser)
    options.add_descent(parser)


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `jq4 train qat --json` prints."""
    from jq4.cli.training import losses, rounded, run

    task = rounded.open_task(arguments, lambda forward, dense: losses.next_token(forward))
    return run.carry_out(task, arguments)
