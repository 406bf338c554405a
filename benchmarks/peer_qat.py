"""Trains a Hugging Face folder with torchao's fake quantization, and measures what was trained against the folder.

    PEER_PYTHON -m benchmarks.peer_qat MODEL BATCHES.npz OUT.json --bits 2 --group 32 [--asym] [--inputs 8]
                                       [--learned] [--loss distill|next] --rate 1e-3

`benchmarks.qat --peer PEER_PYTHON` writes BATCHES.npz and calls this: `batches` i32[S, B, T] are the very batches that
ours trains on, in their order, and `evaluation` i32[R, T] the rows to measure on. The optimizer is the same too
(jq4.train.running.optimizer): Adam over all params, by steps relative to each, with a rate that rises for a twentieth
of the steps and falls along a cosine, and gradients of norm 1 at most. `--learned` is torchao's prototype of learned
ranges; without it the scales are found anew from the weights at every step. Inputs are rounded as torchao rounds them,
by the token with a zero point. The figures are of the fake-quantized model in float32, in the definitions of
jq4.evaluate. It runs under the Python of an environment that holds torchao: nothing here imports jax or jq4.
"""

import argparse
import json
import math
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, log_softmax
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from torchao.quantization.qat.api import initialize_fake_quantizers
from transformers import AutoModelForCausalLM


def prepare(model: torch.nn.Module, options: argparse.Namespace) -> None:
    """Every linear layer but the head fake-quantized."""
    weights = IntxFakeQuantizeConfig(
        getattr(torch, f"int{options.bits}"),
        group_size=options.group,
        is_symmetric=not options.asym,
        is_dynamic=not options.learned,
        range_learning=options.learned,
    )
    inputs = None
    if options.inputs:
        inputs = IntxFakeQuantizeConfig(getattr(torch, f"int{options.inputs}"), "per_token", is_symmetric=False)

    def chosen(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "lm_head" not in name

    quantize_(model, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"), chosen)


def divergence(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || model) f32[...] of logits [..., V]."""
    log_p, log_q = log_softmax(teacher, dim=-1), log_softmax(logits, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def train(model: torch.nn.Module, dense: torch.nn.Module, batches: torch.Tensor, options: argparse.Namespace) -> float:
    """The seconds that the steps took."""
    optimizer = torch.optim.Adam([{"params": [parameter]} for parameter in model.parameters()], betas=(0.9, 0.99))
    start = time.perf_counter()
    for done, tokens in enumerate(batches):
        logits = model(tokens).logits
        if options.loss == "next":
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        else:
            with torch.no_grad():
                teacher = dense(tokens).logits
            loss = divergence(logits, teacher).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(done, len(batches), options.rate) * rms(group["params"][0])
        optimizer.step()
    return time.perf_counter() - start


def rate_at(done: int, steps: int, rate: float) -> float:
    warmup = steps // 20
    if done < warmup:
        return rate * (done + 1) / (warmup + 1)
    return rate * (1 + math.cos(math.pi * (done - warmup) / (steps - warmup))) / 2


@torch.no_grad()
def rms(parameter: torch.Tensor) -> float:
    return max(parameter.square().mean().sqrt().item(), 1e-3)


@torch.no_grad()
def measure(model: torch.nn.Module, dense: torch.nn.Module, rows: torch.Tensor) -> dict[str, float]:
    klds, nlls, agreements = [], [], []
    for tokens in rows.split(16):
        logits, teacher = model(tokens).logits[:, :-1], dense(tokens).logits[:, :-1]
        klds.append(divergence(logits, teacher).flatten())
        nlls.append(cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"))
        agreements.append((logits.argmax(-1) == teacher.argmax(-1)).double().flatten())
    return {
        "kld_mean": torch.cat(klds).double().mean().item(),
        "perplexity": torch.cat(nlls).double().mean().exp().item(),
        "top1_agreement": torch.cat(agreements).mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("batches", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--inputs", type=int, choices=(4, 8))
    parser.add_argument("--learned", action="store_true")
    parser.add_argument("--loss", choices=("distill", "next"), default="distill")
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    data = np.load(options.batches)
    batches, rows = (torch.from_numpy(data[name].astype(np.int64)) for name in ("batches", "evaluation"))
    model, dense = (AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32) for _ in range(2))
    prepare(model, options)
    if options.learned:
        initialize_fake_quantizers(model, (batches[0],))
    found = {"start_kld": measure(model, dense, rows)["kld_mean"]}
    found |= {"seconds": train(model, dense, batches, options), **measure(model, dense, rows)}
    found |= {name: getattr(options, name) for name in ("rate", "learned", "loss")}
    versions = {"torch": torch.__version__, "torchao": version("torchao")}
    options.out.write_text(json.dumps(found | versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
