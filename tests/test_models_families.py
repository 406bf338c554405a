"""Oracle: transformers, on random weights saved by save_pretrained. Logits, and greedy text token for token."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import DecoderConfig
from models.decoder import Decoder
from models.generate import generate
from models.hf import load_config, load_params

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(torch|transformers|importlib).*")
torch = pytest.importorskip("torch", reason="torch is the oracle here and is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle here and is not installed")

TOLERANCE = 2e-4
LENGTH = 29  # more than every window and than the trained length of the stretched ropes
ODD = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHORT = {"max_position_embeddings": 16}
SLIDING = "sliding_attention"


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


LONGROPE = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 3.0, 7.0]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama-tied-biases": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim-gelu": ("Llama", {"head_dim": 10, "num_key_value_heads": 1, "hidden_act": "gelu"}),
    "llama-linear": ("Llama", _rope("linear", factor=3.0)),
    "llama-dynamic": ("Llama", SHORT | _rope("dynamic", factor=2.0)),
    "llama-dynamic-short-text": ("Llama", _rope("dynamic", factor=2.0)),
    "llama-llama3": (
        "Llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama-yarn": ("Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-yarn-mscale": (
        "Llama",
        _rope("yarn", factor=4.0, mscale=0.7, mscale_all_dim=1.3, truncate=False, beta_fast=8.0, beta_slow=2.0)
        | {"head_dim": 12},
    ),
    "llama-yarn-attention-factor": ("Llama", _rope("yarn", factor=4.0, attention_factor=1.4)),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 10}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 8, "rms_norm_eps": 1e-3}),
    "qwen3-window-bias": (
        "Qwen3",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 6}),
    "phi3-partial": ("Phi3", {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}}),
    "phi3-longrope": (
        "Phi3",
        {"original_max_position_embeddings": 16, "tie_word_embeddings": True} | _rope("longrope", **LONGROPE),
    ),
    "phi3-longrope-short-text": (
        "Phi3",
        {"original_max_position_embeddings": 40} | _rope("longrope", **LONGROPE),
    ),
    "gemma2": ("Gemma2", {"head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 7}),
    "gemma2-no-caps": (
        "Gemma2",
        {"head_dim": 6, "sliding_window": 9, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 13, "num_hidden_layers": 4}
        | {"layer_types": [SLIDING, SLIDING, "full_attention", SLIDING]}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                SLIDING: {"rope_type": "default", "rope_theta": 50.0},
            }
        },
    ),
    "gemma3-untied-final-cap": (
        "Gemma3",
        {"head_dim": 6, "sliding_window": 3, "tie_word_embeddings": False, "final_logit_softcapping": 5.0},
    ),
}
# one for each way in which a cache can go wrong: windows, ropes that change with the length, two ropes, caps, norms
GENERATED = ("llama-tied-biases", "llama-dynamic", "mistral", "qwen3", "phi3-longrope", "gemma2", "gemma3")
CLASS = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}


@functools.cache
def _reference(case: str) -> Any:
    """A model of transformers with weights large enough that every part of it matters."""
    torch.set_num_threads(1)
    family, values = CASES[case]
    config_name, model_name = CLASS.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    config = getattr(transformers, config_name)(**{**ODD, **values}, attn_implementation="eager")
    torch.manual_seed(len(case))
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.25)
    model.generation_config.eos_token_id = None
    return model


def _ours(case: str, folder: Path) -> tuple[DecoderConfig, Any]:
    """What we read from the folder that transformers writes."""
    _reference(case).save_pretrained(folder)
    config = load_config(folder)
    return config, load_params(folder, config)


def _prompt(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, ODD["vocab_size"], (batch, length), np.int32)


def _reference_logits(reference: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    reference, (config, params) = _reference(case), _ours(case, tmp_path)
    tokens = _prompt(2, LENGTH)
    wanted = _reference_logits(reference, tokens)
    found = jax.jit(Decoder(config).apply)({"params": params}, tokens)
    assert found.dtype == jnp.float32
    assert np.std(wanted) > 0.1  # a comparison of near-zeros would show nothing
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", GENERATED)
def test_greedy_text_is_that_of_transformers_and_of_no_cache(case, tmp_path):
    reference, (config, params) = _reference(case), _ours(case, tmp_path)
    tokens, new = _prompt(2, 11), 12
    model = Decoder(config)
    found = np.asarray(generate(model.apply, params, config, tokens, max_new_tokens=new))
    with torch.no_grad():
        whole = reference.generate(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
        )
    np.testing.assert_array_equal(found, whole.numpy()[:, tokens.shape[1] :])
    if case != "llama-dynamic":  # whose cached keys stay turned as they were, in transformers too
        np.testing.assert_array_equal(found, _without_cache(model, params, tokens, new))


def _without_cache(model: Decoder, params: Any, tokens: np.ndarray, new: int) -> np.ndarray:
    """Greedy text by reading everything again for every token, in one shape: what is still to come is masked."""
    batch, length = tokens.shape
    text = np.zeros((batch, length + new), np.int32)
    text[:, :length] = tokens
    step = jax.jit(lambda params, text, mask: model.apply({"params": params}, text, mask=mask))
    for end in range(length, length + new):
        mask = np.broadcast_to(np.arange(length + new)[None] < end, text.shape)
        text[:, end] = np.argmax(step(params, text, mask)[:, end - 1], axis=-1)
    return text[:, length:]


def _as_transformers_4(raw: dict[str, Any]) -> dict[str, Any]:
    """The same config.json in the spelling of transformers 4."""
    old = {key: value for key, value in raw.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    old["torch_dtype"] = raw.get("dtype", "float32")
    rope = raw["rope_parameters"]
    if SLIDING in rope:
        old["rope_local_base_freq"] = rope[SLIDING]["rope_theta"]
        rope = rope["full_attention"]
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    scaling["type"] = scaling.pop("rope_type")
    old["rope_theta"] = rope["rope_theta"]
    old["rope_scaling"] = None if scaling["type"] == "default" else scaling
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return old


@pytest.mark.parametrize("name", CASES)
def test_both_spellings_of_the_config_are_read_alike(name, tmp_path):
    if "layer_types" in CASES[name][1]:
        pytest.skip("transformers 4 had no way to write a list of layers' kinds")
    _reference(name).config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    new, old = (DecoderConfig.from_hf(each).__dict__ for each in (raw, _as_transformers_4(raw)))
    assert {**new, "source": ""} == {**old, "source": ""}
