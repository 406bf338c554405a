"""Oracle: the checkpoint of random packed weights that the model was made of; numpy's dequantization of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_checkpoint import Kind, config_of, dequantized, random_checkpoint

from jq4.errors import JQ4Error
from jq4.qarray import is_qarray
from jq4.quantize import quantize
from models.as_checkpoint import checkpoint_of_folder, checkpoint_of_params
from models.filling import params_of
from models.language_model import LanguageModel


def _choose(kind):
    return lambda name: kind if "proj" in name or "embed" in name or "lm_head" in name else None


def _same(found, wanted):
    assert {weight.name for weight in found.weights.values()} == set(wanted.weights)
    for name, weight in wanted.weights.items():
        ours, theirs = found.weights[name], weight
        assert ours.abstract == theirs.abstract, name
        one, other = ours.read(), theirs.read()
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for mine, given in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert isinstance(mine, np.ndarray)
            np.testing.assert_array_equal(mine, given, name)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3_text"])
@pytest.mark.parametrize("kind", [Kind(zero=True, permuted=True), Kind("int3", 32, offset=True), Kind("nf4")], ids=str)
def test_a_model_is_the_checkpoint_that_it_was_made_of(family, kind):
    config = config_of(family)
    checkpoint = random_checkpoint(config, _choose(kind))
    params = params_of("here", checkpoint, config)
    assert sum(map(is_qarray, jax.tree.leaves(params, is_leaf=is_qarray))) == (8 if config.tied_embeddings else 9)
    found = checkpoint_of_params(config, params)
    _same(found, checkpoint)
    assert (found.format, found.notes, found.config) == ("orbax", (), checkpoint.config)


def test_a_saved_model_is_read_layer_by_layer_and_in_runs(tmp_path):
    config = config_of("llama")
    checkpoint = random_checkpoint(
        config, lambda name: Kind("int8" if "layers.1" in name else "int4") if "proj" in name else None
    )
    model = LanguageModel.from_checkpoint(checkpoint, "here")
    model.save(tmp_path / "ours")
    found = checkpoint_of_folder(tmp_path / "ours")
    _same(found, checkpoint)
    assert next(iter(found.weights)) == "model.embed_tokens.weight"
    assert list(found.weights)[-1] == "lm_head.weight"
    file = next((tmp_path / "ours").rglob("*codes*/0*"))
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(JQ4Error, match=f"{file.name}"):
        checkpoint_of_folder(tmp_path / "ours")


def test_scales_that_are_packed_themselves_are_cut_and_joined_exactly():
    config = config_of("phi3")
    checkpoint = random_checkpoint(config, _choose(Kind(scale="packed")))
    found = checkpoint_of_params(config, params_of("here", checkpoint, config))
    for name, weight in checkpoint.weights.items():
        one, other = found.weights[name].read(), weight.read()
        one, other = (dequantized(each) if is_qarray(each) else each for each in (one, other))
        np.testing.assert_array_equal(one, other, name)
    assert is_qarray(found.weights["model.layers.0.self_attn.qkv_proj.weight"].read().scale)


def test_parts_that_are_packed_unlike_are_joined_dense_and_told():
    config = config_of("phi3")
    dense = params_of("here", random_checkpoint(config, lambda name: None), config)
    packed = dict(quantize(dense, "rtn-w4g32"))
    kernel = packed["layers"]["attention"]["q_proj"]["kernel"]
    packed["layers"]["attention"]["q_proj"]["kernel"] = kernel.dequantize(jnp.float32)
    found = checkpoint_of_params(config, packed)
    assert found.notes == (
        "layers.*.self_attn.qkv_proj.weight is given dense: some of its parts are packed and some dense",
    )
    joined = found.weights["model.layers.1.self_attn.qkv_proj.weight"]
    assert (joined.packed, joined.shape) == (False, (64, 32))
    assert joined.abstract.dtype == joined.read().dtype
    np.testing.assert_array_equal(joined.read()[:32], np.asarray(kernel.dequantize())[1].T)
    assert found.weights["model.layers.1.mlp.gate_up_proj.weight"].packed


def test_params_of_another_config_are_refused():
    config = config_of("llama")
    params = params_of("here", random_checkpoint(config, lambda name: None), config)
    with pytest.raises(JQ4Error, match=r"the params: layers/input_norm/scale has shape \(3, 32\), wanted \(3, 31\)"):
        wrong = params | {"embed": {"embedding": np.zeros((40, 31), np.float32)}}
        checkpoint_of_params(dataclasses.replace(config, hidden_size=31), wrong)
    del params["final_norm"]
    with pytest.raises(JQ4Error, match=r"the leaf final_norm/scale is missing"):
        checkpoint_of_params(config, params)
