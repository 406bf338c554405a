"""Oracle: the dense model itself, whose logits no fold may change; smoothing's formula in float64 numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jq4
from jq4.chain import TreeSource
from jq4.equalize import collects, for_model, prepare_tree, scale_block
from jq4.equalize.folds import Fold, leaf_at, scale_inputs
from jq4.equalize.smoothquant import smooth_scale
from jq4.statistics import WeightStatistics
from jq4.steps import Step
from models.chain import LAYERS
from models.config import DecoderConfig
from models.decoder import Decoder
from models.folds import decoder_folds
from tests.random_model import CONFIG
from tests.zoo import jit

_GEMMA = {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh"}
FAMILIES = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "gemma2": _GEMMA | {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": _GEMMA | {"model_type": "gemma3_text"},
}
TOKENS = np.random.default_rng(2).integers(0, 300, (3, 20), np.int32)


def random_decoder(family):
    """(config, params): norms away from one and zero, biases away from zero, two inputs of each norm much larger."""
    config = DecoderConfig.from_hf(CONFIG | FAMILIES[family])
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.asarray(TOKENS))["params"]
    random = np.random.default_rng(0)

    def draw(path, leaf):
        values = random.normal(0, 0.1, leaf.shape)
        if path[-1].key == "scale" and "q_norm" not in str(path) and "k_norm" not in str(path):
            values += 0.0 if config.gemma else 1.0
            values[..., 3:5] *= 20.0
        return jnp.asarray(values, jnp.float32)

    return config, jax.tree_util.tree_map_with_path(draw, shapes)


def logits_of(config, params):
    return np.asarray(jit(Decoder(config).apply)({"params": params}, jnp.asarray(TOKENS)))


def observe(config, params, collect):
    return jq4.observe(
        lambda tree, tokens: Decoder(config).apply({"params": tree}, tokens), params, [TOKENS], collect=collect
    )


def with_steps(preset, *steps):
    return dataclasses.replace(jq4.Recipe.preset(preset), before=tuple(Step(*step) for step in steps))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_scale_in_any_fold_leaves_the_function_as_it_is(family):
    config, params = random_decoder(family)
    folds, moved = decoder_folds(config), params
    random = np.random.default_rng(1)
    for fold in folds.scaled:
        channels = leaf_at(params, fold.producer).shape[-1]
        scale = jnp.asarray(np.exp(random.normal(0, 1, (config.num_layers, channels))), jnp.float32)
        moved = scale_inputs(moved, fold, scale)
    expected = logits_of(config, params)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits_of(config, moved), expected, atol=1e-4 * np.abs(expected).max())
    for path in folds.consumers:
        assert not np.allclose(leaf_at(moved, path), leaf_at(params, path)), path


@pytest.mark.parametrize(("family", "step"), [*((name, "smoothquant") for name in FAMILIES), ("gemma2", "awq")])
def test_a_step_leaves_the_function_as_it_is_and_moves_scales(family, step):
    config, params = random_decoder(family)
    recipe = with_steps("rtn-w4g32", (step,))
    moved = prepare_tree(params, decoder_folds(config), recipe, lambda tree, collect: observe(config, tree, collect))
    expected = logits_of(config, params)
    np.testing.assert_allclose(logits_of(config, moved), expected, atol=1e-4 * np.abs(expected).max())
    assert not np.allclose(
        leaf_at(moved, "attention/q_proj/kernel"), leaf_at(params, "attention/q_proj/kernel"), rtol=0.1
    )


def test_smoothing_is_the_paper_s_formula():
    config, params = random_decoder("biased")
    folds = decoder_folds(config)
    recipe = with_steps("rtn-w8gc", ("smoothquant", (("alpha", 0.7),)))
    statistics = observe(config, params, collects(recipe, folds))
    moved = scale_block(params, folds, recipe, statistics)
    x = np.asarray(statistics["layers/attention/q_proj/kernel"].absmax, np.float64)
    weights = [np.abs(leaf_at(params, f"attention/{n}_proj/kernel")).max(-1) for n in "qkv"]
    scale = x**0.7 / np.max(weights, axis=0).astype(np.float64) ** 0.3
    norm = np.asarray(leaf_at(params, "input_norm/scale"))
    np.testing.assert_allclose(leaf_at(moved, "input_norm/scale"), norm / scale, rtol=1e-5)
    kernel = np.asarray(leaf_at(params, "k_proj/kernel"))
    np.testing.assert_allclose(leaf_at(moved, "k_proj/kernel"), kernel * scale[..., None], rtol=1e-5)


def test_query_heads_of_one_value_head_share_their_scale():
    config, params = random_decoder("llama")
    folds = decoder_folds(config)
    recipe = with_steps("rtn-w8gc", ("smoothquant",))
    statistics = observe(config, params, collects(recipe, folds))
    moved = scale_block(params, folds, recipe, statistics)
    ratio = np.asarray(leaf_at(moved, "o_proj/kernel") / leaf_at(params, "o_proj/kernel")).mean(-1)
    by_head = ratio.reshape(2, config.num_kv_heads, -1, config.head_dim)
    np.testing.assert_allclose(by_head[:, :, :1], by_head[:, :, 1:], rtol=1e-5)
    assert by_head.std() > 0.01


def test_a_block_alone_is_prepared_as_it_is_in_the_stack():
    config, params = random_decoder("biased")
    folds = decoder_folds(config)
    recipe = with_steps("rtn-w4g32", ("smoothquant",), ("awq",))
    statistics = observe(config, params, collects(recipe, folds))
    whole = scale_block(params, folds, recipe, statistics)
    block = TreeSource(params, LAYERS).block(1)
    own = {path: jax.tree.map(lambda leaf: leaf[1], statistics[path]) for path in statistics}
    alone = scale_block(block, folds, recipe, own)
    wanted = TreeSource(whole, LAYERS).block(1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), alone, wanted)


def test_a_dead_channel_keeps_its_scale():
    config, params = random_decoder("llama")
    folds = decoder_folds(config)
    dead = {"layers": {**params["layers"]}, **{k: v for k, v in params.items() if k != "layers"}}
    norm = dead["layers"]["input_norm"]["scale"].at[:, 7].set(0.0)
    dead["layers"] = {**dead["layers"], "input_norm": {"scale": norm}}
    for step in ("smoothquant", "awq"):
        recipe = with_steps("rtn-w4g32", (step,))
        statistics = observe(config, dead, collects(recipe, folds))
        moved = scale_block(dead, folds, recipe, statistics)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))
        kernel = leaf_at(dead, "q_proj/kernel")
        np.testing.assert_array_equal(leaf_at(moved, "q_proj/kernel")[:, 7], kernel[:, 7])


def test_smoothing_has_bounds():
    """What calibration hardly saw would else be 1e15 times the rest of a token, where it is seen."""
    scale = np.asarray(smooth_scale(Fold((), ""), [jnp.ones((3, 5))], jnp.asarray([1e-20, 4.0, 1e20]), 0.5))
    np.testing.assert_allclose(scale, [1 / 4096, 2, 4096], rtol=1e-6)


def test_only_what_a_step_needs_is_collected():
    folds = decoder_folds(random_decoder("llama")[0])
    collect = collects(with_steps("rtn-w4g32", ("awq", (("finalists", 0),))), folds)
    assert collect("layers/attention/q_proj/kernel") == {"mean_square"}
    assert collect("params/layers/attention/q_proj/kernel") == {"mean_square"}
    assert not collect("layers/attention/k_proj/kernel")
    assert collects(with_steps("rtn-w4g32", ("smoothquant",)), folds)("layers/mlp/down_proj/kernel") == {"absmax"}
    assert not collects(jq4.Recipe.preset("rtn-w4g32"), folds)("layers/mlp/down_proj/kernel")


def test_errors_say_what_is_missing():
    folds = decoder_folds(random_decoder("llama")[0])
    recipe = with_steps("rtn-w4g32", ("smoothquant",))
    with pytest.raises(jq4.JQ4Error, match=r"step smoothquant: no statistics of the inputs of layers/attention/q_proj"):
        scale_block(random_decoder("llama")[1], folds, recipe, {"other": WeightStatistics(1)})
    with pytest.raises(jq4.JQ4Error, match=r"no max \|x\| of layers/attention/q_proj/kernel, wanted the statistics of"):
        scale_block(random_decoder("llama")[1], folds, recipe, {folds.consumers[0]: WeightStatistics(1)})
    with pytest.raises(jq4.JQ4Error, match=r"step smoothquant: alpha is 1\.5, wanted a number from 0 to 1"):
        smooth_scale(Fold((), ""), [jnp.ones((4, 3))], jnp.ones(4), 1.5)
    with pytest.raises(jq4.JQ4Error, match="the recipe has the step smoothquant, and the model does not say"):
        for_model(recipe, None)
    with pytest.raises(jq4.JQ4Error, match="awq, rotate: wanted rotate first"):
        for_model(with_steps("rtn-w4g32", ("awq",), ("rotate",)), folds)
    with pytest.raises(jq4.JQ4Error, match="found 0 leaves of that path in the tree"):
        leaf_at({"a": 1}, "layers/x")
