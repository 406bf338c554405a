"""Drift. Oracles: closed forms of Gaussians in numpy, and samples that are known to have moved, or not to have."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_model import make_random_model

import jq4
from jq4.calibration import Calibration
from jq4.cli import main
from jq4.cli.drift import judge, rounded, say_other_calibration
from jq4.drift import MARGIN, Drift, SliceDrift, drift, merge_statistics
from jq4.errors import JQ4Error
from jq4.observe import Programs
from models.language_model import LanguageModel

ALL = ("absmax", "mean", "mean_square", "hessian")
CHEAP = ALL[:3]
FEATURES = 12


PROGRAMS = {CHEAP: Programs(), ALL: Programs()}


def multiply(tree, x):
    return x @ tree["w"]


def observed(x, collect=CHEAP):
    weights = {"w": jnp.ones((x.shape[-1], 3))}
    return jq4.observe(multiply, weights, [x], collect=collect, programs=PROGRAMS.get(collect))


def sample(rows, seed, mean=0.0, scale=1.0, mix=None):
    x = np.random.default_rng(seed).normal(size=(rows, FEATURES)) * scale + mean
    return jnp.asarray(x if mix is None else x @ mix, jnp.float32)


def parts(x, count=8, collect=CHEAP):
    return [observed(part, collect) for part in jnp.split(x, count)]


def gaussian_kl(mean_b, covariance_b, mean_a, covariance_a):
    inverse, moved = np.linalg.inv(covariance_a), mean_b - mean_a
    log_ratio = np.log(np.linalg.det(covariance_a) / np.linalg.det(covariance_b))
    return (np.trace(inverse @ covariance_b) - len(moved) + moved @ inverse @ moved + log_ratio) / 2


@pytest.mark.parametrize("collect", [CHEAP, ALL])
def test_figures_are_those_of_numpy(collect):
    mix = np.eye(FEATURES) + 0.2 * np.random.default_rng(9).normal(size=(FEATURES, FEATURES))
    a, b = sample(4000, 0, mean=0.3), sample(3000, 1, mean=0.5, scale=1.3, mix=mix)
    (found,) = drift(observed(a, collect), observed(b, collect)).slices
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    covariances = [np.cov(each.T, bias=True) for each in (x, y)]
    if "hessian" not in collect:
        covariances = [np.diag(np.diag(each)) for each in covariances]
    damping = 0.01 * x.var(0).mean()
    of_a, of_b = (each + damping * np.eye(FEATURES) for each in covariances)
    wanted = gaussian_kl(y.mean(0), of_b, x.mean(0), of_a) / FEATURES
    assert found.divergence == pytest.approx(wanted, rel=1e-3)
    shift = np.sqrt(np.mean((y.mean(0) - x.mean(0)) ** 2 / (x.var(0) + damping)))
    assert found.mean_shift == pytest.approx(shift, rel=1e-3)
    scales = np.log(((y**2).mean(0) + damping) / ((x**2).mean(0) + damping)) / 2
    assert found.scale_shift == pytest.approx(np.sqrt(np.mean(scales**2)), rel=1e-3)
    assert found.absmax_ratio == pytest.approx(np.abs(y).max() / np.abs(x).max(), rel=1e-5)
    moments = [each.T @ each / len(each) for each in (x, y)]
    if "hessian" not in collect:
        moments = [np.diag(np.diag(each)) for each in moments]
    assert found.frobenius == pytest.approx(
        np.linalg.norm(moments[1] - moments[0]) / np.linalg.norm(moments[0]), rel=1e-3
    )
    assert found.moved is None and found.threshold is None  # nothing tells what is much


@pytest.mark.parametrize("collect", [CHEAP, ALL])
@pytest.mark.parametrize("new_rows", [200, 4000])
def test_fresh_samples_of_one_distribution_have_not_moved(collect, new_rows):
    """Ten draws at each size, small and large against calibration: a false alarm would be the threshold's defect."""
    calibration = parts(sample(1600, 0, mean=0.5), collect=collect)
    for seed in range(1, 11):
        (found,) = drift(calibration, observed(sample(new_rows, seed, mean=0.5), collect)).slices
        assert found.moved is False, (seed, found)


@pytest.mark.parametrize(
    ("change", "measure", "size"),
    [
        ({"mean": 0.25}, "mean_shift", 0.25),
        ({"scale": 1.2}, "scale_shift", np.log(1.2)),
        ({"scale": 0.8}, "scale_shift", -np.log(0.8)),
    ],
)
def test_a_change_of_known_size_is_found_and_measured(change, measure, size):
    found = drift(parts(sample(1600, 0)), observed(sample(1600, 1, **change)))
    assert [each.path for each in found.moved] == ["w"] and found.share_moved == 1
    assert getattr(found.moved[0], measure) == pytest.approx(size, rel=0.15)


def test_correlations_are_seen_by_whole_covariances_only():
    """The same mean and variance in every channel, but pairs of channels that now go together."""
    mix = np.kron(np.eye(FEATURES // 2), np.array([[0.96, 0.28], [0.28, 0.96]]))
    mix = mix / np.sqrt((mix**2).sum(0))
    new = sample(1600, 1, mix=mix)
    assert drift(parts(sample(1600, 0)), observed(new)).moved == []
    full = drift(parts(sample(1600, 0), collect=ALL), observed(new, ALL))
    assert full.covariance == "full" and len(full.moved) == 1


def test_statistics_of_parts_merge_to_those_of_the_whole():
    x = sample(800, 0)
    merged, whole = merge_statistics(parts(x, collect=ALL))["w"], observed(x, ALL)["w"]
    assert int(merged.count) == int(whole.count) == 800
    np.testing.assert_allclose(merged.hessian, whole.hessian, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(merged.absmax, whole.absmax)


def test_only_the_slice_that_moved_is_named():
    def apply(tree, x):
        return jnp.einsum("lmk,lkn->lmn", x, tree["layers"])

    def stacked(seed, **change):
        return jnp.stack([sample(800, seed), sample(800, seed + 1, **change), sample(800, seed + 2)])

    def observe(x):
        return jq4.observe(apply, {"layers": jnp.ones((3, FEATURES, 2))}, [x])

    before = stacked(0)
    found = drift([observe(before[:, i : i + 100]) for i in range(0, 800, 100)], observe(stacked(5, scale=1.3)))
    assert [each.index for each in found.moved] == [(1,)]
    assert found.share_moved == pytest.approx(1 / 3)


def test_an_expert_that_calibration_never_saw_has_moved():
    def apply(tree, x, sizes):
        return jnp.zeros(()) + jnp.sum(jax.lax.ragged_dot(x, tree["experts"], sizes))

    def observe(sizes):
        x = sample(sum(sizes), sum(sizes))
        return jq4.observe(apply, {"experts": jnp.ones((2, FEATURES, 3))}, [(x, jnp.asarray(sizes, jnp.int32))])

    found = drift([observe([50 + i, 0]) for i in range(4)], observe([200, 30]))
    assert [(each.index, each.moved) for each in found.slices] == [((0,), False), ((1,), True)]
    assert found.moved[0].divergence is None
    nowhere = drift([observe([50 + i, 0]) for i in range(4)], observe([200, 0]))
    assert nowhere.slices[1].moved is None


def test_what_cannot_be_compared_is_told():
    x = sample(80, 0)
    with pytest.raises(JQ4Error, match="no weight in common: observe the same function"):
        drift(observed(x), jq4.observe(lambda tree, x: x @ tree["other"], {"other": jnp.ones((FEATURES, 3))}, [x]))
    with pytest.raises(JQ4Error, match="w: absmax was not collected"):
        drift(observed(x, ("mean",)), observed(x))
    with pytest.raises(JQ4Error, match=r"w: inputs \(12,\) in one statistics and \(6,\) in the other"):
        drift(observed(x), observed(x[:, :6]))
    with pytest.raises(JQ4Error, match="1 parts of calibration, wanted 2 or more"):
        drift([observed(x)], observed(x))


def figures(calibration, new, error=0.0001):
    return {
        name: {"kld_mean": mean, "kld_mean_standard_error": error}
        for name, mean in (("calibration", calibration), ("new", new))
    }


def test_the_verdict_weighs_inputs_and_loss():
    def moved(divergence):
        return Drift((SliceDrift("w", (0,), 0.1, 10, 10, divergence, 0.1, 0.1, 1.0, 0.1),), "diagonal", 16)

    assert moved(MARGIN * 0.1 + 0.01).moved and not moved(MARGIN * 0.1).moved
    assert judge(moved(0.1), {}, {}, True)[0] is False
    advised, why = judge(moved(0.3), {}, {}, True)
    assert advised and "--reference would tell" in why and "w [0]" in why
    advised, why = judge(moved(0.3), {}, {}, False)
    assert not advised and "looks at no calibration" in why
    assert judge(moved(0.3), figures(0.03, 0.06), figures(0.05, 0.06), True)[0] is True
    advised, why = judge(moved(0.3), figures(0.03, 0.036), figures(0.05, 0.06), True)
    assert not advised and "1.20 times; 1.20 times by round-to-nearest" in why
    assert judge(moved(0.3), figures(0.03, 0.036), {}, True)[0] is True
    assert judge(moved(0.3), figures(0.03, 0.036, error=0.01), {}, True)[0] is False


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("drift")
    source = make_random_model(base / "dense")
    random = np.random.default_rng(0)
    for name, low, high in (("old", 0, 300), ("same", 0, 300), ("other", 0, 8)):
        np.save(base / f"{name}.npy", random.integers(low, high, (32, 16), np.int32))
    assert main(["quantize", str(source), str(base / "packed"), "--recipe", "rtn-w4g32", "--json"]) == 0
    return base


def run(capsys, folders, text, *more):
    capsys.readouterr()
    files = ["--text", str(folders / f"{text}.npy"), "--calibration", str(folders / "old.npy")]
    code = main(["drift", str(folders / "packed"), *files, "--json", *more])
    return code, capsys.readouterr()


def test_the_command_tells_what_moved(capsys, folders):
    code, captured = run(capsys, folders, "same", "--exit-code")
    data = json.loads(captured.out)
    assert code == 0 and data["share_moved"] == 0 and not data["recalibrate"]
    assert data["texts"]["calibration"]["rows"] == 32 and data["splits"] == 12
    code, captured = run(capsys, folders, "other", "--exit-code", "--reference", str(folders / "dense"))
    data = json.loads(captured.out)
    assert data["share_moved"] == 1 and len(data["slices"]) == 15
    assert not data["recalibrate"] and code == 0  # rtn looks at no calibration
    assert data["kld"]["new"]["kld_mean"] > 0
    assert data["kld_round_to_nearest"]["new"]["kld_mean"] == pytest.approx(data["kld"]["new"]["kld_mean"], rel=1e-3)


def test_the_exit_code_is_for_those_who_ask(capsys, folders, monkeypatch):
    monkeypatch.setattr("jq4.cli.drift.recipe_of", lambda folder: None)
    assert run(capsys, folders, "other", "--exit-code")[0] == 3
    code, captured = run(capsys, folders, "other")
    assert code == 0 and json.loads(captured.out)["recalibrate"]


def test_the_control_looks_at_no_calibration(folders):
    model = LanguageModel.from_folder(folders / "dense")
    made = rounded(model, jq4.Recipe.preset("smoothquant-w8a8-static"))
    plain = jq4.quantize(model.params, "rtn-w8gc")
    for have, want in zip(jax.tree.leaves(made.params), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(have, want)


def test_another_calibration_file_than_the_model_tells_is_remarked(capsys, folders):
    model = LanguageModel.from_folder(folders / "dense")
    text = Calibration(np.zeros((1, 2), np.int32), "old.npy", "0f", 1)
    for sha256, remarks in (("0f", 0), ("1e", 1)):
        model.save(folders / "told", source={"calibration": {"file": "web.txt", "sha256": f"sha256:{sha256}"}})
        capsys.readouterr()
        say_other_calibration(argparse.Namespace(model=str(folders / "told"), calibration="old.npy"), text)
        assert capsys.readouterr().err.count("was calibrated on another file, web.txt") == remarks


def test_few_rows_are_remarked(capsys, folders):
    np.save(folders / "short.npy", np.load(folders / "same.npy")[:2])
    captured = run(capsys, folders, "short")[1]
    (note,) = json.loads(captured.out)["notes"]
    assert "short.npy: gives 2 rows, fewer than 8: the verdict is of these passages" in note and note in captured.err
    assert json.loads(run(capsys, folders, "same")[1].out)["notes"] == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--parts", "3"), "--parts is 3, wanted an even number, 4 or more"),
        (("--parts", "64"), "gives 32 rows, too few for 64 parts"),
        (("--calibration", "nowhere.npy"), "nowhere.npy: there is no such file"),
    ],
)
def test_bad_input_is_told_in_one_line(capsys, folders, more, message):
    code, captured = run(capsys, folders, "same", *more)
    assert code == 1 and message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
