"""jq4 train: a model's folder and text in, a trained packed folder out."""

import argparse
from typing import Any

from jq4.cli.training import distill, qat, qlora

HELP = "train with few bits: quantization-aware training, distillation, adapters"
DESCRIPTION = (
    "Trains MODEL as it will be served, in few bits, and writes OUT: packed weights, config and tokenizer, a "
    "model that jq4 eval, generate and inspect take, and OUT/training: metrics.jsonl, run.json and a picture of the "
    "losses. The same command goes on where a killed or interrupted one stopped, to the same losses (OUT.partial holds "
    "its work)."
)
_VERBS = {"qat": qat, "distill": distill, "qlora": qlora}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="training", required=True, metavar="qat|distill|qlora")
    for name, module in _VERBS.items():
        added = verbs.add_parser(name, help=module.HELP, description=f"{module.DESCRIPTION} {DESCRIPTION}")
        module.add_arguments(added)
        added.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object on stdout"
        )


def run(arguments: argparse.Namespace) -> None:
    from jq4.cli import _terminal
    from jq4.report import training_table

    data: dict[str, Any] = _VERBS[arguments.training].train(arguments)
    if arguments.json:
        _terminal.print_json(data)
        return
    out = _terminal.console()
    out.print(training_table(data))
    for entry in data["went_dense"]:
        _terminal.say(f"{entry['kind']}: {entry['path']} at {entry['primitive']}: {entry['reason']}")
    out.print(f"trained: {data['out']}; its figures: {', '.join(data['files'].values())}")
