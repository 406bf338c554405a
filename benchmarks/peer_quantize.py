"""Runs a peer on a Hugging Face folder and saves what its 4-bit model computes with, as a dense folder.

    PEER_PYTHON -m benchmarks.peer_quantize METHOD MODEL IDS.npy OUT --bits 4 --group 32 [--asym] [--iters 200]

METHOD is one of METHODS below. It runs under the Python of an environment that holds the peer (they
want other versions of transformers than jq4's tests do, so each has its own): nothing here imports jax or jq4.
`benchmarks.best` calls it and measures the result with the same `evaluate` as ours. The weights that it saves are the
peer's own dequantized ones, in float32; embedding and head stay as they were.
"""

import argparse
import functools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def auto_round(model, tokenizer, rows: torch.Tensor, options: argparse.Namespace):
    from auto_round import AutoRound

    tuner = AutoRound(
        model,
        tokenizer,
        bits=options.bits,
        group_size=options.group,
        sym=not options.asym,
        iters=options.iters,
        dataset=list(rows.split(1)),
        seqlen=rows.shape[1],
        nsamples=rows.shape[0],
        batch_size=8,
        device_map="cpu",
        enable_torch_compile=False,
        seed=42,
    )
    return tuner.quantize()[0]


def llmcompressor_gptq(model, tokenizer, rows: torch.Tensor, options: argparse.Namespace):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(
        num_bits=options.bits, symmetric=not options.asym, strategy="group", group_size=options.group
    )
    modifier = GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    return oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=modifier,
        dataset=data,
        num_calibration_samples=len(rows),
        max_seq_length=rows.shape[1],
        shuffle_calibration_samples=False,
    )


def bitsandbytes_nf4(weight: torch.Tensor) -> torch.Tensor:
    from bitsandbytes import functional

    return functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4", blocksize=64))


def bitsandbytes_nf4_nested(weight: torch.Tensor) -> torch.Tensor:
    from bitsandbytes import functional

    held = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    return functional.dequantize_4bit(*held)


def gguf_type(name: str, weight: torch.Tensor) -> torch.Tensor:
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[name]
    return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))


CALIBRATED = {"auto-round": auto_round, "llmcompressor-gptq": llmcompressor_gptq}
# of one weight [out, in] at a time, and the bits that a weight takes in the peer's own file
BY_WEIGHT = {
    "bitsandbytes-nf4": (bitsandbytes_nf4, 4 + 32 / 64),
    "bitsandbytes-nf4-nested": (bitsandbytes_nf4_nested, 4 + 8 / 64 + 32 / (64 * 256)),
    "gguf-q4_0": (functools.partial(gguf_type, "Q4_0"), 4.5),
    "gguf-q4_1": (functools.partial(gguf_type, "Q4_1"), 5.0),
}
METHODS = (*CALIBRATED, *BY_WEIGHT)


def quantized(options: argparse.Namespace, model, tokenizer) -> tuple[torch.nn.Module, float]:
    """The model with dequantized weights, and the bits a weight takes."""
    if options.method in CALIBRATED:
        rows = torch.from_numpy(np.load(options.ids).astype(np.int64))
        bits, group = options.bits, options.group
        stored = bits + (16 + bits) / group if options.asym else bits + 16 / group
        return CALIBRATED[options.method](model, tokenizer, rows, options), stored
    convert, bits = BY_WEIGHT[options.method]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = convert(module.weight.data)
    return model, bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("model", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--iters", type=int, default=200)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    start = time.perf_counter()
    found, bits = quantized(options, model, tokenizer)
    seconds = time.perf_counter() - start
    after = found.state_dict()
    tied = model.config.tie_word_embeddings
    kept = {name: after[name].float().contiguous() for name in before if not (tied and name == "lm_head.weight")}
    changed = [name for name, value in kept.items() if not torch.equal(value, before[name])]
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(kept, options.out / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (options.model / name).exists():
            shutil.copy(options.model / name, options.out / name)
    report = {
        "method": options.method,
        "seconds": seconds,
        "bits": bits,
        "changed": changed,
        "torch": torch.__version__,
    }
    (options.out / "peer.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
