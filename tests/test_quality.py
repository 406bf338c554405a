"""Quality on a real Llama. Oracle: the figures that other quantizers reach on the same rows of the same model."""

import jax
import numpy as np
import pytest

import jq4
from jq4.evaluate import evaluate
from models.decoder import Decoder
from models.hf import load_config, load_params


@pytest.fixture(scope="module")
def kld_of(shared_data):
    """The mean KLD of a preset's packed model against the dense one, over the 97 rows of 256 tokens."""
    folder = shared_data / "tinystories-656k"
    config = load_config(folder)
    params, model = {"params": load_params(folder, config)}, Decoder(config)
    ids = np.load(folder / "evaluation_ids.npy")
    dense, packed = jax.jit(model.apply), jax.jit(jq4.quantized(model.apply, strict=True))
    batches = {}

    def reference(tokens):
        key = np.asarray(tokens).tobytes()
        if key not in batches:
            batches[key] = dense(params, tokens)
        return batches[key]

    def measure(preset):
        qparams = jq4.quantize(params, preset)
        found = evaluate(lambda tokens: packed(qparams, tokens), ids, reference=reference, batch_size=25)
        assert found.reference_perplexity == pytest.approx(36.867, abs=0.01)
        return found.kld_mean

    return measure


def test_rtn_is_where_others_rtn_is(kld_of):
    assert kld_of("rtn-w4g32") == pytest.approx(0.0813, rel=0.02)


@pytest.mark.parametrize(
    ("preset", "peer"), [("hqq-w4g32-asym", 0.0498), ("hqq-w4g128-asym", 0.0859), ("hqq-w3g32-asym", 0.2392)]
)
def test_hqq_is_better_than_the_hqq_package(kld_of, preset, peer):
    assert kld_of(preset) < peer * 0.9
