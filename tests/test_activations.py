"""Oracle: numpy's int64 products of codes, and float64 products of weights and inputs rounded by the formula."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jq4
from jq4.activations import Activations, fixed_step, in_steps, rounding_inputs
from jq4.equalize import collects, scale_block
from jq4.integer_product import has_integer_product
from jq4.inventory import inventory
from jq4.matmul import dot_general, ragged_dot
from jq4.qarray import QArray, codes_of, validate
from jq4.rounding import quantize_weight
from jq4.statistics import statistics_of
from models.decoder import Decoder
from models.folds import decoder_folds
from tests.test_folds import TOKENS, logits_of, observe, random_decoder
from tests.zoo import jit

RANDOM = np.random.default_rng(3)
X = jnp.asarray(RANDOM.normal(0, 1, (5, 24)) * np.exp(RANDOM.normal(0, 1, (5, 1))), jnp.float32)
W = jnp.asarray(RANDOM.normal(0, 1, (24, 7)), jnp.float32)
NUMBERS = (((1,), (0,)), ((), ()))


def rounded(x, most=127, step=None):
    """(integers, step): float64 numpy."""
    x = np.asarray(x, np.float64)
    step = np.abs(x).max(-1, keepdims=True) / most if step is None else step
    return np.clip(np.round(x / step), -most, most), step


@pytest.mark.parametrize("axis", [-2, -1])
def test_eight_bits_by_eight_are_sums_of_integers(axis):
    """The product of int8 codes is numpy's, integer for integer."""
    q = quantize_weight(W if axis == -2 else W.T, "int8", group_size=None, axis=axis, scale_dtype="float32")
    q = rounding_inputs(q, "int8-token", None)
    numbers = NUMBERS if axis == -2 else (((1,), (1,)), ((), ()))
    out = jit(lambda x, q: dot_general(x, q, numbers, weight_side="rhs"))(X, q)
    integers, step = rounded(X)
    levels = np.asarray(codes_of(q), np.int64) - 128
    sums = integers.astype(np.int64) @ (levels if axis == -2 else levels.T)
    scale = np.asarray(q.scale, np.float64).reshape(1, -1)
    np.testing.assert_allclose(out, sums * step * scale, rtol=2e-6, atol=1e-6)
    jaxpr = str(jax.make_jaxpr(lambda x, q: dot_general(x, q, numbers, weight_side="rhs"))(X, q))
    assert "preferred_element_type=int32" in jaxpr


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", [("int4", 8, True), ("int4", 8, False), ("int4", None, True), ("nf4", 8, True)])
def test_other_weights_multiply_the_same_integers(form, bits):
    name, group, symmetric = form
    q = quantize_weight(W, name, group_size=group, symmetric=symmetric)
    q = rounding_inputs(q, f"int{bits}-token", None)
    integers, step = rounded(X, 2 ** (bits - 1) - 1)
    wanted = (integers * step) @ np.asarray(q.dequantize(), np.float64)
    np.testing.assert_allclose(jq4.matmul(X, q), wanted, rtol=1e-5, atol=1e-5)


def e4m3(x, step=None):
    """(numbers of e4m3 by ml_dtypes, step): float64 numpy."""
    x = np.asarray(x, np.float32)
    step = np.abs(x).max(-1, keepdims=True) / np.float32(448) if step is None else np.float32(step)
    return np.clip(x / step, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64), step


@pytest.mark.parametrize("form", [("int4", 8, True), ("int4", 8, False), ("int8", None, True), ("nf4", 8, True)])
def test_floats_of_eight_bits_are_those_of_e4m3(form):
    """By groups and by the column; one scale a column and no zero point make no product of integers of them."""
    name, group, symmetric = form
    q = rounding_inputs(quantize_weight(W, name, group_size=group, symmetric=symmetric), "float8-token", None)
    numbers, step = e4m3(X)
    wanted = (numbers * step) @ np.asarray(q.dequantize(), np.float64)
    np.testing.assert_allclose(jit(jq4.matmul)(X, q), wanted, rtol=1e-5, atol=1e-5)
    fixed = rounding_inputs(q, "float8-tensor", jnp.abs(X[:2]).max(0))
    numbers, step = e4m3(X, np.abs(np.asarray(X[:2])).max() / np.float32(448))
    assert (np.abs(numbers) == 448).sum() > 5  # clipped
    wanted = (numbers * step) @ np.asarray(q.dequantize(), np.float64)
    np.testing.assert_allclose(jq4.matmul(X, fixed), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_float_is_rounded_to_e4m3_as_ml_dtypes_does(dtype):
    """Subnormals, ties and both ends, in a compiled program as well: XLA may leave out conversions there and back."""
    edges = np.array([0, 448, 464, 6e4, 2.0**-10, 3 * 2.0**-10, 2.0**-6, 15 * 2.0**-10, 17, 19, 0.0156], np.float64)
    x = jnp.asarray(np.concatenate([edges, RANDOM.uniform(-480, 480, 500), RANDOM.normal(0, 0.02, 500)]), dtype)
    x = jnp.concatenate([x, -x])
    held, step = jit(lambda x: in_steps(x, "float8-tensor", (0,), jnp.ones(1)))(x)
    wanted = np.clip(np.asarray(x, np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(held, np.float32), wanted)
    assert held.dtype == x.dtype and float(step[0]) == 1.0


def asymmetric(x, bits):
    """(codes less zero point, step) by torch's formula (choose_qparams_affine): float32 numpy."""
    x, levels = np.asarray(x, np.float32), 2**bits - 1
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    step = (high - low) / np.float32(levels)
    zero = -np.round(low / step)
    codes = np.clip(np.round(x / step) + zero, 0, levels)
    return (codes - zero).astype(np.float64), step


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", [("int4", 8, True), ("int4", None, False), ("int8", None, True)])
def test_ranges_with_ends_of_their_own(form, bits):
    """Tokens of both signs, of one (behind a ReLU), of nothing but one value; by groups and by the column."""
    name, group, symmetric = form
    q = quantize_weight(W, name, group_size=group, symmetric=symmetric)
    q = rounding_inputs(q, f"int{bits}-token-asym", None)
    x = X.at[1].set(jnp.abs(X[1])).at[2].set(-jnp.abs(X[2])).at[3].set(X[3] + 2).at[4].set(0.7)
    numbers, step = asymmetric(x, bits)
    assert numbers.min() == -(2**bits - 1) and numbers.max() == 2**bits - 1
    wanted = (numbers * step) @ np.asarray(q.dequantize(), np.float64)
    np.testing.assert_allclose(jit(jq4.matmul)(x, q), wanted, rtol=2e-5, atol=2e-5)
    of_integers = "preferred_element_type=int32" in str(jax.make_jaxpr(jq4.matmul)(x, q))
    assert of_integers == (form[0] == "int8" and bits == 4)  # numbers up to 255 fit no int8
    held, _ = in_steps(x.astype(jnp.bfloat16), q.activations, (1,), None)
    again, _ = asymmetric(x.astype(jnp.bfloat16), bits)
    np.testing.assert_array_equal(np.asarray(held, np.float64), again)


def test_the_widest_ranges_have_a_step():
    x = jnp.asarray([[3e38, -3e38, 1.0], [-3e38, -1.0, 0.0]])
    numbers, step = in_steps(x, "int8-token-asym", (1,), None)
    np.testing.assert_allclose(np.asarray(step)[:, 0] / 1e38, [6 / 255, 3 / 255], rtol=1e-6)
    assert (np.abs(np.asarray(numbers) - np.asarray(x / step)) <= 0.5 + 1e-4).all()


def test_gradients_pass_the_rounding_of_ranges_with_ends_of_their_own():
    q = rounding_inputs(quantize_weight(W, "int4", group_size=8), "int4-token-asym", None)
    slope = jax.grad(lambda x: jnp.sum(jq4.matmul(x, q)))(X)
    wanted = np.broadcast_to(np.asarray(q.dequantize()).sum(-1), X.shape)
    np.testing.assert_allclose(slope, wanted, rtol=1e-5, atol=1e-5)


def test_a_fixed_step_clips_what_lies_beyond():
    q = rounding_inputs(quantize_weight(W, "int8", group_size=None), "int8-tensor", jnp.abs(X[:2]).max(0))
    step = float(np.abs(np.asarray(X[:2], np.float64)).max() / 127)
    integers, _ = rounded(X, 127, step)
    assert (np.abs(np.asarray(X)) > 127.5 * step).any()
    wanted = (integers * step) @ np.asarray(q.dequantize(), np.float64)
    np.testing.assert_allclose(jq4.matmul(X, q), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int8-token", "int4-token-asym", "int8-tensor", "float8-token"])
@pytest.mark.parametrize("group", [None, 8])
def test_a_token_with_a_nan_gives_nan_and_no_other_does(group, name):
    """Integers know no NaN, and a sum of them would hide it."""
    q = rounding_inputs(quantize_weight(W, "int8", group_size=group), name, jnp.abs(X).max(0))
    out = np.asarray(jq4.matmul(X.at[1, 3].set(jnp.nan), q))
    assert np.isnan(out[1]).all()
    np.testing.assert_array_equal(np.delete(out, 1, 0), np.delete(np.asarray(jq4.matmul(X, q)), 1, 0))


@pytest.mark.parametrize("name", ["int8-token", "int8-token-asym", "float8-token"])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-37])
def test_a_token_of_nothing_gives_nothing(size, name):
    q = rounding_inputs(quantize_weight(W, "int8", group_size=None), name, None)
    x = X.at[1].set(size).at[1, 0].set(0)
    np.testing.assert_allclose(jq4.matmul(x, q)[1], 0, atol=1e-30)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(jq4.matmul(x, q)))(x)).all()


def test_sums_that_int32_cannot_hold_are_of_floats():
    def weight(length):
        codes, scale = (jax.ShapeDtypeStruct((rows, 7), jnp.uint8) for rows in (length, 1))
        return QArray(codes, scale, format="int8", group_size=length)

    longest = (2**31 - 1) // (127 * 128)
    assert has_integer_product(weight(longest)) and not has_integer_product(weight(longest + 1))


def test_fixed_steps_of_experts_that_no_row_reached_are_those_beside_them():
    seen = jnp.asarray([[3.0, 1.0], [0.0, 0.0], [2.0, 5.0]])
    np.testing.assert_allclose(fixed_step(seen, "int8-tensor"), np.asarray([3, 5, 5]) / 127, rtol=1e-6)
    np.testing.assert_allclose(fixed_step(jnp.stack([seen, 0 * seen]), "int8-tensor")[1], 1)


def test_a_fixed_step_goes_with_the_name_of_one():
    fixed = rounding_inputs(quantize_weight(W, "int8", group_size=None), "int8-tensor", jnp.abs(X).max(0))
    with pytest.raises(jq4.JQ4Error, match="w: activations 'int8-tensor' with activation_scale none"):
        validate(dataclasses.replace(fixed, activation_scale=None), "w")
    with pytest.raises(jq4.JQ4Error, match=r"activations 'int8-token' with activation_scale one of shape \(1, 1\)"):
        validate(dataclasses.replace(fixed, activations="int8-token"))


def test_fixed_steps_want_finite_statistics():
    rule = jq4.Rule(("w",), num_bits=8, axis=-2, input_activations=Activations(strategy="tensor", dynamic=False))
    poisoned = statistics_of(X.at[0, 0].set(jnp.nan), frozenset({"absmax"}))
    with pytest.raises(jq4.JQ4Error, match=r"^w: its statistics are not finite \(absmax\)"):
        jq4.quantize({"w": W}, rule, {"w": poisoned})


@pytest.mark.parametrize("name", ["int8-token", "float8-token"])
@pytest.mark.parametrize("group", [None, 8])
def test_gradients_go_straight_through(group, name):
    q = rounding_inputs(quantize_weight(W, "int8", group_size=group), name, None)
    dy = jnp.asarray(RANDOM.normal(0, 1, (5, 7)), jnp.float32)
    gradient = jit(jax.grad(lambda x: jnp.sum(jq4.matmul(x, q) * dy)))(X)
    np.testing.assert_allclose(gradient, np.asarray(dy) @ np.asarray(q.dequantize()).T, rtol=1e-4, atol=1e-4)
    by_scale = jit(jax.grad(lambda s: jnp.sum(jq4.matmul(X, dataclasses.replace(q, scale=s)) * dy)))(q.scale)
    assert by_scale.shape == q.scale.shape and np.abs(np.asarray(by_scale, np.float32)).min() > 0


@pytest.mark.parametrize("name, round_rows", [("int8-token", rounded), ("float8-token", e4m3)])
def test_ragged_rows_are_rounded_by_themselves(name, round_rows):
    experts = jnp.asarray(RANDOM.normal(0, 1, (3, 24, 7)), jnp.float32)
    q = quantize_weight(experts, "int4", group_size=8)
    factors = jnp.asarray(np.exp(RANDOM.normal(0, 1, (3, 24, 1))), jnp.float32)
    q = validate(dataclasses.replace(q, input_scale=factors))
    q = rounding_inputs(q, name, None)
    sizes = np.array([2, 0, 3], np.int32)
    out = jit(ragged_dot)(X, q, jnp.asarray(sizes))
    codes = np.asarray(dataclasses.replace(q, input_scale=None).dequantize(), np.float64)
    for row, expert in enumerate(np.repeat(np.arange(3), sizes)):
        numbers, step = round_rows(np.asarray(X[row] * factors[expert, :, 0])[None])
        np.testing.assert_allclose(out[row], (numbers * step @ codes[expert])[0], rtol=1e-4, atol=1e-4)


def test_a_model_runs_with_rounded_activations_and_none_goes_dense():
    config, params = random_decoder("biased")
    recipe = jq4.Recipe.preset("rtn-w8gc-a8", head=True)
    packed = jq4.quantize(params, recipe)
    kernel = packed["layers"]["mlp"]["up_proj"]["kernel"]
    assert (kernel.activations, kernel.format, kernel.num_groups) == ("int8-token", "int8", 1)
    model = jq4.quantized(Decoder(config).apply, strict=True)
    logits = np.asarray(jit(model)({"params": packed}, jnp.asarray(TOKENS)))
    dense = logits_of(config, params)
    weights_only = logits_of(config, jq4.dequantize(packed))
    lost = np.sqrt(np.square(logits - weights_only).mean() / np.square(dense).mean())
    assert 1e-4 < lost < 0.2  # eight bits of activations, two channels of them 20 times the rest


def test_scanned_layers_round_their_own_inputs():
    weights = jnp.asarray(RANDOM.normal(0, 0.3, (3, 24, 24)), jnp.float32)
    steps = jnp.asarray(RANDOM.uniform(0.5, 2.0, (3, 24)), jnp.float32)
    q = rounding_inputs(quantize_weight(weights, "int8", group_size=None), "int8-tensor", steps)

    def layers(x, tree):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, tree["w"])[0]

    out = jit(jq4.quantized(layers, strict=True))(X, {"w": q})
    x = np.asarray(X, np.float64)
    for layer, weight in enumerate(np.asarray(q.dequantize(), np.float64)):
        integers, step = rounded(x, 127, float(steps[layer].max()) / 127)
        x = np.tanh(integers * step @ weight)
    np.testing.assert_allclose(out, x, atol=0.02)  # a tie may round the other way
    assert np.median(np.abs(np.asarray(out) - x)) < 1e-5


@pytest.mark.parametrize("kind", ["int", "float"])
def test_what_the_recipe_says_of_activations_is_kept(tmp_path, kind):
    config, params = random_decoder("llama")
    activations = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "tensor", "dynamic": False}
    rule = jq4.Rule.from_dict(
        {"targets": ["Linear"], "ignore": ["re:norm|embed"], "num_bits": 8, "input_activations": activations}
    )
    recipe = jq4.Recipe((rule,))
    assert jq4.Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.to_dict()["rules"][0]["input_activations"] == activations
    recipe.save(tmp_path / "recipe.yaml")
    assert jq4.Recipe.load(tmp_path / "recipe.yaml") == recipe
    with pytest.raises(jq4.JQ4Error, match=r"q_proj/kernel|k_proj/kernel.*dynamic false want max \|x\|"):
        jq4.quantize(params, recipe)
    packed = jq4.quantize(params, recipe, observe(config, params, ("absmax",)))
    assert packed["layers"]["attention"]["q_proj"]["kernel"].activation_scale.shape == (2, 1, 1)
    assert {leaf.activations for leaf in inventory(packed) if leaf.packed} == {f"{kind}8-tensor"}
    jq4.save(tmp_path / "model.jq4", packed)
    again = jq4.restore(tmp_path / "model.jq4")
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    jax.tree.map(np.testing.assert_array_equal, again, packed)


def test_smoothing_makes_eight_bits_of_a_tensor_do():
    """With two channels 20 times the rest, one fixed step a tensor loses less once they are smoothed."""
    config, params = random_decoder("untied")
    folds, recipe = decoder_folds(config), jq4.Recipe.preset("smoothquant-w8a8-static")
    dense = logits_of(config, params)
    smoothed = scale_block(params, folds, recipe, observe(config, params, collects(recipe, folds)))
    rules = dataclasses.replace(recipe, before=())
    errors = []
    for tree in (params, smoothed):
        packed = jq4.quantize(tree, rules, observe(config, tree, ("absmax",)))
        logits = jit(jq4.quantized(Decoder(config).apply, strict=True))({"params": packed}, jnp.asarray(TOKENS))
        errors.append(float(np.square(np.asarray(logits) - dense).mean()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"num_bits": 3}, "num_bits 3.*wanted num_bits 8 or 4"),
        ({"num_bits": 4, "type": "float"}, r"num_bits 4, type 'float'.*wanted .* type int \(or 8, float\)"),
        ({"type": "float", "symmetric": False}, "type 'float', symmetric False.*symmetric true, or false for integers"),
        ({"symmetric": False, "strategy": "tensor", "dynamic": False}, "symmetric False, strategy 'tensor'"),
        ({"strategy": "tensor"}, "strategy 'tensor', dynamic True; wanted"),
        (
            {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": False},
            "strategy 'token', dynamic False; wanted",
        ),
        ({"strategy": ["token"]}, r"strategy \['token'\]"),
        ({"bits": 8}, r"\{'bits': 8\}, wanted a mapping with some of num_bits, type"),
        ("int8", "input_activations is 'int8', wanted a mapping"),
    ],
)
def test_activations_that_cannot_be(value, text):
    with pytest.raises(jq4.JQ4Error, match=text):
        jq4.Rule.from_dict({"targets": ["Linear"], "input_activations": value})


def test_dense_leaves_have_no_rounded_inputs():
    with pytest.raises(jq4.JQ4Error, match="input_activations with num_bits 16, which leaves the leaf to its own"):
        jq4.Rule(("w",), num_bits=16, input_activations=Activations())
    q = quantize_weight(W, "int8", group_size=None)
    assert rounding_inputs(rounding_inputs(q, "int8-token", None), "", None).activations == ""
    with pytest.raises(jq4.JQ4Error, match="activations are 'int8', wanted one of int8-token"):
        rounding_inputs(q, "int8", None)


def test_presets_with_activations():
    assert jq4.Recipe.preset("rtn-w4g128-a8").rules[0].input_activations == Activations()
    assert jq4.Recipe.preset("hqq-w4g64-asym-a4").rules[0].input_activations == Activations(num_bits=4)
    assert jq4.Recipe.preset("rtn-w4g64-asym-a8-asym").rules[0].input_activations == Activations(symmetric=False)
    four = Activations(num_bits=4, symmetric=False)
    assert jq4.Recipe.preset("gptq-w4g32-a4-asym").rules[0].input_activations == four
    assert jq4.Recipe.preset("rotate-rtn-w4g32-a4-asym").before == jq4.Recipe.preset("rotate-rtn-w4g32-a4").before
    assert jq4.Recipe.preset("gptq-w4g128-afp8").rules[0].input_activations == Activations(type="float")
    recipe = jq4.Recipe.preset("smoothquant-w8a8")
    assert (recipe.before[0].step, recipe.rules[0].num_bits, recipe.rules[0].strategy) == ("smoothquant", 8, "channel")
    assert [step.step for step in jq4.Recipe.preset("rotate-rtn-w4g128-a8").before] == ["rotate"]
    with pytest.raises(jq4.JQ4Error, match="unknown preset 'rtn-w4g32-a5'"):
        jq4.Recipe.preset("rtn-w4g32-a5")
