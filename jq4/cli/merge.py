"""jq4 merge: a model with adapters in, the same model without them out, and what that lost of each leaf."""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

from jq4.cli import _calibration, _folders, _models

HELP = "put a model's adapters into its weights, dense or packed again, and tell what that loses"
DESCRIPTION = (
    "Adds what the adapters of MODEL (of jq4 train qlora, or PEFT's with --adapters) learned to the weights that they "
    "stand beside, and writes OUT, a model without adapters. These weights become dense, or with --recipe are packed "
    "again, which loses what packing loses: of each leaf SQNR tells how far it is from the exact sum, and the last "
    "column how much more was learned than lost. Beside packed weights, unmerged, adapters lose nothing."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder of jq4's with adapters, or any model with --adapters")
    parser.add_argument(
        "out", metavar="OUT", help="the folder to write; an older one of jq4's without adapters is replaced"
    )
    parser.add_argument("--adapters", metavar="DIR", help="PEFT's folder, or jq4.save_lora's, instead of MODEL's own")
    parser.add_argument(
        "--recipe", metavar="NAME|FILE", help="packs the leaves that have adapters again (default: they become dense)"
    )
    parser.add_argument(
        "--calibration", metavar="FILE", help="text, .jsonl or .npy ids, for the recipes that need them"
    )
    _calibration.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    from jq4.cli import _terminal
    from jq4.report import format_bytes, format_figure, merge_table

    data = merge(arguments)
    if arguments.json:
        _terminal.print_json(data)
        return
    out = _terminal.console()
    out.print(merge_table(data))
    lost = [leaf["path"] for leaf in data["leaves"] if leaf["change_db"] < 0]
    if lost:
        _terminal.say(
            f"rounding lost more than was learned of {len(lost)} leaves ({', '.join(lost[:3])}): "
            f"{'give more bits, or ' * bool(data['recipe'])}leave the adapters beside the weights"
        )
    out.print(
        f"{format_bytes(data['bytes'])} held ({format_figure(data['bits_per_weight_packed'])} bits a packed weight, "
        f"{data['bits_per_weight']:.3f} over all), {format_bytes(data['bytes_on_disk'])} in {data['out']}"
    )


def merge(arguments: argparse.Namespace) -> dict[str, Any]:
    """Merges and saves; what `jq4 merge --json` prints."""
    from jq4.checkpoint.deferred import shapes_of
    from jq4.cli import _terminal
    from jq4.cli.inspect import leaves_of_manifest
    from jq4.cli.quantize import read_recipe
    from jq4.cli.training.run import remove_older
    from jq4.inventory import bytes_on_disk, totals
    from jq4.train.adapters.merge_lora import DENSE, Merging

    watch = _terminal.Stopwatch()
    source, out = Path(arguments.model), Path(arguments.out)
    for read in filter(None, (arguments.model, arguments.adapters)):
        _folders.check_destination(Path(read), out)
    _folders.check_without_adapters(out)
    recipe = None if arguments.recipe is None else read_recipe(arguments.recipe)
    check_recipe(recipe, arguments.calibration)
    model = with_given_adapters(_models.unread_model(arguments.model), arguments)
    before = recipe_before(arguments.model)
    stats = None if recipe is None else observed(recipe, arguments)
    merging = Merging.of(shapes_of(model.params), model.adapters, recipe or DENSE, stats=stats)
    about = _models.origin(source) | {"merged": provenance_of(arguments, list(merging.adapters))}
    params, report = merged_when_written(model.params, merging)
    merged = dataclasses.replace(model, params=params, adapters=None)
    merged.save(out, recipe=merged_recipe(before, recipe, merging), source=about)
    remove_older(out)
    held = totals(leaves_of_manifest(out))
    return {
        "model": arguments.model,
        "out": arguments.out,
        "recipe": None if recipe is None else recipe.to_dict(),
        "adapters": _models.adapters_told(model.adapters),
        "leaves": [each.as_dict() for each in report],
        **{key: held[key] for key in ("parameters", "bits_per_weight", "bits_per_weight_packed", "bytes")},
        "bytes_on_disk": bytes_on_disk(out),
        "seconds": watch.seconds,
        "versions": _terminal.versions(),
    }


def check_recipe(recipe: Any, calibration: str | None) -> None:
    """Raises JQ4Error, before a model is opened, for a recipe that cannot be merged by."""
    from jq4.driver.calibration_rows import may_need_rows
    from jq4.errors import JQ4Error

    if recipe is None:
        if calibration is not None:
            raise JQ4Error("--calibration is for a --recipe, and there is none; leave it out")
        return
    if recipe.has_steps:
        names = ", ".join(step.step for step in (*recipe.before, *recipe.after))
        raise JQ4Error(f"the recipe has steps ({names}), and leaves are merged by rules alone: take one without")
    if calibration is None and may_need_rows(recipe):
        raise JQ4Error("the recipe needs calibration, and none was given: --calibration FILE, or rtn- or hqq- presets")


def with_given_adapters(model: Any, arguments: argparse.Namespace) -> Any:
    """The model with the adapters that are merged: its own, or those of --adapters."""
    from jq4.errors import JQ4Error
    from jq4.train import restore_lora
    from models.layer_runs import runs_of
    from models.peft import load_peft

    if arguments.adapters is None:
        if model.adapters is None:
            raise JQ4Error(f"{arguments.model}: has no adapters to merge; give a folder of them with --adapters")
        return model
    if model.adapters is not None:
        raise JQ4Error(f"{arguments.model}: has adapters of its own; merge them first, without --adapters")
    folder = _models.existing_adapters(arguments.adapters)
    ours = _models.is_checkpoint(folder)
    found = restore_lora(folder) if ours else load_peft(folder, model.config, runs=runs_of(model.params))
    return dataclasses.replace(model, adapters=found)


def merged_when_written(params: Any, merging: Any) -> tuple[Any, list[Any]]:
    """(deferred params with their adapters in them, what that lost of each leaf, filled in as they are made)."""
    import jax

    from jq4.paths import leaf_path

    report: list[Any] = []

    def change(path: str, leaf: Any) -> Any:
        result, told = merging.merged(path, leaf)
        report.append(told)
        return result

    def merged(keys: Any, leaf: Any) -> Any:
        path = leaf_path(keys)
        return leaf.then(functools.partial(change, path)) if path in merging.adapters else leaf

    return jax.tree_util.tree_map_with_path(merged, params), report


def observed(recipe: Any, arguments: argparse.Namespace) -> Any:
    """Statistics of the inputs that the weights meet in the model with its adapters, where the recipe looks at them.

    The one part of merging that holds the whole model.
    """
    from jq4.cli import quantize
    from jq4.statistics import COLLECTABLE
    from models.language_model import LanguageModel

    if not quantize.is_calibrated(arguments.calibration, recipe):
        return None
    model = with_given_adapters(LanguageModel.from_folder(arguments.model), arguments)
    rows = _calibration.read_rows(model.tokenizer, model.config, arguments.calibration, arguments).rows
    return _models.observe_inputs(model, rows, arguments.batch_size, COLLECTABLE)


def recipe_before(model: str) -> Any:
    """The recipe that the model was packed by; None where it tells of none, or has something else in its place."""
    from jq4.cli.drift import recipe_of
    from jq4.errors import JQ4Error

    try:
        return recipe_of(model)
    except JQ4Error:
        return None


def merged_recipe(before: Any, recipe: Any, merging: Any) -> Any:
    """The rules that all leaves of the result were packed by; None where nothing tells of any.

    Those that had adapters are named one by one, by the rules that they were merged by; the model's own follow.
    """
    from jq4.recipe import Recipe
    from jq4.rule import DENSE_BITS, Rule

    if before is None and recipe is None:
        return None
    dense, paths = Rule(("**",), num_bits=DENSE_BITS), {}
    for path in merging.adapters:
        rule = merging.plan[path].rule if path in merging.plan else dense
        paths.setdefault(rule, []).append(path)
    named = tuple(dataclasses.replace(rule, targets=tuple(each), ignore=()) for rule, each in paths.items())
    if before is None:
        return Recipe(named)
    kept = tuple(dataclasses.replace(rule, ignore=(*rule.ignore, *before.ignore)) for rule in before.rules)
    return dataclasses.replace(before, rules=(*named, *kept), ignore=(), name=None)


def provenance_of(arguments: argparse.Namespace, paths: list[str]) -> dict[str, Any]:
    """What the manifest says of the merging, and of how the model was made before."""
    from jq4.checkpoint.orbax import read_manifest

    given = None if arguments.adapters is None else Path(arguments.adapters).resolve().name
    told = {"adapters": given or "the model's own", "to": arguments.recipe or "dense", "leaves": paths}
    into = read_manifest(arguments.model).source if _models.is_checkpoint(arguments.model) else None
    return told if into is None else told | {"into": into}
