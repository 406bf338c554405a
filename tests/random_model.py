"""A Hugging Face folder with a small Llama of random weights, large enough that its logits are not flat.

Beside them a tokenizer, text.txt and ids.npy i32[5, 16].
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from models.config import DecoderConfig
from models.decoder import Decoder
from models.hf import save_params

TEXT = "The quick brown fox jumps over the lazy dog. A second sentence follows the first, and a third the second. " * 8
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 0,
}


def make_random_model(folder: Path) -> Path:
    """Fills `folder` and returns it."""
    config = DecoderConfig.from_hf(CONFIG)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    random = np.random.default_rng(0)

    def draw(path, leaf):
        of_norm = path[-1].key == "scale"
        return random.normal(float(of_norm), 0.1, leaf.shape).astype(np.float32)

    save_params(folder, config, jax.tree_util.tree_map_with_path(draw, shapes))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "text.txt").write_text(TEXT)
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 300, (5, 16), np.int32))
    return folder
