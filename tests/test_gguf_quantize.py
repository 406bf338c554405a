"""Oracle: llama.cpp. Golden bytes that ggml wrote, and digests of what its ggml_quantize_chunk makes of weights."""

import hashlib

import numpy as np
import pytest
from gguf_inputs import hard_weights

from jq4.checkpoint.foreign.gguf import qarrays
from jq4.checkpoint.foreign.gguf.block_types import BY_NAME
from jq4.checkpoint.foreign.gguf.quantize import QUANTIZERS, quantized_blocks
from jq4.checkpoint.foreign.host_dequantize import host_dequantize
from jq4.errors import JQ4Error

pytestmark = pytest.mark.arithmetic

INPUT = "3bddf53288b2f83b85bc8932dafa0cce86aaac2581ee1999b5d8044c2ac85ddf"
# the first half of the SHA-256 of ggml_quantize_chunk(type, hard_weights(), without an importance matrix), called in
# the libllama of xllamacpp 2026.10.11549 on x86-64
OF_LLAMA_CPP = {
    "Q4_0": "910dc878ee9a106babd8933b3597407a",
    "Q4_1": "0e093603017a786aa8aba342bc260fe5",
    "Q5_0": "e4a8a72b6f8b70ceb2e484741d886b3c",
    "Q5_1": "98cd98efd06e7dfd77e5e795b3d6821c",
    "Q8_0": "818f72769661f09e4ec91c5f0101918a",
    "IQ4_NL": "079154456929e6f0d22c16161ce8aa54",
    "Q4_K": "b7e978a6071c98218610361b78dbdc83",
    "Q5_K": "8129f3b20c811383948cdf10ec739087",
    "Q6_K": "e8b2a92346114ffbdd99bdd68fea59ab",
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_hard_weights_get_the_bytes_of_llama_cpp(name):
    weights = hard_weights()
    assert hashlib.sha256(weights.tobytes()).hexdigest() == INPUT
    blocks = quantized_blocks(BY_NAME[name], weights, "w")
    assert hashlib.sha256(blocks.tobytes()).hexdigest()[:32] == OF_LLAMA_CPP[name]


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "IQ4_NL"])
def test_golden_bytes_of_ggml(name, shared_data):
    folder = shared_data / "ggml_quant_golden"
    weights = np.fromfile(folder / f"{name.lower()}_64_noim_input.bin", np.float32).reshape(2, 64)
    wanted = np.fromfile(folder / f"{name.lower()}_64_noim_expected.bin", np.uint8)
    np.testing.assert_array_equal(quantized_blocks(BY_NAME[name], weights, "w").ravel(), wanted)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_many_chunks_are_as_one(name, monkeypatch):
    weights = hard_weights(16, 1024)
    whole = quantized_blocks(BY_NAME[name], weights, "w")
    monkeypatch.setattr("jq4.checkpoint.foreign.gguf.quantize._ELEMENTS", 2048)
    np.testing.assert_array_equal(quantized_blocks(BY_NAME[name], weights, "w"), whole)


@pytest.mark.parametrize(("name", "bound"), [("Q4_K", 0.08), ("Q5_K", 0.04), ("Q6_K", 0.03), ("IQ4_NL", 0.1)])
def test_the_error_is_that_of_so_many_bits(name, bound):
    weights = np.random.default_rng(0).normal(0, 1, (8, 512)).astype(np.float32)
    found = host_dequantize(qarrays.to_qarray(BY_NAME[name], quantized_blocks(BY_NAME[name], weights, "w")))
    assert np.sqrt(np.mean((found - weights) ** 2)) < bound


def test_what_has_no_finite_scale_is_an_error_that_names_the_weight():
    weights = np.zeros((1, 32), np.float32)
    weights[0, 3] = np.nan
    with pytest.raises(JQ4Error, match=r"^layer.7: holds a value that is not finite"):
        quantized_blocks(BY_NAME["Q4_0"], weights, "layer.7")
    weights[0, 3] = 1e8
    with pytest.raises(JQ4Error, match=r"^layer.7: a scale of Q8_0 is beyond float16.*--type bf16"):
        quantized_blocks(BY_NAME["Q8_0"], weights, "layer.7")
