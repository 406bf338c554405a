"""What the verbs of `jq4 train` are told alike."""

import argparse
from typing import Any

from jq4.calibration import DEFAULT_FIELD
from jq4.cli.training import stages

DEFAULT_RECIPE = "gptq-w4g32-asym"
SCHEDULES = ("cosine", "linear", "constant")  # of jq4.train.running.optimizer, which is slow to import
_FILES = ("model", "teacher", "teacher_cache", "start", "text", "held_out", "out")  # what they hold is told apart
_NO_MATTER = ("verb", "json", "restart", "save_every", "devices", "fsdp")


def add_model_and_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the dense model: a Hugging Face folder")
    parser.add_argument("--text", required=True, nargs="+", metavar="FILE", help="text, .jsonl or .npy ids to train on")
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="the folder to write; an older one is replaced, one with adapters by qlora alone",
    )
    parser.add_argument(
        "--held-out",
        metavar="SHARE|FILE",
        help="a share of the rows, not trained on, or another text, to measure before and after (default: none)",
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens a row (default: the model's longest, at most 2048)"
    )
    parser.add_argument("--field", default=DEFAULT_FIELD, metavar="NAME", help="where a JSONL line has its text")
    parser.add_argument("--restart", action="store_true", help="throw away the work of an unfinished run")


def add_rounding(parser: argparse.ArgumentParser) -> None:
    rounding = parser.add_argument_group("rounding")
    rounding.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help=f"what is trained for, and by which method it starts: a preset or a file (default {DEFAULT_RECIPE})",
    )
    rounding.add_argument("--start", metavar="DIR", help="what jq4 quantize made of MODEL, to start from instead")
    rounding.add_argument(
        "--calibration-rows", type=int, default=128, metavar="N", help="rows of the text for the start (default 128)"
    )
    stages.add_arguments(parser)


def add_descent(parser: argparse.ArgumentParser, rate: float | None = None) -> None:
    """Without a rate it is for the bits that are trained for (jq4.train.running.optimizer), a share of each leaf."""
    parser.set_defaults(relative=rate is None)
    descent = parser.add_argument_group("descent")
    descent.add_argument("--steps", type=int, default=400, metavar="N", help="default 400")
    descent.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows a step (default 8)")
    descent.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="parts that a step's rows are taken in (default 1)"
    )
    descent.add_argument(
        "--rate",
        type=float,
        default=rate,
        metavar="X",
        help="Adam's, as a share of a leaf (default: .005 for 2 and 3 bits, .0007 for 4, and less for more; .3 of "
        "that from 4 bits on where a start was learned, by best-* say, unless inputs have fewer than 8)"
        if rate is None
        else "Adam's (default %(default)s)",
    )
    descent.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="of the rate (default cosine)")
    descent.add_argument("--warmup", type=int, metavar="N", help="steps in which the rate rises (default: a twentieth)")
    descent.add_argument("--weight-decay", type=float, default=0.0, metavar="X", help="default 0")
    descent.add_argument("--clip", type=float, default=1.0, metavar="X", help="a gradient's largest norm (default 1)")
    descent.add_argument("--seed", type=int, default=0, metavar="N", help="of the rows' order (default 0)")
    judging = parser.add_argument_group("judging, by rows held out")
    judging.add_argument(
        "--measure-every",
        type=int,
        metavar="N",
        help="measure what is trained on them before the first step, every N steps and at the end (default: the start "
        "and the result alone)",
    )
    judging.add_argument(
        "--keep-best",
        action="store_true",
        help="of those measured write the weights with the least KLD (distill) or loss, the latest of equals; with "
        "--stages of the last stage alone. Where a loss becomes infinite nothing is written",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="to compute in; masters are float32 (default: bfloat16 for a bfloat16 model on an accelerator)",
    )
    machine.add_argument("--remat", action="store_true", help="compute layers again going back, to hold less")
    machine.add_argument("--devices", type=int, metavar="N", help="the first N devices (default: all)")
    machine.add_argument(
        "--fsdp", type=int, default=1, metavar="N", help="devices that weights are cut over; rows over all (default 1)"
    )
    machine.add_argument(
        "--save-every", type=int, default=50, metavar="N", help="steps between states to go on from (default 50)"
    )


def check(arguments: argparse.Namespace) -> None:
    """Raises JQ4Error for numbers that cannot be."""
    from jq4.errors import JQ4Error

    for name in ("steps", "batch_size", "accumulate", "fsdp", "save_every", "calibration_rows"):
        if getattr(arguments, name) < 1:
            raise JQ4Error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, wanted 1 or more")
    if arguments.measure_every is not None:
        if arguments.measure_every < 1:
            raise JQ4Error(f"--measure-every is {arguments.measure_every}, wanted 1 or more")
        if arguments.held_out is None:
            raise JQ4Error("--measure-every wants rows to measure on: give --held-out too")
    elif arguments.keep_best:
        raise JQ4Error("--keep-best chooses of what was measured on the way: give --measure-every N too")
    if arguments.context is not None and arguments.context < 2:
        raise JQ4Error(
            f"--context is {arguments.context}, wanted 2 or more: a token is predicted from those before it in its row"
        )


def dtype_of(arguments: argparse.Namespace, model: Any) -> str:
    """What is computed in: as asked, or the model's own on this machine, which a run keeps to the end."""
    import numpy as np

    return arguments.dtype or np.dtype(model.dtype).name


def identity_of(arguments: argparse.Namespace) -> dict[str, object]:
    """The options that the result depends on, files apart."""
    return {name: value for name, value in sorted(vars(arguments).items()) if name not in _FILES + _NO_MATTER}
