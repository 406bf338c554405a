"""Peak memory of merging adapters: `jq4 merge`, which goes leaf by leaf, against the whole model in memory.

    python -m benchmarks.merge_memory [--layers 2] [--rank 16] [--folder DIR] [--json FILE]

A 7B-shaped checkpoint of random weights in bf16 (benchmarks.driver_memory) is packed by rtn-w4g128, and random adapters
beside its linear layers are merged: into the packed weights, which become dense, and into the dense checkpoint. Each
way runs in a process of its own, which tells what it held once JAX was at work and the most that it held; `whole` opens
the model, and does with jq4.merge_lora and LanguageModel.save what the command does. Both must write the same weights.
Pages of mapped files count as resident; `anonymous`, sampled every 50 ms, leaves them out.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.driver_memory import held_by, make_checkpoint, sampled

RECIPE, WAYS = "rtn-w4g128", ("jq4 merge", "whole")


def make_adapters(folder: Path, model: Path, rank: int) -> None:
    """Adapters for the model's linear layers, as drawn."""
    import jax

    import jq4
    from jq4.checkpoint.deferred import shapes_of
    from models.language_model import LanguageModel

    params, random = shapes_of(LanguageModel.unread(model).params), np.random.default_rng(0)
    begun = jax.eval_shape(lambda: jq4.lora(params, rank))
    drawn = jax.tree.map(lambda part: jax.numpy.asarray(random.normal(0, 0.02, part.shape), part.dtype), begun)
    jq4.save_lora(folder, drawn)


def child(way: str, model: str, adapters: str, out: str) -> None:
    """The measured process: one JSON line on stdout."""
    import jax
    import jax.numpy as jnp

    from jq4.driver.quantize_blocks import peak_memory

    jax.block_until_ready(jnp.zeros(8) + 1)
    start = {"start": peak_memory(), "start_anonymous": held_by("self")["RssAnon"]}
    (merge_by_command if way == WAYS[0] else merge_whole)(model, adapters, out)
    print(json.dumps(start | {"peak": peak_memory()}))


def merge_by_command(model: str, adapters: str, out: str) -> None:
    import contextlib

    from jq4.cli import main

    with contextlib.redirect_stdout(sys.stderr):
        assert main(["merge", model, out, "--adapters", adapters]) == 0


def merge_whole(model: str, adapters: str, out: str) -> None:
    import jq4
    from models.language_model import LanguageModel

    opened = LanguageModel.from_folder(model)
    params, _ = jq4.merge_lora(opened.params, jq4.restore_lora(adapters))
    dataclasses.replace(opened, params=params).save(out)


def measured(base: Path, adapters: Path, work: Path) -> dict[str, Any]:
    """Both ways' figures, and whether they wrote the same data: a data folder is named by its contents."""
    found, names = {}, set()
    for number, way in enumerate(WAYS):
        out = work / f"merged-{number}"
        told = sampled([sys.executable, "-m", "benchmarks.merge_memory", "--child", way, base, adapters, out])
        names |= {folder.name for folder in out.glob("data-*")}
        found[way] = told | {"above_start": told["peak"] - told["start"]}
    return {**found, "same_weights": len(names) == 1}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", help="where the checkpoint is made (default: a temporary folder)")
    parser.add_argument("--json", help="a file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        dense, packed, adapters = (Path(folder) / name for name in ("dense", "packed", "adapters"))
        dense.mkdir()
        make_checkpoint(dense, arguments.layers)
        command = [sys.executable, "-m", "jq4", "quantize", str(dense), str(packed), "--recipe", RECIPE]
        subprocess.run(command, check=True, stdout=sys.stderr)
        make_adapters(adapters, dense, arguments.rank)
        rows = {}
        for name, base in (("packed", packed), ("dense", dense)):
            work = Path(folder) / f"from-{name}"
            work.mkdir()
            rows[name] = {"bytes_on_disk": _bytes_in(base), **measured(base, adapters, work)}
    data = {"layers": arguments.layers, "rank": arguments.rank, "recipe": RECIPE, "bases": rows}
    print(json.dumps(data, indent=2))
    if arguments.json:
        from benchmarks.provenance import publish  # with JAX, which the process that starts the others does without

        publish(arguments.json, "merge_memory", data)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
