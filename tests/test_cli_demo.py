"""`jq4 demo` on a tiny random model: what it prints, writes and proves."""

import base64
import json
import re

import numpy as np
import pytest
from random_model import make_random_model

from jq4 import drawing
from jq4.cli import _demo_picture, demo, main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder that a run wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    source = make_random_model(folder / "random")
    given = ["--model", str(source), "--text", str(source / "text.txt"), "--prompt", "The quick", "--json"]
    capture = pytest.MonkeyPatch()
    printed = []
    capture.setattr("jq4.cli._terminal.print_json", lambda data: printed.append(json.loads(json.dumps(data))))
    capture.setattr(demo, "NEW_TOKENS", 4)
    try:
        assert main(["demo", "--out", str(folder / "out"), *given]) == 0
    finally:
        capture.undo()
    return folder / "out", printed[0]


def test_dense_is_compared_with_every_recipe(made):
    _, data = made
    dense, *packed = data["variants"]
    assert [each["name"] for each in data["variants"]] == ["dense", *demo.RECIPES]
    assert "kld_mean" not in dense and dense["bits_per_weight_linear"] == 32
    for each in packed:
        assert each["kld_mean"] > 0 and 0 < each["top1_agreement"] <= 1
        assert 4 < each["bits_per_weight_linear"] < 5.5
        assert each["bytes"] < dense["bytes"] / 2
        assert each["went_dense"] == []
        assert each["tokens_per_second"] > 0
        assert sum(leaf["sqnr_db"] is not None for leaf in each["leaves"]) == 7


def test_what_was_restored_is_what_was_saved(made):
    out, data = made
    assert data["restored"]["identical"] and data["restored"]["same_logits"]
    assert (out / "model.jq4" / "jq4.json").is_file()
    assert data["restored"]["recipe"] == demo.KEPT


def test_a_flipped_bit_is_not_identical(made):
    """The proof can fail: a restored model with one code changed is told apart."""
    from models.language_model import LanguageModel

    out, _ = made
    model, other = (LanguageModel.from_folder(out / "model.jq4") for _ in range(2))
    assert demo.same_arrays(model.params, other.params)
    kernel = other.params["layers"]["mlp"]["up_proj"]["kernel"]
    object.__setattr__(kernel, "codes", kernel.codes.at[0, 0, 0].set(kernel.codes[0, 0, 0] ^ 1))
    assert not demo.same_arrays(model.params, other.params)


def test_the_page_needs_no_other_file(made):
    out, data = made
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=(?!"data:)""", page)
    assert f"{data['variants'][1]['perplexity']:.4g}" in page
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    if drawing.has_matplotlib():
        assert base64.b64decode(pictures[0]) == (out / "picture.png").read_bytes()
        assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert pictures == []


def test_without_matplotlib_it_says_so_and_goes_on(made, tmp_path, monkeypatch, capsys):
    _, data = made
    monkeypatch.setattr(demo, "compare", lambda arguments, out, step: (out.mkdir(), (dict(data), {}))[1])
    monkeypatch.setattr(drawing, "has_matplotlib", lambda: False)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 0
    assert "picture: skipped, for want of matplotlib: pip install jq4[plot]" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_the_picture_survives_odd_figures(made, tmp_path):
    """No difference at all, and a single token."""
    pytest.importorskip("matplotlib")
    _, data = made
    same = [{**each, "perplexity": 5.0} for each in data["variants"]]
    kld = {name: np.zeros(1, np.float32) for name in demo.RECIPES}
    _demo_picture.draw({**data, "variants": same}, kld, tmp_path / "odd.png")
    assert (tmp_path / "odd.png").stat().st_size > 10_000


def test_a_folder_with_other_things_in_it_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "holds thesis.tex, which no demo wrote" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
