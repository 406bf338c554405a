"""Oracle: each prompt alone; numpy for sampling; counts of compilations. Weights are random, sizes odd."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq4.errors import JQ4Error
from models import Decoder, DecoderConfig, empty_cache
from models.generate import _generate, generate, keep_likeliest

CONFIG = DecoderConfig.from_hf(
    {
        "model_type": "gemma3_text",
        "vocab_size": 53,
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "sliding_window": 4,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 6,
        "tie_word_embeddings": False,
    }
)
PROMPTS = ([7, 3, 9, 30, 12, 8, 41], [5], [11, 2, 44, 17, 9, 1, 23])
NEW = 9


DECODER = Decoder(CONFIG)
read = jax.jit(DECODER.apply)  # compiled once for a shape, which is much of this file's time


@pytest.fixture(scope="module")
def params() -> Any:
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(DECODER.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0, 0.4, leaf.shape), jnp.float32), shapes)


def _padded(side: str, length: int = 10) -> tuple[np.ndarray, np.ndarray]:
    tokens, mask = np.full((len(PROMPTS), length), 50, np.int32), np.zeros((len(PROMPTS), length), bool)
    for row, prompt in enumerate(PROMPTS):
        start = {"left": length - len(prompt), "right": 0, "both": 2}[side]
        tokens[row, start : start + len(prompt)] = prompt
        mask[row, start : start + len(prompt)] = True
    return tokens, mask


@pytest.fixture(scope="module")
def alone(params: Any) -> np.ndarray:
    """The new tokens of each prompt by itself, i32[3, NEW]."""
    rows = [generate(DECODER.apply, params, CONFIG, np.asarray([one]), max_new_tokens=NEW) for one in PROMPTS]
    return np.concatenate([np.asarray(row) for row in rows])


def test_a_padded_batch_gives_what_each_prompt_gives_alone(params, alone):
    assert len(np.unique(alone)) > 8  # text that only repeats itself would hide a wrong position
    for side in ("left", "right", "both"):
        found = generate(DECODER.apply, params, CONFIG, *_padded(side), max_new_tokens=NEW)
        np.testing.assert_array_equal(found, alone, err_msg=side)


def test_logits_of_a_padded_batch_are_those_of_each_text_alone(params):
    wanted = [read({"params": params}, jnp.asarray([prompt]))[0] for prompt in PROMPTS]
    for side in ("left", "right", "both"):
        tokens, mask = _padded(side)
        found = np.asarray(read({"params": params}, tokens, mask=mask))
        for row in range(len(PROMPTS)):
            np.testing.assert_allclose(found[row][mask[row]], wanted[row], rtol=0, atol=5e-5, err_msg=side)


def test_reading_in_pieces_through_the_cache_gives_the_logits_of_reading_at_once(params):
    tokens, mask = _padded("both")
    whole = read({"params": params}, tokens, mask=mask)
    cache, pieces = empty_cache(CONFIG, len(PROMPTS), 12), []
    for part in (slice(0, 5), slice(5, 10)):
        logits, cache = read({"params": params}, tokens[:, part], mask=mask[:, part], cache=cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1)[mask], whole[mask], rtol=0, atol=5e-5)
    assert int(cache.used) == 10


def test_remat_and_given_positions_change_nothing(params):
    tokens = jnp.asarray([PROMPTS[0]])
    wanted = read({"params": params}, tokens)
    positions = jnp.arange(tokens.shape[1])[None]
    found = jax.jit(Decoder(CONFIG, remat=True).apply)({"params": params}, tokens, positions=positions + 5)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5)  # only distances between positions matter


def test_the_block_is_compiled_once_however_deep():
    def size(layers: int) -> int:
        config = DecoderConfig.from_hf({**CONFIG.to_hf(), "num_hidden_layers": layers})
        decoder, tokens = Decoder(config), jax.ShapeDtypeStruct((1, 5), jnp.int32)
        params = jax.eval_shape(lambda: decoder.init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32)))
        return len(jax.jit(decoder.apply).lower(params, tokens).as_text().splitlines())

    assert size(40) == size(4)


def test_the_same_shapes_compile_once_and_weights_are_arguments(params):
    tokens = np.asarray([PROMPTS[0]])
    first = generate(DECODER.apply, params, CONFIG, tokens, max_new_tokens=3)
    before = _generate._cache_size()
    other = jax.tree.map(lambda leaf: -leaf, params)
    second = generate(DECODER.apply, other, CONFIG, tokens + 1, max_new_tokens=3)
    warm = [
        generate(DECODER.apply, params, CONFIG, tokens, max_new_tokens=3, temperature=t, seed=4) for t in (0.5, 9.0)
    ]
    assert _generate._cache_size() == before + 1  # greedy once, sampling once
    assert not np.array_equal(first, second)
    assert not np.array_equal(*warm)


def test_a_row_stops_at_its_end_token_and_the_others_go_on(params, alone):
    end = int(alone[0, 3])
    tokens, mask = _padded("left")
    found = np.asarray(generate(DECODER.apply, params, CONFIG, tokens, mask, max_new_tokens=NEW, eos_ids=(end, 52)))
    for row, wanted in zip(found, alone, strict=True):
        stop = np.flatnonzero(np.isin(wanted, (end, 52)))
        kept = stop[0] + 1 if stop.size else NEW
        np.testing.assert_array_equal(row[:kept], wanted[:kept])
        assert (row[kept:] == row[kept - 1]).all()
    assert len(np.unique(found[0])) <= 4


def test_sampling_draws_by_temperature_top_k_and_top_p(params):
    prompt, draws = np.asarray([PROMPTS[0]]), 400
    logits = np.asarray(read({"params": params}, prompt)[0, -1], np.float64) / 2.0
    wanted = np.exp(logits - logits.max())
    wanted[np.argsort(wanted)[:-6]] = 0  # top 6
    wanted /= wanted.sum()
    order = np.argsort(-wanted)
    kept = order[: np.searchsorted(np.cumsum(wanted[order]), 0.8) + 1]  # of them, the fewest that make 0.8
    wanted[np.setdiff1d(np.arange(wanted.size), kept)] = 0
    wanted /= wanted.sum()
    options = {"max_new_tokens": 1, "temperature": 2.0, "top_k": 6, "top_p": 0.8}
    found = np.asarray(generate(DECODER.apply, params, CONFIG, np.repeat(prompt, draws, axis=0), **options))[:, 0]
    shares = np.bincount(found, minlength=wanted.size) / draws
    assert (shares[wanted == 0] == 0).all()
    assert np.abs(shares - wanted).max() < 4 * np.sqrt(0.25 / draws)


def test_the_same_seed_draws_the_same_and_rows_differ(params):
    prompt = np.repeat(np.asarray([PROMPTS[0]]), 2, axis=0)
    one, same, other = (
        np.asarray(generate(DECODER.apply, params, CONFIG, prompt, max_new_tokens=8, temperature=3.0, seed=seed))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[0], one[1])


@pytest.mark.parametrize("options", [{"temperature": t} for t in (1e-300, 1e-40, 1e-37)] + [{"top_p": 1e-60}])
def test_the_least_temperature_and_top_p_take_the_likeliest(params, options):
    tokens = np.asarray([[5, 6, 7], [8, 9, 10]], np.int32)
    greedy = generate(DECODER.apply, params, CONFIG, tokens, max_new_tokens=4)
    drawn = generate(DECODER.apply, params, CONFIG, tokens, max_new_tokens=4, **{"temperature": 1.0, **options})
    np.testing.assert_array_equal(drawn, greedy)


def test_keep_likeliest_always_keeps_the_likeliest():
    logits = jnp.asarray([[0.0, 3.0, 1.0], [5.0, 5.0, -1.0]])
    found = np.asarray(keep_likeliest(logits, 0, jnp.float32(1e-9))) > -1e30
    np.testing.assert_array_equal(found, [[False, True, False], [True, True, False]])  # equals are kept together


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, wanted 0"),
        ({"top_p": 0.0}, "top_p is 0.0, wanted more than 0"),
        ({"top_k": -3}, "top_k is -3, wanted 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, wanted at least 1"),
        ({"max_new_tokens": 2**31}, "max_new_tokens is 2147483648, wanted at least 1, and a text below"),
        ({"seed": 2**40}, "seed is 1099511627776, wanted 32 bits"),
        ({"mask": np.asarray([[True, True], [False, False]])}, "prompt 1 is empty"),
        ({"mask": np.ones((2, 3), bool)}, r"wanted two of one shape"),
    ],
)
def test_options_out_of_range_are_refused(params, options, text):
    with pytest.raises(JQ4Error, match=text):
        generate(DECODER.apply, params, CONFIG, np.ones((2, 2), np.int32), **{"max_new_tokens": 2, **options})
