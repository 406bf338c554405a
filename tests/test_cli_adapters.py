"""Adapters on the command line. Oracles: NumPy's sums over the adapters' arrays, jq4.merge_lora, the adapted model."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_model import make_random_model

import jq4
from jq4.cli import main
from jq4.divergence import divergence
from jq4.paths import flatten_with_paths
from jq4.qarray import is_qarray
from jq4.rule import describe_format
from models.language_model import LanguageModel
from models.peft import save_peft


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_random_model(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="module")
def adapted(source, tmp_path_factory):
    """The model by rtn-w4g32 with adapters of rank 2 beside the MLPs' weights, as drawn."""
    model = LanguageModel.from_folder(source)
    packed = jq4.quantize(model.params, "rtn-w4g32")
    random = np.random.default_rng(0)
    adapters = jq4.lora(packed, 2, ["mlp"])
    adapters = jax.tree.map(lambda part: jnp.asarray(random.normal(0, 0.2, part.shape), jnp.float32), adapters)
    folder = tmp_path_factory.mktemp("models") / "adapted"
    dataclasses.replace(model, params=packed, adapters=adapters).save(folder, recipe=jq4.Recipe.preset("rtn-w4g32"))
    return folder


def run_json(capsys, *argv):
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def told_of(adapters):
    arrays = [part for each in adapters.by_path.values() for part in (each.a, each.b)]
    return sum(part.size for part in arrays), sum(part.nbytes for part in arrays)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_inspect_shows_them_apart(capsys, source, adapted):
    model = LanguageModel.from_folder(adapted)
    data = run_json(capsys, "inspect", adapted)
    told = data["adapters"]
    assert (told["parameters"], told["bytes"]) == told_of(model.adapters) and told["ranks"] == [2]
    assert [(row["path"], row["rank"], row["scaling"]) for row in told["leaves"]] == [
        (path, 2, 1.0) for path in model.adapters.by_path
    ]
    assert data["bytes"] == sum(leaf["bytes"] for leaf in data["leaves"])
    assert data["bytes_on_disk"] > data["bytes"] + told["bytes"]
    assert run_json(capsys, "inspect", source)["adapters"] is None
    measured = run_json(capsys, "inspect", adapted, "--reference", source)
    assert measured["adapters"] == told and "the model run with adapters" in measured["notes"][0]
    assert main(["inspect", str(adapted)]) == 0
    printed = capsys.readouterr().out
    assert "adapters of rank 2 beside 3 leaves" in printed and "layers/mlp/down_proj/kernel" in printed


def test_adapters_of_other_weights_are_refused(capsys, source, adapted, tmp_path):
    other = tmp_path / "other"
    model = LanguageModel.from_folder(adapted)
    model.save(other)
    jq4.save(other, jq4.quantize(LanguageModel.from_folder(source).params, "rtn-w3g32"))
    assert main(["inspect", str(other)]) == 1
    assert "adapters of other weights" in capsys.readouterr().err
    jq4.save_lora(other / "adapters", model.adapters, source="a note")
    assert main(["inspect", str(other)]) == 1
    assert "adapters of other weights (None)" in capsys.readouterr().err


def test_a_report_measures_with_them_and_says_what_leaves_them_out(capsys, source, adapted, tmp_path):
    ids = source / "ids.npy"
    data = run_json(capsys, "report", adapted, "--ids", ids, "--reference", source, "--out", tmp_path / "report")
    model, dense = LanguageModel.from_folder(adapted), LanguageModel.from_folder(source)
    rows = np.load(ids)
    wanted = float(jnp.mean(divergence(model.logits(rows), dense.logits(rows))[:, :-1]))
    alone = dataclasses.replace(model, adapters=None)
    assert data["evaluation"]["kld_mean"] == pytest.approx(wanted, rel=1e-3)
    assert abs(wanted - float(jnp.mean(divergence(alone.logits(rows), dense.logits(rows))[:, :-1]))) > 0.01
    assert (data["adapters"]["parameters"], data["adapters"]["bytes"]) == told_of(model.adapters)
    assert any("the model run with adapters, which the errors of weights leave out" in note for note in data["notes"])
    page = (tmp_path / "report" / "report.md").read_text()
    assert "adapters of rank 2 beside 3 leaves" in page
    again = ("--reference", source, "--out", tmp_path / "again", "--compare", tmp_path / "report")
    compared = run_json(capsys, "report", adapted, "--ids", ids, *again)["compared"]
    assert {row["bytes"] for row in compared} == {data["totals"]["bytes"] + data["adapters"]["bytes"]}


def test_an_evaluation_says_whose_adapters_ran(capsys, source, adapted):
    ids, told = ("--ids", source / "ids.npy"), run_json(capsys, "inspect", adapted)["adapters"]
    data = run_json(capsys, "eval", adapted, *ids, "--reference", source)
    assert (data["adapters"], data["reference_adapters"]) == (told, None)
    data = run_json(capsys, "eval", source, *ids, "--reference", adapted)
    assert (data["adapters"], data["reference_adapters"]) == (None, told)
    for model, reference, label in ((adapted, source, "adapters "), (source, adapted, "adapters of the reference ")):
        assert main([*map(str, ("eval", model, *ids, "--reference", reference))]) == 0
        rows = [line for line in capsys.readouterr().out.splitlines() if "adapters" in line]
        assert len(rows) == 1 and label in rows[0] and "rank 2 beside 3 leaves" in rows[0]


@pytest.mark.parametrize("name", ["source", "packed"])
def test_weights_with_adapters_beside_them_are_not_quantized_over(capsys, source, adapted, tmp_path, name):
    """Until what they learned is merged elsewhere and they are removed; from a dense folder and from a packed one."""
    given, out = tmp_path / name, tmp_path / "trained"
    shutil.copytree(adapted, out)
    shutil.copytree(source if name == "source" else adapted, given, ignore=shutil.ignore_patterns("adapters"))
    held = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    argv = ["quantize", str(given), str(out), "--recipe", "rtn-w4g32"]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert f"{out}/adapters: adapters that were trained" in error and f"jq4 merge {out} OUT" in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == held
    assert {path.name for path in tmp_path.iterdir()} == {name, "trained"}
    shutil.rmtree(out / "adapters")
    assert main(argv) == 0
    assert LanguageModel.from_folder(out).adapters is None


def test_inputs_are_those_of_the_adapted_function(source, adapted):
    """Observed through jq4.cli, a layer's inputs are moved by the adapters of the layers before it."""
    from jq4.cli._models import observe_inputs

    model, rows = LanguageModel.from_folder(adapted), np.load(source / "ids.npy")
    dense = dataclasses.replace(model, params=jq4.dequantize(model.params))
    merged, _ = jq4.merge_lora(dense.params, model.adapters)
    found = observe_inputs(dense, rows, 5, ("mean_square",))
    wanted = observe_inputs(dataclasses.replace(dense, params=merged, adapters=None), rows, 5, ("mean_square",))
    path = "layers/self_attn/q_proj/kernel"
    path = path if path in wanted else next(name for name in wanted if "q_proj" in name)
    np.testing.assert_allclose(found[path].mean_square, wanted[path].mean_square, rtol=1e-4)


def test_merging_makes_the_adapted_function_dense(capsys, source, adapted, tmp_path):
    data = run_json(capsys, "merge", adapted, tmp_path / "merged")
    model, merged = LanguageModel.from_folder(adapted), LanguageModel.from_folder(tmp_path / "merged")
    ids = np.load(source / "ids.npy")
    assert merged.adapters is None
    np.testing.assert_allclose(merged.logits(ids), model.logits(ids), atol=2e-4)
    assert [(leaf["path"], leaf["format"]) for leaf in data["leaves"]] == [
        (path, "dense") for path in model.adapters.by_path
    ]
    attention = merged.params["layers"]
    assert any(is_qarray(leaf) for leaf in jax.tree.leaves(attention, is_leaf=is_qarray))
    assert main(["generate", str(tmp_path / "merged"), "--prompt", "The quick", "--max-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("The quick")


def test_merging_into_few_bits_tells_what_it_loses(capsys, source, adapted, tmp_path):
    model = LanguageModel.from_folder(adapted)
    wanted, report = jq4.merge_lora(model.params, model.adapters, "rtn-w2g32")
    assert main(["merge", str(adapted), str(tmp_path / "merged"), "--recipe", "rtn-w2g32"]) == 0
    captured = capsys.readouterr()
    assert "learned over lost, dB" in captured.out and "int2" in captured.out
    assert ("rounding lost more than was learned" in captured.err) == any(each.change_db < 0 for each in report)
    merged = LanguageModel.from_folder(tmp_path / "merged")
    jax.tree.map(np.testing.assert_array_equal, merged.params, wanted)
    text = ("--calibration", source / "text.txt", "--context", 16)
    data = run_json(capsys, "merge", adapted, tmp_path / "merged", "--recipe", "gptq-w4g32", *text)
    assert {leaf["format"] for leaf in data["leaves"]} == {"int4"}
    assert all(0 < leaf["error"]["output_error"] < 0.1 for leaf in data["leaves"])


def test_a_merged_folder_tells_by_which_rules_all_of_its_leaves_were_packed(capsys, source, adapted, tmp_path):
    """Oracle: the dense merged weights quantized by the recipe that the folder tells."""
    model, dense, out = LanguageModel.from_folder(adapted), LanguageModel.from_folder(source), tmp_path / "merged"
    run_json(capsys, "merge", adapted, out, "--recipe", "rtn-w2g32")
    told = run_json(capsys, "inspect", out)
    recipe = jq4.Recipe.from_dict(told["recipe"])
    formats = {
        path: leaf.format for path, leaf in flatten_with_paths(LanguageModel.from_folder(out).params) if is_qarray(leaf)
    }
    again = jq4.quantize(dense.params, recipe)
    assert {path: leaf.format for path, leaf in flatten_with_paths(again) if is_qarray(leaf)} == formats
    assert set(formats.values()) == {"int2", "int4"}
    merged = told["source"]["merged"]
    assert (merged["adapters"], merged["to"]) == ("the model's own", "rtn-w2g32")
    assert sorted(merged["leaves"]) == sorted(model.adapters.by_path)
    assert main(["inspect", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "rtn int2 g32" in shown and "rtn int4 g32" in shown and "adapters of 3 leaves" in shown
    run_json(capsys, "merge", adapted, out)
    assert describe_rules(run_json(capsys, "inspect", out)["recipe"]) == ["dense", "int4 g32 rtn"]
    run_json(capsys, "merge", source, out, "--adapters", adapted / "adapters")
    assert run_json(capsys, "inspect", out)["recipe"] is None


def describe_rules(recipe):
    return [describe_format(rule) for rule in jq4.Recipe.from_dict(recipe).rules]


def test_a_folder_of_peft_is_merged_into_a_dense_model(capsys, source, adapted, tmp_path):
    model = LanguageModel.from_folder(adapted)
    save_peft(tmp_path / "peft", model.config, model.adapters)
    run_json(capsys, "merge", source, tmp_path / "merged", "--adapters", tmp_path / "peft")
    dense = LanguageModel.from_folder(source)
    wanted, _ = jq4.merge_lora(dense.params, model.adapters)
    found = LanguageModel.from_folder(tmp_path / "merged").params
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), found, wanted)
    jq4.save_lora(tmp_path / "own", model.adapters)
    run_json(capsys, "merge", source, tmp_path / "merged", "--adapters", tmp_path / "own")
    jax.tree.map(np.testing.assert_array_equal, LanguageModel.from_folder(tmp_path / "merged").params, wanted)


@pytest.mark.parametrize(
    ("model", "argv", "message"),
    [
        ("source", [], "has no adapters to merge; give a folder of them with --adapters"),
        ("source", ["--adapters", "nowhere"], "nowhere: there is no such folder"),
        ("source", ["--adapters", "{source}"], "adapter_config.json"),
        ("adapted", ["--adapters", "{adapted}/adapters"], "has adapters of its own"),
        ("adapted", ["--recipe", "gptq-w4g32"], "the recipe needs calibration, and none was given"),
        ("adapted", ["--recipe", "best-w4g32"], "the recipe has steps"),
        ("adapted", ["--recipe", "nonsense"], "nonsense"),
        ("adapted", ["--calibration", "{source}/text.txt"], "--calibration is for a --recipe, and there is none"),
        ("adapted", ["--recipe", "gptq-w4g32", "--calibration", "nothing"], "there is no such file to calibrate with"),
    ],
)
def test_what_cannot_be_merged_is_told_in_a_line(capsys, source, adapted, tmp_path, model, argv, message):
    places = {"source": source, "adapted": adapted}
    argv = [word.format(**places) for word in argv]
    assert main(["merge", str(places[model]), str(tmp_path / "out"), *argv]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == "" and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(["merge", str(adapted), str(adapted / "inside")]) == 1
    assert "choose another folder" in capsys.readouterr().err


def test_what_is_merged_is_not_written_over(capsys, source, adapted, tmp_path):
    shutil.copytree(adapted, tmp_path / "trained")
    held = contents(tmp_path / "trained")
    for out in ("trained", "trained/adapters", "trained/adapters/merged"):
        argv = ["merge", source, tmp_path / out, "--adapters", tmp_path / "trained" / "adapters"]
        assert main([*map(str, argv)]) == 1
        assert "is, lies in or holds" in capsys.readouterr().err
    assert contents(tmp_path / "trained") == held


def test_what_adapters_learned_is_not_replaced(capsys, source, adapted, tmp_path):
    shutil.copytree(adapted, tmp_path / "out")
    held = contents(tmp_path / "out")
    trained = ["--text", source / "config.json", "--out"]
    for argv in (
        ["merge", adapted],
        ["convert", source, "--to", "orbax"],
        ["train", "qat", source, *trained],
        ["train", "distill", source, *trained],
    ):
        assert main([*map(str, argv), str(tmp_path / "out")]) == 1
        assert "adapters that were trained beside the weights" in capsys.readouterr().err
    assert contents(tmp_path / "out") == held


def test_merging_over_a_trained_folder_leaves_nothing_of_its_training(capsys, adapted, tmp_path):
    model = LanguageModel.from_folder(adapted)
    model.save(tmp_path / "out")
    save_peft(tmp_path / "out" / "peft", model.config, model.adapters)
    shutil.rmtree(tmp_path / "out" / "adapters")
    (tmp_path / "out" / "training").mkdir()
    for name in ("metrics.jsonl", "run.json", "loss.png"):
        (tmp_path / "out" / "training" / name).write_text("of an earlier training")
    run_json(capsys, "merge", adapted, tmp_path / "out")
    assert not any((tmp_path / "out" / name).exists() for name in ("peft", "training"))
