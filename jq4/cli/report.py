"""jq4 report: how good is a packed model? Measured, and written down as JSON, Markdown and one HTML page."""

import argparse
from pathlib import Path
from typing import Any

from jq4.cli import _models
from jq4.cli.eval import add_text_arguments

HELP = "write a quality report: KLD, perplexity, error by layer, bytes; JSON, Markdown, HTML"
DESCRIPTION = (
    "Everything that jq4 eval measures on the text, and with --reference also each packed weight's error: SQNR, and "
    "what its outputs lost over the inputs that the reference's weights meet on that text. Writes report.json, "
    "report.md and report.html, a page that needs no other file."
)
_COMPARED = ("bits_per_weight_packed", "bytes", "kld_mean", "top1_agreement", "perplexity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_models.MODEL)
    parser.add_argument("--reference", metavar="MODEL", help="the dense model that it was made from")
    add_text_arguments(parser)
    parser.add_argument("--out", default="jq4-report", metavar="DIR", help="where to write (default ./jq4-report)")
    parser.add_argument(
        "--quantizing", metavar="REPORT", help="what jq4 quantize --report wrote: its time and memory are told too"
    )
    parser.add_argument(
        "--compare", action="append", default=[], metavar="REPORT", help="another report's folder; may be repeated"
    )


def run(arguments: argparse.Namespace) -> None:
    from jq4.cli import _folders, _terminal
    from jq4.quality_report import write_report
    from jq4.quality_report.sections import sections
    from jq4.quality_report.write import FILES
    from jq4.report import make_table

    _folders.check_only_ours(Path(arguments.out), FILES, "no report wrote")
    data = measure(arguments)
    files = write_report(data, arguments.out)
    if arguments.json:
        _terminal.print_json(data | {"files": files})
        return
    console = _terminal.console()
    for section in sections(data):
        if section.rows and not section.long:
            console.print(make_table(section.title, section.head, section.rows))
        elif section.text and not section.long:
            console.print(section.text)
    console.print(f"report: {files['html']}, {files['md']}, {files['json']}")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report's data: what `jq4 report --json` prints."""
    from jq4.cli import _terminal
    from jq4.cli.eval import read_given
    from jq4.inventory import bytes_on_disk, inventory, totals
    from jq4.quality_report import compose_report, expert_coverage, leaf_rows

    watch = _terminal.Stopwatch()
    given = read_given(arguments)
    others = [read_compared(path) for path in arguments.compare]
    model = _models.open_model(arguments.model)
    reference = None if arguments.reference is None else _models.open_model(arguments.reference)
    if reference is not None:
        model, reference = _models.in_the_same_runs(model, reference)
    rows, dropped = given.rows_for(model, arguments.model, arguments.context)
    text = given.described(rows, dropped)
    for other in others:
        check_comparable(other, text, arguments.reference)
    leaves = inventory(model.params)
    held = totals(leaves) | {"bytes_on_disk": bytes_on_disk(arguments.model)}
    cost = None if arguments.quantizing is None else cost_of(arguments.quantizing, arguments.model, held)
    errors, stats = [], {}
    if reference is not None:
        errors, stats = measure_leaves(model, reference, rows, arguments.batch_size)
    runnable = _models.laid_out(model)
    found = _models.evaluated(runnable, reference, rows, arguments.batch_size)
    adapters = _models.adapters_told(model.adapters)
    mine = as_compared(
        {"model": name_of(arguments.model), "totals": held, "adapters": adapters, "evaluation": found.as_dict()}
    )
    compared = [{key: each.get(key) for key in ("name", *_COMPARED)} for each in (mine, *map(as_compared, others))]
    return compose_report(
        model=name_of(arguments.model),
        reference=None if arguments.reference is None else name_of(arguments.reference),
        leaves=leaf_rows(leaves, errors),
        evaluation=found,
        text=text,
        experts=expert_coverage(stats, list(stats)),
        totals=held,
        adapters=adapters,
        compared=compared if others else [],
        notes=[
            *notes_on_reference(arguments.model, arguments.reference),
            *_models.notes_on_adapters(model, reference),
            *notes_on(model, reference, _models.went_dense(runnable)),
        ],
        versions=_terminal.versions(),
        **made_of(arguments.model),
        cost=cost,
    ) | {"seconds": watch.seconds}


def measure_leaves(model: Any, reference: Any, rows: Any, batch_size: int) -> tuple[list[Any], Any]:
    """Each packed leaf's error over the inputs that the reference's weights meet on `rows`, and those statistics."""
    from jq4.axes import contraction_axes
    from jq4.cli import _terminal
    from jq4.leaf_errors import collect_hessians, leaf_errors

    axes = contraction_axes(_models.function_of(reference), reference.params, rows[:1])
    collect = collect_hessians(reference.params, axes)
    stats = _models.observe_inputs(reference, rows, batch_size, collect, "observing the reference")
    with _terminal.progress("comparing weights") as step:
        return leaf_errors(reference.params, model.params, stats, step), stats


def name_of(folder: str) -> str:
    return Path(folder).resolve().name


def made_of(folder: str) -> dict[str, Any]:
    """How a folder was made, by its own account: recipe, source and calibration."""
    from jq4.checkpoint.orbax import read_manifest

    if not _models.is_checkpoint(folder):
        return {}
    manifest = read_manifest(folder)
    source = dict(manifest.source or {})
    return {"recipe": manifest.recipe, "calibration": source.pop("calibration", None), "source": source}


def cost_of(quantizing: str, folder: str, held: dict[str, Any]) -> dict[str, Any] | None:
    """What a report of quantizing tells of time and memory, if it is of this model: by its sizes and calibration."""
    from jq4.errors import JQ4Error
    from jq4.quality_report import read_report

    report, made = read_report(quantizing), made_of(folder)
    theirs = {**report.get("totals", {}), "calibration": report.get("calibration")}
    ours = {**held, "calibration": made.get("calibration")}
    for name in ("parameters", "parameters_packed", "bytes", "calibration"):
        if theirs.get(name) != ours[name]:
            raise JQ4Error(
                f"{quantizing}: is not of the quantizing that made {folder}: its {name} {_told(theirs.get(name))}, the "
                f"model's {_told(ours[name])}; give what jq4 quantize --report wrote when it made this model"
            )
    return report.get("cost")


def _told(value: Any) -> str:
    """A figure, or the file that was calibrated on."""
    return f"{value.get('file')} ({value.get('sha256')})" if isinstance(value, dict) else str(value)


def notes_on_reference(folder: str, reference: str | None) -> list[str]:
    """That the reference's files are others than those the folder says it was made from, where it says so."""

    recorded = made_of(folder).get("source", {}).get("files", {})
    if reference is None or not recorded or _models.MANIFEST in recorded:
        return []
    found = _models.origin(Path(reference))["files"]
    differing = sorted(name for name in {*recorded, *found} if recorded.get(name) != found.get(name))
    if not differing:
        return []
    return [
        f"the reference is not the folder that the model was made from: {', '.join(differing)} differ from what its "
        "manifest names. The figures are those of its distance from this reference."
    ]


def read_compared(path: str) -> dict[str, Any]:
    """Another report, which must have an evaluation to compare with."""
    from jq4.errors import JQ4Error
    from jq4.quality_report import read_report

    data = read_report(path)
    if "kld_mean" not in data.get("evaluation", {}):
        raise JQ4Error(f"{path}: the report has no KLD to compare with; write it with --reference")
    return data


def check_comparable(other: dict[str, Any], text: dict[str, Any], reference: str | None) -> None:
    """Figures are compared only where they are of the same tokens and the same reference."""
    from jq4.errors import JQ4Error

    theirs = other["evaluation"].get("text", {})
    for key in ("sha256", "rows", "context"):
        if theirs.get(key) != text[key]:
            raise JQ4Error(
                f"the report of {other['model']} was measured on other tokens ({key} {theirs.get(key)}, here "
                f"{text[key]}); measure both on the same text and context"
            )
    if reference is None or other.get("reference") != name_of(reference):
        raise JQ4Error(
            f"the report of {other['model']} was measured against {other.get('reference')}; give that --reference"
        )


def as_compared(report: dict[str, Any]) -> dict[str, Any]:
    """A report's figures in a row; bytes are of weights and adapters together."""
    row = {"name": report["model"], **report.get("totals", {}), **report["evaluation"]}
    adapters = report.get("adapters")
    return row if adapters is None else row | {"bytes": row["bytes"] + adapters["bytes"]}


def notes_on(model: Any, reference: Any, went_dense: list[dict[str, Any]]) -> list[str]:
    """What a reader must know before the figures are believed."""
    import numpy as np

    from jq4.paths import flatten_with_paths
    from jq4.qarray import is_qarray

    notes = [f"{e['path']} was not kept packed at {e['primitive']}: {e['reason']}" for e in went_dense]
    if reference is None:
        return notes
    exact = dict(flatten_with_paths(reference.params))
    changed = [
        path
        for path, leaf in flatten_with_paths(model.params)
        if not is_qarray(leaf) and path in exact and not np.array_equal(np.asarray(leaf), np.asarray(exact[path]))
    ]
    if changed:
        notes.append(
            f"{len(changed)} dense leaves differ from the reference's ({changed[0]}, ...): a step moved scales or "
            "rotations between leaves, or learned them, so the errors of single weights are not those of one function. "
            "KLD, perplexity and agreement are of the whole model, and stand."
        )
    return notes
