"""jq4 quantize: a model's folder in, a packed folder out."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from jq4.cli import _calibration

HELP = "pack a model's weights and save them"
DESCRIPTION = (
    "Quantizes the linear layers of SRC as the recipe says and writes DST: packed weights, config and tokenizer, a "
    "model that jq4 eval, generate and inspect take. The model is read and quantized block by block; DST is written "
    "whole or not at all, and the same command goes on where a killed one stopped (DST.partial holds its work)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a Hugging Face folder")
    parser.add_argument(
        "destination", metavar="DST", help="the folder to write; an older one of jq4's without adapters is replaced"
    )
    parser.add_argument(
        "--recipe",
        default=DEFAULT_RECIPE,
        metavar="NAME|FILE",
        help="a preset, METHOD-wBITSgGROUP[-asym] such as rtn-w4g32, or a YAML or JSON file (default %(default)s)",
    )
    parser.add_argument(
        "--calibration", metavar="FILE", help="text, .jsonl or .npy ids, for the recipes that need them"
    )
    _calibration.add_arguments(parser)
    parser.add_argument(
        "--effort",
        choices=("light", "default", "best"),
        default="default",
        help="time for quality, in the steps that learn",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn at random (default 0)")
    parser.add_argument("--memory", metavar="2GB", help="of activations; more lie in files beside DST (default 2GiB)")
    parser.add_argument("--restart", action="store_true", help="throw away the work of an unfinished run beside DST")
    parser.add_argument(
        "--report", metavar="DIR", help="also write what became of each leaf and layer, as JSON, Markdown and HTML"
    )


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
    for remark in remarks_of(data):
        _terminal.say(remark)
    out.print(
        f"{format_bytes(data['bytes_before'])} -> {format_bytes(data['bytes'])} held "
        f"({format_figure(data['bits_per_weight_packed'])} bits a packed weight, "
        f"{data['bits_per_weight']:.3f} over all), "
        f"{format_bytes(data['bytes_on_disk'])} in {data['destination']}, {data['seconds']:.1f} s"
    )


def remarks_of(data: dict[str, Any]) -> list[str]:
    """What the methods have to say of the calibration, once for all blocks that it is said of."""
    from jq4.driver.rows_learned import LEARNED

    blocks: dict[tuple[str, str], list[str]] = {}
    for row in data.get("rows", ()):
        if row["note"] not in ("", LEARNED):
            place = "outside of the blocks" if row["block"] is None else str(row["block"])
            blocks.setdefault((row["path"], row["note"]), []).append(place)
    return [f"{path} ({', '.join(places)}): {note}" for (path, note), places in blocks.items()]


def pack(arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantizes and saves; what `jq4 quantize --json` prints."""
    from jq4.cli import _folders, _models
    from jq4.quality_report.write import FILES

    source, destination = Path(arguments.source), Path(arguments.destination)
    _folders.check_destination(source, destination)
    _folders.check_without_adapters(destination)
    recipe = read_recipe(arguments.recipe)
    folder_of(arguments.source)
    if arguments.report is not None:
        _folders.check_only_ours(Path(arguments.report), FILES, "no report wrote", "--report")
    data, report = (pack_again if _models.is_checkpoint(source) else pack_folder)(arguments, recipe)
    return data if arguments.report is None else data | {"report": write_report_of(arguments, data, report)}


def pack_folder(arguments: argparse.Namespace, recipe: Any) -> tuple[dict[str, Any], Any]:
    """A Hugging Face folder, block by block."""
    from jq4.chain import BlockSource
    from jq4.cli import _models, _terminal
    from jq4.driver import quantize_blocks
    from models.chain import decoder_chain
    from models.folder_source import FolderSource, UntiedSource
    from models.folds import untied_config
    from models.hf import load_config
    from models.language_model import companion_files

    watch = _terminal.Stopwatch()
    source, destination = Path(arguments.source), Path(arguments.destination)
    config = load_config(source)
    blocks: BlockSource = FolderSource(source, config)
    files = companion_files(source)
    if config.tied_embeddings and rotates(recipe):
        blocks, config = UntiedSource(blocks, config), untied_config(config)
        files["config.json"] = json.dumps(config.to_hf(), indent=2).encode()
        _terminal.say("the output head gets weights of its own: a rotation takes it apart from the embedding")
    calibration = read_rows(arguments, config, files) if is_calibrated(arguments.calibration, recipe) else None

    def provenance() -> dict[str, Any]:
        about = {} if calibration is None else {"calibration": calibration.as_dict()}
        return _models.origin(source) | about

    with _terminal.progress("quantizing") as step:
        result = quantize_blocks(
            decoder_chain(config),
            blocks,
            recipe,
            None if calibration is None else calibration.rows,
            destination=destination,
            effort=arguments.effort,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            memory=memory_of(arguments.memory),
            restart=arguments.restart,
            extra_files=files,
            provenance=provenance,
            progress=step,
        )
    told = {**result.as_dict(), "calibration": None if calibration is None else calibration.as_dict()}
    return account(arguments, recipe, result.report, watch) | told, result.report


def rotates(recipe: Any) -> bool:
    """Whether the recipe turns the residual stream, and with it the embedding and the head."""
    return any(step.step == "rotate" and dict(step.options).get("residual", True) for step in recipe.before)


def pack_again(arguments: argparse.Namespace, recipe: Any) -> tuple[dict[str, Any], Any]:
    """A folder that is packed already: refused, unless just as this recipe says."""
    from jq4.cli import _models, _terminal
    from jq4.errors import JQ4Error
    from jq4.quantize import quantize
    from jq4.quantize_report import QuantizeReport

    watch = _terminal.Stopwatch()
    if recipe.has_steps:
        raise JQ4Error(f"{arguments.source}: is packed already, and the recipe has steps: give the dense model")
    model = _models.open_model(arguments.source)
    is_calibrated(arguments.calibration, recipe)
    report = QuantizeReport()
    packed = dataclasses.replace(model, params=quantize(model.params, recipe, report=report, donate=True))
    packed.save(arguments.destination, recipe=recipe, source=_models.origin(Path(arguments.source)))
    return account(arguments, recipe, report, watch), report


def write_report_of(arguments: argparse.Namespace, data: dict[str, Any], report: Any) -> dict[str, str]:
    """Writes the report of this quantizing; returns its files by kind."""
    from jq4.cli import _terminal
    from jq4.quality_report import quantizing_report, write_report

    names = ("parameters", "parameters_packed", "bytes", "bytes_on_disk", "bits_per_weight", "bits_per_weight_packed")
    made = quantizing_report(
        model=Path(arguments.destination).resolve().name,
        report=report,
        rows=data.get("rows", ()),
        recipe=data["recipe"],
        source={"folder": Path(arguments.source).resolve().name},
        calibration=data.get("calibration"),
        totals={name: data[name] for name in names},
        cost={"seconds": data["seconds"], "peak_memory_bytes": data.get("peak_memory")},
        versions=_terminal.versions(),
    )
    return write_report(made, arguments.report)


def account(arguments: argparse.Namespace, recipe: Any, report: Any, watch: Any) -> dict[str, Any]:
    """What became of the model, leaf by leaf and in all."""
    from jq4.cli.inspect import leaves_of_manifest
    from jq4.inventory import bytes_on_disk, totals

    held = leaves_of_manifest(Path(arguments.destination))
    return {
        "source": arguments.source,
        "destination": arguments.destination,
        "recipe": recipe.to_dict(),
        "bytes_before": report.dense_nbytes,
        **totals(held),
        "bytes_on_disk": bytes_on_disk(arguments.destination),
        "packed": [as_row(leaf) for leaf in report.packed],
        "dense": [as_row(leaf) for leaf in report.unmatched],
        "idle_rules": [{"rule": index, "why": why} for index, *_, why in report.idle_rules()],
        "seconds": watch.seconds,
    }


def folder_of(source: str) -> None:
    from jq4.errors import JQ4Error

    if Path(source).is_file():
        raise JQ4Error(
            f"{source}: is a file, wanted a folder of dense weights. Packed ones are run as they are by jq4 eval and "
            "jq4 generate; jq4 convert --to safetensors makes dense ones of them."
        )
    if not Path(source).is_dir():
        raise JQ4Error(f"{source}: there is no such folder; give a Hugging Face folder or one that jq4 quantize made")


def memory_of(given: str | None) -> int:
    """Bytes of activations that may be held."""
    from jq4.driver.quantize_blocks import STREAM_BYTES
    from jq4.plan import parse_memory

    return STREAM_BYTES if given is None else parse_memory(given)


def read_rows(arguments: argparse.Namespace, config: Any, files: Any) -> Any:
    """The calibration rows, by the model's own tokenizer."""
    from models.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_files(files.get, arguments.source)
    return _calibration.read_rows(tokenizer, config, arguments.calibration, arguments)


def as_row(leaf: Any) -> dict[str, Any]:
    names = ("path", "shape", "dtype", "status", "format", "group_size", "axis", "dense_nbytes", "nbytes", "sqnr_db")
    return {name: getattr(leaf, name) for name in names}


def read_recipe(given: str) -> Any:
    """A recipe from a file where there is one of that name, or from a preset's name."""
    from jq4.recipe import Recipe

    is_file = Path(given).is_file() or Path(given).suffix in (".yaml", ".yml", ".json")
    return Recipe.load(given) if is_file else Recipe.preset(given)


def is_calibrated(calibration: str | None, recipe: Any) -> bool:
    """Whether there is calibration to read; says so where it was given in vain."""
    from jq4.cli import _terminal
    from jq4.driver.calibration_rows import may_need_rows
    from jq4.errors import JQ4Error

    if calibration is None:
        return False
    if not Path(calibration).is_file():
        raise JQ4Error(f"{calibration}: there is no such file to calibrate with")
    if may_need_rows(recipe):
        return True
    methods = ", ".join(sorted({rule.method for rule in recipe.rules}))
    _terminal.say(f"--calibration is not used: {methods} needs none")
    return False
