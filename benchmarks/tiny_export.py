"""Write the bundled model as a Hugging Face folder, measure it, and write its card.

The weights are stored in bf16 and everything is measured on those rounded weights, in f32 arithmetic, over
rows of `context` tokens that do not overlap, each predicting its tokens 1 to context - 1.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from benchmarks import tiny_corpus
from models import hf
from models.decoder import Decoder
from models.generate import generate

SLICE_ROWS = 32
SAMPLE_TOKENS = 160
PROMPTS = ('The "with" statement', "class Reader(Base)\n    ", "Help on module")


def hf_config(options: argparse.Namespace) -> dict[str, Any]:
    """The config.json of the model that the options describe."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": 0,
        "head_dim": options.width // options.heads,
        "hidden_act": "silu",
        "hidden_size": options.width,
        "initializer_range": 0.02,
        "intermediate_size": options.ffn,
        "max_position_embeddings": options.context,
        "mlp_bias": False,
        "num_attention_heads": options.heads,
        "num_hidden_layers": options.layers,
        "num_key_value_heads": options.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": options.vocab,
    }


def rounded_to_bf16(params: Any) -> Any:
    """The params as the folder holds them, back in f32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)


@partial(jax.jit, static_argnums=0)
def _summed_loss(model: Decoder, params: Any, rows: jax.Array) -> jax.Array:
    logits: Any = model.apply({"params": params}, rows)  # f32[R, T, V]
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], rows[:, 1:]).sum()


def perplexity(model: Decoder, params: Any, rows: np.ndarray, batch: int = 8) -> float:
    """exp of the mean loss over rows i32[R, T], positions 0 to T - 2 of each."""
    total = sum(
        float(_summed_loss(model, params, jnp.asarray(rows[i : i + batch]))) for i in range(0, len(rows), batch)
    )
    return float(np.exp(total / (rows.shape[0] * (rows.shape[1] - 1))))


def samples(
    model: Decoder, params: Any, tokenizer: Tokenizer, prompts: Sequence[str], length: int, seed: int
) -> list[str]:
    """Each prompt and up to `length` tokens after it, at temperature 0.7."""
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    longest = max(map(len, encoded))
    tokens = np.asarray([[0] * (longest - len(ids)) + ids for ids in encoded], np.int32)
    mask = np.asarray([[False] * (longest - len(ids)) + [True] * len(ids) for ids in encoded])
    options = {"max_new_tokens": length, "temperature": 0.7, "seed": seed, "eos_ids": (0,)}
    made = np.asarray(generate(model.apply, params, model.config, tokens, mask, **options))
    return [
        tokenizer.decode(ids + row.tolist(), skip_special_tokens=True) for ids, row in zip(encoded, made, strict=True)
    ]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def export(
    folder: Path,
    model: Decoder,
    params: Any,
    options: argparse.Namespace,
    about: dict[str, Any],
    corpus: tiny_corpus.Corpus,
    tokenizer: Tokenizer,
) -> None:
    """Write weights, config, tokenizer, the two texts, metrics.json and the card into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    hf.save_params(folder, model.config, stored)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored)
    _write_json(folder / "generation_config.json", {"eos_token_id": 0, "pad_token_id": 0})
    _write_tokenizer(folder, tokenizer, options.context)
    held_out = tiny_corpus.join_documents(corpus.held_out)
    (folder / "heldout.txt").write_text(held_out, encoding="utf-8", newline="\n")
    calibration = tiny_corpus.join_documents(corpus.calibration())
    (folder / "calibration.txt").write_text(calibration, encoding="utf-8", newline="\n")
    rows = tiny_corpus.rows_of(tiny_corpus.encode(tokenizer, held_out), options.context)
    trained_on = tiny_corpus.rows_of(tiny_corpus.encode(tokenizer, calibration), options.context)
    metrics = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "context": options.context,
        "held_out": {"perplexity": perplexity(model, params, rows), "rows": len(rows)},
        "slice": {"perplexity": perplexity(model, params, rows[:SLICE_ROWS]), "rows": SLICE_ROWS},
        "calibration": {"perplexity": perplexity(model, params, trained_on), "rows": len(trained_on)},
        "training": _training_record(options, about, corpus),
        "held_out_modules": sorted({document.title.partition(".")[0] for document in corpus.held_out}),
        "calibration_documents": [document.title for document in corpus.calibration()],
    }
    _write_json(folder / "metrics.json", metrics)
    texts = samples(model, params, tokenizer, PROMPTS, SAMPLE_TOKENS, options.seed)
    (folder / "README.md").write_text(card(metrics, options, texts), encoding="utf-8", newline="\n")


def _training_record(options: argparse.Namespace, about: dict[str, Any], corpus: tiny_corpus.Corpus) -> dict[str, Any]:
    return {
        "steps": about["step"],
        "steps_planned": options.steps,
        "finished": about["step"] >= options.steps,
        "tokens_read": about["step"] * options.batch * options.context,
        "seconds": round(about["seconds"]),
        "characters": sum(len(document.text) for document in corpus.training),
        "corpus_sha256": about["corpus_sha256"],
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tiny_corpus.END_OF_TEXT,
        "pad_token": tiny_corpus.END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def card(metrics: dict[str, Any], options: argparse.Namespace, samples: Sequence[str]) -> str:
    """The model card: everything in it comes from the run, none of it by hand."""
    training = metrics["training"]
    unfinished = "" if training["finished"] else (
        f"\n> Not final: exported at step {training['steps']} of {training['steps_planned']}, while training goes on.\n"
    )  # fmt: skip
    command = f"python -m benchmarks.train_tiny --steps {training['steps_planned']}"
    texts = "\n\n".join(f"```text\n{text.strip()}\n```" for text in samples)
    return f"""---
license: psf-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# tiny: a language model that has read Python's documentation
{unfinished}
A small Llama that comes with jq4, so that quantization can be tried, tested and measured on something real where
there is no network. It writes what looks like Python's documentation. It is no source of facts.

| | |
| --- | --- |
| architecture | `LlamaForCausalLM`: {options.layers} layers, width {options.width}, {options.heads} heads \
({options.kv_heads} for keys and values) of {options.width // options.heads}, MLP {options.ffn}, tied embeddings |
| parameters | {metrics["parameters"]:,}, stored in bf16 |
| vocabulary | {options.vocab} tokens, byte-level BPE trained on the training part; id 0 ends a text |
| context | {options.context} tokens |
| held-out perplexity | **{metrics["held_out"]["perplexity"]:.3f}** (`heldout.txt`: \
{metrics["held_out"]["rows"]} rows of {options.context} tokens, positions 0 to {options.context - 2} of each; \
bf16 weights, f32 arithmetic) |
| of its first {metrics["slice"]["rows"]} rows | {metrics["slice"]["perplexity"]:.3f} |
| of `calibration.txt`, which it was trained on | {metrics["calibration"]["perplexity"]:.3f} |

## Data

The documentation that CPython {training["python"]} carries: the topics of `pydoc_data.topics`, and the docstrings of
the standard library's modules, classes and functions, each once ({training["characters"]:,} characters to train on).
Left out of training and of the tokenizer, whole: {", ".join(f"`{name}`" for name in metrics["held_out_modules"])};
their documentation is `heldout.txt`. `calibration.txt` is a part of the training text, for calibration.
In both files `{tiny_corpus.END_OF_TEXT}` ends a document, and is one token.

Python's documentation is © 2001 Python Software Foundation; All Rights Reserved. It is used and passed on under the
PSF License Agreement (https://docs.python.org/3/license.html), and so are the two texts and the weights.

## Training

```sh
{command}
```

On the CPython named above (another version has other docstrings), with JAX {training["jax"]}:
{training["steps"]} steps of {options.batch} x {options.context} tokens, {training["tokens_read"] / 1e6:.1f} million,
in {training["seconds"] / 60:.0f} minutes on two shared CPU cores. Muon, peak learning rate {options.learning_rate:g} \
(warmup {options.warmup} steps, falling to zero over the last {options.decay:.0%}),
weight decay {options.weight_decay:g}, dropout {options.dropout:g}, seed {options.seed}.
`metrics.json` has the figures of this card.

## Samples

At temperature 0.7, from the prompts {", ".join(f"`{json.dumps(prompt)}`" for prompt in PROMPTS)}:

{texts}
"""
