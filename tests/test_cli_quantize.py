"""jq4 quantize with calibration, in this process, on a tiny random model folder. Oracle: quantize_blocks itself."""

import hashlib
import json

import jax
import numpy as np
import pytest
from random_model import make_random_model

import jq4
from jq4.chain import TreeSource
from jq4.checkpoint.conversion.destination import overlapping
from jq4.cli import main
from jq4.cli._calibration import choose_context
from models.chain import LAYERS, decoder_chain
from models.hf import load_config, load_params


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_random_model(tmp_path_factory.mktemp("models") / "random")


def run_error(capsys, *argv):
    assert main([*map(str, argv)]) == 1
    captured = capsys.readouterr()
    told = captured.err.splitlines()[-1]
    assert captured.out == "" and told.startswith(f"jq4 {argv[0]}: error: ")
    return told


def test_calibrated_from_a_text(capsys, source, tmp_path):
    file, out = source / "text.txt", tmp_path / "out"
    options = ["--calibration", file, "--context", 16, "--rows", 5, "--memory", "1kB"]
    assert main([*map(str, ["quantize", source, out, "--recipe", "gptq-w4g32", *options]), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    digest = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    assert data["calibration"]["sha256"] == digest and (data["calibration_rows"], data["context"]) == (5, 16)
    assert jq4.read_manifest(out).source["calibration"] == data["calibration"]
    assert {row["block"] for row in data["rows"]} == {0, 1} and len(data["rows"]) == 14
    assert all(0 < row["weighted_error"] < 1 and row["sqnr_db"] > 10 for row in data["rows"])
    assert len(data["packed"]) == 7 and data["peak_memory"] > 1e7

    config = load_config(source)
    ids = np.asarray(jq4_tokenizer(source)(file.read_text()), np.int32)
    cut = ids[: len(ids) // 16 * 16].reshape(-1, 16)
    rows = cut[np.arange(5) * len(cut) // 5]
    tree = TreeSource(load_params(source, config), LAYERS)
    wanted = jq4.quantize_blocks(decoder_chain(config), tree, "gptq-w4g32", rows).params
    for have, want in zip(jax.tree.leaves(jq4.restore(out)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(have), np.asarray(want))


def test_what_calibration_lacked_is_said(capsys, source, tmp_path):
    """Two rows of eight tokens: fewer than the 32 that GPTQ wants, and more positions than are there are remarked."""
    given = ["--calibration", str(source / "ids.npy"), "--rows", "2", "--context", "8"]
    assert main(["quantize", str(source), str(tmp_path / "out"), "--recipe", "gptq-w4g32", *given]) == 0
    said = capsys.readouterr().err
    assert "layers/mlp/down_proj/kernel (0, 1): 1 of 1 slices saw fewer than 32 rows: hqq without data" in said
    assert choose_context(65, 64) == 65 and choose_context(None, 64) == 64
    assert capsys.readouterr().err == "--context 65 is more than the 64 positions that the model was made for\n"


def jq4_tokenizer(folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            [],
            "the recipe gptq-w4g32 needs calibration (method gptq), and none was given",
        ),
        (["--calibration", "{source}/text.txt", "--context", "9999"], "fewer than one row of 9999"),
        (["--calibration", "{source}/ids.npy", "--context", "0"], "128 rows of 0 tokens: wanted 1 row or more"),
        (["--calibration", "{source}/nothing.txt"], "there is no such file to calibrate with"),
        (["--calibration", "{source}/config.json", "--memory", "much"], "memory 'much': wanted an amount above 0"),
    ],
)
def test_what_cannot_be_calibrated_writes_nothing(capsys, source, tmp_path, options, message):
    given = [option.format(source=source) for option in options]
    assert message in run_error(capsys, "quantize", source, tmp_path / "out", "--recipe", "gptq-w4g32", *given)
    assert list(tmp_path.iterdir()) == []


def test_a_report_goes_into_a_folder_of_its_own(capsys, source, tmp_path):
    told = run_error(capsys, "quantize", source, tmp_path / "out", "--report", source)
    assert "holds config.json, which no report wrote; choose another folder with --report" in told
    assert list(tmp_path.iterdir()) == []


def test_a_packed_model_has_no_steps_to_take(capsys, source, tmp_path):
    packed = tmp_path / "packed"
    assert main(["quantize", str(source), str(packed), "--recipe", "rtn-w4g32"]) == 0
    capsys.readouterr()
    told = run_error(capsys, "quantize", packed, tmp_path / "again", "--recipe", "rotate-rtn-w4g32")
    assert "is packed already, and the recipe has steps: give the dense model" in told


def test_another_effort_is_refused_by_name(capsys, source, tmp_path):
    assert main(["quantize", str(source), str(tmp_path / "out"), "--effort", "heroic"]) == 2
    assert "invalid choice: 'heroic'" in capsys.readouterr().err


def test_a_rotation_gives_a_tied_head_weights_of_its_own(capsys, source, tmp_path):
    out = tmp_path / "out"
    assert main(["quantize", str(source), str(out), "--recipe", "rotate-rtn-w8g32"]) == 0
    assert "the output head gets weights of its own" in capsys.readouterr().err
    ids = ["--ids", str(source / "ids.npy"), "--reference", str(source)]
    assert main(["eval", str(out), *ids, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kld_mean"] < 1e-3 and found["went_dense"] == []


def test_the_work_on_a_link_lies_beside_what_it_names(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for partial in ("real.partial", "link.partial"):
        (tmp_path / partial / "blocks").mkdir(parents=True)
        assert overlapping(tmp_path / partial / "blocks", tmp_path / "link") == tmp_path / partial
    assert overlapping(tmp_path / "other", tmp_path / "link") is None
