"""Oracle: the dense model itself, whose logits no rotation may change; Hadamard's definition: H H^T = n I, all +-1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jq4
from jq4.chain import TreeSource
from jq4.equalize import prepare_tree, rotate_block, rotate_outside
from jq4.equalize.folds import leaf_at
from jq4.equalize.hadamard import randomized
from models.chain import LAYERS, decoder_chain
from models.config import DecoderConfig
from models.folds import decoder_folds, untied
from tests.test_folds import FAMILIES, TOKENS, logits_of, observe, random_decoder, with_steps

UNROTATED = ("gemma2", "gemma3")


@pytest.mark.parametrize("n", [1, 2, 8, 12, 20, 28, 36, 64, 96, 160, 768, 896])
def test_hadamard_matrices_are_what_they_are_called(n):
    matrix = randomized(n, seed=3)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-12)
    np.testing.assert_allclose(np.abs(matrix) * np.sqrt(n), 1.0, atol=1e-12)


@pytest.mark.parametrize("n", [7, 52, 80, 172])
def test_other_sizes_are_orthogonal(n):
    matrix = randomized(n, seed=3)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-12)
    assert np.abs(matrix).max() < 0.9
    np.testing.assert_array_equal(matrix, randomized(n, seed=3))
    assert np.abs(matrix - randomized(n, seed=4)).max() > 0.1


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in UNROTATED])
def test_a_rotation_leaves_the_function_as_it_is(family):
    config, params = random_decoder(family)
    expected = logits_of(config, params)
    config, params = untied(config, params)
    recipe = with_steps("rtn-w4g32", ("rotate", (("seed", 5),)))
    rotated = prepare_tree(params, decoder_folds(config), recipe, lambda *_: {})
    np.testing.assert_allclose(logits_of(config, rotated), expected, atol=1e-4 * np.abs(expected).max())
    for path in ("embed/embedding", "lm_head/kernel", *decoder_folds(config).consumers):
        assert not np.allclose(leaf_at(rotated, path), leaf_at(params, path)), path
    assert np.all(np.asarray(leaf_at(rotated, "input_norm/scale")) == 1)


@pytest.mark.parametrize("family", UNROTATED)
def test_models_with_norms_after_their_sublayers_turn_their_heads_alone(family):
    config, params = random_decoder(family)
    folds = decoder_folds(config)
    recipe = with_steps("rtn-w4g32", ("rotate", (("residual", False),)))
    rotated = prepare_tree(params, folds, recipe, lambda *_: {})
    expected = logits_of(config, params)
    np.testing.assert_allclose(logits_of(config, rotated), expected, atol=1e-4 * np.abs(expected).max())
    assert not np.allclose(leaf_at(rotated, "v_proj/kernel"), leaf_at(params, "v_proj/kernel"))
    with pytest.raises(jq4.JQ4Error, match=r"cannot be rotated: gemma.* has a norm after each .*residual: false"):
        rotate_block(params, folds, with_steps("rtn-w4g32", ("rotate",)))
    with pytest.raises(jq4.JQ4Error, match="step rotate: residual is 'no', wanted true or false"):
        rotate_block(params, folds, with_steps("rtn-w4g32", ("rotate", (("residual", "no"),))))


def test_a_tied_model_is_told_how_to_be_untied():
    config, params = random_decoder("llama")
    with pytest.raises(jq4.JQ4Error, match=r"tied to the embedding.*models\.folds\.untied\(config, params\)"):
        rotate_outside(params, decoder_folds(config), with_steps("rtn-w4g32", ("rotate",)))
    config, both = untied(config, {"params": params})
    assert DecoderConfig.from_hf(config.to_hf()).tied_embeddings is False
    np.testing.assert_array_equal(both["params"]["lm_head"]["kernel"], params["embed"]["embedding"].T)
    assert untied(config, both) == (config, both)


def test_a_chain_rotated_block_by_block_is_the_model():
    config, params = random_decoder("untied")
    chain, source, recipe = decoder_chain(config), TreeSource(params, LAYERS), with_steps("rtn-w4g32", ("rotate",))
    outside = rotate_outside(source.outside(), chain.folds, recipe)
    x = chain.embed(outside, jnp.asarray(TOKENS))
    for index in range(chain.num_blocks):
        x = chain.block(rotate_block(source.block(index), chain.folds, recipe), jnp.int32(index), x)
    expected = logits_of(config, params)
    np.testing.assert_allclose(chain.head(outside, x), expected, atol=1e-4 * np.abs(expected).max())


def test_a_rotation_spreads_outliers():
    """Two channels are 20 times the rest; afterwards the largest input is nearer to the root mean square."""
    config, params = random_decoder("untied")
    recipe = with_steps("rtn-w4g32", ("rotate",))
    rotated = prepare_tree(params, decoder_folds(config), recipe, lambda *_: {})
    peaks = []
    for tree in (params, rotated):
        seen = observe(config, tree, ("absmax", "mean_square"))["layers/mlp/up_proj/kernel"]
        peaks.append(float(jnp.max(seen.absmax) / jnp.sqrt(jnp.mean(seen.mean_square))))
    assert peaks[1] < 0.75 * peaks[0]


def test_rotated_stored_params_keep_their_dtype():
    config, params = random_decoder("untied")
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    rotated = prepare_tree(small, decoder_folds(config), with_steps("rtn-w4g32", ("rotate",)), lambda *_: {})
    assert {leaf.dtype for leaf in jax.tree.leaves(rotated)} == {jnp.dtype("bfloat16")}
