"""Memory of `jq4 merge`: a Llama-shaped model of 4 bits with adapters, merged to dense and to packed weights.

    python -m benchmarks.merge_memory [--layers 4 8] [--rank 16] [--folder DIR] [--json FILE]

The model has random weights (hidden 4096, inner 11008; 32,000 words), is packed by `jq4 quantize`, and its adapters, of
every linear layer, are drawn. Each merge runs as a process of its own; the peak is its resident memory at most, mapped
pages included. Layers are stacked, and merged one by one into the result's stack: `largest_leaf_bytes` is the largest
stack's, dense in float32, and `model_bytes` that of all of them.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jq4
from benchmarks.convert_memory import measured_command
from benchmarks.driver_memory import make_checkpoint
from benchmarks.provenance import publish
from jq4.qarray import is_qarray
from models.language_model import LanguageModel

RECIPE = "rtn-w4g128"


def adapted_folder(folder: Path, layers: int, rank: int) -> tuple[Path, list[int]]:
    """A packed model with adapters on disk; the bytes of its packed leaves, dense in float32."""
    dense, packed = folder / "dense", folder / "packed"
    dense.mkdir()
    make_checkpoint(dense, layers)
    measured_command("quantize", dense, packed, "--recipe", RECIPE)
    shutil.rmtree(dense)
    model = LanguageModel.from_folder(packed)
    sizes = [4 * leaf.size for leaf in jax.tree.leaves(model.params, is_leaf=is_qarray) if is_qarray(leaf)]
    random = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda part: random.normal(0, 0.01, part.shape).astype(np.float32), jq4.lora(model.params, rank)
    )
    jq4.train.save_lora(folder / "adapters", drawn)
    return packed, sizes


def measured(folder: Path, layers: int, rank: int) -> list[dict[str, Any]]:
    """A row for dense weights, and one for packed."""
    packed, sizes = adapted_folder(folder, layers, rank)
    rows = []
    for to, options in (("dense", []), (RECIPE, ["--recipe", RECIPE])):
        found = measured_command("merge", packed, folder / "merged", "--adapters", folder / "adapters", *options)
        shutil.rmtree(folder / "merged")
        held = {"largest_leaf_bytes": max(sizes), "model_bytes": sum(sizes)}
        rows.append({"to": to, "layers": layers, "rank": rank, **held, **found})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", help="where there is room (default: the system's temporary folder)")
    parser.add_argument("--json", help="a file to write")
    options = parser.parse_args()
    rows = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows += measured(Path(folder), layers, options.rank)
    if options.json:
        publish(options.json, "merge_memory", {"rows": rows})


if __name__ == "__main__":
    main()
