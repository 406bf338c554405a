"""jq4 inspect: what a model holds, leaf by leaf."""

import argparse
from pathlib import Path
from typing import Any

from jq4.cli import _models

HELP = "list the leaves of a model: formats, groups, bytes, errors"
DESCRIPTION = (
    "Formats, group sizes and bytes of every leaf, from the manifest or the files' headers alone. With "
    "--reference the weights are read, and SQNR says how far each leaf is from the reference's. Adapters beside the "
    "weights are listed and counted apart."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_models.MODEL)
    parser.add_argument("--reference", metavar="MODEL", help="the model that each leaf's error is measured against")


def run(arguments: argparse.Namespace) -> None:
    from jq4.cli import _terminal
    from jq4.how_made import made_rows
    from jq4.report import (
        adapters_sentence,
        adapters_table,
        format_bytes,
        format_count,
        format_figure,
        inventory_table,
        make_table,
    )

    data = describe(arguments.model, arguments.reference)
    if arguments.json:
        _terminal.print_json(data)
        return
    out = _terminal.console()
    for note in data.get("notes", ()):
        _terminal.say(note)
    out.print(inventory_table(data))
    if made := made_rows(data.get("recipe"), data.get("source")):
        out.print(make_table("how it was made", ("", ""), made))
    out.print(
        f"{format_count(data['parameters'])} parameters, {format_bytes(data['bytes'])} on the device, "
        f"{format_bytes(data['bytes_host'])} on the host, {format_bytes(data['bytes_on_disk'])} on disk; "
        f"{data['bits_per_weight']:.3f} bits a weight, {format_figure(data['bits_per_weight_packed'])} where packed"
    )
    if (adapters := data["adapters"]) is not None:
        out.print(adapters_table(adapters))
        out.print(f"{adapters_sentence(adapters)}: on disk with the weights, and in no other figure above")


def describe(model: str, reference: str | None = None) -> dict[str, Any]:
    """What `jq4 inspect --json` prints."""
    from jq4.cli import _terminal
    from jq4.inventory import bytes_on_disk, inventory, totals, with_errors
    from models.adapted import abstract_adapters_of

    folder = _models.existing(model)
    about = about_manifest(folder) if _models.is_checkpoint(folder) else {}
    adapters = None
    if reference is not None:
        ours, theirs = _models.in_the_same_runs(_models.open_model(model), _models.open_model(reference))
        with _terminal.progress("measuring") as step:
            leaves = with_errors(inventory(ours.params), ours.params, theirs.params, step)
        adapters, about = ours.adapters, about | {"notes": _models.notes_on_adapters(ours, theirs)}
    elif _models.is_checkpoint(folder):
        leaves, adapters = leaves_of_manifest(folder), abstract_adapters_of(folder)
    else:
        leaves, about = leaves_of_headers(folder)
    return {
        "model": model,
        "reference": reference,
        **totals(leaves),
        "bytes_on_disk": bytes_on_disk(folder),
        **about,
        "leaves": [leaf.as_dict() for leaf in leaves],
        "adapters": _models.adapters_told(adapters),
    }


def about_manifest(folder: Path) -> dict[str, Any]:
    """How one of our folders was made, by its own account."""
    from jq4.checkpoint.orbax import read_manifest

    manifest = read_manifest(folder)
    return {"recipe": manifest.recipe, "source": manifest.source, "versions": dict(manifest.versions)}


def leaves_of_manifest(folder: Path) -> list[Any]:
    """The leaves of one of our folders; no array is read."""
    from jq4.checkpoint.manifest import ScalarInfo, abstract
    from jq4.checkpoint.orbax import read_manifest
    from jq4.inventory import inventory

    manifest = read_manifest(folder)
    arrays = {leaf.path: abstract(leaf) for leaf in manifest.leaves if not isinstance(leaf, ScalarInfo)}
    return [leaf for path, array in arrays.items() for leaf in rename(inventory([array]), path)]


def rename(leaves: list[Any], path: str) -> list[Any]:
    import dataclasses

    return [dataclasses.replace(leaf, path=path) for leaf in leaves]


def leaves_of_headers(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """The weights of a folder or file of any other format, by Hugging Face's names, and what is to be told of them."""
    from jq4.checkpoint.foreign import open_checkpoint
    from jq4.inventory import inventory

    found = open_checkpoint(path)
    leaves = [leaf for name, weight in found.weights.items() for leaf in rename(inventory([weight.abstract]), name)]
    return leaves, {"format": found.format, "notes": list(found.notes)}
