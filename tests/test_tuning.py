"""Learned rounding. Oracles: brute force over all roundings, finite differences, dequantizing, and the start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_block import as_block, error_of, heavy_tailed, linear, problem, small_layer

import jq4
from jq4.activations import rounding_inputs
from jq4.chain import Chain
from jq4.divergence import divergence
from jq4.qarray import codes_of, is_qarray
from jq4.tuning import distill, logits_of_chain, tune_block, with_effort
from jq4.tuning.descent import draw_batches, split_rows
from jq4.tuning.learned import begin, harden, weight_of
from jq4.tuning.learned_tree import begin_tree
from jq4.tuning.rounded_inputs import with_rounded_inputs

FORMS = ("rtn-w4g32", "rtn-w3g32-asym", "hqq-w4g32-asym", "rtn-w8gc", "nf4-g32", "fp4")


def _moved(variables, size):
    """The variables, each moved by random amounts."""
    random = np.random.default_rng(1)
    return jax.tree.map(lambda each: each + size * random.standard_normal(each.shape).astype(np.float32), variables)


@pytest.mark.parametrize("name", FORMS)
def test_a_start_is_its_packed_leaf_to_the_code_and_scale(name):
    weight = heavy_tailed(2, 72, 24)
    q = jq4.quantize({"kernel": weight}, name)["kernel"]
    again = harden(begin(q, weight), q, weight)
    for wanted, found in zip(jax.tree.leaves(q), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
    assert jax.tree.structure(again) == jax.tree.structure(q)


def test_a_start_may_have_any_codes():
    weight = heavy_tailed(64, 16)
    q = jq4.quantize({"kernel": weight}, "rtn-w4g32")["kernel"]
    codes = jnp.asarray(np.random.default_rng(2).integers(0, 256, q.codes.shape), jnp.uint8)
    other = dataclasses.replace(q, codes=codes)
    again = harden(begin(other, weight), other, weight)
    np.testing.assert_array_equal(np.asarray(again.codes), np.asarray(codes))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("rounding", [True, False])
def test_hardening_gives_what_the_forward_pass_used(name, rounding):
    weight = heavy_tailed(2, 72, 24)
    q = jq4.quantize({"kernel": weight}, name)["kernel"]
    variables = _moved(begin(q, weight, rounding=rounding), 0.3)
    learned = weight_of(variables, q, weight)
    hardened = harden(variables, q, weight)
    np.testing.assert_array_equal(np.asarray(hardened.dequantize()), np.asarray(learned))
    assert np.abs(np.asarray(learned) - np.asarray(q.dequantize())).max() > 0.01, "nothing moved"
    codes = np.asarray(codes_of(hardened))
    assert codes.max() <= q.number_format.max_code
    if name == "rtn-w4g32" and rounding:
        assert (codes != np.asarray(codes_of(q))).mean() > 0.1


def test_a_scale_of_inputs_is_kept_and_made_use_of():
    weight, scale = heavy_tailed(64, 16), np.geomspace(0.2, 5, 64, dtype=np.float32)[:, None]
    q = jq4.quantize({"kernel": weight / scale}, "rtn-w4g32")["kernel"]
    q = dataclasses.replace(q, input_scale=jnp.asarray(scale))
    variables = begin(q, weight)
    np.testing.assert_array_equal(np.asarray(weight_of(variables, q, weight)), np.asarray(q.dequantize()))
    assert np.abs(np.asarray(variables.rounding)).max() < 1e-2, "the start was rounded to nearest, so nothing shifts"


def test_gradients_are_those_of_the_soft_form():
    """Inside their cells codes are flat; straight through, d weight is what (w/s + V) * s would give at fixed codes."""
    weight = heavy_tailed(32, 4)
    q = jq4.quantize({"kernel": weight}, "rtn-w4g32")["kernel"]
    start = begin(q, weight)
    probe = np.random.default_rng(3).standard_normal(weight.shape).astype(np.float32)

    def value(variables):
        return jnp.sum(jnp.asarray(probe) * weight_of(variables, q, weight))

    gradient = jax.grad(value)(start)
    scale = np.repeat(np.asarray(q.scale, np.float32), 32, axis=0)
    inside = (np.asarray(codes_of(q)) > 0) & (np.asarray(codes_of(q)) < 15)
    np.testing.assert_allclose(np.asarray(gradient.rounding)[inside], (probe * scale)[inside], rtol=1e-6)
    # of a scale: that of LSQ, by central differences, the code's distance from w / s staying as it is
    levels = np.asarray(codes_of(q), np.float64) - 8

    def soft(log_scale):
        s = scale * np.exp(log_scale)
        return (probe * (levels + weight / s - weight / scale) * s).sum(axis=0)

    differences = (soft(1e-4) - soft(-1e-4)) / 2e-4
    np.testing.assert_allclose(np.asarray(gradient.log_scale)[0], differences, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", [5, 6, 7])
def test_the_best_rounding_of_a_small_layer_is_found(seed):
    """All 2**8 roundings up or down of 8 weights, on inputs so correlated that to round to nearest is far from best."""
    layer = small_layer(seed)
    options = {"iterations": 300, "batch_size": 1, "rate": 0.03, "scale_rate": 0.0, "checks": 30}
    tuned = tune_block(linear, *layer[:4], index=0, options=options)
    found = layer.error(tuned)
    assert layer.errors[0] < 0.6 * layer.error(layer.packed)
    np.testing.assert_allclose(found, layer.errors[0], rtol=1e-4)


def test_a_block_is_never_worse_than_its_start_and_better_by_scales_alone():
    dense, packed, inputs, targets = problem()
    before = error_of(packed, inputs, targets)
    for options, factor in (
        ({"iterations": 60, "rate": 0.005, "scale_rate": 0.002}, 0.8),
        ({"iterations": 60, "rate": 0.0, "scale_rate": 0.002}, 0.99),
        ({"iterations": 60, "optimizer": "sign", "rate": 0.005, "scale_rate": 0.001, "decay": "cosine"}, 0.9),
        ({"iterations": 60, "rate": 50.0}, 1.0),  # flings every code about, so that the start is the best
        ({"iterations": 0}, 1.0),
    ):
        tuned = tune_block(linear, dense, packed, inputs, targets, index=0, options=options)
        assert error_of(tuned, inputs, targets) <= factor * before, options
        assert jax.tree.structure(tuned) == jax.tree.structure(packed)
        if factor == 1.0:
            _assert_same(tuned, packed)


@pytest.mark.parametrize("name", ["rtn-w3g32-asym", "hqq-w3g32-asym", "nf4-g32-dq"])
def test_zero_points_offsets_and_packed_scales_are_tuned(name):
    dense, _, inputs, targets = problem()
    dense["layers"]["kernel"] = dense["layers"]["kernel"].at[:32, 1].set(0)
    packed = as_block(jq4.quantize(dense, dataclasses.replace(jq4.Recipe.preset(name), name=None))["layers"]["kernel"])
    tuned = tune_block(linear, dense, packed, inputs, targets, index=0, options={"iterations": 30, "batch_size": 4})
    assert error_of(tuned, inputs, targets) < 0.9 * error_of(packed, inputs, targets)
    assert jax.tree.structure(tuned) == jax.tree.structure(packed)


def test_a_group_with_a_scale_of_zero_stays_zero():
    dense, packed, inputs, targets = problem()
    q = packed["layers"]["kernel"]
    dense = as_block(dense["layers"]["kernel"].at[:32, 1].set(0))
    packed = as_block(dataclasses.replace(q, scale=q.scale.at[0, 1].set(0)))
    tuned = tune_block(linear, dense, packed, inputs, targets, index=0, options={"iterations": 4})
    kernel = np.asarray(tuned["layers"]["kernel"].dequantize())
    assert np.isfinite(kernel).all() and not kernel[:32, 1].any()


def test_the_same_seed_gives_the_same_bytes_and_another_one_others():
    dense, packed, inputs, targets = problem()
    make = [
        tune_block(linear, dense, packed, inputs, targets, index=0, options={"iterations": 20, "checks": 1}, seed=seed)
        for seed in (0, 0, 1)
    ]
    _assert_same(make[0], make[1])
    assert (np.asarray(make[0]["layers"]["kernel"].codes) != np.asarray(make[2]["layers"]["kernel"].codes)).any()


def test_batches_hold_every_row_once_before_any_again():
    order = draw_batches(np.arange(3, 13), 7, 4, seed=0)
    assert order.shape == (7, 4)
    assert sorted(order.ravel()[:10]) == sorted(order.ravel()[10:20]) == list(range(3, 13))


@pytest.mark.parametrize("rounding", [True, False])
def test_distillation_comes_nearer_to_the_dense_model(rounding):
    chain, dense, packed, rows = _small_model()
    logits = logits_of_chain(chain)
    options = {"iterations": 60, "batch_size": 4, "perturbed_rows": 16, "scale_rate": 0.002}
    options["rate"] = 0.005 if rounding else 0.0
    steps = []
    tuned = distill(logits, dense, packed, rows, options=options, progress=lambda *step: steps.append(step))
    before, after = _divergence(logits, dense, packed, rows), _divergence(logits, dense, tuned, rows)
    assert after < (0.6 if rounding else 0.95) * before
    assert steps[-1][:2] == (60, 60)
    assert jax.tree.structure(tuned) == jax.tree.structure(packed)
    if not rounding:
        np.testing.assert_array_equal(
            np.asarray(tuned["layers"]["kernel"].codes), np.asarray(packed["layers"]["kernel"].codes)
        )


def test_distillation_is_never_worse_than_its_start_and_learns_from_more_rows():
    chain, dense, packed, rows = _small_model()
    logits = logits_of_chain(chain)
    options = {"iterations": 8, "perturbed_rows": 0, "scale_rate": 0.01, "checks": 8}
    too_fast = options | {"rate": 50.0, "scale_rate": 0.0}
    _assert_same(distill(logits, dense, packed, rows, options=too_fast), packed)
    alone, with_more = (distill(logits, dense, packed, rows, options=options, more_rows=m) for m in (None, rows[::-1]))
    assert (np.asarray(alone["layers"]["kernel"].scale) != np.asarray(with_more["layers"]["kernel"].scale)).any()


def test_presets_learn_from_the_closed_form():
    assert [step.step for step in jq4.Recipe.preset("best-w4g32").after] == ["distill"]
    recipe = jq4.Recipe.preset("autoround-w3g128-asym")
    assert [step.step for step in recipe.after] == ["autoround"]
    assert recipe.rules == jq4.Recipe.preset("gptq-w3g128-asym").rules


def test_logits_of_a_chain_with_remat_are_the_same():
    chain, dense, _, rows = _small_model()
    plain, remat = (logits_of_chain(chain, remat=remat)(dense, jnp.asarray(rows)) for remat in (False, True))
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(remat))
    assert logits_of_chain(chain) is logits_of_chain(chain)


def test_an_effort_fills_in_what_a_step_leaves_open():
    recipe = jq4.Recipe.from_dict(
        {"rules": [{"targets": ["Linear"], "num_bits": 4}], "after": [{"step": "distill", "rate": 0.125}, "autoround"]}
    )
    light, best = with_effort(recipe, "light"), with_effort(recipe, "best")
    assert dict(light.after[0].options)["rate"] == dict(best.after[0].options)["rate"] == 0.125
    for step in (0, 1):
        assert dict(light.after[step].options)["iterations"] < dict(best.after[step].options)["iterations"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"iterations": -1}, "block 3: iterations is -1, wanted an integer, 0 or more"),
        ({"rate": "fast"}, "block 3: rate is 'fast', wanted a number, zero or more"),
        ({"iters": 5}, "block 3: unknown option 'iters' of step autoround, wanted one of iterations, batch_size"),
        ({"optimizer": "newton"}, "block 3: optimizer is 'newton', wanted one of adam, sign"),
    ],
)
def test_bad_options_are_told(options, text):
    dense, packed, inputs, targets = problem()
    with pytest.raises(jq4.JQ4Error, match=text):
        tune_block(linear, dense, packed, inputs, targets, index=3, options=options)


def test_poisoned_inputs_permuted_leaves_and_other_weights_are_refused():
    dense, packed, inputs, targets = problem()
    poisoned = np.where(np.arange(inputs.size).reshape(inputs.shape) == 5, np.nan, inputs).astype(np.float32)
    with pytest.raises(jq4.JQ4Error, match="block 0: the loss at the start is nan: wanted finite"):
        tune_block(linear, dense, packed, poisoned, targets, index=0)
    q = packed["layers"]["kernel"]
    permuted = as_block(dataclasses.replace(q, permutation=jnp.arange(q.shape[0])))
    with pytest.raises(jq4.JQ4Error, match="layers/kernel: its rows are permuted"):
        tune_block(linear, dense, permuted, inputs, targets, index=0)
    with pytest.raises(jq4.JQ4Error, match="layers/kernel: the dense weight has shape"):
        begin_tree(packed, as_block(dense["layers"]["kernel"][:8]))
    with pytest.raises(jq4.JQ4Error, match="no packed leaf"):
        begin_tree(dense, dense)


def _assert_same(left, right):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def _small_model():
    """Two residual layers between an embedding and its transpose; 32 tokens, 16 wide."""

    def block(tree, index, x):
        return x + jnp.tanh(x @ tree["layers"]["kernel"])

    chain = Chain(
        2, "layers", lambda tree, t: tree["table"][t], block, lambda tree, x: x @ tree["table"].T, (("kernel",),)
    )
    random = np.random.default_rng(6)
    kernels = jnp.asarray(random.standard_normal((2, 16, 16)), jnp.float32)
    dense = {"table": jnp.asarray(random.standard_normal((32, 16)), jnp.float32), "layers": {"kernel": kernels}}
    packed = jq4.quantize(dense, "rtn-w3g16")
    return chain, dense, packed, random.integers(0, 32, (12, 8)).astype(np.int32)


def _divergence(logits, dense, packed, rows):
    log_p, log_q = (
        np.asarray(jax.nn.log_softmax(logits(tree, jnp.asarray(rows))), np.float64)
        for tree in (dense, jq4.dequantize(packed))
    )
    return (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()


def _with_inputs(packed, name):
    """The packed tree, whose kernels' products round their inputs; where steps are fixed, each layer by its own."""
    seen = jnp.asarray([[4.0], [2.0]]) * jnp.ones((2, 16))
    kernel = rounding_inputs(packed["layers"]["kernel"], name, seen)
    return packed | {"layers": {"kernel": kernel}}


@pytest.mark.parametrize("name", ["int8-token", "int4-token-asym", "int4-tensor", "float8-token"])
def test_inputs_are_rounded_as_those_of_what_is_served(name):
    """Oracle: jq4.quantized of the packed weights; through a scan over layers, and in one block."""
    chain, _, packed, rows = _small_model()
    packed = _with_inputs(packed, name)
    logits, plain = logits_of_chain(chain), jq4.dequantize(packed)
    served = jax.jit(jq4.quantized(logits, strict=True))(packed, rows)
    learned = jax.jit(lambda tree: with_rounded_inputs(logits, packed)(tree, rows))(plain)
    np.testing.assert_allclose(learned, served, rtol=2e-4, atol=2e-4)
    assert np.abs(np.asarray(logits(plain, rows)) - np.asarray(served)).max() > 0.02
    assert with_rounded_inputs(logits, _small_model()[2]) is logits


@pytest.mark.parametrize("name", ["int8-token", "int4-token-asym", "int4-tensor"])
@pytest.mark.parametrize("before", ["scaled", "scaled by the layer", "rotated"])
def test_inputs_are_scaled_and_rotated_before_they_are_rounded(before, name):
    """Oracle: jq4.quantized, whose products have the weight without either."""
    chain, _, packed, rows = _small_model()
    kernel = packed["layers"]["kernel"]
    scale = jnp.asarray(np.geomspace(0.25, 4, 32, dtype=np.float32).reshape(2, 16, 1))
    changed = {"scaled": {"input_scale": scale[:1]}, "scaled by the layer": {"input_scale": scale}}
    kernel = dataclasses.replace(kernel, **changed.get(before, {"input_rotation": 16}))
    packed = _with_inputs(packed | {"layers": {"kernel": kernel}}, name)
    logits, plain = logits_of_chain(chain), jq4.dequantize(packed)
    served = jax.jit(jq4.quantized(logits, strict=True))(packed, rows)
    learned = jax.jit(lambda tree: with_rounded_inputs(logits, packed)(tree, rows))(plain)
    np.testing.assert_allclose(learned, served, rtol=2e-3, atol=2e-3)
    assert np.abs(np.asarray(logits(plain, rows)) - np.asarray(served)).max() > 0.02


@pytest.mark.parametrize("form", ["experts", "convolution", "turned"])
def test_inputs_of_other_products_are_scaled_before_they_are_rounded(form):
    random = np.random.default_rng(8)
    shape, groups = {"experts": (3, 16, 8), "convolution": (3, 16, 8), "turned": (8, 16)}[form], jnp.asarray([2, 0, 4])
    axis = -1 if form == "turned" else -2
    function = {
        "experts": lambda tree, x: jax.lax.ragged_dot(x, tree["w"], groups),
        "convolution": lambda tree, x: jax.lax.conv_general_dilated(
            x[None], tree["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        "turned": lambda tree, x: x @ tree["w"].T,
    }[form]
    weight, x = (random.standard_normal(each).astype(np.float32) for each in (shape, (6, 16)))
    q = jq4.quantize({"w": weight}, "rtn-w4g16", axes={"w": axis})["w"]
    scale = np.geomspace(0.25, 4, shape[0] * 16, dtype=np.float32).reshape(shape[0], 16, 1)
    scale = {"experts": scale, "convolution": scale[:1], "turned": scale[:1, :, 0]}[form]
    packed = {"w": rounding_inputs(dataclasses.replace(q, input_scale=jnp.asarray(scale)), "int4-token", None)}
    learned = with_rounded_inputs(function, packed)(jq4.dequantize(packed), x)
    np.testing.assert_allclose(learned, jq4.quantized(function)(packed, x), rtol=1e-3, atol=1e-3)
    assert np.abs(np.asarray(learned - function(jq4.dequantize(packed), x))).max() > 0.02


def _learned_and_served(function, weight, x, before=None, name="int4-token"):
    """What a function of one leaf gives with inputs rounded for learning, as served, and with float inputs."""
    random = np.random.default_rng(9)
    q = jq4.quantize({"w": random.standard_normal(weight).astype(np.float32)}, "rtn-w4g16", axes={"w": -2})["w"]
    if before is not None:
        q = dataclasses.replace(q, input_scale=jnp.asarray(np.exp(random.standard_normal(before)), jnp.float32))
    packed = {"w": rounding_inputs(q, name, 4 * jnp.ones((*weight[:-2], weight[-2])))}
    plain = jq4.dequantize(packed)
    return with_rounded_inputs(function, packed)(plain, x), jq4.quantized(function)(packed, x), function(plain, x)


@pytest.mark.parametrize("before", [None, (3, 1, 16, 1), (3, 2, 16, 1)])
def test_experts_of_a_layer_that_is_indexed_have_their_own_scales(before):
    x, sizes = np.random.default_rng(8).standard_normal((4, 16)).astype(np.float32), jnp.asarray([3, 1])

    def function(tree, x):
        return sum(jax.lax.ragged_dot(x, tree["w"][layer], sizes) for layer in (0, 2))

    learned, served, plain = _learned_and_served(function, (3, 2, 16, 8), x, before)
    np.testing.assert_allclose(learned, served, rtol=1e-3, atol=1e-3)
    assert np.abs(np.asarray(learned - plain)).max() > 0.02


def test_a_weight_cut_along_its_outputs_rounds_its_inputs():
    x = np.random.default_rng(8).standard_normal((4, 16)).astype(np.float32)

    def function(tree, x):
        first, second = jnp.split(tree["w"], 2, axis=1)
        return (x @ first) * (x @ second) + x @ tree["w"][:, 2:6]

    learned, served, plain = _learned_and_served(function, (16, 8), x, (16, 1))
    np.testing.assert_allclose(learned, served, rtol=1e-3, atol=1e-3)
    assert np.abs(np.asarray(learned - plain)).max() > 0.02


def test_inputs_that_cannot_be_rounded_are_told():
    """Scaled along an axis that the product splits; a scale of nothing is no NaN."""
    x = np.random.default_rng(8).standard_normal((4, 16)).astype(np.float32)
    function = lambda tree, x: jnp.einsum("bhd,hdn->bn", x.reshape(4, 2, 8), tree["w"].reshape(2, 8, 8))  # noqa: E731
    with pytest.warns(jq4.UnroundedWarning, match="w: is learned from inputs that are not rounded at dot_general: "):
        learned, _, plain = _learned_and_served(function, (16, 8), x, (16, 1))
    np.testing.assert_array_equal(learned, plain)
    q = jq4.quantize({"w": np.ones((16, 8), np.float32)}, "rtn-w4g16")["w"]
    scale = jnp.ones((16, 1)).at[3].set(0)
    packed = {"w": rounding_inputs(dataclasses.replace(q, input_scale=scale), "int8-token", None)}
    learned = with_rounded_inputs(lambda tree, x: x @ tree["w"], packed)(jq4.dequantize(packed), x)
    np.testing.assert_allclose(learned, jq4.matmul(x, packed["w"]), rtol=1e-3, atol=1e-3)


def test_learning_makes_up_for_rounded_inputs():
    """Judged as served: on rows held out in the whole model, on its own rows in a block."""
    chain, dense, packed, rows = _small_model()
    packed = _with_inputs(packed, "int4-token")
    logits = logits_of_chain(chain)
    served = jax.jit(jq4.quantized(logits, strict=True))
    apart = lambda tree: float(jnp.mean(divergence(served(tree, rows), logits(dense, rows))))  # noqa: E731
    learn = lambda start: distill(logits, dense, start, rows, options={"iterations": 60})  # noqa: E731
    plain = jax.tree.map(
        lambda q: dataclasses.replace(q, activations="") if is_qarray(q) else q, packed, is_leaf=is_qarray
    )
    blind = _with_inputs(learn(plain), "int4-token")
    assert apart(learn(packed)) < 0.9 * min(apart(blind), apart(packed))
    dense, packed, inputs, targets = problem("rtn-w4g32-a4")
    error = lambda block: float(np.mean(np.square(jq4.quantized(linear)(block, 0, inputs) - targets)))  # noqa: E731
    tuned = tune_block(linear, dense, packed, inputs, targets, index=0, options={"iterations": 60})
    assert error(tuned) < error(packed)


def test_the_rows_that_distillation_judges_by_are_not_learned_from():
    learned, judges = split_rows(97, 0.15)
    assert len(judges) == 14 and not set(judges) & set(learned)
    assert sorted([*judges, *learned]) == list(range(97))
    assert np.diff(judges).max() <= 8  # spread over the text
    assert [list(part) for part in split_rows(3, 0.15)] == [[0, 1, 2], [0, 1, 2]]
    with pytest.raises(jq4.JQ4Error, match=r"held_out is 0.9, wanted a share of the rows from 0 to 0.5"):
        split_rows(10, 0.9)
