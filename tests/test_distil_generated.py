"""Oracle: a Markov chain, whose next token depends on the last alone, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_model import CONFIG

import jq4
from jq4.train import generated_rows, generator
from models.config import DecoderConfig
from models.decoder import Decoder
from models.generate import generate

VOCABULARY, LENGTH = 12, 40
CHAIN = np.random.default_rng(3).normal(0, 1.5, (VOCABULARY, VOCABULARY)).astype(np.float32)


def logits(chain, tokens):
    return chain[tokens]


def test_rows_begin_with_the_likeliest_and_are_sampled_from_there():
    write = generator(logits, jnp.asarray(CHAIN))
    rows = generated_rows(write, 300, LENGTH, np.arange(2, 8), prefix=(1,), likeliest=4, batch_size=100, seed=3)
    assert (rows.shape, rows.dtype) == ((300, LENGTH), np.int32)
    assert (rows[:, 0] == 1).all() and set(rows[:, 1]) == set(range(2, 8))
    for place in range(2, 6):
        np.testing.assert_array_equal(rows[:, place], CHAIN[rows[:, place - 1]].argmax(-1))
    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, (rows[:, 5:-1].ravel(), rows[:, 6:].ravel()), 1)
    wanted = np.exp(CHAIN) / np.exp(CHAIN).sum(-1, keepdims=True)
    often = counts.sum(-1) > 300
    error = np.sqrt(wanted * (1 - wanted) / np.maximum(counts.sum(-1, keepdims=True), 1))
    assert often.sum() > 4
    assert (np.abs(counts / counts.sum(-1, keepdims=True).clip(1) - wanted) < 5 * error + 2e-3)[often].all()
    again = generated_rows(write, 300, LENGTH, np.arange(2, 8), prefix=(1,), batch_size=100, seed=3)
    np.testing.assert_array_equal(rows, again)
    other = generated_rows(write, 300, LENGTH, np.arange(2, 8), prefix=(1,), batch_size=100, seed=4)
    assert (rows != other).any(axis=1).all()


def test_a_decoder_with_a_cache_writes_what_one_without_does():
    """The likeliest tokens, so that no random key matters."""
    config = DecoderConfig.from_hf(CONFIG | {"num_hidden_layers": 1})
    model, random = Decoder(config), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.5, 0.3, leaf.shape), leaf.dtype), shapes)

    def cached(tokens, more, temperature, seed):
        options = {"max_new_tokens": more, "temperature": temperature, "seed": seed}
        return generate(model.apply, params["params"], config, tokens, **options)

    start = jnp.asarray([[3], [5]], jnp.int32)
    written = generator(model.apply, params)(start, 6, 0.0, 0)
    np.testing.assert_array_equal(written, cached(start, 6, 0.0, 0))


def test_impossible_rows_are_told():
    with pytest.raises(jq4.JQ4Error, match=r"3 rows of 5 tokens, 0 of them given, 4 likeliest.*wanted at least one"):
        generated_rows(generator(logits, CHAIN), 3, 5, [1])
