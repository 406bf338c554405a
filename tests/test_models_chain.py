"""Oracle: the decoder itself; a chain of its blocks gives the same logits, dense and packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jq4
from jq4.chain import TreeSource
from models.chain import LAYERS, decoder_chain
from models.config import DecoderConfig
from models.decoder import Decoder
from tests.random_model import CONFIG

GEMMA = CONFIG | {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "head_dim": 16,
    "sliding_window": 4,
    "query_pre_attn_scalar": 16,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "hidden_activation": "gelu_pytorch_tanh",
}
UNTIED = CONFIG | {"tie_word_embeddings": False}


@pytest.mark.parametrize("raw", [CONFIG, UNTIED, GEMMA], ids=["llama", "untied", "gemma2"])
@pytest.mark.parametrize("recipe", [None, "rtn-w4g32"])
def test_a_chain_of_blocks_is_the_decoder(raw, recipe):
    config = DecoderConfig.from_hf(raw)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, config.vocab_size)
    params = Decoder(config).init(jax.random.key(0), tokens)["params"]
    if recipe:
        params = jq4.quantize(params, recipe)
    model = jq4.quantized(Decoder(config).apply, strict=True)
    chain, source = decoder_chain(config), TreeSource(params, LAYERS)
    block = jax.jit(jq4.quantized(chain.block, strict=True))
    x = chain.embed(source.outside(), tokens)
    for i in range(chain.num_blocks):
        x = block(source.block(i), jnp.int32(i), x)
    np.testing.assert_allclose(chain.head(source.outside(), x), model({"params": params}, tokens), atol=2e-5)
