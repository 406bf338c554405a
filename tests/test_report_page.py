"""The quality report. Oracles: what jq4 eval prints, numpy in float64 for a weight's errors, and html.parser."""

import contextlib
import io
import json
import shutil
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_model import make_random_model

import jq4
from jq4 import drawing
from jq4.cli import main
from jq4.cli.report import notes_on_reference
from jq4.errors import JQ4Error
from jq4.leaf_errors import collect_hessians, error_of, leaf_errors
from jq4.quality_report import compose_report, expert_coverage, leaf_rows, read_report, write_report
from jq4.quality_report.pictures import draw, errors_by_layer

FIGURES = ("perplexity", "kld_mean", "kld_p50", "kld_p90", "kld_p99", "kld_p99_9", "kld_max", "top1_agreement")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model; one by rtn and its report "first"; one by gptq, its reports by quantize, "made", and "second"."""
    base = tmp_path_factory.mktemp("report")
    source = make_random_model(base / "dense")
    assert main(["quantize", str(source), str(base / "rtn-w4g32"), "--recipe", "rtn-w4g32", "--json"]) == 0
    assert main(report_of(base, "rtn-w4g32", "first")) == 0
    ids = ["--calibration", str(source / "ids.npy"), "--context", "16", "--report", str(base / "made"), "--json"]
    recipe = base / "recipe.yaml"
    recipe.write_text("rules: [{targets: [up_proj], num_bits: 3, group_size: 32, method: gptq}]")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["quantize", str(source), str(base / "gptq-w3g32"), "--recipe", str(recipe), *ids]) == 0
    (base / "printed.json").write_text(printed.getvalue())
    more = ["--compare", str(base / "first"), "--quantizing", str(base / "made")]
    assert main(report_of(base, "gptq-w3g32", "second", *more)) == 0
    return base


def report_of(base, model, out, *more):
    ids = ["--ids", str(base / "dense" / "ids.npy"), "--reference", str(base / "dense")]
    return ["report", str(base / model), *ids, "--out", str(base / out), *more]


def test_another_reference_than_the_source_is_told(folders, tmp_path):
    """The source itself is not; a copy whose config says something more is, by the file's name."""
    copy, model = tmp_path / "copy", str(folders / "rtn-w4g32")
    shutil.copytree(folders / "dense", copy)
    assert notes_on_reference(model, str(copy)) == [] == notes_on_reference(model, None)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    (note,) = notes_on_reference(model, str(copy))
    assert "the reference is not the folder that the model was made from: config.json differ" in note


def test_a_report_of_another_quantizing_is_refused(folders, tmp_path, capsys):
    """The model by rtn has been made without calibration, and has other sizes."""
    assert main(report_of(folders, "rtn-w4g32", "third", "--quantizing", str(folders / "made"))) == 1
    told = capsys.readouterr().err
    assert "made: is not of the quantizing that made" in told and "its parameters_packed" in told


class Page(HTMLParser):
    """Collects tags that were left open, links, and the text of cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.cells = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "data", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_figures_are_those_of_eval(folders, capsys):
    capsys.readouterr()
    dense = folders / "dense"
    assert (
        main(["eval", str(folders / "rtn-w4g32"), "--ids", str(dense / "ids.npy"), "--reference", str(dense), "--json"])
        == 0
    )
    wanted = json.loads(capsys.readouterr().out)
    found = read_report(folders / "first")
    for name in (*FIGURES, *(f"{mean}_standard_error" for mean in ("perplexity", "kld_mean", "top1_agreement"))):
        assert found["evaluation"][name] == pytest.approx(wanted[name], rel=1e-6)
    assert found["totals"]["bytes"] == wanted["bytes"] and found["totals"]["bytes_on_disk"] == wanted["bytes_on_disk"]
    assert sum(found["evaluation"]["kld_histogram"]["counts"]) == wanted["tokens"]
    assert found["evaluation"]["text"]["rows"] == 5 and found["recipe"]["name"] == "rtn-w4g32"
    assert found["versions"]["jax"] == jax.__version__


def test_the_page_is_whole_and_needs_no_other_file(folders):
    data = read_report(folders / "first")
    text = (folders / "first" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert len(page.links) == drawing.has_matplotlib()
    assert "http" not in text and "<script" not in text
    assert f"{data['evaluation']['kld_p99_9']:.4g}" in page.cells
    for leaf in data["leaves"]:
        assert leaf["path"] in page.cells


def test_markdown_has_a_row_for_every_leaf_and_slice(folders):
    text = (folders / "first" / "report.md").read_text(encoding="utf-8")
    for leaf in read_report(folders / "first")["leaves"]:
        rows = [line for line in text.splitlines() if line.startswith(f"| {leaf['path']} ")]
        assert len(rows) == 1 + len(leaf.get("slices", ()))
    widths = {line.count("|") for line in text.split("## Weights")[1].split("##")[0].splitlines() if line[:1] == "|"}
    assert len(widths) == 1


def test_without_matplotlib_the_page_says_so(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "has_matplotlib", lambda: False)
    write_report(read_report(folders / "first"), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Pictures were skipped, for want of matplotlib: pip install jq4[plot]" in text
    assert Page(text).links == []


def test_a_report_is_made_again_from_its_data(folders, tmp_path):
    data = read_report(folders / "first")
    write_report(data, tmp_path)
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (folders / "first" / name).read_bytes()


def test_several_models_are_compared_on_the_same_tokens_only(folders, capsys):
    data = read_report(folders / "second")
    three, four = data["compared"]
    assert (three["name"], four["name"]) == ("gptq-w3g32", "rtn-w4g32")
    assert (three["bits_per_weight_packed"], four["bits_per_weight_packed"]) == (3.5, 4.5)
    assert three["kld_mean"] == data["evaluation"]["kld_mean"] > 0
    assert four["kld_mean"] == read_report(folders / "first")["evaluation"]["kld_mean"]
    capsys.readouterr()
    assert main(report_of(folders, "gptq-w3g32", "third", "--compare", str(folders / "first"), "--context", "8")) == 1
    assert "was measured on other tokens (rows 5, here 10)" in capsys.readouterr().err
    assert not (folders / "third").exists()


def test_bad_input_is_told_in_one_line_and_writes_nothing(folders, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    for argv, message in (
        (report_of(folders, "rtn-w4g32", tmp_path), "holds thesis.tex, which no report wrote"),
        (report_of(folders, "rtn-w4g32", "new", "--compare", "nowhere"), "nowhere: there is no such report"),
        (report_of(folders, "nothing", "new"), "there is no such folder"),
    ):
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (folders / "new").exists()
    (tmp_path / "report.json").write_text("[1]")
    with pytest.raises(JQ4Error, match="not a report of jq4's"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text('{"format": "jq4-quality-report", "version": 99}')
    with pytest.raises(JQ4Error, match="version 99 of the report, wanted 1"):
        read_report(tmp_path)


def stacked(tree, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, tree["layers"])[0] @ tree["head"].T


def test_errors_of_weights_are_those_of_their_outputs_in_numpy():
    """E|x D|**2 / E|x W|**2 over every row x that reached each layer, and the head [N, K] contracted along its last."""
    random = np.random.default_rng(0)
    tree = {"layers": jnp.asarray(random.normal(size=(3, 16, 16)) / 4, jnp.float32)}
    tree["head"] = jnp.asarray(random.normal(size=(5, 16)), jnp.float32)
    x = jnp.asarray(random.normal(size=(40, 16)), jnp.float32)
    stats = jq4.observe(stacked, tree, [x], collect=("mean_square", "hessian"))
    packed = jq4.quantize(tree, jq4.Rule(["layers", "head"], num_bits=4, group_size=8), stats)
    head, layers = leaf_errors(tree, packed, stats)
    inputs = np.asarray(x, np.float64)
    for index, each in enumerate(layers.slices):
        exact, near = (np.asarray(w[index], np.float64) for w in (tree["layers"], packed["layers"].dequantize()))
        wanted = ((inputs @ (exact - near)) ** 2).sum() / ((inputs @ exact) ** 2).sum()
        assert each.index == (index,) and each.rows == 40
        assert each.output_error == pytest.approx(wanted, rel=1e-3)
        assert each.sqnr_db == pytest.approx(10 * np.log10((exact**2).sum() / ((exact - near) ** 2).sum()), rel=1e-4)
        inputs = np.tanh(inputs @ exact)
    lost = np.asarray(tree["head"], np.float64) - np.asarray(packed["head"].dequantize(), np.float64)
    wanted = ((inputs @ lost.T) ** 2).sum() / ((inputs @ np.asarray(tree["head"], np.float64).T) ** 2).sum()
    assert head.output_error == pytest.approx(wanted, rel=1e-3) and head.slices == () and head.features == 16
    diagonal = jq4.observe(stacked, tree, [x])
    guess = error_of("head", tree["head"], packed["head"], diagonal["head"], axis=-1)
    moments = (inputs**2).mean(0)
    wanted = (lost**2 @ moments).sum() / (np.asarray(tree["head"], np.float64) ** 2 @ moments).sum()
    assert guess.weighting == "mean_square" and guess.output_error == pytest.approx(wanted, rel=1e-3)


def test_hessians_are_collected_up_to_a_limit():
    tree = {"small": jnp.zeros((2, 8, 4)), "large": jnp.zeros((64, 4)), "unknown": jnp.zeros((4, 4))}
    collect = collect_hessians(tree, {"small": -2, "large": -2}, limit=4 * 2 * 8 * 8)
    assert "hessian" in collect("small")
    assert "hessian" not in collect("large") and "hessian" not in collect("unknown")


def test_experts_that_saw_too_little_are_counted():
    """An expert starves below 6 tokens, the inputs that it has; expert 2 sees none."""
    weights = {"moe": {"experts": jnp.ones((4, 6, 3))}}

    def apply(tree, x, sizes):
        return jax.lax.ragged_dot(x, tree["moe"]["experts"], sizes)

    stats = jq4.observe(apply, weights, [(jnp.ones((30, 6)), jnp.asarray([20, 7, 0, 3], jnp.int32))])
    (row,) = expert_coverage(stats, stats)
    assert row["tokens"] == [20, 7, 0, 3] and (row["least"], row["most"], row["median"]) == (0, 20, 5.0)
    assert (row["unseen"], row["starved"], row["features"]) == (1, 2, 6)
    text = compose_report(model="m", experts=[row])
    assert text["experts"][0]["starved"] == 2
    alike = jq4.observe(stacked, {"layers": jnp.ones((3, 4, 4)), "head": jnp.ones((2, 4))}, [jnp.ones((5, 4))])
    assert expert_coverage(alike, alike) == []


def test_rows_of_a_quantize_report_are_what_was_held():
    report = jq4.QuantizeReport()
    tree = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32), "bias": jnp.ones(8)}
    packed = jq4.quantize(tree, "rtn-w4g32", report=report)
    bias, kernel = leaf_rows(report)
    assert kernel["bytes"] == packed["kernel"].nbytes and kernel["dense_bytes"] == 64 * 8 * 4
    assert kernel["bits_per_weight"] == 4.5 and kernel["sqnr_db"] == pytest.approx(report.packed[0].sqnr_db)
    assert (bias["packed"], bias["format"], bias["status"]) == (False, "float32", "no rule")
    data = compose_report(model="m", leaves=leaf_rows(report), cost={"seconds": 1.5, "peak_memory_bytes": 3e9})
    assert json.loads(json.dumps(data)) == data
    assert "| peak memory | 3 GB |" in jq4.quality_report.markdown.markdown_of(data)


def test_quantize_writes_a_report_that_report_takes_its_cost_from(folders):
    """What quantize prints with --json is the oracle."""
    printed = json.loads((folders / "printed.json").read_text())
    found = read_report(folders / "made")
    assert found["cost"]["peak_memory_bytes"] == printed["peak_memory"] and found["calibration"]["rows"] == 5
    assert found["totals"]["bits_per_weight_packed"] == 3.5 and "evaluation" not in found
    leaf = next(leaf for leaf in found["leaves"] if leaf["path"].endswith("up_proj/kernel"))
    rows = [row for row in printed["rows"] if row["path"] == leaf["path"]]
    assert [each["index"] for each in leaf["slices"]] == [[0], [1]] and leaf["weighting"] == "calibration"
    assert [each["output_error"] for each in leaf["slices"]] == [row["weighted_error"] for row in rows]
    assert Page((folders / "made" / "report.html").read_text(encoding="utf-8")).open == []
    measured = read_report(folders / "second")
    assert measured["cost"] == found["cost"] and measured["calibration"] == found["calibration"]
    assert "| calibrated on | ids.npy (5 rows of 16 tokens" in (folders / "second" / "report.md").read_text()


def test_layers_are_read_from_slices_and_from_names():
    leaves = [
        {
            "path": "layers/up",
            "slices": [{"index": [0, 0], "output_error": 0.1}, {"index": [0, 1], "output_error": 0.3}],
        },
        {"path": "layers_0/down/kernel", "output_error": 0.5},
        {"path": "layers_11/down/kernel", "output_error": None, "sqnr_db": 10.0},
    ]
    found = errors_by_layer({"leaves": leaves})
    assert found["layers/up"] == {0: pytest.approx(0.2)}
    assert found["layers_*/down/kernel"] == {0: 0.5, 11: pytest.approx(0.1)}


def test_a_name_of_a_model_is_no_mathematics():
    """matplotlib reads text between two dollars as TeX, and raises for what is none."""
    pytest.importorskip("matplotlib")
    report = {"compared": [{"name": name, "bits_per_weight_packed": 4.5, "kld_mean": 0.1} for name in ("a$_{$", "b")]}
    assert draw(report).startswith(b"\x89PNG")
