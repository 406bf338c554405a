"""jq4 quantize: a model's folder in, a packed folder out."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

HELP = "pack a model's weights and save them"
DESCRIPTION = (
    "Quantizes the linear layers of SRC as the recipe says and writes DST: packed weights, config and tokenizer, a "
    "model that jq4 eval, generate and inspect take. DST is written whole or not at all."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a Hugging Face folder")
    parser.add_argument("destination", metavar="DST", help="the folder to write; an older one of jq4's is replaced")
    parser.add_argument(
        "--recipe",
        default=DEFAULT_RECIPE,
        metavar="NAME|FILE",
        help="a preset, METHOD-wBITSgGROUP[-asym] such as rtn-w4g32, or a YAML or JSON file (default %(default)s)",
    )
    parser.add_argument("--calibration", metavar="FILE", help="text or .npy ids, for the methods that need them")


DEFAULT_RECIPE = "hqq-w4g64-asym"


def run(arguments: argparse.Namespace) -> None:
    from jq4.cli import _terminal
    from jq4.report import format_bytes, format_figure, quantize_table

    data = pack(arguments)
    if arguments.json:
        _terminal.print_json(data)
        return
    out = _terminal.console()
    out.print(quantize_table(data))
    out.print(
        f"{format_bytes(data['bytes_before'])} -> {format_bytes(data['bytes'])} held "
        f"({format_figure(data['bits_per_weight_packed'])} bits a packed weight, "
        f"{data['bits_per_weight']:.3f} over all), "
        f"{format_bytes(data['bytes_on_disk'])} in {data['destination']}, {data['seconds']:.1f} s"
    )


def pack(arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantizes and saves; what `jq4 quantize --json` prints."""
    from jq4.cli import _models, _terminal
    from jq4.inventory import bytes_on_disk, inventory, totals
    from jq4.quantize import quantize, quantize_report
    from jq4.quantize_report import QuantizeReport

    watch = _terminal.Stopwatch()
    source, destination = Path(arguments.source), Path(arguments.destination)
    check_destination(source, destination)
    recipe = read_recipe(arguments.recipe)
    model = _models.open_model(arguments.source)
    say_of_calibration(arguments.calibration, recipe)
    planned = quantize_report(model.params, recipe)
    report = QuantizeReport()
    with _terminal.progress("quantizing") as step:
        params = quantize(
            model.params,
            recipe,
            report=report,
            progress=lambda leaf: step(len(report.leaves), len(planned.leaves)),
            donate=True,
        )
    check_dense_leaves(params)
    packed = dataclasses.replace(model, params=params)
    packed.save(destination, recipe=recipe, source=_models.origin(source))
    return {
        "source": arguments.source,
        "destination": arguments.destination,
        "recipe": recipe.to_dict(),
        "bytes_before": report.dense_nbytes,
        **totals(inventory(params)),
        "bytes_on_disk": bytes_on_disk(destination),
        "packed": [as_row(leaf) for leaf in report.packed],
        "dense": [as_row(leaf) for leaf in report.unmatched],
        "idle_rules": [{"rule": index, "why": why} for index, *_, why in report.idle_rules()],
        "seconds": watch.seconds,
    }


def check_dense_leaves(params: Any) -> None:
    """The packed leaves were checked as they were packed; the norms and tables that stay dense are checked here."""
    import jax.numpy as jnp

    from jq4.errors import JQ4Error
    from jq4.paths import flatten_with_paths
    from jq4.qarray import is_qarray

    for path, leaf in flatten_with_paths(params):
        if not is_qarray(leaf) and not bool(jnp.all(jnp.isfinite(leaf))):
            raise JQ4Error(f"{path}: holds NaN or Inf, wanted finite weights; repair the checkpoint")


def as_row(leaf: Any) -> dict[str, Any]:
    names = ("path", "shape", "dtype", "status", "format", "group_size", "axis", "dense_nbytes", "nbytes", "sqnr_db")
    return {name: getattr(leaf, name) for name in names}


def read_recipe(given: str) -> Any:
    """A recipe from a file where there is one of that name, or from a preset's name."""
    from jq4.recipe import Recipe

    is_file = Path(given).is_file() or Path(given).suffix in (".yaml", ".yml", ".json")
    return Recipe.load(given) if is_file else Recipe.preset(given)


def check_destination(source: Path, destination: Path) -> None:
    """Refuses what would destroy something, before any work is done."""
    from jq4.checkpoint.atomic import check_ours
    from jq4.errors import JQ4Error

    here, there = source.resolve(), destination.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise JQ4Error(
            f"{destination}: lies in, or is, the source {source}; choose another folder for the packed model"
        )
    check_ours(there)


def say_of_calibration(calibration: str | None, recipe: Any) -> None:
    """Says so where calibration was given in vain; an error where its file is not there."""
    from jq4.cli import _terminal
    from jq4.errors import JQ4Error
    from jq4.methods import get_method

    needing = sorted(
        {rule.method for rule in recipe.rules if not rule.is_dense and get_method(rule.method).needs_statistics}
    )
    if calibration is None:
        return
    if not Path(calibration).is_file():
        raise JQ4Error(f"{calibration}: there is no such file to calibrate with")
    if not needing:
        methods = ", ".join(sorted({rule.method for rule in recipe.rules}))
        _terminal.say(f"--calibration is not used: {methods} needs none")
