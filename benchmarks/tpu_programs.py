"""Whole models on several TPUs through the production compiler, without the hardware: do they compile, and fit?

    python -m benchmarks.tpu_programs [--model llama-3-70b] [--slice v5e-16] [--json FILE]

The scanned decoder of models/ with packed weights (int4, groups of 128, the TPU layout), a step of decoding and one of
prefill, compiled for a mesh of data x model: the columns of q, k, v, gate and up, the rows of o and down, the heads of
the cache, the words of the embedding and the columns of the output head lie along `model`, the batch along `data`.
Nothing is allocated: weights are shapes with shardings. From the compiled program, per device:

    memory        arguments, temporaries and results that are not written in place, beside the chip's HBM
    kernels       how often our kernel runs in a step: 7 products a layer
    dense         leaves that went dense (jq4's record) + float arrays of the shape of a device's part of a weight
    collectives   how often each kind runs in a step
    moved         HBM bytes of a step (benchmarks/tpu_lab/hlo.py), and their time at the chip's bandwidth
"""

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import jq4
from benchmarks.aot import missing
from benchmarks.provenance import publish
from benchmarks.tpu_lab import compiling
from benchmarks.tpu_lab.chips import CHIPS
from benchmarks.tpu_lab.hlo import Program
from jq4.partition import part_specs
from jq4.qarray import is_qarray
from models.config import DecoderConfig
from models.decoder import Decoder
from models.kv_cache import empty_cache

_LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3-70b": _LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
SLICES = {  # chip, topology, data x model
    "v5e-8": ("v5e", "v5e:2x4", (1, 8)),
    "v5e-16": ("v5e", "v5e:4x4", (2, 8)),
    "v6e-8": ("v6e", "v6e:2x4", (1, 8)),
}
PRODUCTS_OF_A_LAYER = 7
BATCH, CONTEXT, PROMPT = 16, 8192, 384  # 16 x 384 rows are no length of any weight's part


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of the decoder: `tokens` a row, for `batch` rows, with a cache of `slots` tokens."""

    name: str
    batch: int
    tokens: int
    slots: int


STEPS = (Step("decode", BATCH, 1, CONTEXT), Step("prefill", BATCH, PROMPT, CONTEXT))


def spec_of_weight(path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Where a dense weight lies along `model`, by its name."""
    name = path.split("/")[-2]
    if name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        return PartitionSpec(None, None, "model")
    if name in ("o_proj", "down_proj"):
        return PartitionSpec(None, "model", None)
    if name == "embed":
        return PartitionSpec("model")
    if name == "lm_head":
        return PartitionSpec(None, "model")
    return PartitionSpec()


def mesh_of(name: str) -> Mesh:
    """A slice's compile-only devices as data x model."""
    chip, topology, shape = SLICES[name]
    devices = compiling.devices(CHIPS[chip], topology)
    return Mesh(np.array(devices).reshape(shape), ("data", "model"))


def packed_weights(decoder: Decoder, mesh: Mesh) -> Any:
    """The decoder's params, packed for the mesh's chip: ShapeDtypeStructs with shardings."""
    kind = mesh.devices.flat[0].device_kind

    def packed() -> Any:
        params = decoder.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
        return jq4.prepare(jq4.quantize(params, jq4.Recipe.preset("rtn-w4g128")), kind)

    def place(keys: Any, leaf: Any) -> Any:
        spec = spec_of_weight(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf.shape)
        if not is_qarray(leaf):
            return _placed(leaf, mesh, spec)
        entries = [*spec, *[None] * (leaf.ndim - len(spec))]
        return jax.tree.map(lambda part, own: _placed(part, mesh, own), leaf, part_specs(leaf, entries))

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(packed), is_leaf=is_qarray)


def _placed(leaf: Any, mesh: Mesh, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


def cache_of(config: DecoderConfig, step: Step, mesh: Mesh) -> Any:
    """The cache: keys and values [L, B, S, Hkv, hd] with heads along `model` and rows along `data`."""
    empty = jax.eval_shape(lambda: empty_cache(config, step.batch, step.slots, jnp.bfloat16))
    specs = {5: PartitionSpec(None, "data", None, "model"), 2: PartitionSpec("data"), 0: PartitionSpec()}
    return jax.tree.map(lambda leaf: _placed(leaf, mesh, specs[leaf.ndim]), empty)


def compile_step(config: DecoderConfig, step: Step, mesh: Mesh) -> tuple[Any, Any, int]:
    """(the executable, jq4's record of what did not stay packed, kernels in the program given to the compiler)."""
    decoder = Decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, spec_of_weight(path, shape))

    apply: Any = jq4.quantized(decoder.apply, strict=True, shardings=sharding)

    def run(params: Any, tokens: jax.Array, cache: Any) -> Any:
        last = jnp.full((step.batch,), step.tokens - 1, jnp.int32)
        return apply({"params": params}, tokens, cache=cache, select=last)

    tokens = _placed(jax.ShapeDtypeStruct((step.batch, step.tokens), jnp.int32), mesh, PartitionSpec("data"))
    weights, cache = packed_weights(decoder, mesh), cache_of(config, step, mesh)
    chosen = jax.tree.map(lambda leaf: Format(Layout.AUTO, leaf.sharding), cache)  # as a server lets XLA choose it once
    logits = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    places = (jax.tree.map(lambda leaf: leaf.sharding, weights), tokens.sharding, chosen)
    jitted = jax.jit(run, donate_argnums=2, in_shardings=places, out_shardings=(logits, chosen))
    anywhere = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), cache)
    traced = jitted.trace(weights, tokens, anywhere)
    lowered = traced.lower(lowering_platforms=("tpu",))
    return lowered.compile(), apply.record, kernels_given(lowered.as_text())


def kernels_given(text: str) -> int:
    """Kernels of a StableHLO program, each call of a function that holds one counted; a loop's body counts once."""
    functions = re.split(r"\n  func\.func ", text)[1:]
    bodies = {re.search(r"@([\w.]+)", body)[1]: body for body in functions}  # type: ignore[index]

    def count(name: str) -> int:
        called = re.findall(r"call @([\w.]+)\(", bodies[name])
        return bodies[name].count("@tpu_custom_call(") + sum(count(inner) for inner in called if inner in bodies)

    return count("main")


def program_of(executable: Any) -> Program | None:
    """The compiled program; None where jaxlib cannot read what libtpu wrote (asynchronous collectives on v6e)."""
    try:
        return Program(executable.as_text())
    except jax.errors.JaxRuntimeError:
        return None


def measure(model: str, place: str, step: Step) -> dict[str, Any]:
    """One row: what the compiled step needs and holds, per device."""
    config, mesh, start = DecoderConfig.from_hf(MODELS[model]), mesh_of(place), time.perf_counter()
    executable, record, given = compile_step(config, step, mesh)
    memory, program = executable.memory_analysis(), program_of(executable)
    hbm = CHIPS[SLICES[place][0]].hbm
    needed = (
        memory.argument_size_in_bytes + memory.temp_size_in_bytes
        + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )  # fmt: skip
    return {
        "model": model, "slice": place, "mesh": dict(mesh.shape), **dataclasses.asdict(step),
        "argument_bytes": memory.argument_size_in_bytes, "temp_bytes": memory.temp_size_in_bytes,
        "needed_bytes": needed, "hbm_bytes": hbm, "fits": needed < hbm,
        "kernels_given": given, "wanted_kernels": PRODUCTS_OF_A_LAYER * config.num_layers,
        "dense": len(record.dense), "relaid": len(record.relaid),
        **({} if program is None else _counted(program, parts_of_weights(config, mesh))),
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def _counted(program: Program, parts: set[tuple[int, ...]]) -> dict[str, Any]:
    return {
        "kernels": program.custom_calls(),
        "float_weights": program.floats_of_shape(parts),
        "collectives": program.collectives(),
        "moved_bytes": sum(one.times * one.nbytes for one in program.operations()),
    }


def parts_of_weights(config: DecoderConfig, mesh: Mesh) -> set[tuple[int, ...]]:
    """The shapes of one device's part of one layer's packed weights, were they dense."""
    weights = packed_weights(Decoder(config), mesh)
    leaves = jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_qarray)
    packed = {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf.shape for keys, leaf in leaves if is_qarray(leaf)
    }
    places = {path: NamedSharding(mesh, spec_of_weight(path, shape)) for path, shape in packed.items()}
    return {places[path].shard_shape(shape)[-2:] for path, shape in packed.items()}


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="per device, from the compiled program")
    for name in (
        "model",
        "slice",
        "step",
        "needs GiB",
        "of",
        "temporaries GiB",
        "kernels",
        "dense",
        "collectives",
        "moved GiB",
        "ms",
    ):
        table.add_column(name)
    gib: Callable[[int], str] = lambda count: f"{count / 2**30:.2f}"  # noqa: E731
    for row in rows:
        moved, bandwidth = row.get("moved_bytes"), CHIPS[SLICES[row["slice"]][0]].bandwidth
        table.add_row(
            row["model"], row["slice"], f"{row['name']} {row['batch']} x {row['tokens']}", gib(row["needed_bytes"]),
            gib(row["hbm_bytes"]), gib(row["temp_bytes"]), f"{row.get('kernels', '?')} of {row['wanted_kernels']}",
            f"{row['dense']} + {row.get('float_weights', '?')}",
            ", ".join(f"{kind} {count}" for kind, count in sorted(row.get("collectives", {}).items())),
            gib(moved) if moved else "?", f"{1e3 * moved / bandwidth:.2f}" if moved else "?",
        )  # fmt: skip
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--slice", nargs="+", choices=list(SLICES), default=list(SLICES))
    parser.add_argument("--step", nargs="+", choices=[step.name for step in STEPS], default=[s.name for s in STEPS])
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    if reason := missing("v5e:2x4"):
        print(f"nothing can be compiled: {reason}", file=sys.stderr)
        return 1
    rows = []
    for model in options.model:
        for place in options.slice:
            for step in (step for step in STEPS if step.name in options.step):
                rows.append(measure(model, place, step))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    Console(width=160).print(table_of(rows))
    if options.json:
        publish(options.json, "tpu_programs", {"rows": rows})
    return 0 if all(map(_as_wanted, rows)) else 1


def _as_wanted(row: dict[str, Any]) -> bool:
    """It fits, nothing went dense, and every product of a layer is a kernel, in the program given and in that made."""
    whole = row.get("kernels", row["wanted_kernels"]) == row["wanted_kernels"]
    return row["fits"] and not row["dense"] and row["kernels_given"] == PRODUCTS_OF_A_LAYER and whole


if __name__ == "__main__":
    sys.exit(main())
