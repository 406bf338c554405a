"""Runs of `jq4 train` that take seconds, and what they printed."""

import contextlib
import json
from pathlib import Path

import jax
import pytest

from jq4.cli import main
from jq4.train.running.metrics import read_metrics

QUICK = ("--steps", 6, "--batch-size", 8, "--save-every", 2, "--context", 16, "--rate", 0.02, "--devices", 1)
CACHE = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextlib.contextmanager
def compiled_once(folder):
    """Runs of the same options compile the same programs."""
    kept = {name: getattr(jax.config, name) for name in CACHE}
    for name, value in (CACHE | {"jax_compilation_cache_dir": str(folder)}).items():
        jax.config.update(name, value)
    yield
    for name, value in kept.items():
        jax.config.update(name, value)


def printed(folder, *argv):
    """What `jq4 train ... --json` printed, for fixtures, which have no capsys."""
    file = folder / "printed.json"
    with file.open("w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        assert main(["train", *map(str, argv), "--json"]) == 0
    return json.loads(file.read_text())


def run(capsys, verb, source, *argv):
    assert main(["train", verb, *map(str, (source, "--text", source / "text.txt", *QUICK, *argv)), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def run_error(capsys, *argv):
    assert main(["train", *map(str, argv)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def losses(data):
    rows = read_metrics(Path(data["files"]["metrics"]))
    assert [row["step"] for row in rows] == list(range(1, data["steps"] + 1))
    assert all(row["tokens_per_second"] > 0 and row["gradient_norm"] > 0 for row in rows)
    return [row["loss"] for row in rows]
