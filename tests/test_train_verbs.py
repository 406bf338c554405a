"""What each verb of `jq4 train` has of its own. Oracles: jq4's functions by themselves, runs without the option."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_model import make_random_model
from train_runs import QUICK, compiled_once, losses, printed, run, run_error

import jq4
from jq4.cli import main
from jq4.qarray import is_qarray
from jq4.train import TeacherCache, divergence, hidden_loss, inputs_of, next_token, stages
from jq4.train.running.rows import ShuffledRows
from models.decoder import Decoder
from models.language_model import LanguageModel

TEXT_ALONE = ("--recipe", "rtn-w3g32-asym", "--perturbed", 0)


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_random_model(tmp_path_factory.mktemp("models") / "random")


def first_batch(model, folder):
    ids = np.asarray(model.tokenizer.encode((folder / "text.txt").read_text()).ids, np.int32)
    rows = ids[: len(ids) // 16 * 16].reshape(-1, 16)
    return rows, ShuffledRows(rows, 8)[0]["tokens"][0]


# A teacher on disk --------------------------------------------------------------------------------------------------


def test_a_teacher_on_disk_teaches_as_one_at_hand(capsys, source, tmp_path):
    """All of a vocabulary of 300 is kept, in float16; then a second run finds it there."""
    at_hand = losses(run(capsys, "distill", source, *TEXT_ALONE, "--out", tmp_path / "hand"))
    cache = ("--teacher-cache", tmp_path / "teacher", "--top-k", 300, "--recipe", "rtn-w3g32-asym")
    data = run(capsys, "distill", source, *cache, "--out", tmp_path / "disk")
    np.testing.assert_allclose(losses(data), at_hand, rtol=5e-3, atol=1e-4)
    assert (data["perturbed"], data["top_k"]) == (0, 300)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "teacher").glob("*.safetensors")}
    again = run(capsys, "distill", source, *cache, "--out", tmp_path / "again", "--accumulate", 2)
    np.testing.assert_allclose(losses(again), losses(data), rtol=1e-4)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "teacher").glob("*.safetensors")} == written
    model = LanguageModel.from_folder(source)
    rows, _ = first_batch(model, source)
    kept = TeacherCache.open(tmp_path / "teacher", rows=rows, verify=True)
    np.testing.assert_array_equal(kept[0].tokens[:, 0], np.argmax(model.logits(rows[:1])[0], -1))
    few = run(capsys, "distill", source, *cache[:3], 8, *cache[4:], "--out", tmp_path / "few", "--teacher-cache",
              tmp_path / "other")  # fmt: skip
    assert losses(few)[0] < losses(data)[0]  # lumping tokens never raises a divergence
    message = "holds the predictions of another teacher or of other rows: k is 300 and not 8"
    text = ("--text", source / "text.txt", *QUICK, "--out", tmp_path / "out")
    assert message in run_error(capsys, "distill", source, *text, *cache[:3], 8, *cache[4:])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature", "2"], "--temperature does not go with --teacher-cache: a tail's mass has no temperature"),
        (["--perturbed", "0.5"], "--perturbed does not go with --teacher-cache"),
        (["--hidden", "down_proj"], "--hidden does not go with --teacher-cache: its hidden states are not kept"),
        (["--top-k", "301"], "k is 301, wanted 1 to 300"),
        (["--out", "{tmp}/teacher"], "--teacher-cache is, lies in or holds"),
        (["--teacher-cache", "{tmp}/out/teacher"], "out, which --out is made in; choose another folder for one of"),
        (["--teacher-cache", "{tmp}/out.partial/teacher"], "out.partial, which --out is made in; choose another"),
        (["--teacher-cache", "{tmp}/out.partial"], "out.partial, which --out is made in; choose another"),
    ],
)
def test_what_a_teacher_on_disk_cannot_is_told(capsys, source, tmp_path, argv, message):
    given = ("--text", source / "text.txt", *QUICK, "--out", tmp_path / "out", "--teacher-cache", tmp_path / "teacher")
    argv = [word.format(tmp=tmp_path) for word in argv]
    assert message in run_error(capsys, "distill", source, *given, "--recipe", "rtn-w4g32", *argv)
    assert not (tmp_path / "out").exists()
    assert "--top-k is of a --teacher-cache" in run_error(capsys, "distill", source, *given[:-2], "--top-k", 4)


# Hidden states ------------------------------------------------------------------------------------------------------


def test_hidden_states_are_held_to_the_teachers(capsys, source, tmp_path):
    """The first loss is that of the start, by jq4.quantized of the packed weights themselves."""
    hidden = ("--hidden", "down_proj", "re:layers.*o_proj", "--hidden-weight", 0.5)
    data = run(capsys, "distill", source, *TEXT_ALONE, *hidden, "--out", tmp_path / "out")
    model = LanguageModel.from_folder(source)
    _, batch = first_batch(model, source)
    apply = lambda params, tokens: Decoder(model.config).apply({"params": params}, tokens)  # noqa: E731
    watched = jax.jit(jq4.quantized(inputs_of(apply, ["down_proj", "re:layers.*o_proj"]), strict=True))
    packed = jq4.quantize(model.params, "rtn-w3g32-asym")
    (logits, found), (taught, wanted) = watched(packed, batch), watched(model.params, batch)
    assert len(found) == 2
    expected = jnp.mean(divergence(logits, taught)) + 0.5 * hidden_loss(found, wanted)
    np.testing.assert_allclose(losses(data)[0], expected, rtol=1e-4)
    assert losses(data)[-1] < losses(data)[0]
    text = ("--text", source / "text.txt", *QUICK, "--out", tmp_path / "other")
    told = run_error(capsys, "distill", source, *text, *TEXT_ALONE, "--hidden", "nothing_proj")
    assert "no weight is called 'nothing_proj'" in told and not (tmp_path / "other.partial").exists()
    weight = ("--hidden-weight", 0)
    assert "--hidden-weight is 0.0" in run_error(capsys, "distill", source, *text, "--hidden", "down_proj", *weight)
    assert "--hidden-weight is of --hidden, and there is none" in run_error(capsys, "distill", source, *text, *weight)


# Stages -------------------------------------------------------------------------------------------------------------


STAGES = ("--recipe", "rtn-w3g32-asym", "--stages", 8, 5)  # steps 1 and 2, 3 and 4, then 3 bits


@pytest.fixture(scope="module")
def staged(source, tmp_path_factory):
    """What `jq4 train qat --stages 8 5 --json` printed, of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("staged")
    return printed(folder, "qat", source, "--text", source / "text.txt", *QUICK, *STAGES, "--out", folder / "out")


def test_bits_come_down_in_stages_from_the_dense_weights(source, staged):
    """The first loss is that of the dense weights at 8 bits, packed, within the ranges of the start at 3."""
    model = LanguageModel.from_folder(source)
    _, batch = first_batch(model, source)
    start = jq4.quantize(model.params, "rtn-w3g32-asym")
    wide = stages("rtn-w3g32-asym", 6, (8, 5))[0].recipe
    ranges = jq4.quantizers(model.params, "rtn-w3g32-asym", start=start)
    at_8 = jq4.harden(model.params, jq4.quantizers(model.params, wide, start=ranges), wide)
    wanted, other = (
        float(jnp.mean(next_token(LanguageModel(model.config, packed).logits(batch), batch)))
        for packed in (at_8, start)
    )
    assert losses(staged)[0] == pytest.approx(wanted, rel=1e-5) and abs(wanted - other) > 1e-3
    rows = [json.loads(line) for line in Path(staged["files"]["metrics"]).read_text().splitlines()]
    assert [row["stage"] for row in rows] == [1, 1, 2, 2, 3, 3]
    served = LanguageModel.from_folder(staged["out"])
    leaves = jax.tree.leaves(served.params, is_leaf=is_qarray)
    assert {leaf.format for leaf in leaves if is_qarray(leaf)} == {"int3"}
    assert staged["stages"] == [8, 5] and staged["recipe"]["name"] == "rtn-w3g32-asym"


def test_stopped_between_and_within_stages_it_goes_on_to_the_same_losses(capsys, monkeypatch, source, staged, tmp_path):
    """At the end of the first stage, and within the second."""
    from jq4.train.running import run_folder

    keep, out = run_folder.RunFolder.keep, tmp_path / "out"

    def interrupted(self, state, step, lost=None):
        keep(self, state, step, lost)
        os.kill(os.getpid(), signal.SIGTERM)

    argv = ("train", "qat", source, "--text", source / "text.txt", *QUICK, *STAGES, "--out", out)
    argv = [*map(str, argv), "--save-every", "3", "--json"]
    monkeypatch.setattr(run_folder.RunFolder, "keep", interrupted)
    assert main(argv) == 130
    assert "stopped after step 2 of 6" in capsys.readouterr().err
    assert main(argv) == 130
    assert "stopped after step 3 of 6" in capsys.readouterr().err
    monkeypatch.setattr(run_folder.RunFolder, "keep", keep)
    assert main(argv) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["resumed"] == 3 and losses(data) == losses(staged)


def test_weights_go_first_where_inputs_are_rounded_too(capsys, source, tmp_path):
    rounded = ("--recipe", "rtn-w4g32-a8", "--weights-first")
    data = run(capsys, "distill", source, *rounded, "--perturbed", 0, "--out", tmp_path / "out")
    rows = [json.loads(line) for line in Path(data["files"]["metrics"]).read_text().splitlines()]
    assert [row["stage"] for row in rows] == [1, 1, 1, 2, 2, 2]
    model = LanguageModel.from_folder(source)
    _, batch = first_batch(model, source)
    weights_alone = LanguageModel(model.config, jq4.quantize(model.params, "rtn-w4g32"))
    wanted = float(jnp.mean(divergence(weights_alone.logits(batch), model.logits(batch))))
    assert losses(data)[0] == pytest.approx(wanted, rel=1e-4)
    leaves = jax.tree.leaves(LanguageModel.from_folder(data["out"]).params, is_leaf=is_qarray)
    assert {leaf.activations for leaf in leaves if is_qarray(leaf)} == {"int8-token"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipe", "rtn-w4g32", "--stages", "4"], "--stages 4: the recipe has no integers of fewer bits"),
        (["--recipe", "nf4", "--stages", "8"], "--stages 8: the recipe has no integers of fewer bits"),
        (["--recipe", "rtn-w4g32", "--stages", "6", "8"], "bits are (6, 8), wanted falling numbers from 8 to 2"),
        (["--recipe", "rtn-w4g32", "--stages", "8", "7", "6", "--steps", "3"], "3 steps for 4 stages"),
        (["--recipe", "rtn-w4g32", "--weights-first"], "the recipe rounds no inputs"),
    ],
)
def test_stages_that_cannot_be_are_told(capsys, source, tmp_path, argv, message):
    given = ("--text", source / "text.txt", *QUICK, "--out", tmp_path / "out")
    assert message in run_error(capsys, "qat", source, *given, *argv)
    assert list(tmp_path.iterdir()) == []


# Adapters -----------------------------------------------------------------------------------------------------------


def test_loftq_begins_with_codes_and_adapters_fitted_together(capsys, source, tmp_path):
    given = ("--recipe", "rtn-w2g32", "--rank", 4, "--held-out", 0.25)
    fitted = run(capsys, "qlora", source, *given, "--init", "loftq", "--loftq-iter", 3, "--out", tmp_path / "fitted")
    model, dense = LanguageModel.from_folder(tmp_path / "fitted"), LanguageModel.from_folder(source)
    packed, adapters = jq4.loftq(dense.params, "rtn-w2g32", 4, turns=3)
    jax.tree.map(np.testing.assert_array_equal, model.params, packed)
    assert fitted["loftq_iter"] == 3
    left = lambda tree, a: sum(  # noqa: E731
        float(jnp.sum((leaf.astype(jnp.float32) - other) ** 2))
        for leaf, other in zip(jax.tree.leaves(jq4.merge_lora(tree, a)[0]), jax.tree.leaves(dense.params), strict=True)
    )
    plain = jq4.quantize(dense.params, "rtn-w2g32")
    assert left(packed, adapters) < left(plain, jq4.lora(plain, 4))
    assert losses(fitted)[-1] < losses(fitted)[0]


@pytest.mark.parametrize("init", ["residual", "loftq"])
def test_what_packing_lost_is_fitted_once(capsys, monkeypatch, source, tmp_path, init):
    """Though the run is stopped and goes on, and its start is measured too; the first loss is that start's."""
    from jq4.train.adapters import loftq, lora
    from jq4.train.running import run_folder

    fitted, of_difference, keep = [], lora.of_difference, run_folder.RunFolder.keep

    def stopped(self, state, step, lost=None):
        keep(self, state, step, lost)
        os.kill(os.getpid(), signal.SIGTERM)

    for module in (lora, loftq):
        monkeypatch.setattr(
            module, "of_difference", lambda path, *rest: fitted.append(path) or of_difference(path, *rest)
        )
    text, out = source / "text.txt", tmp_path / "out"
    given = ("--recipe", "rtn-w2g32", "--rank", 4, "--init", init, "--held-out", text, "--out", out)
    argv = [*map(str, ("train", "qlora", source, "--text", text, *QUICK, *given)), "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "keep", stopped)
        assert main(argv) == 130
    capsys.readouterr()
    assert main(argv) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["resumed"] == 2
    by_the_run, dense = sorted(fitted), LanguageModel.from_folder(source)
    fitted.clear()
    if init == "residual":
        packed = jq4.quantize(dense.params, "rtn-w2g32")
        adapters = jq4.lora(packed, 4, init="residual", reference=dense.params)
    else:
        packed, adapters = jq4.loftq(dense.params, "rtn-w2g32", 4)
    assert by_the_run == sorted(fitted) != []
    _, batch = first_batch(dense, source)
    model = dataclasses.replace(dense, params=packed, adapters=adapters)
    wanted = float(jnp.mean(next_token(model.logits(batch), batch)))
    assert losses(data)[0] == pytest.approx(wanted, rel=1e-4)
    rows, _ = first_batch(dense, source)
    measured = float(jnp.exp(jnp.mean(next_token(model.logits(rows), rows))))
    assert data["before"]["perplexity"] == pytest.approx(measured, rel=1e-4)


def test_what_is_dropped_depends_on_row_and_step_alone(capsys, source, tmp_path):
    given = ("--recipe", "rtn-w4g32", "--rank", 4, "--dropout", 0.5, "--init", "residual")
    whole = losses(run(capsys, "qlora", source, *given, "--out", tmp_path / "whole"))
    parts = losses(run(capsys, "qlora", source, *given, "--out", tmp_path / "parts", "--accumulate", 4))
    np.testing.assert_allclose(parts, whole, rtol=1e-4)
    plain = losses(run(capsys, "qlora", source, *given[:4], *given[6:], "--out", tmp_path / "plain"))
    assert not np.allclose(plain[1:], whole[1:], rtol=1e-4)


def test_a_packed_base_over_devices_says_that_no_kernel_multiplies(capsys, source, tmp_path):
    given = ("--text", source / "text.txt", *QUICK, "--recipe", "rtn-w4g32", "--rank", 4, "--out", tmp_path / "out")
    assert main(["train", "qlora", str(source), *map(str, given), "--devices", "2", "--fsdp", "2"]) == 0
    assert "over 2 devices the packed weights are multiplied by XLA's own forms" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--init", "loftq", "--loftq-iter", "0"], "--loftq-iter is 0, wanted 1 or more"),
        (["--loftq-iter", "2"], "--loftq-iter is of --init loftq"),
        (["--init", "loftq", "--recipe", "best-w4g32"], "--init loftq packs by rules alone, and the recipe has steps"),
    ],
)
def test_what_loftq_cannot_is_told(capsys, source, tmp_path, argv, message):
    given = ("--text", source / "text.txt", *QUICK, "--out", tmp_path / "out")
    assert message in run_error(capsys, "qlora", source, *given, *argv)
    assert list(tmp_path.iterdir()) == []


# All of them --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["qat", "distill", "qlora"])
def test_rows_of_one_token_predict_nothing(capsys, source, tmp_path, verb):
    given = ("--text", source / "text.txt", *QUICK, "--out", tmp_path / "out", "--context", 1)
    assert "--context is 1, wanted 2 or more: a token is predicted from those before it" in run_error(
        capsys, verb, source, *given
    )


@pytest.mark.parametrize("verb", ["qat", "distill", "qlora"])
def test_no_rows_calibrate_nothing(capsys, source, tmp_path, verb):
    given = ("--text", source / "text.txt", *QUICK, "--out", tmp_path / "out", "--calibration-rows", 0)
    assert "--calibration-rows is 0, wanted 1 or more" in run_error(capsys, verb, source, *given)


@pytest.mark.parametrize("option", ["--start", "--teacher"])
def test_what_a_training_reads_is_not_written_over(capsys, source, tmp_path, option):
    for name, out in (("packed", "packed"), ("packed", "packed/trained"), ("out.partial/start", "out")):
        packed = tmp_path / name
        jq4.save(packed, {"kernel": jnp.ones((2, 2))})
        given = ("--text", source / "text.txt", *QUICK, "--out", tmp_path / out, option, packed)
        assert "is, lies in or holds" in run_error(capsys, "distill", source, *given)


def test_what_was_computed_in_is_told(staged):
    told = json.loads(Path(staged["files"]["run"]).read_text())
    assert told["dtype"] == staged["dtype"] == "float32"
