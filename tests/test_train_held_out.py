"""What `jq4 train` measures on its way, and the best that it keeps. Oracles: `jq4.evaluate` of what was written, a run
that nobody stopped, and the start itself."""

import argparse
import io
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from random_model import make_random_model
from rich.console import Console
from train_runs import QUICK, compiled_once, printed, run, run_error

import jq4
from jq4.cli import main
from jq4.cli.training.rounded import starts_learned
from jq4.drawing import has_matplotlib
from jq4.report import training_table
from jq4.train.running.metrics import Metrics, read_metrics
from jq4.train.running.states import States
from models.language_model import LanguageModel

RECIPE = ("--recipe", "rtn-w3g32-asym")
JUDGED = ("--held-out", 0.25, "--measure-every", 2, "--keep-best", *RECIPE)
WORSE_LATER = ("--rate", 0.05, "--schedule", "constant", "--save-every", 5)


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_random_model(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="module")
def distilled(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    argv = ("distill", source, "--text", source / "text.txt", *QUICK, *JUDGED, *WORSE_LATER)
    return printed(folder, *argv, "--out", folder / "out")


def measured(data):
    rows = read_metrics(Path(data["files"]["held_out"]))
    found = {row["step"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def check_ends(data, figures):
    """What was measured of the start and of what is kept is what `jq4.evaluate` says of these folders."""
    rows = measured(data)
    for step, told in ((0, data["before"]), (data["kept"], data["after"])):
        assert {name: rows[step][name] for name in figures} == pytest.approx(
            {name: told[name] for name in figures}, rel=1e-4
        )


def test_the_state_that_lost_least_is_written(distilled):
    rows = measured(distilled)
    assert list(rows) == [0, 2, 4, 6]
    assert distilled["kept"] == min(rows, key=lambda step: rows[step]["kld_mean"]) == 2
    check_ends(distilled, ("kld_mean", "nll", "perplexity"))
    out = Path(distilled["out"])
    assert json.loads((out / "training" / "run.json").read_text())["kept"] == distilled["kept"]
    assert (out / "training" / "loss.png").exists() == has_matplotlib()
    console = Console(file=io.StringIO(), width=200)
    console.print(training_table(distilled))
    assert "6 (kept as of 2)" in console.file.getvalue()


def test_training_on_text_is_judged_by_the_text(capsys, source, tmp_path):
    """The dense model knows little of it, so that what learns it leaves the dense model behind."""
    data = run(capsys, "qat", source, *JUDGED, "--out", tmp_path / "out")
    rows = measured(data)
    assert data["kept"] == min(rows, key=lambda step: rows[step]["nll"]) > 0
    assert rows[data["kept"]]["kld_mean"] > rows[0]["kld_mean"]


def test_where_training_only_harms_the_start_is_written(capsys, source, tmp_path):
    argv = ("--measure-every", 4, "--rate", 0.3, "--out", tmp_path / "out")
    data = run(capsys, "distill", source, *JUDGED, *argv)
    assert data["kept"] == 0 and data["after"] == data["before"]
    rows = measured(data)
    assert list(rows) == [0, 4, 6] and all(rows[step]["kld_mean"] > rows[0]["kld_mean"] for step in (4, 6))
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "kept 0" in capsys.readouterr().out


def test_stopped_again_and_again_it_keeps_the_same(capsys, monkeypatch, source, distilled, tmp_path):
    """Stopped before the first state is kept, when its line is written; then after each state, step by step."""
    from jq4.train.running import run_folder

    keep, out = run_folder.RunFolder.keep, tmp_path / "out"
    argv = ("train", "distill", source, "--text", source / "text.txt", *QUICK, *JUDGED, *WORSE_LATER, "--out", out)
    argv = [*map(str, argv)]

    def killed(self, state, step, lost=None):
        raise KeyboardInterrupt

    def interrupted(self, state, step, lost=None):
        keep(self, state, step, lost)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run_folder.RunFolder, "keep", killed)
    assert main(argv) == 130
    monkeypatch.setattr(run_folder.RunFolder, "keep", interrupted)
    kept = {0: ["0"], 2: ["0", "2"], 5: ["2", "5"]}  # as of 2 it is the best; 4 is measured, no better and not kept
    for step, states in kept.items():
        assert main(argv) == 130
        assert f"stopped after step {step} of 6" in capsys.readouterr().err
        assert sorted(path.name for path in (tmp_path / "out.partial" / "states").iterdir()) == states
        if step == 0:  # no step is lost where another run is begun here
            assert main([*argv, "--seed", "1"]) == 130 and main(argv) == 130
            capsys.readouterr()
    monkeypatch.setattr(run_folder.RunFolder, "keep", keep)
    assert main([*argv, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["resumed"] == 5 and measured(data) == measured(distilled)
    assert (data["kept"], data["after"]) == (distilled["kept"], distilled["after"])


def test_a_state_that_is_no_number_is_told_with_its_step(capsys, monkeypatch, source, tmp_path):
    from jq4.cli.training import descent

    keeps = descent.Reporting.look

    def blown_up(self, state, step):
        broken = jax.tree.map(lambda leaf: leaf * jnp.nan if leaf.dtype == jnp.float32 else leaf, state.trained)
        keeps(self, state._replace(trained=broken) if step == 2 else state, step)

    monkeypatch.setattr(descent.Reporting, "look", blown_up)
    text = ("--text", source / "text.txt", *QUICK, "--out", tmp_path / "out")
    told = run_error(capsys, "qat", source, *text, *JUDGED)
    assert "step 2, rows held out: " in told and "If training diverged: lower the rate, or clip gradients" in told


def test_the_last_two_states_and_the_best_stay(tmp_path):
    """Those that were not judged go too; of equals the latest is the best."""
    states = States(tmp_path, judged=True)
    assert states.best is None and states.least is None
    for step, lost in enumerate((0.5, 0.2, None, 0.2, None, 0.3, None)):
        states.save(step, {"step": jnp.full(3, step)}, lost)
    states.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "5", "6"]
    states.close()
    again = States(tmp_path, judged=True)
    assert (again.last, again.best, again.least) == (6, 3, 0.2)
    assert again.restore(3, {"step": jnp.zeros(3, jnp.int32)})["step"].tolist() == [3, 3, 3]
    again.close()


def test_figures_that_json_has_no_word_for_are_null(tmp_path):
    metrics = Metrics(tmp_path / "held_out.jsonl", -1)
    metrics.add({"step": 0, "nll": 800.0, "perplexity": float("inf")})
    metrics.close()
    assert (tmp_path / "held_out.jsonl").read_text() == '{"step": 0, "nll": 800.0, "perplexity": null}\n'


def test_of_equals_the_latest_is_written(capsys, source, tmp_path):
    """Steps too short to change a weight."""
    data = run(capsys, "distill", source, *JUDGED, "--rate", 1e-30, "--save-every", 4, "--out", tmp_path / "out")
    assert len({row["kld_mean"] for row in measured(data).values()}) == 1 and data["kept"] == 6


@pytest.mark.parametrize(
    ("recipe", "start", "stages", "learned"),
    [
        ("rtn-w4g32", None, [], False),
        ("best-w4g32", None, [], True),
        ("best-w4g32", None, [8], False),
        ("gptq-w4g32", "best-w4g32", [], True),
        ("best-w4g32", "rtn-w4g32", [], False),
    ],
)
def test_whether_a_start_was_learned_is_what_the_start_says(source, tmp_path, recipe, start, stages, learned):
    arguments = argparse.Namespace(start=start and str(tmp_path), stages=stages)
    if start is not None:
        packed = jq4.quantize(LanguageModel.from_folder(source).params, "rtn-w4g32")
        jq4.save(tmp_path, packed, recipe=jq4.Recipe.preset(start))
    assert starts_learned(arguments, jq4.Recipe.preset(recipe)) == learned


def test_of_stages_the_last_ones_states_may_be_kept(capsys, source, tmp_path):
    """Of 8 bits much less is lost, but they are not what is asked for."""
    argv = ("--stages", 8, "--measure-every", 1, "--rate", 1e-4, "--out", tmp_path / "out")
    data = run(capsys, "distill", source, *JUDGED, *argv)
    rows = measured(data)
    assert [row["stage"] for row in rows.values()] == [1, 1, 1, 1, 2, 2, 2]
    assert rows[3]["kld_mean"] < rows[4]["kld_mean"] / 10
    assert data["kept"] == min((4, 5, 6), key=lambda step: rows[step]["kld_mean"])
    check_ends({**data, "before": rows[0]}, ("kld_mean",))


def test_adapters_are_measured_over_devices(capsys, source, tmp_path):
    argv = ("--held-out", 0.25, "--measure-every", 6, "--dropout", 0.5, "--rank", 4, "--recipe", "rtn-w4g32")
    over = ("--devices", 4, "--fsdp", 2, "--accumulate", 2, "--out", tmp_path / "out")
    data = run(capsys, "qlora", source, *argv, *over)
    assert "kept" not in data and list(measured(data)) == [0, 6]
    check_ends({**data, "kept": 6}, ("nll", "perplexity"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--measure-every", 2], "--measure-every wants rows to measure on: give --held-out too"),
        (["--held-out", 0.25, "--measure-every", 0], "--measure-every is 0, wanted 1 or more"),
        (["--held-out", 0.25, "--keep-best"], "--keep-best chooses of what was measured on the way: give"),
    ],
)
@pytest.mark.parametrize("verb", ["qat", "qlora"])
def test_what_cannot_be_measured_is_told(capsys, source, tmp_path, verb, argv, message):
    text = ("--text", source / "text.txt", *QUICK, "--out", tmp_path / "out")
    assert message in run_error(capsys, verb, source, *text, *argv)
    assert not any(tmp_path.iterdir())
