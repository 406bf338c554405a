"""Oracle: transformers' own layers of Google's packed Gemma checkpoints, and their description written out."""

import numpy as np
import pytest

from jq4.checkpoint.foreign import open_checkpoint
from jq4.errors import JQ4Error
from tests.foreign_folder import dense, read_weight, write_checkpoint
from tests.packed_oracle import pack_bits

CONFIG = {
    "quantization_config": {
        "quant_method": "gemma", "num_bits": 4, "quantize_embeddings": True,
        "module_quant_configs": {"down_proj$": {"num_bits": 2}, "embed": {"num_bits": 2}, "v_proj": {"num_bits": 8}},
    }
}  # fmt: skip
LAYERS = {"a.q_proj": 4, "a.down_proj": 2, "a.v_proj": 8}


def packed(rng, rows, width, bits):
    """Packed codes and the signed ones."""
    signed = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, width), dtype=np.int8)
    if bits == 8:
        return signed, signed
    codes = (signed + 2 ** (bits - 1)).astype(np.uint8)
    return pack_bits(codes, bits, -1), signed


def by_the_book(activations=0.0):
    """The tensors of a checkpoint, and the weights that they mean."""
    rng, tensors, expected = np.random.default_rng(0), {}, {}
    for name, bits in LAYERS.items():
        scale = rng.uniform(0.5, 1, (6, 1)).astype(np.float32)
        tensors[f"{name}.weight"], codes = packed(rng, 6, 32, bits)
        tensors[f"{name}.weight_scale"], expected[f"{name}.weight"] = scale, codes * scale
        tensors[f"{name}.input_activation_scale"] = np.float32(activations)
        tensors[f"{name}.output_activation_scale"] = np.float32(0)
    tensors["embed.embedding_quantized"], codes = packed(rng, 10, 16, 2)
    tensors["embed.embedding_scale"] = rng.uniform(0.5, 1, (10, 2)).astype(np.float32)
    expected["embed.weight"] = codes * np.repeat(tensors["embed.embedding_scale"], 8, axis=1)
    return tensors, expected


def test_linear_layers_and_tables_by_the_book(tmp_path):
    tensors, expected = by_the_book()
    folder = write_checkpoint(tmp_path / "m", tensors, CONFIG)
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.weights) == set(expected) and checkpoint.notes == ()
    for name, values in expected.items():
        np.testing.assert_array_equal(dense(read_weight(folder, name, "gemma"), np.float32), values)


def test_transformers_says_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    gemma_quant = pytest.importorskip("transformers.integrations.gemma_quant", reason="a transformers before 5.23")
    tensors, _ = by_the_book()
    folder = write_checkpoint(tmp_path / "m", tensors, CONFIG | {"dtype": "float32"})
    for name, bits in LAYERS.items():
        layer = gemma_quant.QuantizedLinear(32, 6, num_bits=bits)
        parts = {key: torch.tensor(tensors[f"{name}.{key}"]) for key in ("weight", "weight_scale")}
        for key, value in parts.items():
            setattr(layer, key, torch.nn.Parameter(value, requires_grad=False))
        found = dense(read_weight(folder, f"{name}.weight"))
        np.testing.assert_array_equal(found, layer._dequantize_weights().numpy(), strict=True)
    table = gemma_quant.QuantizedEmbedding(10, 16, torch.float32, num_bits=2)
    rows = (torch.tensor(tensors[f"embed.embedding_{key}"]) for key in ("quantized", "scale"))
    np.testing.assert_array_equal(dense(read_weight(folder, "embed.weight")), table._dequantize_weights(*rows).numpy())


def test_rounded_activations_are_told(tmp_path):
    (note,) = open_checkpoint(write_checkpoint(tmp_path / "m", by_the_book(0.5)[0], CONFIG)).notes
    assert note.startswith("3 scales of activations (a.down_proj.input_activation_scale, ...): Gemma rounds these")


@pytest.mark.parametrize(("change", "config", "message"), [
    ({"a.q_proj.weight": None}, {}, "'a.q_proj.weight_scale' comes without 'a.q_proj.weight'"),
    ({"a.q_proj.weight": np.ones((6, 32), np.float32)}, {}, "'a.q_proj.weight' has dtype F32, wanted U8 or I8"),
    ({"a.q_proj.weight_scale": np.ones((5, 1), np.float32)}, {}, r"_scale' has shape \[5, 1\], wanted \[6, any\]"),
    ({"embed.embedding_scale": np.ones((10, 5), np.float32)}, {}, "wanted groups that divide 16, the weight's columns"),
    ({"embed.embedding_quantized": np.uint8(1)}, {}, r"embedding_quantized' has shape \[\], wanted \[any, any\]"),
    ({}, {"num_bits": 8}, "'a.q_proj.weight' is U8 and config.json says 8 bits, wanted I8 for 8 bits, U8 for 2 or 4"),
    ({}, {"module_quant_configs": {"(": {}}}, "module_quant_configs: .* is not a regular expression"),
    ({}, {"module_quant_configs": [1]}, "module_quant_configs is no object of objects"),
])  # fmt: skip
def test_what_contradicts_itself_is_refused_when_opened(change, config, message, tmp_path):
    tensors = {name: array for name, array in (by_the_book()[0] | change).items() if array is not None}
    settings = {"quantization_config": CONFIG["quantization_config"] | config}
    with pytest.raises(JQ4Error, match=message):
        open_checkpoint(write_checkpoint(tmp_path / "m", tensors, settings))
