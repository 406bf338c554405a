"""What `jq4.quantized` itself costs: tracing time, time of calls after the first, and temporaries.

    python -m benchmarks.transform [--json FILE]

32 gated residual layers, not scanned (96 products to trace), are lowered dense and packed. A small function is called
jitted, plain and through the transform, both on the same packed program, interleaved: the ratio of the best times says
what a call costs beyond plain jit. A 12-layer scanned Llama is compiled dense and packed: XLA's own count of
temporaries.
"""

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import jq4
from models.config import DecoderConfig
from models.decoder import Decoder

TOKENS = jnp.zeros((1, 32), jnp.int32)


def llama(layers: int, width: int) -> DecoderConfig:
    """A Llama of the given depth and width, as its config.json would describe it."""
    return DecoderConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width,
            "intermediate_size": 3 * width, "num_hidden_layers": layers, "num_attention_heads": width // 64,
            "num_key_value_heads": width // 64, "vocab_size": 512, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 1e4,
        }
    )  # fmt: skip


def packed_and_dense(config: DecoderConfig) -> tuple[Any, Any, Any]:
    model = Decoder(config)
    dense = model.init(jax.random.key(0), TOKENS)
    return model.apply, dense, jq4.quantize(dense, "rtn-w4g32")


def unrolled(layers: int) -> tuple[Any, Any, Any]:
    """Gated residual layers that are not scanned: `layers` times three products and an inner jit."""
    width = 128
    keys = jax.random.split(jax.random.key(0), layers)
    dense = [
        {name: {"kernel": jax.random.normal(key, (width, width))} for name in ("gate", "up", "down")} for key in keys
    ]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        for layer in params:
            gate, up = jax.nn.silu(x @ layer["gate"]["kernel"]), x @ layer["up"]["kernel"]
            x = x + (gate * up) @ layer["down"]["kernel"]
        return x

    return apply, dense, jq4.quantize(dense, "rtn-w4g32")


def seconds(function: Any) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def tracing() -> dict[str, float]:
    apply, dense, packed = unrolled(32)
    x = jnp.ones((4, 128))
    return {
        "dense_seconds": seconds(lambda: jax.jit(apply).lower(dense, x)),
        "packed_seconds": seconds(lambda: jax.jit(jq4.quantized(apply)).lower(packed, x)),
    }


def calls(repeats: int = 300) -> dict[str, float]:
    """One packed product through the transform, against the same product written out: both jitted."""
    _, _, packed = unrolled(1)
    x, weight = jnp.ones((1, 128)), packed[0]["gate"]["kernel"]
    plain = jax.jit(jq4.matmul)
    through = jax.jit(jq4.quantized(lambda w, x: x @ w))
    best = {"plain": float("inf"), "through": float("inf")}
    jax.block_until_ready((plain(x, weight), through(weight, x)))
    for _ in range(repeats):
        best["plain"] = min(best["plain"], seconds(lambda: plain(x, weight).block_until_ready()))
        best["through"] = min(best["through"], seconds(lambda: through(weight, x).block_until_ready()))
    return {"plain_jit_us": 1e6 * best["plain"], "quantized_us": 1e6 * best["through"]}


def temporaries() -> dict[str, float]:
    apply, dense, packed = packed_and_dense(llama(12, 512))
    found = {}
    for name, f, tree in (("dense", apply, dense), ("packed", jq4.quantized(apply), packed)):
        memory = jax.jit(f).lower(tree, TOKENS).compile().memory_analysis()
        found[f"{name}_temporary_bytes"] = memory.temp_size_in_bytes
        found[f"{name}_argument_bytes"] = memory.argument_size_in_bytes
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    traced, called, held = tracing(), calls(), temporaries()
    result = {
        "date": date.today().isoformat(),
        "command": "python -m benchmarks.transform",
        "versions": {"jq4": jq4.__version__, "jax": jax.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        "trace_32_layers": traced,
        "call": called | {"ratio": called["quantized_us"] / called["plain_jit_us"]},
        "temporaries_12_scanned_layers": held
        | {"ratio": held["packed_temporary_bytes"] / held["dense_temporary_bytes"]},
    }
    table = Table("what", "dense or plain", "packed", "ratio")
    table.add_row(
        "trace and lower, 32 layers (s)", f"{traced['dense_seconds']:.2f}", f"{traced['packed_seconds']:.2f}",
        f"{traced['packed_seconds'] / traced['dense_seconds']:.1f}",
    )  # fmt: skip
    table.add_row(
        "one call (µs)",
        f"{called['plain_jit_us']:.0f}",
        f"{called['quantized_us']:.0f}",
        f"{result['call']['ratio']:.2f}",
    )
    table.add_row(
        "temporaries, 12 scanned layers (KiB)", f"{held['dense_temporary_bytes'] / 1024:.0f}",
        f"{held['packed_temporary_bytes'] / 1024:.0f}", f"{result['temporaries_12_scanned_layers']['ratio']:.2f}",
    )  # fmt: skip
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
