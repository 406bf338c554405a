"""What a step of QLoRA on a 7B model needs on one chip, by the chip's own compiler, which needs no chip.

    python -m benchmarks.qlora_memory [--devices v5e:2x2 h200] [--bases nf4-dq rtn-w4g128 bfloat16] [--json FILE]

The decoder of models/ in the shape of Llama 2 7B: a scan over rematerialized layers, computed in bfloat16, adapters of
rank 16 beside every linear layer in float32, next-token loss on a row of 1024 tokens, gradients and AdamW, whose state
and the adapters are updated in place. Embedding and head are dense bfloat16, as are all weights of the base "bfloat16",
which is LoRA. Packed weights lie in the layout of the chip. From the compiled program:

    trainable   numbers that are trained, and the bytes of them and of the optimizer's state
    arguments   all that the step is given: weights, adapters, state, tokens
    temporary   what it needs beside them; the sum of both is what must fit

and a layer's largest weight, were it dense: what temporaries of a program that unpacks no weight need not hold.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import jq4
from benchmarks.aot import DEVICE_KINDS, compile_for, environment, missing
from benchmarks.provenance import ROOT, publish
from models.config import DecoderConfig
from models.decoder import Decoder

MODEL = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
DENSE = "bfloat16"
DEVICES, BASES = ("v5e:2x2", "h200"), ("nf4-dq", "rtn-w4g128", DENSE)
HBM = {"v5e": 16 * 2**30, "h200": 141 * 10**9}  # bytes, as the makers state them
RANK, BATCH, LENGTH = 16, 1, 1024


def measure(device: str, base: str, rank: int, batch: int, length: int) -> dict[str, Any]:
    """One row: what the compiled step holds and needs."""
    config, kind = DecoderConfig.from_hf(MODEL), DEVICE_KINDS[device.split(":")[0]]
    decoder = Decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=True)
    forward = jq4.with_lora(decoder.apply, strict=True)
    optimizer = optax.adamw(1e-4)

    def weights() -> Any:
        params = decoder.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
        return params if base == DENSE else jq4.prepare(jq4.quantize(params, base), kind)

    def step(params: Any, adapters: Any, state: Any, tokens: Any) -> Any:
        def loss(adapters: Any) -> jax.Array:
            logits = forward((params, adapters), tokens[:, :-1])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

        value, gradients = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(gradients, state, adapters)
        return value, optax.apply_updates(adapters, updates), state

    params = jax.eval_shape(weights)
    adapters = jax.eval_shape(lambda: jq4.lora(params, rank))
    state = jax.eval_shape(optimizer.init, adapters)
    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    begun = time.perf_counter()
    compiled = compile_for(device, step, params, adapters, state, tokens, donate=(1, 2))
    memory = compiled.memory_analysis()
    needed = (
        memory.argument_size_in_bytes + memory.temp_size_in_bytes
        + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )  # fmt: skip
    hbm = HBM[device.split(":")[0]]
    return {
        "device": kind, "base": base, "rank": rank, "batch": batch, "length": length,
        "weights_bytes": _nbytes(params), "trainable": adapters.size,
        "trainable_state_bytes": _nbytes((adapters, state)),
        "argument_bytes": memory.argument_size_in_bytes, "temp_bytes": memory.temp_size_in_bytes,
        "needed_bytes": needed, "hbm_bytes": hbm, "fits": needed < hbm,
        "largest_dense_layer_bytes": 2 * config.hidden_size * config.intermediate_size,
        "dense": len(forward.record.dense), "relaid": len(forward.record.relaid),
        "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip


def _nbytes(tree: Any) -> int:
    return sum(jq4.qarray.leaf_nbytes(leaf) for leaf in jax.tree.leaves(tree))


def in_its_own_process(device: str, base: str, options: argparse.Namespace) -> dict[str, Any]:
    """`measure` where the environment is as its device's compiler wants it."""
    command = [sys.executable, "-m", "benchmarks.qlora_memory", "--here", "--devices", device, "--bases", base]
    command += ["--rank", str(options.rank), "--batch", str(options.batch), "--length", str(options.length)]
    done = subprocess.run(command, env=environment(device), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"device": device, "base": base, "error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="bytes in GiB, from the compiled step")
    for name in ("device", "base", "weights", "trainable + state", "arguments", "temporary", "needed", "of"):
        table.add_column(name)
    for row in rows:
        keys = ("weights", "trainable_state", "argument", "temp", "needed", "hbm")
        sizes = [f"{row[f'{key}_bytes'] / 2**30:.2f}" if "error" not in row else "-" for key in keys]
        table.add_row(row["device"], row["base"], *sizes)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=list(DEVICES))
    parser.add_argument("--bases", nargs="+", default=list(BASES))
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--here", action="store_true", help="compile in this process, for one device and base")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.here:
        row = measure(options.devices[0], options.bases[0], options.rank, options.batch, options.length)
        print(json.dumps(row))
        return 0
    rows = []
    for device in options.devices:
        if reason := missing(device):
            print(f"nothing can be compiled for {device}: {reason}", file=sys.stderr)
            return 1
        for base in options.bases:
            rows.append(in_its_own_process(device, base, options))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    Console(width=140).print(table_of(rows))
    if options.json:
        publish(options.json, "qlora_memory", {"model": MODEL, "rows": rows})
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
