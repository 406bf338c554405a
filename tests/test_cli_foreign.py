"""Oracle: the packed folder of jq4's own that a folder of another format was converted from."""

import json

import numpy as np
import pytest
from random_model import make_random_model
from test_convert import ROOM

from jq4.cli import main

pytest.importorskip("jq4.cli.convert", reason="there is no jq4 convert yet")


def _json(capsys, *argv):
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model, ours of it in 4 bits, and GPTQ's of ours."""
    root = tmp_path_factory.mktemp("foreign")
    dense, ours, theirs = root / "dense", root / "ours", root / "gptq"
    dense.mkdir()
    make_random_model(dense)
    assert main(["quantize", str(dense), str(ours), "--recipe", "rtn-w4g32"]) == 0
    assert main(["convert", str(ours), str(theirs), "--to", "gptq", "--requantize", *ROOM]) == 0
    return dense, ours, theirs


def test_a_packed_folder_of_others_is_run_and_listed_as_it_is(capsys, folders):
    dense, ours, theirs = folders
    ids = dense / "ids.npy"
    found = _json(capsys, "eval", theirs, "--ids", ids, "--reference", ours)
    assert found["went_dense"] == []
    assert found["kld_mean"] == pytest.approx(0, abs=1e-5)
    listed = _json(capsys, "inspect", theirs)
    packed = [leaf for leaf in listed["leaves"] if leaf["packed"]]
    assert (listed["format"], len(packed), {leaf["group_size"] for leaf in packed}) == ("gptq", 14, {32})
    assert listed["bits_per_weight_packed"] == 4.5
    assert _json(capsys, "generate", theirs, "--prompt", "The", "--max-tokens", 4)["completions"][0]["text"]


def test_errors_of_its_leaves_are_measured_against_the_dense_model(capsys, folders):
    dense, ours, theirs = folders
    measured = _json(capsys, "inspect", theirs, "--reference", dense)
    mine = _json(capsys, "inspect", ours, "--reference", dense)
    errors, wanted = ({leaf["path"]: leaf["sqnr_db"] for leaf in each["leaves"]} for each in (measured, mine))
    assert errors.keys() == wanted.keys()
    for path, error in wanted.items():
        assert errors[path] is error or errors[path] == pytest.approx(error, abs=0.05)


def test_packed_weights_are_not_quantized_again(capsys, folders, tmp_path):
    *_, theirs = folders
    assert main(["quantize", str(theirs), str(tmp_path / "out"), "--recipe", "rtn-w4g32"]) == 1
    message = capsys.readouterr().err
    assert "the weights are packed (gptq), wanted dense ones. Take the dense original" in message
    assert "jq4 convert" in message and not (tmp_path / "out").exists()
    file = theirs / "model.safetensors"
    assert main(["quantize", str(file), str(tmp_path / "out"), "--recipe", "rtn-w4g32"]) == 1
    assert "is a file, wanted a folder of dense weights" in capsys.readouterr().err


def test_the_way_back_gives_the_same_logits(folders, tmp_path):
    from models.language_model import LanguageModel

    *_, theirs = folders
    assert main(["convert", str(theirs), str(tmp_path / "back"), "--to", "orbax", *ROOM]) == 0
    tokens = np.asarray([[1, 4, 9, 33]])
    there, back = (LanguageModel.from_folder(each) for each in (theirs, tmp_path / "back"))
    np.testing.assert_array_equal(back.logits(tokens), there.logits(tokens))
