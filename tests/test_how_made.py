"""What is told of how a model was made: what jq4 wrote in words, what others wrote as it stands."""

import jax.numpy as jnp
import pytest

import jq4
from jq4.cli import main
from jq4.how_made import made_rows


def test_what_jq4_wrote_is_told_in_words():
    recipe = jq4.Recipe.preset("gptq-w4g32-a8").to_dict() | {"name": None}
    training = {"training": "qlora", "text": [{"file": "x.npy", "rows": 97, "context": 256}], "steps": 10, "seed": None}
    source = {"folder": "m", "merged": {"adapters": "a", "to": "dense", "leaves": ["p", "q"], "into": {"folder": "b"}}}
    recipe |= {"before": [{"step": "smoothquant", "alpha": 0.5}], "after": [{"step": "distill", "rows": None}]}
    rows = made_rows(recipe, source | {"training": training}, {"file": "y.npy", "tokens": 5})
    assert rows[-1] == ("calibrated on", "y.npy (5 tokens)")
    assert ("recipe", "gptq int4 g32, inputs int8 by the token: Linear") in rows
    assert ("before the rules", "smoothquant, alpha 0.5") in rows and ("after the rules", "distill") in rows
    assert [words for what, words in rows if what == "made from"] == ["m", "b"]
    assert ("merged", "adapters of 2 leaves (a), which became dense") in rows
    assert ("trained on", "x.npy (97 rows of 256 tokens)") in rows and ("options", "steps 10") in rows


@pytest.mark.parametrize(
    ("what", "recipe", "source", "calibration", "words"),
    [
        ("recipe", "by hand", None, None, "by hand"),
        ("recipe", {"note": "by hand"}, None, None, "{'note': 'by hand'}"),
        ("recipe", {"rules": ["w4"]}, None, None, "{'rules': ['w4']}"),
        ("made from", None, "a folder", None, "a folder"),
        ("trained", None, {"training": {"text": "corpus.txt"}}, None, "{'text': 'corpus.txt'}"),
        ("trained", None, {"training": {"text": None}}, None, "{'text': None}"),
        ("trained", None, {"training": {"sources": ["a"]}}, None, "{'sources': ['a']}"),
        ("merged", None, {"merged": {"leaves": 3}}, None, "{'leaves': 3}"),
        ("calibrated on", None, None, {"rows": "x", "context": 5}, "{'rows': 'x', 'context': 5}"),
    ],
)
def test_what_others_wrote_is_told_as_it_stands(what, recipe, source, calibration, words):
    assert (what, words) in made_rows(recipe, source, calibration)


def test_a_folder_that_others_described_is_inspected(capsys, tmp_path):
    described = {"training": {"text": "corpus.txt", "steps": 10}}
    jq4.save(tmp_path / "m", {"kernel": jnp.zeros((4, 4))}, recipe={"note": "mine"}, source=described)
    assert main(["inspect", str(tmp_path / "m")]) == 0
    assert "corpus.txt" in capsys.readouterr().out
