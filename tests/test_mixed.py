"""Mixed precision. Oracles: every combination tried for the knapsack, numpy's own KLD for a trial."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_model import make_random_model

import jq4
from jq4.choose_formats import choose_formats, frontier_of, uniform_choices
from jq4.cli import main
from jq4.cli.mixed import draw
from jq4.errors import JQ4Error
from jq4.knapsack import Frontier
from jq4.sensitivity import Sensitivity, sensitivity, target_of
from jq4.trials import kld_of_params

VOCABULARY, WIDTH = 40, 32


def random_items(seed, items=6, options=4):
    random = np.random.default_rng(seed)
    costs = [random.integers(1, 30, options).tolist() for _ in range(items)]
    losses = [random.exponential(size=options).tolist() for _ in range(items)]
    return costs, losses


def brute_force(costs, losses, budget):
    """The least loss of all combinations that keep to the budget."""
    found = np.inf
    for combination in itertools.product(*(range(len(each)) for each in costs)):
        if sum(costs[i][c] for i, c in enumerate(combination)) <= budget:
            found = min(found, sum(losses[i][c] for i, c in enumerate(combination)))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all_combinations(seed):
    costs, losses = random_items(seed)
    frontier = Frontier(costs, losses)
    least = sum(map(min, costs))
    for budget in (least, least + 7, least + 25, sum(map(max, costs))):
        found = frontier.at(budget)
        assert found.cost <= budget and found.gap == 0
        assert found.cost == sum(costs[i][c] for i, c in enumerate(found.options))
        assert found.loss == pytest.approx(sum(losses[i][c] for i, c in enumerate(found.options)))
        assert found.loss == pytest.approx(brute_force(costs, losses, budget))


@pytest.mark.parametrize("seed", range(4))
def test_a_frontier_that_was_cut_states_a_gap_that_holds(seed):
    costs, losses = random_items(seed)
    rough = Frontier(costs, losses, limit=6)
    for budget in (sum(map(min, costs)) + 20, sum(map(max, costs)) - 20):
        found, best = rough.at(budget), brute_force(costs, losses, budget)
        assert found.cost <= budget
        assert found.loss - found.gap <= best + 1e-9 <= found.loss + 2e-9


def test_the_frontier_has_every_compromise_once():
    costs, losses = random_items(9, items=4)
    points = Frontier(costs, losses).points
    assert [loss for _, loss in points] == sorted((loss for _, loss in points), reverse=True)
    for cost, loss in points:
        assert loss == pytest.approx(brute_force(costs, losses, cost))
        assert loss < brute_force(costs, losses, cost - 1)


def test_impossible_knapsacks_are_told():
    with pytest.raises(JQ4Error, match="a budget of 3 is less than the cheapest options together cost, 5"):
        Frontier([[2, 3], [3, 4]], [[1.0, 0.5], [1.0, 0.5]]).at(3)
    with pytest.raises(JQ4Error, match="one item or more"):
        Frontier([], [])
    with pytest.raises(JQ4Error, match="a loss is not finite"):
        Frontier([[1]], [[float("nan")]])


def apply(params, tokens):
    x = params["table"][tokens]
    x = x + jnp.tanh(x @ params["first"]["kernel"])
    x = x + jnp.tanh(x @ params["second"]["kernel"])
    return x @ params["last"]["kernel"]


@pytest.fixture(scope="module")
def small():
    """(params, rows, what was measured of them in three formats)."""
    random = np.random.default_rng(0)
    shapes = {"first": (WIDTH, WIDTH), "second": (WIDTH, 32), "last": (WIDTH, VOCABULARY)}
    params = {
        name: {"kernel": jnp.asarray(random.normal(size=shape) / 4, jnp.float32)} for name, shape in shapes.items()
    }
    params["table"] = jnp.asarray(random.normal(size=(VOCABULARY, WIDTH)), jnp.float32)
    rows = random.integers(0, VOCABULARY, (12, 10), np.int32)
    stats = jq4.observe(apply, params, [rows])
    return params, rows, stats, sensitivity(apply, params, ("rtn-w3g16", "rtn-w4g16", "rtn-w8gc"), rows, stats)


def test_a_trial_is_the_kld_of_one_packed_leaf(small):
    params, rows, _, found = small
    assert [leaf.path for leaf in found.leaves] == ["first/kernel", "last/kernel", "second/kernel"]
    option = found.leaves[2].options[0]
    packed = jq4.quantize({"kernel": params["second"]["kernel"]}, "rtn-w3g16")["kernel"]
    changed = {**params, "second": {"kernel": packed.dequantize()}}
    log_p, log_q = (np.asarray(jax.nn.log_softmax(apply(each, rows)), np.float64)[:, :-1] for each in (params, changed))
    assert option.format == "rtn-w3g16" and option.bytes == packed.nbytes
    assert option.loss == option.kld == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-3)


def test_losses_nearly_add_up_and_the_mix_beats_what_is_uniform(small):
    params, rows, _, found = small
    measure = kld_of_params(apply, params, rows)
    uniform = uniform_choices(found)
    assert set(uniform) == {"rtn-w3g16", "rtn-w4g16", "rtn-w8gc"}
    choice = choose_formats(found, bits=uniform["rtn-w4g16"].bits)
    packed = jq4.quantize(params, choice.recipe)
    assert choice.gap == 0 and choice.bits <= uniform["rtn-w4g16"].bits
    assert sum(packed[name]["kernel"].nbytes for name in ("first", "second", "last")) == choice.bytes
    assert measure(packed) == pytest.approx(choice.predicted, rel=0.5)
    assert choice.predicted <= uniform["rtn-w4g16"].predicted


def test_a_budget_may_be_given_in_bytes(small):
    *_, found = small
    by_bytes = choose_formats(found, bytes=found.size * 5 // 8)
    assert by_bytes.options == choose_formats(found, bits=5).options
    points = frontier_of(found)
    assert points[0]["bits"] == uniform_choices(found)["rtn-w3g16"].bits
    assert points[-1]["predicted"] == min(each["predicted"] for each in points)


def test_one_trial_a_leaf_scales_the_errors_of_outputs(small):
    params, rows, stats, full = small
    formats = ("rtn-w3g16", "rtn-w4g16", "rtn-w8gc")
    found = sensitivity(apply, params, formats, rows, stats, trials="one", weighting="hessian")
    for leaf, wanted in zip(found.leaves, full.leaves, strict=True):
        probe, three = leaf.options[1], leaf.options[0]
        assert [option.kld is None for option in leaf.options] == [True, False, True]
        assert probe.loss == pytest.approx(wanted.options[1].loss)
        assert three.loss == pytest.approx(probe.loss * three.output_error / probe.output_error)
        assert three.loss == pytest.approx(wanted.options[0].loss, rel=0.5)  # quadratic, nearly
    none = sensitivity(apply, params, formats[:2], rows, stats, trials="none", weighting="hessian")
    assert [option.loss for option in none.leaves[0].options] == [o.output_error for o in none.leaves[0].options]


def test_gradients_predict_the_trials(small):
    """Weighted by Fisher, an estimate is a KLD in nats: near the trial's, without one and without statistics."""
    params, rows, _, full = small
    found = sensitivity(apply, params, ("rtn-w3g16", "rtn-w4g16", "rtn-w8gc"), rows, trials="none")
    assert found.weighting == "fisher"
    for leaf, wanted in zip(found.leaves, full.leaves, strict=True):
        for option, trial in zip(leaf.options, wanted.options, strict=True):
            assert option.kld is None and option.loss == option.fisher_loss
            assert option.loss == pytest.approx(trial.kld, rel=0.25)
    one = sensitivity(apply, params, ("rtn-w3g16", "rtn-w4g16", "rtn-w8gc"), rows, trials="one")
    for leaf, wanted in zip(one.leaves, found.leaves, strict=True):
        factors = {round(a.loss / b.loss, 3) for a, b in zip(leaf.options, wanted.options, strict=True)}
        assert len(factors) == 1 and leaf.options[1].kld == pytest.approx(leaf.options[1].loss)


def test_dense_is_a_format_too(small):
    params, rows, stats, _ = small
    found = sensitivity(apply, params, ("rtn-w3g16", "dense"), rows, stats)
    choice = choose_formats(found, bits=16)
    assert {option.format for option in choice.options.values()} == {"rtn-w3g16", "dense"}
    packed = jq4.quantize(params, choice.recipe)
    dense = [path for path, option in choice.options.items() if option.format == "dense"]
    assert all(isinstance(packed[path.split("/")[0]]["kernel"], jax.Array) for path in dense)
    assert choice.bits <= 16


def test_a_recipe_survives_its_file(small, tmp_path):
    *_, found = small
    recipe = choose_formats(found, bits=5).recipe
    recipe.save(tmp_path / "mix.yaml")
    assert jq4.Recipe.load(tmp_path / "mix.yaml") == recipe


def test_a_target_means_one_leaf_only():
    paths = ["layers/mlp/kernel", "encoder/layers/mlp/kernel", "a.b/kernel"]
    target = target_of("layers/mlp/kernel", paths)
    rule = jq4.Rule((target,))
    assert [path for path in (*paths, "params/layers/mlp/kernel") if rule.matches(path)] == [
        "layers/mlp/kernel",
        "params/layers/mlp/kernel",
    ]
    assert target_of("a.b/kernel", paths) == "a.b/kernel"


def test_bad_requests_are_told(small):
    params, rows, _, found = small
    for formats, message in (
        (("rtn-w4g16",), "wanted two or more to choose from"),
        (("rtn-w4g16", "nonsense"), "unknown preset 'nonsense'"),
    ):
        with pytest.raises(JQ4Error, match=message):
            sensitivity(apply, params, formats, rows)
    with pytest.raises(JQ4Error, match="mean no leaf of the tree"):
        sensitivity(apply, {"scale": jnp.ones(3)}, ("rtn-w4g16", "rtn-w8gc"), rows)
    with pytest.raises(JQ4Error, match="trials is 'few', wanted one of all, one, none"):
        sensitivity(apply, params, ("rtn-w4g16", "rtn-w8gc"), rows, trials="few")
    with pytest.raises(JQ4Error, match=r"need stats=jq4\.observe"):
        sensitivity(apply, params, ("rtn-w4g16", "rtn-w8gc"), rows, trials="one", weighting="hessian")
    with pytest.raises(JQ4Error, match="the statistics do not tell its outputs' errors: use the weighting 'fisher'"):
        sensitivity(apply, params, ("rtn-w4g16", "rtn-w8gc"), rows, {}, trials="none", weighting="hessian")
    with pytest.raises(JQ4Error, match="weighting is 'flat', wanted one of fisher, hessian"):
        sensitivity(apply, params, ("rtn-w4g16", "rtn-w8gc"), rows, weighting="flat")
    with pytest.raises(JQ4Error, match="bits is nan, wanted a number"):
        choose_formats(found, bits=float("nan"))
    with pytest.raises(JQ4Error, match="wanted either bits"):
        choose_formats(found)
    with pytest.raises(JQ4Error, match=r"less than the smallest of the formats take, .* \(4 bits a weight\)"):
        choose_formats(found, bits=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_random_model(tmp_path_factory.mktemp("mixed") / "dense")


def arguments(source, *more):
    given = ["--calibration", str(source / "ids.npy"), "--formats", "rtn-w3g32,rtn-w4g32"]
    return ["mixed", str(source), *given, *more]


def test_the_command_writes_a_recipe_that_quantize_takes(source, tmp_path, capsys):
    recipe = tmp_path / "mix.yaml"
    assert main(arguments(source, "--bits", "4", "--out", str(recipe), "--json")) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["mix"]["bits"] <= 4 and data["mix"]["gap"] == 0 and data["mix"]["measured"] > 0
    assert set(data["mix"]["chosen"]) == {leaf["path"] for leaf in data["sensitivity"]["leaves"]}
    assert (data["calibration"]["fitted_rows"], data["calibration"]["trial_rows"]) == (3, 2)
    assert [each["name"] for each in data["uniform"]] == ["rtn-w3g32", "rtn-w4g32"]
    assert main(["quantize", str(source), str(tmp_path / "packed"), "--recipe", str(recipe), "--json"]) == 0
    packed = json.loads(capsys.readouterr().out)
    assert packed["bits_per_weight_packed"] == pytest.approx(data["mix"]["bits"])
    formats = {leaf["path"]: leaf["format"] for leaf in packed["packed"]}
    for path, name in data["mix"]["chosen"].items():
        assert formats[path] == f"int{name[5]}"


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--bits", "1"), 1, "is less than the smallest of the formats take"),
        (("--bits", "4.5", "--formats", "rtn-w4g32"), 1, "wanted two or more"),
        (("--bits", "4.5", "--batch-size", "0"), 1, "--batch-size is 0, wanted 1 or more"),
        (("--bits", "4.5", "--out", "nowhere/mix.yaml"), 1, "there is no folder"),
        (("--bits", "4.5", "--out", "mix.txt"), 1, "wanted a name that ends in .yaml"),
        (("--bits", "4.5", "--calibration", "nowhere.npy"), 1, "there is no such file"),
        ((), 2, "one of the arguments --bits --bytes is required"),
    ],
)
def test_bad_input_is_told_in_one_line(source, capsys, more, code, message):
    if more and more[1] == "1":
        more = (*more, "--trials", "none")  # told after the work: let that be little
    assert main(arguments(source, *more)) == code
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_the_frontier_is_drawn(small, tmp_path):
    """A PNG by its signature; another mix gives another picture."""
    pytest.importorskip("matplotlib")
    *_, found = small
    uniform = [
        {"name": name, "bits": mix.bits, "measured": mix.predicted} for name, mix in uniform_choices(found).items()
    ]
    pictures = []
    for bits in (5, 7):
        mix = choose_formats(found, bits=bits)
        data = {"mix": {**mix.as_dict(), "measured": mix.predicted}, "uniform": uniform, "frontier": frontier_of(found)}
        draw(data, tmp_path / "bits.png")
        pictures.append((tmp_path / "bits.png").read_bytes())
    assert all(each.startswith(b"\x89PNG") for each in pictures) and pictures[0] != pictures[1]


def test_sensitivities_are_plain_data(small):
    *_, found = small
    assert isinstance(found, Sensitivity)
    assert json.loads(json.dumps(found.as_dict())) == found.as_dict()
