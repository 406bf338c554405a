"""Memory and time of `jq4 convert`: a Llama-shaped GPTQ checkpoint of several sizes, re-packed, against a plain copy.

    python -m benchmarks.convert_memory [--layers 9 22 49] [--to compressed-tensors orbax] [--folder DIR] [--json FILE]

Each conversion runs as a process of its own (--memory 1GB, the default): the seconds are its whole life, importing JAX
included (and those of the processors beside them: `load` tells how many others they were shared with), the peak is its
resident memory at most (mapped pages of the files included), as the system counts it. The
copy reads and writes the same bytes in blocks of 16 MiB and waits for the disk, as the conversion does, right before
it. The page cache is told to forget the source before each. Codes are random bytes, which do not compress. The
checkpoints are removed afterwards.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import publish
from jq4.checkpoint.safetensors_files import write

HIDDEN, INNER, VOCABULARY, KEYS, GROUP = 4096, 14336, 32000, 1024, 128
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
BLOCK = 16 * 2**20


def make_checkpoint(folder: Path, layers: int) -> int:
    """Writes the checkpoint; its bytes."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(layers)
    tensors: dict[str, Any] = {}

    def dense(name: str, *shape: int) -> None:
        tensors[name] = ("F16", shape, lambda: (draw.random(shape, np.float32) - 0.5).astype(np.float16))

    def words(*shape: int) -> Any:
        return lambda: np.frombuffer(draw.bytes(4 * int(np.prod(shape))), np.int32).reshape(shape)

    dense("model.embed_tokens.weight", VOCABULARY, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, (outputs, inputs) in LINEAR.items():
            groups = inputs // GROUP
            zeros = np.full((groups, outputs // 8), 0x77777777, np.int32)
            order = (np.arange(inputs) // GROUP).astype(np.int32)
            tensors[f"{prefix}{name}.qweight"] = ("I32", (inputs // 8, outputs), words(inputs // 8, outputs))
            tensors[f"{prefix}{name}.qzeros"] = ("I32", zeros.shape, lambda zeros=zeros: zeros)
            dense(f"{prefix}{name}.scales", groups, outputs)
            tensors[f"{prefix}{name}.g_idx"] = ("I32", order.shape, lambda order=order: order)
        dense(f"{prefix}input_layernorm.weight", HIDDEN)
        dense(f"{prefix}post_attention_layernorm.weight", HIDDEN)
    dense("model.norm.weight", HIDDEN)
    dense("lm_head.weight", VOCABULARY, HIDDEN)
    write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config_of(layers)))
    return (folder / "model.safetensors").stat().st_size


def config_of(layers: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HIDDEN // 128,
        "num_key_value_heads": KEYS // 128,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    }


def forget(folder: Path) -> None:
    """Asks the page cache to forget a folder's files."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, target: Path) -> float:
    """Of a copy of the weights to the disk."""
    forget(source)
    buffer = memoryview(bytearray(BLOCK))
    start = time.perf_counter()
    with (source / "model.safetensors").open("rb", 0) as reading, target.open("wb", 0) as writing:
        while size := reading.readinto(buffer):
            writing.write(buffer[:size])
        os.fsync(writing.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def convert_in_a_process(source: Path, target: Path, to: str) -> dict[str, Any]:
    """What `measured_command` tells of a conversion."""
    forget(source)
    found = measured_command("convert", source, target, "--to", to)
    shutil.rmtree(target)
    return found


def measured_command(*given: str | Path) -> dict[str, Any]:
    """Of a `jq4` command: seconds, of the clock and of the processors, and the most resident memory in bytes."""
    words = [sys.executable, "-m", "jq4", *map(str, given), "--json"]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process, peak = subprocess.Popen(words, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        peak = max(peak, peak_resident(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}")
    total = resource.getrusage(resource.RUSAGE_CHILDREN)
    processors = total.ru_utime + total.ru_stime - used.ru_utime - used.ru_stime
    return {"seconds": round(seconds, 2), "processor_seconds": round(processors, 2), "peak_resident_bytes": peak}


def peak_resident(pid: int) -> int:
    """A running process's peak; what wait4 tells counts that of the process that started it too."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def measured(folder: Path, layers: int, targets: list[str]) -> list[dict[str, Any]]:
    """A row for each target."""
    source = folder / f"gptq-{layers}"
    size = make_checkpoint(source, layers)
    rows = []
    for to in targets:
        copied = copy_seconds(source, folder / "copy")
        row = {"to": to, "layers": layers, "bytes": size, "copy_seconds": round(copied, 2)}
        row |= convert_in_a_process(source, folder / "converted", to)
        rows.append(row | {"share_of_copy_speed": round(copied / row["seconds"], 3), "load": os.getloadavg()[0]})
        print(json.dumps(rows[-1]), flush=True)
    shutil.rmtree(source)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, nargs="+", default=[9, 22, 49])
    parser.add_argument("--to", nargs="+", default=["compressed-tensors", "orbax"])
    parser.add_argument("--folder", help="where there is room (default: the system's temporary folder)")
    parser.add_argument("--json", help="a file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = [row for layers in arguments.layers for row in measured(Path(folder), layers, arguments.to)]
    if arguments.json:
        publish(arguments.json, "convert_memory", {"rows": rows})


if __name__ == "__main__":
    main()
