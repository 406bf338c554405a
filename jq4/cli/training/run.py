"""A run of `jq4 train`: from a task to a folder, going on where an earlier process of the same run was stopped."""

import argparse
import contextlib
import logging
from pathlib import Path
from typing import Any

from jq4.cli.training.task import Task

TRAINING, PICTURE = "training", "loss.png"  # the folder beside the weights, and the loss in it


def carry_out(task: Task, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains, writes OUT and measures; what `jq4 train --json` prints."""
    from jq4.cli import _models, _terminal
    from jq4.cli.training.descent import descend
    from jq4.inventory import bytes_on_disk, inventory, totals
    from jq4.train.running.metrics import read_metrics
    from jq4.train.running.run_folder import METRICS, SUFFIX, clear, run_folder

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every save that waits for the one before
    watch = _terminal.Stopwatch()
    out = Path(arguments.out)
    partial = out.with_name(out.name + SUFFIX)
    identity = identity_of(task, arguments)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with run_folder(partial, identity, arguments.restart, judged=arguments.keep_best) as folder:
        done = descend(task, arguments, folder)
        model = task.served(done.trained, done.start)
        measured = measure(task, done.start, model, arguments.batch_size)
        rows = read_metrics(partial / METRICS)
        kept = {"kept": done.kept} if arguments.keep_best else {}
        about = {**identity, **measured, **summary_of(rows), **kept}
        told = provenance_of(identity) | kept
        model.save(out, recipe=task.recipe, source=task.given["model"] | {"training": told})
        remove_older(out)
        files = task.beside(out, model) | write_figures(out, about, partial, task.judged_by)
    clear(partial)
    with contextlib.suppress(OSError):
        partial.rmdir()
    held = totals(inventory(model.params))
    return {
        "model": arguments.model,
        "out": arguments.out,
        "training": arguments.training,
        **about,
        **{key: held[key] for key in ("parameters", "bits_per_weight", "bits_per_weight_packed", "bytes")},
        "bytes_on_disk": bytes_on_disk(out),
        "adapters": _models.adapters_told(model.adapters),
        "resumed": folder.resumed,
        "files": files,
        "went_dense": _models.went_dense(model),
        "seconds": watch.seconds,
        "versions": _terminal.versions(),
    }


def remove_older(out: Path) -> None:
    """Removes what an earlier training left beside the weights in OUT: PEFT's files and figures, of weights no more."""
    from jq4.cli.training.adapted import PEFT
    from jq4.train.running.run_folder import HELD_OUT, METRICS, RUN
    from models.peft import CONFIG, WEIGHTS

    for folder, names in ((out / PEFT, (CONFIG, WEIGHTS)), (out / TRAINING, (METRICS, HELD_OUT, RUN, PICTURE))):
        for name in names:
            (folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def identity_of(task: Task, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that the result depends on but the number of devices, which changes sums by rounding."""
    from jq4.cli import _terminal
    from jq4.cli.training import options
    from jq4.driver.journal import digest_of

    asked = options.identity_of(arguments) | {"recipe": task.recipe and task.recipe.to_dict()}
    rows = digest_of(task.text.rows)
    versions = _terminal.versions()
    return {**asked, "sources": task.given, **task.text.about, "rows": rows, "versions": versions}


def provenance_of(identity: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of the training: all that is not told there of any model."""
    told = {name: value for name, value in identity.items() if name not in ("recipe", "sources", "versions")}
    others = {name: origin for name, origin in identity["sources"].items() if name != "model"}
    return told | ({"sources": others} if others else {})


def measure(task: Task, start: Any, model: Any, batch_size: int) -> dict[str, Any]:
    """The start and the result on the rows held out; nothing where there are none."""
    from jq4.cli import _models

    if task.text.held_out is None:
        return {}
    found = {}
    for name, measured in (("before", task.before(start)), ("after", model)):
        packed = _models.laid_out(measured)
        found[name] = _models.evaluated(packed, task.reference, task.text.held_out, batch_size).as_dict()
    return found


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The loss at the beginning and the end, the mean of a twentieth of the steps; and seconds of the steps."""
    import numpy as np

    losses = [row["loss"] for row in rows]
    few = max(1, len(losses) // 20)
    return {
        "loss_first": float(np.mean(losses[:few])),
        "loss_last": float(np.mean(losses[-few:])),
        "seconds_training": float(sum(row["seconds"] for row in rows)),
        "tokens_per_second": float(np.median([row["tokens_per_second"] for row in rows])),
    }


def write_figures(out: Path, about: dict[str, Any], run: Path, judged_by: str) -> dict[str, str]:
    """Writes OUT/training of what the folder of a run holds; its files by kind."""
    from jq4 import plain_json
    from jq4.checkpoint.atomic import replace_file
    from jq4.cli.training import picture
    from jq4.train.running.metrics import read_metrics
    from jq4.train.running.run_folder import HELD_OUT, METRICS, RUN

    rows, judged = (read_metrics(run / name) for name in (METRICS, HELD_OUT))
    contents = {
        "metrics": (METRICS, (run / METRICS).read_bytes()),
        "held_out": (HELD_OUT, (run / HELD_OUT).read_bytes() if judged else None),
        "run": (RUN, (plain_json.dumps(about, indent=2) + "\n").encode()),
        "picture": (PICTURE, picture.draw(rows, judged, judged_by, about)),
    }
    folder = out / TRAINING
    folder.mkdir(exist_ok=True)
    written = {kind: (folder / name, content) for kind, (name, content) in contents.items() if content is not None}
    for file, content in written.values():
        replace_file(file, content)
    return {kind: str(file) for kind, (file, _) in written.items()}
