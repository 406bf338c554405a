"""Memory of `jq4 convert` where one packed weight is larger than --memory: experts in one tensor, a vocabulary.

    python -m benchmarks.convert_large [--gigabytes 1.5] [--folder DIR] [--json FILE]

    experts      gpt-oss' MXFP4 [E, 5760, 2880], E as many as make the size    -> mxfp4 (compressed-tensors), orbax
    vocabulary   compressed-tensors' int4 [V, 4096] with zero points in groups of 128    -> compressed-tensors, orbax

Each conversion is a process of its own with --memory 1GB, the default; `peak_resident_bytes` is its resident memory at
most, mapped pages of the files included. `--to gptq` of the vocabulary is asked for too: GPTQ's words lie across the
rows, so that it must say beforehand that it takes more memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.convert_memory import convert_in_a_process
from benchmarks.provenance import publish
from jq4.checkpoint.safetensors_files import write

ROWS, BLOCKS, WIDTH, GROUP = 5760, 90, 4096, 128
TARGETS = {"experts": ("mxfp4", "orbax"), "vocabulary": ("compressed-tensors", "orbax")}
MODULE = "model.layers.0.mlp.experts.gate_up_proj"


def experts(folder: Path, size: int) -> None:
    count = max(1, size // (ROWS * BLOCKS * 17))
    blocks, scales = (count, ROWS, BLOCKS, 16), (count, ROWS, BLOCKS)
    _write(folder, {"quant_method": "mxfp4"}, {
        f"{MODULE}_blocks": ("U8", blocks, lambda: _noise(blocks)),
        f"{MODULE}_scales": ("U8", scales, lambda: _noise(scales) % 16 + 112),
    })  # fmt: skip


def vocabulary(folder: Path, size: int) -> None:
    rows = size // (WIDTH // 2) // 32 * 32
    groups, words = WIDTH // GROUP, (rows, WIDTH // 8)
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    zeros, scales = (rows // 8, groups), (rows, groups)
    _write(folder, quantization, {
        "head.weight_packed": ("I32", words, lambda: _noise((rows, WIDTH // 2)).view(np.int32)),
        "head.weight_scale": ("F16", scales, lambda: (_noise(scales) / np.float16(256) + np.float16(1))),
        "head.weight_zero_point": ("I32", zeros, lambda: _noise((rows // 8, groups * 4)).view(np.int32)),
        "head.weight_shape": ("I64", (2,), lambda: np.array([rows, WIDTH], np.int64)),
    })  # fmt: skip


def _noise(shape: tuple[int, ...]) -> np.ndarray:
    """Random bytes, which do not compress; the same 64 MiB again and again."""
    return np.resize(np.random.default_rng(0).integers(0, 256, 2**26, np.uint8), shape)


def _write(folder: Path, quantization: Any, tensors: Any) -> None:
    folder.mkdir()
    write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", "quantization_config": quantization}))


def refusal(source: Path, target: Path, to: str) -> str:
    """What a conversion that cannot be done within the bound says."""
    words = [sys.executable, "-m", "jq4", "convert", str(source), str(target), "--to", to]
    ran = subprocess.run(words, capture_output=True, text=True)
    if ran.returncode != 1 or target.exists():
        raise SystemExit(f"--to {to}: exit code {ran.returncode}, wanted a refusal")
    return ran.stderr.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=1.5, help="of the packed weight")
    parser.add_argument("--folder", help="where there is room (default: the system's temporary folder)")
    parser.add_argument("--json", help="a file to write")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for make in (experts, vocabulary):
            source = folder / make.__name__
            make(source, round(arguments.gigabytes * 10**9))
            size = (source / "model.safetensors").stat().st_size
            for to in TARGETS[make.__name__]:
                found = convert_in_a_process(source, folder / "out", to)
                rows.append({"weight": make.__name__, "bytes": size, "to": to, **found})
                print(json.dumps(rows[-1]), flush=True)
        refused = refusal(folder / "vocabulary", folder / "out", "gptq")
        print(refused)
    if arguments.json:
        publish(arguments.json, "convert_large", {"rows": rows, "refused": refused})


if __name__ == "__main__":
    main()
