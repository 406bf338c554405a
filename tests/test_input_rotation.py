"""Rotated inputs. Oracles: Sylvester's matrices by numpy, and the product with the weight that dequantizing gives."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jq4
from jq4 import qarray_ops
from jq4.chain import TreeSource
from jq4.driver import quantize_blocks
from jq4.equalize.steps import for_model
from jq4.input_rotation import block_of, rotated
from jq4.matmul import ragged_dot
from jq4.qarray import is_qarray, validate
from jq4.sqnr import sqnr
from jq4.tuning.learned import begin, harden, weight_of
from models.chain import LAYERS, decoder_chain
from models.decoder import Decoder
from models.folds import decoder_folds
from tests.test_folds import TOKENS, logits_of, random_decoder

RULE = {"targets": ["re:.*"], "num_bits": 4, "group_size": 16, "input_rotation": "hadamard"}


def sylvester(block):
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    return matrix / np.sqrt(block)


def matrix_of(length, block):
    return np.kron(np.eye(length // block), sylvester(block))


def packed(*shape, axis=-2, seed=0, **rule):
    """A weight and its QArray with rotated inputs."""
    weight = np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)
    recipe = jq4.Recipe.from_dict({"rules": [RULE | {"axis": axis} | rule]})
    return weight, jq4.quantize({"w": jnp.asarray(weight)}, recipe)["w"]


@pytest.mark.parametrize(("length", "block"), [(32, 32), (48, 16), (6, 2), (384, 128)])
def test_a_rotation_is_by_sylvesters_matrix_and_its_own_inverse(length, block):
    x = np.random.default_rng(0).normal(size=(3, length, 5)).astype(np.float32)
    wanted = np.einsum("bkn,kl->bln", x, matrix_of(length, block))
    assert block_of(length) == block
    np.testing.assert_allclose(rotated(jnp.asarray(x), block, 1), wanted, atol=1e-5)
    np.testing.assert_allclose(rotated(rotated(jnp.asarray(x), block, 1), block, 1), x, atol=1e-5)


def test_what_is_packed_is_the_rotated_weight_and_dequantizing_gives_the_weight():
    weight, q = packed(48, 24)
    assert q.input_rotation == 16 and q.shape == weight.shape
    turned = dataclasses.replace(q, input_rotation=0).dequantize()
    plain = jq4.quantize({"w": matrix_of(48, 16).astype(np.float32) @ weight}, "rtn-w4g16")["w"]
    np.testing.assert_allclose(turned, plain.dequantize(), atol=1e-5)
    np.testing.assert_allclose(q.dequantize(), matrix_of(48, 16) @ np.asarray(turned), atol=1e-5)
    assert sqnr(weight, q) > 15


@pytest.mark.parametrize("stack", [(), (3,)])
def test_products_are_those_of_the_dequantized_weight(stack):
    _, q = packed(*stack, 48, 24)
    x = np.random.default_rng(1).normal(size=(*stack, 5, 48)).astype(np.float32)
    wanted = x @ np.asarray(q.dequantize())
    np.testing.assert_allclose(jax.jit(jq4.matmul)(x, q), wanted, atol=1e-4)
    found = jax.jit(jq4.quantized(lambda tree, x: x @ tree["w"], strict=True))({"w": q}, x)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    gradient = jax.grad(lambda x: jnp.sum(jq4.matmul(x, q) ** 2))(jnp.asarray(x))
    np.testing.assert_allclose(gradient, 2 * wanted @ np.swapaxes(q.dequantize(), -1, -2), atol=1e-2)


def test_products_of_other_forms_are_too():
    _, q = packed(24, 48, axis=-1)
    x = np.random.default_rng(1).normal(size=(5, 48)).astype(np.float32)
    run = jax.jit(jq4.quantized(lambda tree, x: x @ tree["w"].T, strict=True))
    np.testing.assert_allclose(run({"w": q}, x), x @ np.asarray(q.dequantize()).T, atol=1e-4)
    _, q = packed(2, 48, 24)  # two contracted axes, the outer one without a rotation
    run = jax.jit(jq4.quantized(lambda tree, x: jnp.einsum("mhk,hkn->mn", x, tree["w"]), strict=True))
    x = np.random.default_rng(1).normal(size=(5, 2, 48)).astype(np.float32)
    np.testing.assert_allclose(run({"w": q}, x), np.einsum("mhk,hkn->mn", x, q.dequantize()), atol=1e-4)
    rows, sizes = np.random.default_rng(1).normal(size=(7, 48)).astype(np.float32), jnp.asarray([3, 4], jnp.int32)
    experts = np.repeat(np.asarray(q.dequantize()), [3, 4], axis=0)
    np.testing.assert_allclose(ragged_dot(rows, q, sizes), np.einsum("mk,mkn->mn", rows, experts), atol=1e-4)


def test_reshaping_keeps_blocks_or_is_refused():
    _, q = packed(2, 64, 24)
    np.testing.assert_array_equal(qarray_ops.reshape(q, (128, 24)).dequantize(), q.dequantize().reshape(128, 24))
    with pytest.raises(qarray_ops.NoPackedForm, match="breaks blocks of 64 rotated inputs"):
        qarray_ops.reshape(q, (2, 2, 32, 24))


def test_inputs_are_rounded_after_they_were_rotated():
    """One input a hundred times the others: rounded to 4 bits as it is, it leaves nothing of them."""
    weight, q = packed(64, 24, input_activations={"num_bits": 4})
    x = np.random.default_rng(1).normal(size=(9, 64)).astype(np.float32)
    x[:, 5] *= 100
    turned = x @ matrix_of(64, 64)
    step = np.abs(turned).max(-1, keepdims=True) / 7
    wanted = np.round(turned / step) * step @ np.asarray(dataclasses.replace(q, input_rotation=0).dequantize())
    found = np.asarray(jq4.matmul(jnp.asarray(x), q))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)
    _, plain = packed(64, 24, input_activations={"num_bits": 4}, input_rotation=None)
    lost, lost_plain = (
        np.square(np.asarray(jq4.matmul(jnp.asarray(x), each)) - x @ weight).mean() for each in (q, plain)
    )
    assert lost < 0.5 * lost_plain


def test_gptq_sees_the_hessian_of_rotated_inputs():
    weight = np.random.default_rng(0).normal(size=(64, 24)).astype(np.float32)
    random = np.random.default_rng(1)
    x = (random.normal(size=(512, 12)) @ random.normal(size=(12, 64))).astype(np.float32)
    x += 0.1 * random.normal(size=x.shape).astype(np.float32)
    stats = jq4.observe(lambda tree, x: x @ tree["w"], {"w": weight}, [x], collect=("mean_square", "hessian"))
    errors = {}
    for method in ("rtn", "gptq"):
        recipe = jq4.Recipe.from_dict({"rules": [RULE | {"method": method}]})
        q = jq4.quantize({"w": jnp.asarray(weight)}, recipe, stats)["w"]
        errors[method] = np.square(x @ (np.asarray(q.dequantize()) - weight)).mean()
    assert errors["gptq"] < 0.5 * errors["rtn"]


def test_it_is_saved_restored_and_checked(tmp_path):
    _, q = packed(2, 48, 24)
    jq4.save(tmp_path / "w.jq4", {"w": q, "plain": dataclasses.replace(q, input_rotation=0)})
    found = jq4.restore(tmp_path / "w.jq4")
    assert found["w"].input_rotation == 16 and found["plain"].input_rotation == 0
    np.testing.assert_array_equal(found["w"].dequantize(), q.dequantize())
    manifest = json.loads((tmp_path / "w.jq4" / "jq4.json").read_text())
    assert {leaf["path"]: leaf.get("input_rotation") for leaf in manifest["leaves"]} == {"plain": None, "w": 16}
    for bad in (12, 32, -16):
        with pytest.raises(
            jq4.JQ4Error, match=rf"w: input_rotation is {bad}, wanted 0 or a power of two that divides 48"
        ):
            validate(dataclasses.replace(q, input_rotation=bad), "w")


def test_learning_knows_the_weight_in_its_own_basis():
    weight, q = packed(48, 24)
    variables = begin(q, weight)
    np.testing.assert_array_equal(harden(variables, q, weight).codes, q.codes)
    np.testing.assert_allclose(weight_of(variables, q, weight), q.dequantize(), atol=1e-6)


def test_the_step_rotates_what_lies_behind_the_gate():
    config, params = random_decoder("untied")
    folds = decoder_folds(config)
    preset = jq4.Recipe.preset("rotate-rtn-w4g32-a4")
    assert preset.before[0].to_dict() == {"step": "rotate", "inner": True}
    recipe = for_model(preset, folds)
    assert [rule.targets for rule in recipe.rules] == [folds.inner, ("Linear",)] and for_model(recipe, folds) == recipe
    weights = dataclasses.replace(
        preset, rules=tuple(dataclasses.replace(rule, num_bits=8, input_activations=None) for rule in preset.rules)
    )
    made = quantize_blocks(decoder_chain(config), TreeSource(params, LAYERS), weights).params
    turned = {
        jax.tree_util.keystr(keys): leaf.input_rotation
        for keys, leaf in jax.tree_util.tree_leaves_with_path(made, is_leaf=is_qarray)
        if is_qarray(leaf)
    }
    assert {name for name, block in turned.items() if block} == {name for name in turned if "down_proj" in name}
    expected = logits_of(config, params)
    logits = jax.jit(jq4.quantized(Decoder(config).apply, strict=True))({"params": made}, jnp.asarray(TOKENS))
    np.testing.assert_allclose(logits, expected, atol=0.05 * np.abs(expected).max())


def test_what_cannot_be_is_told():
    with pytest.raises(jq4.JQ4Error, match="input_rotation is 'random', wanted one of hadamard"):
        jq4.Recipe.from_dict({"rules": [RULE | {"input_rotation": "random"}]})
    with pytest.raises(jq4.JQ4Error, match="input_rotation with fixed steps of inputs, which were not seen rotated"):
        packed(48, 24, input_activations={"dynamic": False, "strategy": "tensor"})
    with pytest.raises(jq4.JQ4Error, match="input_rotation: 15 inputs, wanted an even number"):
        packed(15, 24)
