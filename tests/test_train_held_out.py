"""What `jq4 train` measures on its way, and the best that it keeps. Oracles: `jq4.evaluate` of what was written, a run
that nobody stopped, and the start itself."""

import json
import os
import signal
from pathlib import Path

import pytest
from random_model import make_random_model
from train_runs import QUICK, compiled_once, printed, run, run_error

from jq4.cli import main
from jq4.train.running.metrics import read_metrics

JUDGED = ("--held-out", 0.25, "--measure-every", 2, "--keep-best", "--recipe", "rtn-w3g32-asym")


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
    argv = ("distill", source, "--text", source / "text.txt", *QUICK, *JUDGED)
    return printed(folder, *argv, "--out", folder / "out")


def measured(data):
    return {row["step"]: row for row in read_metrics(Path(data["files"]["held_out"]))}


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
    assert distilled["kept"] == min(rows, key=lambda step: rows[step]["kld_mean"]) > 0
    check_ends(distilled, ("kld_mean", "nll", "perplexity"))
    out = Path(distilled["out"])
    assert json.loads((out / "training" / "run.json").read_text())["kept"] == distilled["kept"]
    assert (out / "training" / "loss.png").exists()


def test_where_training_only_harms_the_start_is_written(capsys, source, tmp_path):
    data = run(capsys, "distill", source, *JUDGED, "--rate", 0.3, "--save-every", 5, "--out", tmp_path / "out")
    assert data["kept"] == 0 and data["after"] == data["before"]
    rows = measured(data)
    assert all(rows[step]["kld_mean"] > rows[0]["kld_mean"] for step in (2, 4, 6))
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "kept 0" in capsys.readouterr().out


def test_stopped_again_and_again_it_keeps_the_same(capsys, monkeypatch, source, distilled, tmp_path):
    """Stopped after each state that is kept; the first one is that before the first step."""
    from jq4.train.running import run_folder

    keep, out = run_folder.RunFolder.keep, tmp_path / "out"

    def interrupted(self, state, step, lost=None):
        keep(self, state, step, lost)
        os.kill(os.getpid(), signal.SIGTERM)

    argv = [*map(str, ("train", "distill", source, "--text", source / "text.txt", *QUICK, *JUDGED, "--out", out))]
    monkeypatch.setattr(run_folder.RunFolder, "keep", interrupted)
    for step in (0, 2, 4):
        assert main(argv) == 130
        assert f"stopped after step {step} of 6" in capsys.readouterr().err
    monkeypatch.setattr(run_folder.RunFolder, "keep", keep)
    assert main([*argv, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["resumed"] == 4 and measured(data) == measured(distilled)
    assert (data["kept"], data["after"]) == (distilled["kept"], distilled["after"])


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
    over = ("--devices", 4, "--fsdp", 2, "--out", tmp_path / "out")
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
