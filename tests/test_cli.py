"""The command line in this process, on a tiny random model folder; figures against jq4's own functions and numpy."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from random_model import make_random_model

import jq4
from jq4.cli import main
from jq4.cli.eval import choose_context
from jq4.evaluate import evaluate
from models.decoder import Decoder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_random_model(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "model"
    assert main(["quantize", str(source), str(folder), "--recipe", "rtn-w4g32"]) == 0
    return folder


def run_json(capsys, *argv):
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def run_error(capsys, *argv):
    assert main([*map(str, argv)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"jq4 {argv[0]}: error: ") and captured.err.count("\n") == 1
    return captured.err


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jq4 {jq4.__version__}\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "exit codes: 0 done, 1 an error in what was given" in " ".join(text.split())
    for verb in (
        "demo",
        "quantize",
        "eval",
        "report",
        "drift",
        "mixed",
        "generate",
        "inspect",
        "plan",
        "train",
        "merge",
    ):
        assert verb in text
        assert main([verb, "--help"]) == 0
        assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["eval"], ["eval", "m"], ["eval", "m", "--text", "a", "--ids", "b"]]
)
def test_wrong_usage_is_exit_code_2(capsys, argv):
    assert main(argv) == 2
    assert "usage: jq4" in capsys.readouterr().err


def test_an_interrupt_is_exit_code_130(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jq4.plan.plan", interrupt)
    assert main(["plan", "x"]) == 130
    assert capsys.readouterr().err == "jq4 plan: interrupted\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "out of memory; use less at a time"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"),
    ],
)
def test_what_a_machine_lacks_is_told_in_one_line(capsys, monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("jq4.plan.plan", fail)
    assert message in run_error(capsys, "plan", "x")


def test_a_defect_of_ours_is_not_hidden(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr("jq4.plan.plan", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["plan", "x"])


def test_python_m_jq4_is_the_same_command(source):
    ran = subprocess.run([sys.executable, "-m", "jq4", "plan", str(source), "--json"], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout)["model_type"] == "llama"


def test_quantize_prints_what_became_of_each_leaf(capsys, source, tmp_path):
    data = run_json(capsys, "quantize", source, tmp_path / "out", "--recipe", "rtn-w4g32")
    by_path = {leaf["path"]: leaf for leaf in data["packed"]}
    assert len(by_path) == 7 and all(leaf["format"] == "int4" and leaf["group_size"] == 32 for leaf in by_path.values())
    assert all(15 < leaf["sqnr_db"] < 25 for leaf in by_path.values())
    assert {leaf["status"] for leaf in data["dense"]} == {"ignored"}
    assert data["bits_per_weight_packed"] == 4.5
    assert data["bytes"] < data["bytes_before"] / 2
    assert main(["quantize", str(source), str(tmp_path / "out"), "--recipe", "rtn-w4g32"]) == 0
    out = capsys.readouterr().out
    assert "int4 g32" in out and "dense: ignored" in out


def test_a_packed_folder_says_what_it_was_made_from(capsys, source, packed):
    inspected = run_json(capsys, "inspect", packed)
    assert inspected["recipe"]["name"] == "rtn-w4g32"
    assert all(digest.startswith("sha256:") for digest in inspected["source"]["files"].values())
    assert "model.safetensors" in inspected["source"]["files"]
    assert run_json(capsys, "plan", packed)["parameters"] == inspected["parameters"]


def test_eval_of_ids_against_a_reference(capsys, source, packed):
    found = run_json(capsys, "eval", packed, "--ids", source / "ids.npy", "--reference", source)
    assert {"perplexity", "tokens", "context", "kld_mean", "kld_p99", "top1_agreement"} <= set(found)
    assert (found["tokens"], found["rows"], found["context"]) == (5 * 15, 5, 16)
    assert found["went_dense"] == []

    from models.hf import load_config, load_params

    config = load_config(source)
    decoder, dense = Decoder(config), load_params(source, config)
    rounded = jq4.dequantize(jq4.quantize({"params": dense}, "rtn-w4g32"))
    wanted = evaluate(
        jax.jit(lambda t: decoder.apply(rounded, t)),
        np.load(source / "ids.npy"),
        reference=jax.jit(lambda t: decoder.apply({"params": dense}, t)),
    )
    assert wanted.kld_mean > 1e-3
    for name in ("perplexity", "reference_perplexity", "kld_mean", "kld_p99", "top1_agreement"):
        np.testing.assert_allclose(found[name], getattr(wanted, name), rtol=2e-3)


def test_eval_of_a_text_says_what_it_left_out(capsys, source, packed):
    assert main(["eval", str(packed), "--text", str(source / "text.txt"), "--context", "60"]) == 0
    captured = capsys.readouterr()
    assert "perplexity" in captured.out and "tokens at the end, too few for a row, were left out" in captured.err
    assert "dense" not in captured.err


def test_the_context_of_a_text_is_the_longest_that_model_and_text_let():
    assert choose_context(None, 1, 64, 1000) == 64
    assert choose_context(None, 1, 131072, 10**6) == 2048
    assert choose_context(None, 1, 131072, 100) == 100
    assert choose_context(None, 2, 64, 1000) is None
    assert choose_context(7, 1, 64, 1000) == 7


def test_inspect_lists_leaves(capsys, source, packed):
    data = run_json(capsys, "inspect", packed)
    kernel = next(leaf for leaf in data["leaves"] if leaf["path"].endswith("mlp/down_proj/kernel"))
    assert (kernel["shape"], kernel["format"], kernel["group_size"]) == ([2, 96, 64], "int4", 32)
    assert kernel["bytes"] == 2 * (48 * 64 + 3 * 64 * 2)
    assert data["bytes"] == sum(leaf["bytes"] for leaf in data["leaves"])
    assert data["bits_per_weight"] == pytest.approx(8 * data["bytes"] / data["parameters"])
    assert data["bits_per_weight_packed"] == 4.5
    measured = run_json(capsys, "inspect", packed, "--reference", source)
    assert [leaf["sqnr_db"] is not None for leaf in measured["leaves"]] == [leaf["packed"] for leaf in data["leaves"]]
    assert {leaf["path"] for leaf in measured["leaves"]} == {leaf["path"] for leaf in data["leaves"]}
    dense = run_json(capsys, "inspect", source)
    assert dense["bits_per_weight"] == 32 and dense["parameters"] == data["parameters"]
    assert main(["inspect", str(packed), "--reference", str(source)]) == 0
    assert "SQNR dB" in capsys.readouterr().out


def test_generate_continues_each_prompt(capsys, packed):
    from models.language_model import LanguageModel

    assert main(["generate", str(packed), "--prompt", "The quick", "--prompt", "A", "--max-tokens", "6"]) == 0
    wanted = LanguageModel.from_folder(packed).generate(["The quick", "A"], max_new_tokens=6)
    assert capsys.readouterr().out == f"The quick{wanted[0]}\nA{wanted[1]}\n"


def test_generate_hands_its_options_on(capsys, monkeypatch, source):
    from models.language_model import LanguageModel

    told = {}
    monkeypatch.setattr(LanguageModel, "generate", lambda self, prompts, **options: told.update(options) or ["!"])
    options = ("--max-tokens", 8, "--temperature", 1.5, "--top-k", 50, "--top-p", 0.9, "--seed", 3)
    data = run_json(capsys, "generate", source, "--prompt", "The", *options)
    assert told == {"max_new_tokens": 8, "temperature": 1.5, "top_k": 50, "top_p": 0.9, "seed": 3}
    assert data["completions"] == [{"prompt": "The", "text": "!"}] and data["went_dense"] == []


def test_plan_prints_a_table(capsys, source):
    assert main(["plan", str(source), "--memory", "1MB"]) == 0
    out = capsys.readouterr().out
    assert "INT4 g128" in out and "fits 1 MB" in out and "advice" in out


def test_recipes_come_from_files_too(capsys, source, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "ignore: [lm_head, norm, embed]\nrules:\n"
        "  - {targets: ['re:.*down_proj.*'], num_bits: 8, strategy: channel}\n"
        "  - {targets: [Linear], num_bits: 4, group_size: 16}\n"
    )
    data = run_json(capsys, "quantize", source, tmp_path / "out", "--recipe", file)
    assert sorted({leaf["format"] for leaf in data["packed"]}) == ["int4", "int8"]


def test_an_idle_rule_and_needless_calibration_are_told(capsys, source, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "rules:\n  - {targets: ['re:.*experts.*'], num_bits: 8}\n  - {targets: [Linear], num_bits: 4, group_size: 32}\n"
    )
    calibration = ["--calibration", str(source / "text.txt")]
    assert main(["quantize", str(source), str(tmp_path / "out"), "--recipe", str(file), *calibration, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["idle_rules"] == [{"rule": 0, "why": "it matched none"}]
    assert "--calibration is not used: rtn needs none" in captured.err
    assert (
        "jq4 quantize: warning: rule 0 of the recipe, for targets ['re:.*experts.*'], quantized no leaf" in captured.err
    )


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("rtn-w9g32", "rtn-w9g32"),
        ("nonsense", "unknown preset 'nonsense'"),
        ("no.yaml", "no.yaml: no such recipe file"),
    ],
)
def test_bad_recipes_write_nothing(capsys, source, tmp_path, recipe, message):
    assert message in run_error(capsys, "quantize", source, tmp_path / "out", "--recipe", recipe)
    assert not (tmp_path / "out").exists()


def test_destinations_that_would_destroy_are_refused(capsys, source, tmp_path):
    before = sorted(source.iterdir())
    for destination in (source, source / "sub", source.parent):
        assert "is, lies in or holds" in run_error(capsys, "quantize", source, destination)
    assert sorted(source.iterdir()) == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    assert "holds something else than a jq4 checkpoint" in run_error(capsys, "quantize", source, tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]
    (tmp_path / "file").write_text("")
    assert "a file stands there" in run_error(capsys, "quantize", source, tmp_path / "file")


def test_the_same_command_goes_on_where_a_first_save_was_killed(capsys, source, tmp_path):
    (tmp_path / "out" / ".saving" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data-0123456789abcdef").mkdir()
    run_json(capsys, "quantize", source, tmp_path / "out", "--recipe", "rtn-w4g32")
    assert len(list((tmp_path / "out").iterdir())) == 2  # jq4.json and its data


def test_quantizing_nothing_and_what_is_packed_already_is_told(capsys, source, packed, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("rules:\n  - {targets: [nothing]}\n")
    assert main(["quantize", str(source), str(tmp_path / "dense"), "--recipe", str(file)]) == 0
    captured = capsys.readouterr()
    assert "- bits a packed weight" in captured.out and "quantized no leaf" in captured.err
    assert main(["quantize", str(packed), str(tmp_path / "again"), "--recipe", "rtn-w4g32"]) == 0
    out = capsys.readouterr().out
    assert "packed already" in out and "dense: packed already" not in out


def test_models_that_are_none(capsys, source, tmp_path):
    nowhere = tmp_path / "nowhere"
    for argv in (
        ("eval", nowhere, "--ids", source / "ids.npy"),
        ("generate", nowhere, "--prompt", "a"),
        ("inspect", nowhere),
        ("quantize", nowhere, tmp_path / "out", "--recipe", "rtn-w4g32"),
    ):
        assert f"{nowhere}: there is no such folder" in run_error(capsys, *argv)
    (tmp_path / "empty").mkdir()
    assert "config.json" in run_error(capsys, "eval", tmp_path / "empty", "--ids", source / "ids.npy")
    assert "found neither model.safetensors nor" in run_error(capsys, "inspect", tmp_path / "empty")


@pytest.mark.parametrize(
    ("tensor", "leaf"),
    [("model.layers.1.mlp.up_proj.weight", "mlp/up_proj/kernel"), ("model.norm.weight", "final_norm/scale")],
)
def test_a_weight_that_is_not_finite_writes_nothing(capsys, source, tmp_path, tensor, leaf):
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (broken / name).write_bytes((source / name).read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors[tensor].flat[5] = np.nan
    save_file(tensors, broken / "model.safetensors")
    message = run_error(capsys, "quantize", broken, tmp_path / "out", "--recipe", "rtn-w4g32")
    assert leaf in message and "nan" in message.lower()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.zeros((2, 8), np.float32), (), "dtype float32, wanted integers"),
        (np.zeros((1, 2, 3), np.int32), (), "wanted a text [n] or rows"),
        (np.zeros((2, 8), np.int32), ("--context", "9"), "the rows have 8 tokens, fewer than the context of 9"),
        (np.full((2, 8), 300), (), "token 300 at [0, 0] is outside of the model's vocabulary of 300"),
        (np.zeros((0, 8), np.int32), (), "there are no tokens in it"),
        (np.int32(3), (), "shape (), wanted a text [n] or rows"),
    ],
)
def test_bad_ids_are_told(capsys, source, tmp_path, array, options, message):
    np.save(tmp_path / "ids.npy", array)
    assert message in run_error(capsys, "eval", source, "--ids", tmp_path / "ids.npy", *options)


def test_files_that_are_no_ids_and_no_text(capsys, source, tmp_path):
    (tmp_path / "ids.npy").write_bytes(b"not numpy")
    assert "not a .npy file" in run_error(capsys, "eval", source, "--ids", tmp_path / "ids.npy")
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "not a .npy file" in run_error(capsys, "eval", source, "--ids", tmp_path / "pickle.npy")
    (tmp_path / "empty.txt").write_text(" \n")
    assert "the text is empty" in run_error(capsys, "eval", source, "--text", tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 40)
    assert "not UTF-8" in run_error(capsys, "eval", source, "--text", tmp_path / "latin.txt")
    missing = tmp_path / "missing.txt"
    assert f"{missing}: No such file" in run_error(capsys, "eval", source, "--text", missing)
    (tmp_path / "short.txt").write_text("The fox")
    assert "fewer than the context of 60" in run_error(
        capsys, "eval", source, "--text", tmp_path / "short.txt", "--context", 60
    )


def test_a_model_without_a_tokenizer_takes_ids(capsys, source, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((source / name).read_bytes())
    assert run_json(capsys, "eval", bare, "--ids", source / "ids.npy")["tokens"] == 75
    assert "tokenizer.json" in run_error(capsys, "eval", bare, "--text", source / "text.txt")


def test_the_measured_table_of_a_real_model(capsys, shared_data, tmp_path):
    """Oracle: the peers' measured figures, 36.867 dense and a KLD of .0813 for round-to-nearest in groups of 32."""
    model = shared_data / "tinystories-656k"
    assert main(["quantize", str(model), str(tmp_path / "out"), "--recipe", "rtn-w4g32"]) == 0
    capsys.readouterr()
    ids = model / "evaluation_ids.npy"
    found = run_json(capsys, "eval", tmp_path / "out", "--ids", ids, "--reference", model)
    assert found["reference_perplexity"] == pytest.approx(36.867, abs=0.01)
    assert found["kld_mean"] == pytest.approx(0.0813, rel=0.02)
    assert found["top1_agreement"] == pytest.approx(0.779, abs=0.01)
    assert (found["tokens"], found["context"], found["went_dense"]) == (97 * 255, 256, [])
