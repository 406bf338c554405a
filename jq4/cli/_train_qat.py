"""jq4 train qat: the text's next tokens, by a model that is rounded as it will be served."""

import argparse
from typing import Any

from jq4.cli import _train_options

HELP = "learn the text's next tokens with rounded weights (quantization-aware training)"
DESCRIPTION = "Learns to predict the text's next tokens, all weights and their quantizers trained (LSQ)."
RATE = 0.005


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _train_options.add_model_and_text(parser)
    _train_options.add_rounding(parser)
    _train_options.add_descent(parser, RATE)


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `jq4 train qat --json` prints."""
    from jq4.cli import _train_losses, _train_rounded, _train_run

    task = _train_rounded.open_task(arguments, lambda forward, dense: _train_losses.next_token(forward))
    return _train_run.carry_out(task, arguments)
