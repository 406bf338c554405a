"""Oracle: the objective tr(dW^T H dW) in float64 numpy, for every candidate; the dequantized weight for products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jq4
from jq4.equalize import collects, for_model, scale_block
from jq4.equalize.awq import awq_scale, candidates
from jq4.equalize.folds import Fold
from jq4.layouts import prepare
from jq4.matmul import dot_general
from jq4.qarray import QArray, validate
from jq4.qarray_ops import NoPackedForm, reshape, transpose
from jq4.rounding import Encoding, quantize_weight
from jq4.statistics import statistics_of
from models.decoder import Decoder
from models.folds import decoder_folds
from tests.test_folds import TOKENS, logits_of, observe, random_decoder
from tests.zoo import jit

RANDOM = np.random.default_rng(0)
K, N, GROUP = 64, 24, 16
MIXING = RANDOM.normal(0, 1, (K, K)) / 8 + np.eye(K)
X = jnp.asarray(RANDOM.normal(0, 1, (512, K)) @ MIXING * np.exp(RANDOM.normal(0, 1.5, K)), jnp.float32)
W = jnp.asarray(RANDOM.standard_t(4, (K, N)) * 0.1, jnp.float32)
STATISTICS = statistics_of(X, frozenset({"absmax", "mean_square", "hessian"}))
AWQ = jq4.Rule(("re:.",), group_size=GROUP, method="awq", scale_dtype="float32")


def output_error(weight, approximation, x=X):
    """tr(dW^T H dW), float64."""
    error = np.asarray(x, np.float64) @ (np.asarray(weight, np.float64) - np.asarray(approximation, np.float64))
    return np.square(error).sum() / len(x)


def rounded(weight):
    """Round-to-nearest int4 in groups, float64 numpy."""
    groups = np.asarray(weight, np.float64).reshape(-1, GROUP, weight.shape[-1])
    step = np.abs(groups).max(1, keepdims=True) / 7
    return (np.clip(np.round(groups / step), -8, 7) * step).reshape(weight.shape)


def scale_by_hand(pair):
    r = np.sqrt(np.square(np.asarray(X, np.float64)).mean(0))
    groups = np.abs(np.asarray(W, np.float64)).reshape(-1, GROUP, N)
    w = (groups / groups.max(1, keepdims=True)).reshape(K, N).mean(-1)
    s = r ** pair[0] / w ** pair[1]
    return s / np.sqrt(s.max() * s.min())


def test_the_scale_found_is_the_best_of_all_candidates():
    encoding = Encoding(group_size=GROUP, scale_dtype="float32")
    pairs = candidates(20, True)
    errors = [output_error(W, rounded(W * s[:, None]) / s[:, None]) for s in map(scale_by_hand, pairs)]
    assert errors[0] == pytest.approx(output_error(W, rounded(W)))
    assert min(errors) < 0.7 * errors[0]
    every = awq_scale(Fold((), ""), [W], [encoding], STATISTICS, finalists=len(pairs))
    np.testing.assert_allclose(every, scale_by_hand(pairs[int(np.argmin(errors))]), rtol=1e-4)
    few = np.asarray(awq_scale(Fold((), ""), [W], [encoding], STATISTICS), np.float64)
    assert output_error(W, rounded(W * few[:, None]) / few[:, None]) <= sorted(errors)[4]


def test_weights_that_share_inputs_share_the_scale_that_serves_both():
    encoding, pairs = Encoding(group_size=GROUP, scale_dtype="float32"), candidates(10, False)
    weights = [W, jnp.asarray(RANDOM.normal(0, 1, (K, N)), jnp.float32)]
    found = awq_scale(Fold((), ""), weights, [encoding] * 2, STATISTICS, ratios=10, by_weights=False, finalists=10)
    errors = []
    for s in map(scale_by_hand, pairs):
        errors.append(sum(output_error(w, rounded(w * s[:, None]) / s[:, None]) for w in weights))
    np.testing.assert_allclose(found, scale_by_hand(pairs[int(np.argmin(errors))]), rtol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_method_loses_less_than_rounding_and_keeps_its_scales_beside_the_codes(symmetric):
    rule = dataclasses.replace(AWQ, symmetric=symmetric, observer=None)
    tree, stats = {"w": W}, {"w": STATISTICS}
    packed = jq4.quantize(tree, rule, stats)["w"]
    assert packed.input_scale.shape == (K, 1)
    validate(packed)
    simple = jq4.quantize(tree, dataclasses.replace(rule, method="rtn"))["w"]
    assert output_error(W, packed.dequantize()) < 0.6 * output_error(W, simple.dequantize())
    clipped = jq4.quantize(tree, dataclasses.replace(rule, options=(("multiplier", 0),)), stats)["w"]
    assert clipped.input_scale is None
    assert output_error(W, clipped.dequantize()) < output_error(W, simple.dequantize())
    out = jit(jq4.quantized(lambda p, x: x @ p["w"], strict=True))({"w": packed}, X)
    np.testing.assert_allclose(out, X @ packed.dequantize(), rtol=1e-4, atol=1e-3)


def test_any_function_s_weights_are_found_their_scales():
    """Stacked layers under scan, and a kernel contracted over heads and their width, by names alone."""
    stacked = jnp.asarray(RANDOM.normal(0, 0.1, (3, K, K)), jnp.float32)
    heads = jnp.asarray(RANDOM.normal(0, 0.1, (4, 16, N)), jnp.float32)

    def function(tree, x):
        x = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, tree["layers"])[0]
        return jnp.einsum("bhd,hdo->bo", x.reshape(-1, 4, 16), tree["out"])

    tree = {"layers": stacked, "out": heads}
    stats = jq4.observe(function, tree, [X], collect=("mean_square", "hessian"))
    packed = jq4.quantize(tree, AWQ, stats)
    assert packed["layers"].input_scale.shape == (3, K, 1)
    assert packed["out"].input_scale.shape == (4, 16, 1)
    out = jit(jq4.quantized(function, strict=True))(packed, X)
    np.testing.assert_allclose(out, function(jq4.dequantize(packed), X), rtol=1e-3, atol=1e-3)


def multiplied(shape, axis=-2, stacked=0, **options):
    """A packed weight with an input_scale that differs along its stacked axes."""
    weight = jnp.asarray(RANDOM.normal(0, 1, shape), jnp.float32)
    q = quantize_weight(weight, group_size=8, axis=axis, **options)
    sizes = [size if at < stacked or at == axis % len(shape) else 1 for at, size in enumerate(shape)]
    return validate(dataclasses.replace(q, input_scale=jnp.asarray(RANDOM.uniform(0.5, 2, sizes), jnp.float32)))


def same(function, q, *args):
    """A function packed, strictly, against the same on what the weight dequantizes to."""
    out = jit(jq4.quantized(function, strict=True))(q, *args)
    np.testing.assert_allclose(out, jit(function)(q.dequantize(), *args), rtol=1e-4, atol=1e-4)


def test_scales_of_inputs_go_where_the_weight_goes():
    x = jnp.asarray(RANDOM.normal(0, 1, (5, 32)), jnp.float32)
    q = multiplied((32, 12))
    same(lambda w, x: x @ w, q, x)
    same(lambda w, x: x @ w.T.T.astype(jnp.float32) * 2.0, q, x)
    same(lambda w, x: x @ w.T, multiplied((12, 32), axis=-1), x)
    same(lambda w, x: jnp.einsum("bhd,hdo->bo", x.reshape(5, 2, 16), w.reshape(2, 16, 12)), q, x)
    same(lambda w, x: x @ w.reshape(32, 12), multiplied((2, 16, 12), stacked=1), x)
    same(lambda w, x: x @ w[:, 2:9], q, x)
    stack = multiplied((3, 32, 12), stacked=1)
    same(lambda w, x: jnp.stack([x @ w[i] for i in range(3)]), stack, x)
    same(lambda w, x: jax.lax.scan(lambda _, w: (None, x @ w), None, w)[1], stack, x)
    same(lambda w, x: jax.vmap(lambda w, x: x @ w)(w, x), stack, jnp.stack([x, -x, 2 * x]))
    same(lambda w, x: x @ jnp.take(w, jnp.array(1), axis=0), stack, x)
    same(lambda w, i: w[i], multiplied((12, 32), axis=-1), jnp.array([3, 0, 5]))
    merged = multiplied((3, 12, 32), axis=-1, stacked=1)
    np.testing.assert_array_equal(reshape(merged, (36, 32)).dequantize(), merged.dequantize().reshape(36, 32))
    slope = jit(jax.grad(lambda x, w: jnp.sum(jnp.square(jq4.matmul(x, w)))))
    np.testing.assert_allclose(slope(x, q), slope(x, q.dequantize()), rtol=1e-3, atol=1e-3)


def test_what_cannot_carry_scales_of_inputs_says_so():
    stack, x = multiplied((3, 32, 12), stacked=1), jnp.ones((5, 32))
    with pytest.raises(NoPackedForm, match=r"input_scale of shape \(3, 32, 1\) that varies along an axis of its"):
        dot_general(x, stack, (((1,), (1,)), ((), ())), weight_side="rhs")
    with pytest.raises(jq4.DensifiedError, match="a concatenation of weights with scales of their inputs"):
        q = multiplied((32, 12))
        jq4.quantized(lambda a, b: jnp.concatenate([a, b], 1), strict=True)(q, q)
    with pytest.raises(jq4.JQ4Error, match=r"w: input_scale has shape \(12, 1\), wanted \(32, 12\) or 1"):
        validate(dataclasses.replace(multiplied((32, 12)), input_scale=jnp.ones((12, 1))), "w")
    with pytest.raises(jq4.JQ4Error, match="w: method awq needs statistics"):
        jq4.quantize({"w": W}, AWQ)
    with pytest.raises(jq4.JQ4Error, match="w: method awq wants mean_square"):
        jq4.quantize({"w": W}, AWQ, {"w": statistics_of(X, frozenset({"absmax"}))})
    for name, value in (("ratios", 0), ("columns", -3), ("finalists", -1)):
        rule = dataclasses.replace(AWQ, options=((name, value),))
        with pytest.raises(
            jq4.JQ4Error, match=f"{name} {value}.*; wanted ratios 1 or more, finalists and columns 0 or"
        ):
            jq4.quantize({"w": W}, rule, {"w": statistics_of(X, frozenset({"mean_square", "hessian"}))})


@pytest.mark.parametrize("device", ["TPU v6 lite", "NVIDIA H200"])
@pytest.mark.parametrize("axis", [-2, -1])
def test_prepared_layouts_keep_them(device, axis):
    q = multiplied((3, 32, 16) if axis == -2 else (3, 16, 32), axis=axis, stacked=1)
    q = dataclasses.replace(q, activations="int8-token")
    laid = prepare({"w": q}, device)["w"]
    assert laid.layout != "neutral"
    np.testing.assert_array_equal(laid.dequantize(), q.dequantize())
    swapped = transpose(laid, [0, 2, 1])
    np.testing.assert_array_equal(swapped.dequantize(), jnp.swapaxes(q.dequantize(), 1, 2))
    back = prepare({"w": laid}, "cpu")["w"]
    assert jax.tree.structure(back) == jax.tree.structure(q)


def test_saved_and_restored(tmp_path):
    tree = {"w": dataclasses.replace(multiplied((3, 32, 12), stacked=1), activations="int4-token")}
    jq4.save(tmp_path / "w.jq4", tree)
    found = jq4.restore(tmp_path / "w.jq4")["w"]
    assert isinstance(found, QArray) and found.activations == "int4-token"
    np.testing.assert_array_equal(found.dequantize(), tree["w"].dequantize())


def mlp_only(preset):
    recipe = jq4.Recipe.preset(preset)
    return dataclasses.replace(recipe, ignore=(*recipe.ignore, "re:attention"))


def test_a_model_takes_the_scales_into_its_folds():
    config, params = random_decoder("untied")
    folds, recipe = decoder_folds(config), mlp_only("awq-w4g32")
    assert not recipe.before and recipe.rules[0].observer == "mse"
    whole = for_model(recipe, folds)
    assert [step.step for step in whole.before] == ["awq"] and whole.rules[0].method_options["multiplier"] == 0
    assert for_model(whole, folds) == whole
    headed = for_model(jq4.Recipe.preset("awq-w4g32", head=True), folds)
    of_leaf = {
        path: headed.rules[headed.index_of_rule(path, "Linear")] for path in ("lm_head/kernel", *folds.consumers)
    }
    keep = {path: rule.method_options.get("multiplier", 1) for path, rule in of_leaf.items()}
    assert keep == {"lm_head/kernel": 1, **dict.fromkeys(folds.consumers, 0)}
    assert for_model(headed, folds) == headed
    clipping = (dataclasses.replace(recipe.rules[0], options=(("multiplier", 0),)),)
    assert not for_model(dataclasses.replace(recipe, rules=clipping), folds).before
    few = dataclasses.replace(recipe, rules=(dataclasses.replace(recipe.rules[0], options=(("ratios", 5),)),))
    assert dict(for_model(few, folds).before[0].options) == {"ratios": 5}
    dense, errors = logits_of(config, params), {}
    moved = scale_block(params, folds, whole, observe(config, params, collects(whole, folds)))
    for name, tree, rules in (
        ("rtn", params, mlp_only("rtn-w4g32")),
        ("awq", moved, dataclasses.replace(whole, before=())),
    ):
        packed = jq4.quantize(tree, rules, observe(config, tree, ("mean_square", "hessian")))
        logits = jit(jq4.quantized(Decoder(config).apply, strict=True))({"params": packed}, jnp.asarray(TOKENS))
        errors[name] = float(np.square(np.asarray(logits) - dense).mean())
        assert all(q.input_scale is None for q in jax.tree.leaves(packed, is_leaf=lambda q: isinstance(q, QArray))
                   if isinstance(q, QArray))  # fmt: skip
    assert errors["awq"] < 0.8 * errors["rtn"]


@pytest.mark.parametrize("device", ["cpu", "TPU v6 lite"])
@pytest.mark.parametrize("spec", [PartitionSpec("m"), PartitionSpec(None, "m")], ids=["rows", "columns"])
def test_shards_take_their_part_of_them(spec, device):
    mesh = jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    over_rows = spec[0] == "m"

    def product(w, x):
        return jax.lax.psum(x @ w, "m") if over_rows else x @ w

    x_spec = PartitionSpec(None, "m" if over_rows else None)
    out_spec = PartitionSpec(None, None if over_rows else "m")

    def f(w, x):
        return jax.shard_map(product, mesh=mesh, in_specs=(spec, x_spec), out_specs=out_spec)(w, x)

    q, x = multiplied((32, 16)), jnp.asarray(RANDOM.normal(0, 1, (5, 32)), jnp.float32)
    out = jit(jq4.quantized(f, strict=True))(prepare({"w": q}, device)["w"], x)
    np.testing.assert_allclose(out, x @ q.dequantize(), rtol=1e-4, atol=1e-4)
