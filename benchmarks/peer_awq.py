"""llm-compressor's AWQ search for one 4096x4096 weight, timed; prints seconds as JSON. See benchmarks/awq_speed.py.

    PEER_PYTHON -m benchmarks.peer_awq --size 4096 --tokens 2048 --threads 2

The model is a Llama of one layer, of which only v_proj -> o_proj is mapped: one search over the o_proj of SIZE x SIZE
on TOKENS tokens, in float32. Timed is what follows calibration: the search and the application of its scales.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.size,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=arguments.size // 128,
        num_key_value_heads=arguments.size // 128,
        vocab_size=128,
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    seconds = []
    search = AWQModifier._apply_smoothing

    def timed(self, *args, **kwargs):
        start = time.perf_counter()
        result = search(self, *args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    AWQModifier._apply_smoothing = timed
    torch.Tensor.pin_memory = lambda self, *_: self  # which it asks for without an accelerator too
    weights = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=128)
    groups = {"all": QuantizationScheme(targets=["re:.*o_proj$"], weights=weights)}
    recipe = [
        AWQModifier(mappings=[AWQMapping("re:.*v_proj$", ["re:.*o_proj$"])]),
        QuantizationModifier(config_groups=groups, ignore=["lm_head"]),
    ]
    rows = torch.randint(0, 128, (arguments.tokens // 256, 256))
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    folder = Path(__file__).resolve().parents[1] / "models" / "tiny"
    model.config._name_or_path = str(folder)  # it looks a model's name up, and this one has none
    tokenizer = AutoTokenizer.from_pretrained(folder)
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=256,
    )
    print(json.dumps({"seconds": max(seconds), "calls": len(seconds)}))


if __name__ == "__main__":
    main()
