"""jq4 generate: text from a model."""

import argparse
from typing import Any

from jq4.cli import _models

HELP = "continue one or more prompts"
DESCRIPTION = "Continues every --prompt; greedy unless a temperature is given. Packed models run packed."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_models.MODEL)
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="new tokens at most (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest (default)")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="draw from the N likeliest (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that sum to P")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawing (default 0)")


def run(arguments: argparse.Namespace) -> None:
    from jq4.cli import _terminal

    watch = _terminal.Stopwatch()
    model = _models.laid_out(_models.open_model(arguments.model))
    texts = model.generate(
        arguments.prompt,
        max_new_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    completions = [{"prompt": p, "text": t} for p, t in zip(arguments.prompt, texts, strict=True)]
    if arguments.json:
        data: dict[str, Any] = {"model": arguments.model, "completions": completions}
        _terminal.print_json(data | {"went_dense": _models.went_dense(model), "seconds": watch.seconds})
        return
    for each in completions:
        print(each["prompt"] + each["text"])
