"""The bundled model. Oracles: transformers (logits), LZMA (how well text can be guessed), its own card's figures."""

import json
import lzma
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from models import Decoder, hf

FOLDER = Path(__file__).resolve().parents[1] / "models" / "tiny"
END_OF_TEXT = "<|endoftext|>"


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    return json.loads((FOLDER / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> tuple[Decoder, Any]:
    config = hf.load_config(FOLDER)
    return Decoder(config), hf.load_params(FOLDER, config, dtype=jnp.float32)


@pytest.fixture(scope="module")
def rows(metrics: dict[str, Any], tokenizer: Tokenizer) -> np.ndarray:
    """The card's slice of the held-out text, i32[R, context]."""
    ids, context, count = _ids(tokenizer, "heldout.txt"), metrics["context"], metrics["slice"]["rows"]
    return ids[: count * context].reshape(count, context)


def _ids(tokenizer: Tokenizer, name: str) -> np.ndarray:
    return np.asarray(tokenizer.encode((FOLDER / name).read_text(encoding="utf-8")).ids, np.int32)


@jax.jit
def _mean_loss(params: Any, rows: jax.Array) -> jax.Array:
    logits: Any = Decoder(hf.load_config(FOLDER)).apply({"params": params}, rows[:, :-1])  # f32[R, T - 1, V]
    chosen = jnp.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()


def _loss(params: Any, rows: np.ndarray) -> float:
    """Mean cross-entropy in nats over positions 0 to T - 2 of each row."""
    return float(np.mean([_mean_loss(params, jnp.asarray(part)) for part in np.split(rows, 4)]))


@pytest.fixture(scope="module")
def dense_loss(model: tuple[Decoder, Any], rows: np.ndarray) -> float:
    return _loss(model[1], rows)


def test_size_is_what_the_card_says(model: tuple[Decoder, Any], metrics: dict[str, Any]) -> None:
    count = sum(leaf.size for leaf in jax.tree.leaves(model[1]))
    assert 2_000_000 <= count <= 8_000_000
    assert count == metrics["parameters"]
    assert f"{count:,}" in (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 18_000_000


def test_every_matrix_is_in_bf16_and_in_whole_groups() -> None:
    params = hf.load_params(FOLDER, hf.load_config(FOLDER))
    for leaf in jax.tree.leaves(params):
        assert leaf.dtype == jnp.bfloat16
        assert all(size % 64 == 0 for size in leaf.shape[-2:] if leaf.ndim > 2)


def test_held_out_perplexity_is_the_cards(dense_loss: float, metrics: dict[str, Any]) -> None:
    assert math.exp(dense_loss) == pytest.approx(metrics["slice"]["perplexity"], rel=0.01)
    assert f"{metrics['held_out']['perplexity']:.3f}" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_it_guesses_unseen_documentation_better_than_a_compressor(
    dense_loss: float, rows: np.ndarray, tokenizer: Tokenizer
) -> None:
    """LZMA has read the calibration text before, and all of the slice's rows before each; the model only the row."""
    known = (FOLDER / "calibration.txt").read_bytes()
    unseen = tokenizer.decode(rows.reshape(-1).tolist(), skip_special_tokens=False).encode()
    theirs = 8 * (len(lzma.compress(known + unseen, preset=9)) - len(lzma.compress(known, preset=9)))
    ours = dense_loss / math.log(2) * rows.size
    assert ours < theirs


def test_four_bits_round_to_nearest_cost_something_but_not_everything(
    model: tuple[Decoder, Any], rows: np.ndarray, dense_loss: float
) -> None:
    def rounded(path: Any, leaf: jax.Array) -> jax.Array:  # symmetric, absmax / 7, groups of 32 along K
        if "kernel" not in jax.tree_util.keystr(path):
            return leaf
        groups = np.asarray(leaf).reshape(leaf.shape[0], -1, 32, leaf.shape[-1])  # f32[L, G, 32, N]
        scale = np.abs(groups).max(axis=2, keepdims=True) / 7
        return jnp.asarray((np.clip(np.round(groups / scale), -8, 7) * scale).reshape(leaf.shape))

    packed = jax.tree_util.tree_map_with_path(rounded, model[1])
    cost = math.exp(_loss(packed, rows) - dense_loss) - 1
    assert 0.01 < cost < 0.3


def test_held_out_modules_are_not_in_the_calibration_text(metrics: dict[str, Any]) -> None:
    held_out, calibration = ((FOLDER / name).read_text(encoding="utf-8") for name in ("heldout.txt", "calibration.txt"))
    assert 100_000 <= len(held_out) <= 250_000
    assert 100_000 <= len(calibration) <= 250_000
    modules = {title.partition(".")[0] for title in metrics["calibration_documents"]}
    assert modules.isdisjoint(metrics["held_out_modules"])
    for module in metrics["held_out_modules"]:
        assert f"Help on module {module}:" in held_out
        assert f"Help on module {module}:" not in calibration
        assert f"Help on module {module}." not in calibration
    shared = {part for part in _paragraphs(held_out) & _paragraphs(calibration) if len(part) >= 120}
    assert not shared


def _paragraphs(text: str) -> set[str]:
    return {" ".join(part.split()) for part in text.split("\n\n")}


def test_tokenizer_gives_the_text_back_and_ends_it_with_one_token(tokenizer: Tokenizer) -> None:
    text = (FOLDER / "heldout.txt").read_text(encoding="utf-8")
    ids = _ids(tokenizer, "heldout.txt").tolist()
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids.count(0) == text.count(END_OF_TEXT) == len(text.split(END_OF_TEXT)) - 1
    assert tokenizer.decode(tokenizer.encode("naïve ∑ 漢字 🙂").ids) == "naïve ∑ 漢字 🙂"


@pytest.mark.filterwarnings("ignore")
def test_transformers_opens_it_and_gives_the_same_logits(model: tuple[Decoder, Any], rows: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    few = rows[:2]
    with torch.no_grad():
        theirs = loaded(torch.from_numpy(few.astype(np.int64))).logits.numpy()
    ours = np.asarray(model[0].apply({"params": model[1]}, jnp.asarray(few)))
    assert np.abs(ours - theirs).max() <= 2e-4
    words = transformers.AutoTokenizer.from_pretrained(FOLDER)
    assert words.eos_token_id == 0
    text = (FOLDER / "calibration.txt").read_text(encoding="utf-8")[:5000]
    assert words(text)["input_ids"] == Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(text).ids
