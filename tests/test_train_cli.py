"""Oracles: jq4's own functions on the written model, a run that nobody stopped, the rounded function in training."""

import dataclasses
import functools
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
from jq4.cli.training.rounded import begun, rounded_forward, served
from jq4.cli.training.run import remove_older
from jq4.divergence import divergence
from models.decoder import Decoder
from models.language_model import LanguageModel
from models.peft import load_peft


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_random_model(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="module")
def distilled(source, tmp_path_factory):
    """What `jq4 train distill --json` printed, of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("trained")
    argv = ("distill", source, "--text", source / "text.txt", *QUICK, "--held-out", 0.25, "--recipe", "rtn-w3g32-asym")
    return printed(folder, *argv, "--out", folder / "out")


def test_a_trained_folder_is_a_model(capsys, source, distilled):
    out = distilled["out"]
    assert main(["inspect", out, "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)
    assert {leaf["format"] for leaf in inspected["leaves"] if leaf["packed"]} == {"int3"}
    assert inspected["recipe"]["name"] == "rtn-w3g32-asym"
    training = json.loads((Path(out) / "training" / "run.json").read_text())
    told = inspected["source"]["training"]
    assert told["steps"] == 6 and told["rate"] == 0.02 and told["held_out"] == {"share": 0.25, "rows": 4}
    assert told == {name: training[name] for name in told}
    asked = {"weights_first", "hidden", "top_k", "perturbed", "accumulate", "clip", "schedule", "remat", "dtype"}
    assert asked < set(told)
    assert main(["inspect", out]) == 0
    shown = capsys.readouterr().out
    for words in ("rtn-w3g32-asym", "trained by", "distill", "text.txt", "held out", "rate 0.02", "perturbed 0.6"):
        assert words in shown
    assert distilled["bytes"] == inspected["bytes"] and distilled["went_dense"] == []
    assert main(["generate", out, "--prompt", "The quick", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("The quick")
    assert {"metrics.jsonl", "run.json"} <= {path.name for path in (Path(out) / "training").iterdir()}
    assert not Path(f"{out}.partial").exists()


def test_the_loss_is_the_divergence_from_the_dense_model(source, distilled):
    """At its last step's rate of nearly nothing: the written model's KL on all rows is about what training told."""
    assert losses(distilled)[-1] < losses(distilled)[0]
    dense, packed = LanguageModel.from_folder(source), LanguageModel.from_folder(distilled["out"])
    ids = np.asarray(dense.tokenizer.encode((source / "text.txt").read_text()).ids, np.int32)
    rows = ids[: len(ids) // 16 * 16].reshape(-1, 16)
    found = float(jnp.mean(divergence(packed.logits(rows), dense.logits(rows))))
    assert 0.5 < found / losses(distilled)[-1] < 2
    assert distilled["after"]["kld_mean"] < distilled["before"]["kld_mean"]


def test_what_is_served_is_what_was_trained(source):
    """To float32's rounding of sums; in bfloat16 too, where a file's dense leaves are bfloat16."""
    model = LanguageModel.from_folder(source)
    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), model.params)
    model = LanguageModel(model.config, narrow, model.tokenizer, jnp.float32, model.files)
    recipe = jq4.Recipe.preset("rtn-w4g32-asym")
    params, quantizers = begun(jq4.quantize(model.params, recipe), model.params, recipe)
    params = jax.tree.map(lambda leaf: leaf * 1.01 + 0.003, params)  # not representable in bfloat16
    tokens = np.load(source / "ids.npy")
    packed = served(model, (params, quantizers), recipe)
    assert packed.params["embed"]["embedding"].dtype == jnp.bfloat16
    trained = jax.jit(rounded_forward(model, recipe, "float32", remat=True))((params, quantizers), tokens)
    np.testing.assert_allclose(packed.logits(tokens), trained, atol=2e-5)
    half = jax.jit(rounded_forward(model, recipe, "bfloat16", remat=False))((params, quantizers), tokens)
    assert 1e-4 < np.abs(half - trained).max() < 0.5 and half.dtype == jnp.float32


@pytest.mark.parametrize("bits", [2, 3])
def test_training_starts_at_the_codes_of_its_start(source, bits):
    """With 2 bits as near the dense weights as they let, with more in the middle of what rounds to them."""
    model, recipe = LanguageModel.from_folder(source), jq4.Recipe.preset(f"rtn-w{bits}g32-asym")
    packed = jq4.quantize(jax.tree.map(lambda leaf: leaf * 1.2, model.params), recipe)  # other codes than its own
    params, quantizers = begun(packed, model.params, recipe)
    jax.tree.map(np.testing.assert_array_equal, served(model, (params, quantizers), recipe).params, packed)
    path = ("layers", "mlp", "up_proj", "kernel")
    dense, moved, start = (functools.reduce(dict.__getitem__, path, tree) for tree in (model.params, params, packed))
    away, middle = np.abs(moved - dense), np.abs(start.dequantize() - dense)
    assert (away <= middle + 1e-6).all()
    assert 0 < away.mean() < 0.5 * middle.mean() if bits == 2 else away.mean() > 0.99 * middle.mean()
    other = packed | {"final_norm": jax.tree.map(lambda leaf: 3 * leaf, packed["final_norm"])}
    unmoved, ranges = begun(other, model.params, recipe, at_codes=False)
    jax.tree.map(np.testing.assert_array_equal, unmoved, model.params)
    jax.tree.map(np.testing.assert_array_equal, ranges, quantizers)


def test_what_a_start_has_packed_and_the_recipe_does_not_mean_is_dequantized(source):
    model, recipe = LanguageModel.from_folder(source), jq4.Recipe.preset("rtn-w2g32")
    recipe = dataclasses.replace(recipe, ignore=(*recipe.ignore, "q_proj"))
    nested = jq4.quantize(model.params, dataclasses.replace(jq4.Recipe.preset("nf4-dq"), ignore=("mlp",)))
    packed = jq4.quantize(model.params, recipe)
    packed["layers"]["attention"]["q_proj"] = start = nested["layers"]["attention"]["q_proj"]
    params, _ = begun(packed, model.params, recipe)
    np.testing.assert_array_equal(params["layers"]["attention"]["q_proj"]["kernel"], start["kernel"].dequantize())


def test_interrupted_it_goes_on_to_the_same_losses(capsys, monkeypatch, source, distilled, tmp_path):
    from jq4.train.running import run_folder

    keep, out = run_folder.RunFolder.keep, tmp_path / "out"

    def interrupted(self, state, step, lost=None):
        keep(self, state, step, lost)
        os.kill(os.getpid(), signal.SIGTERM)

    argv = ["train", "distill", source, "--text", source / "text.txt", *QUICK, "--held-out", 0.25, "--out", out]
    argv = [*map(str, argv), "--recipe", "rtn-w3g32-asym"]
    monkeypatch.setattr(run_folder.RunFolder, "keep", interrupted)
    assert main(argv) == 130
    captured = capsys.readouterr()
    assert "stopped after step 2 of 6; the same command goes on from there" in captured.err
    assert not out.exists() and (tmp_path / "out.partial").exists()
    monkeypatch.setattr(run_folder.RunFolder, "keep", keep)
    assert main([*argv[:-1], "rtn-w4g32"]) == 1
    assert "another run, whose recipe differ" in capsys.readouterr().err
    assert main([*argv, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["resumed"] == 2 and losses(data) == losses(distilled)
    assert data["after"] == distilled["after"]


def test_qat_learns_the_text_from_a_given_start(capsys, source, tmp_path):
    """With all that changes how a step is computed."""
    assert main(["quantize", str(source), str(tmp_path / "start"), "--recipe", "rtn-w4g32-asym"]) == 0
    capsys.readouterr()
    given = ("--start", tmp_path / "start", "--remat", "--accumulate", 2, "--dtype", "bfloat16", "--warmup", 1)
    data = run(capsys, "qat", source, "--out", tmp_path / "out", *given, "--devices", 4, "--fsdp", 2)
    assert losses(data)[-1] < losses(data)[0] and data["recipe"]["name"] == "rtn-w4g32-asym"


def test_qlora_writes_adapters_that_are_run_beside_the_base(capsys, source, tmp_path):
    out = tmp_path / "out"
    data = run(capsys, "qlora", source, "--recipe", "rtn-w4g32", "--rank", 4, "--dropout", 0.1, "--held-out", 0.25,
               "--out", out)  # fmt: skip
    assert losses(data)[-1] < losses(data)[0] and data["after"]["perplexity"] < data["before"]["perplexity"]
    model, ids = LanguageModel.from_folder(out), np.load(source / "ids.npy")
    alone = jq4.quantize(LanguageModel.from_folder(source).params, "rtn-w4g32")
    jax.tree.map(np.testing.assert_array_equal, model.params, alone)
    forward = jax.jit(jq4.with_lora(Decoder(model.config).apply, strict=True))
    wanted = forward(({"params": alone}, jq4.restore_lora(out / "adapters")), ids)
    np.testing.assert_array_equal(model.logits(ids), wanted)
    assert np.abs(wanted - LanguageModel(model.config, alone).logits(ids)).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, load_peft(out / "peft", model.config), model.adapters)
    assert main(["generate", str(out), "--prompt", "The quick", "--max-tokens", "2"]) == 0
    assert main(["convert", str(out), str(tmp_path / "out.gguf"), "--to", "gguf", "--type", "q4_0"]) == 1
    assert "holds adapters, which a checkpoint of weights would leave out" in capsys.readouterr().err
    assert main(["quantize", str(source), str(out), "--recipe", "rtn-w3g32"]) == 1
    assert f"{out}/adapters: adapters that were trained beside the weights in {out}" in capsys.readouterr().err
    np.testing.assert_array_equal(LanguageModel.from_folder(out).logits(ids), wanted)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--text", "{m}/nothing.txt"], "nothing.txt: there is no such file to train on"),
        (["--batch-size", 6, "--devices", 4], "--batch-size 6 in 1 parts over 4 devices: wanted as many rows on each"),
        (["--fsdp", 3, "--devices", 4], "fsdp is 3, wanted a divisor of the 4 devices"),
        (["--devices", 99], "--devices is 99, and there are 8"),
        (["--steps", 0], "--steps is 0, wanted 1 or more"),
        (["--held-out", 0.9], "--held-out is 0.9, wanted a share of the rows above 0 and at most 0.5, or a file"),
        (["--held-out", 0.01], "--held-out 0.01: no row of"),
        (["--recipe", "smoothquant-w8a8"], "the recipe begins with smoothquant"),
        (["--temperature", 0], "--temperature is 0.0, wanted a number above 0"),
        (["--perturbed", 2], "--perturbed is 2.0, wanted a share"),
        (["--out", "{m}"], "choose another folder"),
        (["--warmup", 99], "warmup is 99 of 6 steps, wanted fewer"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(capsys, source, tmp_path, argv, message):
    argv = [str(word).format(m=source) for word in argv]
    given = ("distill", source, "--text", source / "text.txt", *QUICK, "--recipe", "rtn-w4g32", "--out", tmp_path / "o")
    assert message in run_error(capsys, *given, *argv)
    assert not (tmp_path / "o").exists()


def test_a_packed_model_is_no_source(capsys, source, distilled, tmp_path):
    given = ("--text", source / "text.txt", *QUICK, "--out", tmp_path / "o")
    assert "is packed, wanted the dense model" in run_error(capsys, "qat", distilled["out"], *given)


def test_help_says_what_there_is(capsys):
    assert main(["train", "--help"]) == 0
    assert "qat" in capsys.readouterr().out
    for verb in ("qat", "distill", "qlora"):
        assert main(["train", verb, "--help"]) == 0
        assert "--accumulate" in capsys.readouterr().out
    assert main(["train"]) == 2


def test_adapters_of_a_teacher_teach_and_others_are_refused(capsys, source, tmp_path, monkeypatch):
    model = LanguageModel.from_folder(source)
    adapted = tmp_path / "adapted"
    dataclasses.replace(model, adapters=jq4.lora(model.params, 2)).save(adapted)
    text = ("--text", source / "text.txt", *QUICK, "--out", tmp_path / "out")
    message = "adapted: has adapters, which would be left out: merge them first"
    assert message in run_error(capsys, "qat", adapted, *text)
    assert message in run_error(capsys, "qat", source, "--start", adapted, *text)
    tasks = []

    def carry_out(task, arguments):
        tasks.append(task)
        raise jq4.JQ4Error("that is enough")

    monkeypatch.setattr("jq4.cli.training.run.carry_out", carry_out)
    assert "enough" in run_error(capsys, "distill", source, "--teacher", adapted, *text)
    _, adapters = tasks[0].fixed(None)
    assert isinstance(adapters, jq4.Adapters)


def test_what_an_older_training_left_goes(tmp_path):
    left = (("peft", "adapter_config.json"), ("training", "run.json"), ("training", "held_out.jsonl"))
    for folder, name in left:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text("{}")
    (tmp_path / "training" / "notes.txt").write_text("the user's own")
    remove_older(tmp_path)
    assert not (tmp_path / "peft").exists()
    assert [path.name for path in (tmp_path / "training").iterdir()] == ["notes.txt"]
    remove_older(tmp_path)


def test_what_adapters_cannot_have_is_refused_before_anything_is_packed(capsys, source, tmp_path):
    text = ("--text", source / "text.txt", *QUICK, "--out", tmp_path / "out")
    for given, message in (
        (("--rank", 0), "rank is 0, wanted"),
        (("--alpha", 0), "alpha is 0.0, wanted a number above 0"),
        (("--dropout", 1), "--dropout is 1.0, wanted a share of at least 0 and below 1"),
        (("--rank", 33), "rank 33 of matrices 64 x 32, wanted at most 32"),
        (("--targets", "nothing_proj"), "no leaf is a matrix that targets ['nothing_proj'] mean"),
    ):
        assert message in run_error(capsys, "qlora", source, *text, *given)
    assert list(tmp_path.iterdir()) == []
