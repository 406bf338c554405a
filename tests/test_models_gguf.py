"""Oracle: gguf-py's own dequantization of the same file, by a table of names written here, in our dense decoder."""

import re

import numpy as np
import pytest
from packed_checkpoint import checkpoint_of

from jq4.evaluate import evaluate
from models.hf import load_config
from models.language_model import LanguageModel

pytest.importorskip("jq4.checkpoint.foreign.gguf", reason="GGUF files are not read yet")
gguf = pytest.importorskip("gguf", reason="gguf is the oracle here and is not installed")

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {
    **{f"attn_{short}": f"self_attn.{long}_proj" for short, long in zip("qkv", "qkv", strict=True)},
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _name(stored):
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", stored)
    if layer:
        return f"model.layers.{layer[1]}.{INSIDE[layer[2]]}.weight"
    return f"{OUTSIDE[stored.removesuffix('.weight')]}.weight"


def _rows_in_pairs(weight, heads):
    """Undoes what llama.cpp's converter does to rows of queries and keys: each head's halves are interleaved."""
    rows, inputs = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1"])
def test_a_file_has_the_perplexity_of_its_weights_dequantized_by_gguf(shared_data, kind):
    file = shared_data / "gguf" / f"tinystories-656k-{kind}.gguf"
    config = load_config(shared_data / "tinystories-656k")
    values = {}
    for tensor in gguf.GGUFReader(file).tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(tensor.name.split(".")[-2])
        values[_name(tensor.name)] = _rows_in_pairs(weight, heads) if heads else weight
    wanted = LanguageModel.from_checkpoint(checkpoint_of(values, config), "gguf-py")
    model = LanguageModel.from_folder(file)
    rows = np.load(shared_data / "tinystories-656k" / "evaluation_ids.npy")[:8]
    found = evaluate(model.logits, rows, reference=wanted.logits, batch_size=8)
    assert not model.record.entries
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-6)
    assert found.kld_mean == pytest.approx(0, abs=1e-6)
    assert model.tokenizer is not None
