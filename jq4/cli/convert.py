"""jq4 convert: a checkpoint of one format to one of another."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HELP = "convert a checkpoint to another format, losslessly where that can be"
DESCRIPTION = (
    "Reads SRC (GPTQ, AWQ, compressed-tensors, GGUF, bitsandbytes, MXFP4, dense safetensors, a folder of jq4's own: "
    "known by its contents) and writes DST in another format, weight by weight. It says beforehand what becomes of "
    "each kind of weight and what is lost; DST is written whole or not at all, and the same command goes on where a "
    "killed one stopped (DST.partial holds its work)."
)
_TARGETS = ("orbax", "safetensors", "compressed-tensors", "gptq", "awq", "gguf", "bnb-nf4", "mxfp4", "gpt-oss")
_OPTIONS = {
    "dtype": ("safetensors",),
    "type": ("gguf",),
    "scale_dtype": ("gptq", "awq"),
    "checkpoint_format": ("gptq",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a folder, a .safetensors or a .gguf file")
    parser.add_argument(
        "destination",
        metavar="DST",
        help="the folder to write (a new .gguf file for gguf); a folder of an older conversion is replaced",
    )
    parser.add_argument("--to", required=True, choices=_TARGETS, metavar="FORMAT", help=", ".join(_TARGETS))
    parser.add_argument(
        "--dtype", help="of the weights, for safetensors: bfloat16, float16, float32 (default: their own)"
    )
    parser.add_argument("--type", help="for gguf: q4_0, q4_1, q8_0, iq4_nl, q4_k, q6_k, f16, ...")
    parser.add_argument(
        "--scale-dtype", help="for gptq and awq: float16 (default, where none is rounded unsaid), bfloat16, float32"
    )
    parser.add_argument(
        "--checkpoint-format", help="for gptq: gptq (default for symmetric weights) or gptq_v2 (for zero points)"
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="round weights that FORMAT cannot hold to the nearest that it can, and tell by how much",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read the result again and prove that it is what was said"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    parser.add_argument(
        "--memory",
        metavar="1GB",
        help="that the process may hold (default 1GB, more where the program itself takes it)",
    )
    parser.add_argument("--shard-size", default="5GB", metavar="5GB", help="of a file of weights (default %(default)s)")
    parser.add_argument("--restart", action="store_true", help="throw away the work of another conversion beside DST")


def run(arguments: argparse.Namespace) -> int:
    from jq4.checkpoint.conversion.destination import check_convertible
    from jq4.checkpoint.conversion.progress import folder_of
    from jq4.cli import _conversion, _folders, _terminal
    from jq4.report import conversion_tables, conversion_title, format_bytes, verification_tables

    watch = _terminal.Stopwatch()
    source, destination = Path(arguments.source), Path(arguments.destination)
    check_convertible(source, destination)
    _folders.check_without_adapters(destination)
    _check_name(destination, arguments.to)
    work = _conversion.prepare(source, arguments.to, _options(arguments), arguments.requantize, arguments.shard_size)
    data = work.as_dict() | {"source": arguments.source, "destination": arguments.destination}
    out = _terminal.console()
    if not arguments.json:
        for note in work.source.notes:
            _terminal.say(note)
        out.print(conversion_title(data), *conversion_tables(data), sep="\n")
    if not arguments.dry_run:
        try:
            data |= _conversion.carry_out(work, source, destination, arguments) | {"seconds": watch.seconds}
        except KeyboardInterrupt:
            _terminal.say(f"{folder_of(destination)} holds what is written; the same command goes on from there")
            raise
    if arguments.json:
        _terminal.print_json(data)
    elif not arguments.dry_run:
        if data["requantized"]:
            out.print(f"rounded again: {len(data['requantized'])} weights, {_worst(data['requantized'])}")
        if data["verified"] is not None:
            out.print(*verification_tables(data), sep="\n")
        resumed = f" ({data['resumed']} of them were done before)" if data["resumed"] else ""
        out.print(
            f"{data['weights']} weights{resumed}, {format_bytes(data['bytes'])} in {destination}, {watch.seconds:.1f} s"
        )
    return 0


def _options(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from jq4.errors import JQ4Error

    for name, targets in _OPTIONS.items():
        if getattr(arguments, name) is not None and arguments.to not in targets:
            raise JQ4Error(
                f"--{name.replace('_', '-')} is for --to {' or '.join(targets)}, and this is --to {arguments.to}; "
                "leave it out"
            )
    return {name: getattr(arguments, name) for name in _OPTIONS}


def _check_name(destination: Path, target: str) -> None:
    from jq4.errors import JQ4Error

    if (destination.suffix == ".gguf") != (target == "gguf"):
        wanted = "a file whose name ends in .gguf" if target == "gguf" else "a folder, whose name does not end in .gguf"
        raise JQ4Error(f"{destination}: --to {target} writes {wanted}; choose such a name")


def _worst(errors: Mapping[str, Mapping[str, float]]) -> str:
    name = max(errors, key=lambda each: errors[each]["relative"])
    return f"relative error at most {errors[name]['relative']:.3g} ({name}), |dW| at most " + format(
        max(error["max"] for error in errors.values()), ".3g"
    )
