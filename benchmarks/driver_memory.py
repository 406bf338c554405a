"""Peak memory of quantizing a 7B-shaped checkpoint block by block: bf16 safetensors in, GPTQ W4 g128, packed Orbax out.

    python -m benchmarks.driver_memory [--layers 4] [--rows 8] [--context 256] [--recipe gptq-w4g128] [--json FILE]

A checkpoint of random weights (hidden 4096, inner 11008, 32 heads, 32,000 words) is written to a temporary folder; then
`quantize_blocks` runs in a process of its own, whose resident memory is sampled from outside every 50 ms, and whose
high-water mark the system tells at its end. What is reported is the peak above the memory that the process held once
JAX was at work, against the bytes of one block in float32 (two of them is what is wanted). Pages of mapped files count
as resident while they are mapped, though the system may take them back at any time: `anonymous` leaves them out, at the
start and at the peak.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def make_checkpoint(folder: Path, layers: int) -> int:
    """Writes config.json and model.safetensors of random weights; the bytes of one block in float32."""
    from jq4.checkpoint.safetensors_files import write
    from models.config import DecoderConfig
    from models.tensor_names import places

    raw = CONFIG | {"num_hidden_layers": layers}
    config = DecoderConfig.from_hf(raw)
    (folder / "config.json").write_text(json.dumps(raw))
    random = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        of_norm = len(shape) == 1
        values = random.standard_normal(shape, np.float32) * (0.1 if of_norm else 0.02) + of_norm
        return values.astype(ml_dtypes.bfloat16)

    tensors, block = {}, 0
    for place in places(config).values():
        block += 4 * int(np.prod(place.shape)) * place.stacked
        for layer in range(layers) if place.stacked else [None]:
            prefix = "" if place.name == "lm_head.weight" else "model."
            name = prefix + place.name.format(layer=layer)
            tensors[name] = ("BF16", place.stored, lambda shape=place.stored: draw(shape))
    write(folder / "model.safetensors", tensors)
    return block


def measured_run(folder: Path, destination: Path, recipe: str, rows: int, context: int) -> dict[str, Any]:
    """Runs the child and samples it."""
    command = [sys.executable, "-m", "benchmarks.driver_memory", "--child", str(folder), str(destination), recipe]
    child = subprocess.Popen([*command, str(rows), str(context)], stdout=subprocess.PIPE, text=True)
    peak = {"VmRSS": 0, "RssAnon": 0}
    while child.poll() is None:
        for name, nbytes in held_by(child.pid).items():
            peak[name] = max(peak[name], nbytes)
        time.sleep(0.05)
    assert child.stdout is not None
    told = json.loads(child.stdout.read().splitlines()[-1])
    return told | {"sampled_peak": peak["VmRSS"], "sampled_peak_anonymous": peak["RssAnon"]}


def held_by(pid: int | str) -> dict[str, int]:
    """Resident memory of a process, and that of no file, in bytes; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if line.startswith(("VmRSS", "RssAnon")))
    return {name: 1024 * int(value.split()[0]) for name, value in pairs}


def child(folder: Path, destination: Path, recipe: str, rows: int, context: int) -> None:
    """The measured process: one JSON line on stdout."""
    import jax
    import jax.numpy as jnp

    from jq4.driver import quantize_blocks
    from jq4.driver.quantize_blocks import peak_memory
    from models.chain import decoder_chain
    from models.folder_source import FolderSource
    from models.hf import load_config

    jax.block_until_ready(jnp.zeros(8) + 1)
    start, start_anonymous = peak_memory(), held_by("self")["RssAnon"]
    config = load_config(folder)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, context), np.int32)
    source = FolderSource(folder, config)
    said: dict[str, int] = {}

    def say(done: int, total: int, text: str) -> None:
        said[text] = peak_memory()
        print(f"{time.strftime('%H:%M:%S')} {done}/{total} {text}: {peak_memory() / 1e6:.0f} MB", file=sys.stderr)

    result = quantize_blocks(
        decoder_chain(config), source, recipe, tokens, destination=destination, provenance="random", progress=say
    )
    seconds = [sum(row.seconds for row in result.rows), result.seconds]
    held = {"start": start, "start_anonymous": start_anonymous, "peak": peak_memory()}
    print(json.dumps(held | {"method_seconds": seconds[0], "seconds": seconds[1]}))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        folder, destination, recipe, rows, context = sys.argv[2:]
        child(Path(folder), Path(destination), recipe, int(rows), int(context))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--recipe", default="gptq-w4g128")
    parser.add_argument("--folder", help="where the checkpoint is made (default: a temporary folder)")
    parser.add_argument("--json", help="a file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        block = make_checkpoint(Path(folder), arguments.layers)
        out = Path(folder) / "packed"
        found = measured_run(Path(folder), out, arguments.recipe, arguments.rows, arguments.context)
        on_disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    above = found["peak"] - found["start"]
    data = {
        **{name: getattr(arguments, name) for name in ("layers", "rows", "context", "recipe")},
        "block_f32_bytes": block,
        **found,
        "above_start": above,
        "blocks_above_start": above / block,
        "anonymous_blocks_above_start": (found["sampled_peak_anonymous"] - found["start_anonymous"]) / block,
        "bytes_on_disk": on_disk,
        "machine": platform.machine(),
    }
    print(json.dumps(data, indent=2))
    if arguments.json:
        from benchmarks.provenance import publish  # with JAX, which the process that starts the child does without

        publish(arguments.json, "driver_memory", data)


if __name__ == "__main__":
    main()
