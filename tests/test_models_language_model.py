"""Oracles: transformers and its perplexity on tinystories-656k (PEERS' table), the tokenizers library, dense params."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jq4.errors import JQ4Error
from jq4.evaluate import evaluate
from jq4.qarray import is_qarray
from jq4.quantize import quantize
from jq4.recipe import Recipe
from models.language_model import LanguageModel
from models.tokenizer import Tokenizer

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
PROMPTS = ["Once upon a time, there was a little girl named", "Tom", "The dog was very happy. He"]


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data / "tinystories-656k"


@pytest.fixture(scope="module")
def dense(folder: Path) -> LanguageModel:
    return LanguageModel.from_folder(folder)


@pytest.fixture(scope="module")
def packed(dense: LanguageModel) -> LanguageModel:
    return dataclasses.replace(dense, params=quantize(dense.params, Recipe.preset("rtn-w4g32")))


def test_dense_perplexity_is_that_of_the_peers_table(dense, folder):
    found = evaluate(dense.logits, np.load(folder / "evaluation_ids.npy"))
    assert found.perplexity == pytest.approx(36.867, abs=0.01)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(torch|transformers|importlib).*")
def test_logits_and_greedy_text_are_those_of_transformers(dense, folder):
    torch = pytest.importorskip("torch", reason="torch is the oracle here and is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here and is not installed")
    torch.set_num_threads(1)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = np.load(folder / "evaluation_ids.npy")[:2]
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
        text = reference.generate(torch.tensor(tokens[:, :32], dtype=torch.long), **options).numpy()[:, 32:]
    np.testing.assert_allclose(dense.logits(tokens), wanted, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(dense.generate(tokens[:, :32], max_new_tokens=20, stop_at_end=False), text)


def test_the_evaluation_ids_are_the_tokenizers(dense, folder, shared_data):
    text = (shared_data / "tinystories_text" / "tinystories.txt").read_text(encoding="utf-8")
    ids = np.asarray(dense.tokenizer.encode(text).ids)
    rows = np.load(folder / "calibration_ids.npy").ravel()
    # from the first character on that the vocabulary lacks, the files were made by transformers' rewritten tokenizer
    known = int(np.flatnonzero(ids == 0)[0])
    assert known > 10_000
    np.testing.assert_array_equal(ids[:known], rows[:known])
    assert (dense.tokenizer.bos_token_id, dense.tokenizer.eos_token_ids) == (1, (2,))
    assert dense.tokenizer.decode(dense.tokenizer.encode("The dog ran.").ids) == "The dog ran."


def test_a_list_of_texts_gives_the_text_that_each_gives_alone(dense):
    together = dense.generate(PROMPTS, max_new_tokens=12)
    assert [dense.generate([one], max_new_tokens=12)[0] for one in PROMPTS] == together
    assert all(len(text) > 10 for text in together)
    library = tokenizers.Tokenizer.from_str(dense.tokenizer.inner.to_str())
    ids = library.encode(PROMPTS[0]).ids
    made = np.asarray(dense.generate(np.asarray([ids]), max_new_tokens=12))[0].tolist()
    assert library.decode(ids[1:] + made) == PROMPTS[0] + together[0]  # without <|start_story|>


def test_a_text_ends_at_the_end_token(dense):
    end = dense.tokenizer.eos_token_ids[0]
    made = np.asarray(dense.generate(np.asarray([[1, 5, end, 1]]), max_new_tokens=200, temperature=1.0, seed=3))[0]
    stop = np.flatnonzero(made == end)
    assert stop.size and (made[stop[0] :] == end).all()


def test_packed_params_run_packed(packed, dense):
    leaves = jax.tree.leaves(packed.params, is_leaf=is_qarray)
    assert sum(map(is_qarray, leaves)) == 7  # the linear layers, stacked
    tokens = np.asarray([[1, 40, 60, 90, 7, 300, 21]])
    logits = packed.logits(tokens)
    assert not packed.record.entries
    texts = packed.generate(PROMPTS[:1], max_new_tokens=8)
    assert not packed.record.entries and texts[0]
    unpacked = jax.tree.map(
        lambda leaf: leaf.dequantize() if is_qarray(leaf) else leaf, packed.params, is_leaf=is_qarray
    )
    wanted = dataclasses.replace(dense, params=unpacked).logits(tokens)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-3)
    assert np.abs(np.asarray(wanted) - np.asarray(dense.logits(tokens))).max() > 0.05  # 4 bits do change them


@pytest.mark.parametrize("which", ["dense", "packed"])
def test_a_saved_folder_is_a_model(which, request, tmp_path):
    model = request.getfixturevalue(which)
    model.save(tmp_path / "saved", recipe={"name": "test"})
    opened = LanguageModel.from_folder(tmp_path / "saved")
    assert opened.config == model.config
    _same_bytes(opened.params, model.params)
    tokens = np.asarray([[1, 40, 60, 90]])
    np.testing.assert_array_equal(opened.logits(tokens), model.logits(tokens))
    assert opened.tokenizer.encode(PROMPTS[0]).ids == model.tokenizer.encode(PROMPTS[0]).ids
    assert opened.tokenizer.eos_token_ids == model.tokenizer.eos_token_ids


def _same_bytes(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert mine.dtype == theirs.dtype
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()


def test_text_that_is_no_unicode_and_token_ids_that_are_none_are_refused(dense, folder):
    with pytest.raises(JQ4Error, match="is not valid Unicode"):
        dense.tokenizer.encode("a\udcff")
    tokenizer = (folder / "tokenizer.json").read_bytes()
    for wrong in ("x", [[1]], 1.5):
        files = {"tokenizer.json": tokenizer, "config.json": json.dumps({"eos_token_id": wrong}).encode()}
        with pytest.raises(JQ4Error, match=r"eos_token_id is .*, wanted a token's number or a list"):
            Tokenizer.from_files(files.get, "folder")


def test_a_folder_without_a_tokenizer_takes_ids_and_refuses_text(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / name)
    model = LanguageModel.from_folder(tmp_path)
    assert model.generate(np.asarray([[1, 5]]), max_new_tokens=2).shape == (1, 2)
    with pytest.raises(JQ4Error, match=r"no tokenizer.json, which text needs"):
        model.generate(["Tom"])
    with pytest.raises(JQ4Error, match=r"tokenizer.json: is missing, wanted to read text"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(JQ4Error, match=r"tokenizer.json cannot be read"):
        LanguageModel.from_folder(tmp_path)


def test_the_end_tokens_are_of_the_first_file_that_says(folder):
    files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}

    def ends(**more: Any) -> tuple[int, ...]:
        given = files | {f"{name}.json": json.dumps(content).encode() for name, content in more.items()}
        found = Tokenizer.from_files(given.get, "here")
        assert found is not None
        return found.eos_token_ids

    named = {"eos_token": {"content": "<|end_story|>"}}
    assert ends() == ()
    assert ends(tokenizer_config=named) == (2,)
    assert ends(tokenizer_config=named, config={"eos_token_id": 7}) == (7,)
    assert ends(config={"eos_token_id": 7}, generation_config={"eos_token_id": [8, 9]}) == (8, 9)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([[1, 2048]], r"tokens run from 1 to 2048, wanted 0 to 2047"),
        ([[-1, 3]], r"tokens run from -1 to 3"),
        ([1, 2], r"tokens are int64\[2\], wanted integers \[batch, length\]"),
        ([[0.5]], r"tokens are float64\[1, 1\]"),
    ],
)
def test_tokens_outside_of_the_vocabulary_are_refused(dense, tokens, text):
    with pytest.raises(JQ4Error, match=text):
        dense.logits(np.asarray(tokens))
    with pytest.raises(JQ4Error, match=text):
        dense.generate(np.asarray(tokens))


def test_one_text_is_not_a_list_of_texts(dense):
    with pytest.raises(JQ4Error, match=r"wanted a list of them"):
        dense.generate("Tom")
    with pytest.raises(JQ4Error, match=r"there are no prompts"):
        dense.generate([])


def test_bfloat16_is_computed_in_when_asked_and_logits_stay_f32(dense, folder):
    narrow = LanguageModel.from_folder(folder, dtype=jnp.bfloat16)
    tokens = np.asarray([[1, 40, 60, 90]])
    found, wanted = narrow.logits(tokens), np.asarray(dense.logits(tokens))
    assert found.dtype == jnp.float32
    assert 0 < np.abs(np.asarray(found) - wanted).max() < 0.3
    assert narrow.generate(tokens, max_new_tokens=3).shape == (1, 3)
