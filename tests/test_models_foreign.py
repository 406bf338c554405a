"""Oracle: the same decoder on weights that were dequantized before it saw them, in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import packed_checkpoint
import pytest
from packed_checkpoint import Kind, checkpoint_of, config_of, dense_of, random_checkpoint

import jq4
from jq4.axes import contraction_axes
from jq4.errors import JQ4Error
from jq4.qarray import is_qarray
from models.as_checkpoint import checkpoint_of_params
from models.decoder import Decoder
from models.language_model import LanguageModel
from models.layer_runs import in_runs, runs_of

TOKENS = np.random.default_rng(5).integers(0, 40, (2, 9))


def _by(**kinds):
    """A choice by a part of the name; other matrices are dense."""
    return lambda name: next((kind for part, kind in kinds.items() if part in name), None)


def _models(checkpoint):
    packed = LanguageModel.from_checkpoint(checkpoint, "here")
    return packed, LanguageModel.from_checkpoint(dense_of(checkpoint), "here")


def _packed_leaves(model):
    return [leaf for leaf in jax.tree.leaves(model.params, is_leaf=is_qarray) if is_qarray(leaf)]


CASES = {
    "llama": (
        config_of("llama"),
        _by(self_attn=Kind(group=8, permuted=True), mlp=Kind(zero=True), lm_head=Kind("int8", 32)),
    ),
    "qwen2": (config_of("qwen2", tie_word_embeddings=True), _by(proj=Kind("int4", offset=True), embed=Kind("int4"))),
    "phi3": (config_of("phi3"), _by(qkv=Kind(scale="packed"), gate_up=Kind("nf4"), o_proj=Kind("int3"))),
    "gemma3": (config_of("gemma3_text"), _by(embed=Kind("int6"), proj=Kind("iq4_nl", scale=np.float32))),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_packed_checkpoint_gives_the_logits_of_its_dequantized_weights(case):
    config, choose = CASES[case]
    packed, dense = _models(random_checkpoint(config, choose))
    logits = packed.logits(TOKENS)
    assert not packed.record.entries
    assert not runs_of(packed.params)
    assert len(_packed_leaves(packed)) == (6 if case == "phi3" else 8)
    np.testing.assert_allclose(logits, dense.logits(TOKENS), rtol=0, atol=1e-4)


def _mixed(name):
    """As Q4_K_M and mixed recipes are: more bits in some layers' down and v, zero points in some, one layer dense."""
    if "layers.1." in name and ("down" in name or "v_proj" in name):
        return Kind("int6", 16)
    if "layers.2" in name:
        return None
    return Kind(zero="layers.0" in name) if "proj" in name else None


def test_layers_that_are_packed_unlike_run_in_runs_and_generate():
    config = config_of("llama", num_hidden_layers=2)
    packed, dense = _models(random_checkpoint(config, _mixed))
    assert runs_of(packed.params) == (0, 1)
    made = packed.generate(TOKENS, max_new_tokens=5, stop_at_end=False)
    np.testing.assert_array_equal(made, dense.generate(TOKENS, max_new_tokens=5, stop_at_end=False))
    assert not packed.record.entries


def test_zero_points_and_permutations_of_some_layers_are_given_to_all_exactly():
    config = config_of("llama")
    kinds = {"layers.0": Kind(zero=True), "layers.1": Kind(permuted=True), "layers.2": Kind(scale=np.float16)}
    checkpoint = random_checkpoint(config, lambda name: kinds.get(name[6:14]) if "proj" in name else None)
    packed = LanguageModel.from_checkpoint(checkpoint, "here")
    assert not runs_of(packed.params)
    back, wanted = checkpoint_of_params(config, packed.params), dense_of(checkpoint)
    for name, weight in dense_of(back).weights.items():
        np.testing.assert_array_equal(weight.read(), wanted.weights[name].read())


def test_a_saved_model_of_runs_opens_as_it_was_and_compares_to_a_stacked_one(tmp_path):
    config = config_of("llama")
    packed, dense = _models(random_checkpoint(config, _mixed))
    packed.save(tmp_path / "ours")
    opened = LanguageModel.from_folder(tmp_path / "ours")
    assert runs_of(opened.params) == (0, 1, 2)
    jax.tree.map(np.testing.assert_array_equal, opened.params, packed.params)
    cut = dense.in_runs_of(opened)
    assert runs_of(cut.params) == (0, 1, 2)
    assert cut.params["layers"]["1"]["mlp"]["up_proj"]["kernel"].shape == (1, 32, 48)


def test_adapters_are_cut_where_their_layers_are():
    """Oracle: the stacked model with the adapters whole."""
    config = config_of("llama")
    packed, dense = _models(random_checkpoint(config, _mixed))
    random = np.random.default_rng(2)
    begun = jq4.lora(dense.params, 2, ["mlp", "lm_head"], ignore=())
    adapters = jax.tree.map(lambda part: jnp.asarray(random.normal(0, 0.2, part.shape), jnp.float32), begun)
    adapted = dataclasses.replace(dense, adapters=adapters)
    wanted = adapted.logits(TOKENS)
    assert np.abs(wanted - dense.logits(TOKENS)).max() > 0.01
    of_two = dataclasses.replace(dense, params=in_runs(config, dense.params, (2,)))
    once = adapted.in_runs_of(of_two)
    twice = once.in_runs_of(packed)
    assert (runs_of(once.params), runs_of(twice.params)) == ((0, 2), (0, 1, 2))
    for cut in (once, twice):
        np.testing.assert_allclose(cut.logits(TOKENS), wanted, atol=1e-5)
        last = cut.adapters.by_path["layers/2/mlp/up_proj/kernel"]
        np.testing.assert_array_equal(last.a, adapters.by_path["layers/mlp/up_proj/kernel"].a[2:])
    assert adapted.in_runs_of(dense) is adapted and twice.in_runs_of(of_two).adapters is twice.adapters


def test_biases_of_zeros_that_packers_add_are_left_out_and_others_refused():
    config = config_of("llama")
    checkpoint = random_checkpoint(config, _by(proj=Kind()))
    values = {name: weight.read() for name, weight in checkpoint.weights.items()}
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float16)}
    LanguageModel.from_checkpoint(checkpoint_of(values | bias, config), "here")
    bias = {name: one + 1 for name, one in bias.items()}
    with pytest.raises(JQ4Error, match=r"here: found 1 tensor: 'model.layers.0.self_attn.q_proj.bias', which a llama"):
        LanguageModel.from_checkpoint(checkpoint_of(values | bias, config), "here")


def test_a_checkpoint_without_a_config_is_no_model():
    checkpoint = random_checkpoint(config_of("llama"), _by(proj=Kind()))
    with pytest.raises(JQ4Error, match=r"here: there is no config.json with it, so it is no model"):
        LanguageModel.from_checkpoint(dataclasses.replace(checkpoint, config=None), "here")


def test_tied_weights_that_are_packed_are_compared():
    config = config_of("llama", tie_word_embeddings=True)
    checkpoint = random_checkpoint(config, _by(embed=Kind()))
    values = {name: weight.read() for name, weight in checkpoint.weights.items()}
    table = values["model.embed_tokens.weight"]
    LanguageModel.from_checkpoint(checkpoint_of(values | {"lm_head.weight": table}, config), "here")
    other = packed_checkpoint.random_qarray(np.random.default_rng(9), (40, 32), Kind())
    with pytest.raises(JQ4Error, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        LanguageModel.from_checkpoint(checkpoint_of(values | {"lm_head.weight": other}, config), "here")


def test_runs_are_traced_like_a_stack():
    config = config_of("llama", num_hidden_layers=12)
    tokens = jax.ShapeDtypeStruct((1, 4), np.int32)
    stacked, cut = Decoder(config), Decoder(config, runs=(0, 5, 11), remat=True)
    shapes = jax.eval_shape(cut.init, jax.random.key(0), tokens)["params"]
    assert sorted(shapes["layers"]) == ["00", "05", "11"]
    whole = jax.eval_shape(stacked.init, jax.random.key(0), tokens)["params"]
    wanted = jax.eval_shape(lambda params: in_runs(config, params, (5, 11)), whole)
    jax.tree.map(_same_shape, shapes, wanted)
    jax.eval_shape(lambda params: in_runs(config, params, (0, 5, 7, 11)), wanted)
    gradient = jax.grad(lambda params, ids: jnp.sum(cut.apply({"params": params}, ids)))  # pyright: ignore[reportArgumentType]
    jax.tree.map(_same_shape, jax.eval_shape(gradient, shapes, tokens), shapes)
    axes = contraction_axes(lambda params, ids: cut.apply({"params": params}, ids), shapes, tokens)
    assert axes["layers/05/mlp/up_proj/kernel"] == -2


def _same_shape(one, other):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
