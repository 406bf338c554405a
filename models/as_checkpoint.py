"""A model of ours as a checkpoint by Hugging Face's names: the way back of models.filling, for conversions.

Stacks are taken apart layer by layer, kernels [K, N] are transposed to [N, K], and what a file keeps in one tensor
(Phi-3's queries, keys and values) is joined, all without unpacking a code. A layer of a folder is read alone, when it
is asked for. What cannot be one packed tensor [N, K] grouped along K (parts packed unlike, a weight grouped along N) is
given dense, and a note says so.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4 import host_moves
from jq4.checkpoint import atomic, orbax
from jq4.checkpoint.deferred import stored_leaves
from jq4.checkpoint.foreign import Checkpoint, LazyWeight
from jq4.checkpoint.safetensors_files import parse_json
from jq4.checkpoint.savable import as_saved
from jq4.errors import JQ4Error
from jq4.paths import flatten_with_paths
from jq4.qarray import is_qarray
from models.adapted import ADAPTERS
from models.config import DecoderConfig
from models.layer_runs import LAYERS, bounds, run_name, runs_of
from models.tensor_names import Path, Place, places

_PER_INPUT = ("permutation", "input_scale", "activation_scale")  # joined weights must have the same
Part = tuple[Place, Any, int | None]  # a leaf, and the layer of it where it is a stack


def checkpoint_of_params(
    config: DecoderConfig, params: Mapping[str, Any], files: Mapping[str, bytes] | None = None
) -> Checkpoint:
    """The checkpoint of params in memory. Raises JQ4Error for a leaf that is missing or misshapen."""
    leaves = {path: as_saved(leaf) for path, leaf in flatten_with_paths(params.get("params", params))}
    return _checkpoint(config, leaves, dict(files or {}), "the params")


def checkpoint_of_folder(folder: str | FilePath, *, verify: bool = True) -> Checkpoint:
    """The checkpoint of a folder of jq4's own that holds a model; weights are read when they are asked for.

    verify: whether every file's SHA-256 is checked first. Raises JQ4Error for what is missing, damaged or no model.
    """
    folder = FilePath(folder)
    if (folder / ADAPTERS).exists():
        raise JQ4Error(
            f"{folder}: holds adapters, which a checkpoint of weights would leave out: merge them first, with "
            f"jq4 merge, or remove {folder / ADAPTERS}"
        )
    manifest = orbax.read_manifest(folder)
    stored = stored_leaves(folder, manifest, verify)
    files = {name: orbax.read_extra_file(folder, name) for name in manifest.extra_files}
    if "config.json" not in files:
        raise JQ4Error(f"{folder}: holds weights and no config.json, so it is no model whose tensors have names.")
    config = DecoderConfig.from_hf(parse_json(files["config.json"], f"{folder}: config.json"))
    leaves = {path.removeprefix("params/"): leaf for path, leaf in stored.items()}
    return _checkpoint(config, leaves, files, str(folder), atomic.reading(folder / manifest.data))


def _checkpoint(
    config: DecoderConfig,
    leaves: Mapping[str, Any],
    files: Mapping[str, bytes],
    where: str,
    held: contextlib.AbstractContextManager[None] | None = None,
) -> Checkpoint:
    """`held`: what keeps the folder from being replaced, as long as any of its weights may be read."""
    if held is not None:
        held.__enter__()
    weights, notes = {}, {}
    for name, parts in _parts_by_name(config, leaves, where):
        value, note = _described(parts)
        if note:
            notes[f"{parts[0][0].name.format(layer='*')} is given dense: {note}"] = None
        read_it, peek = functools.partial(_read, parts, bool(note), held), functools.partial(_peek, parts, held)
        weights[name] = LazyWeight(name, value, read_it, (name,), peek=peek)
    kept = json.loads(files["config.json"]) if "config.json" in files else config.to_hf()
    return Checkpoint(
        format="orbax",
        weights=weights,
        config={key: value for key, value in kept.items() if key != "quantization_config"},
        files={name: content for name, content in files.items() if name != "config.json"},
        notes=tuple(notes),
    )


def _parts_by_name(config: DecoderConfig, leaves: Mapping[str, Any], where: str) -> Iterator[tuple[str, list[Part]]]:
    """Each tensor's name and the leaves that make it, in the order of a file: embedding, layers, rest."""
    table, runs = places(config), runs_of(_keys_of_layers(leaves))
    by_name: dict[str, list[tuple[Path, Place]]] = {}
    for path, place in table.items():
        by_name.setdefault(place.name, []).append((path, place))
    outside = {name: each for name, each in by_name.items() if not each[0][1].stacked}
    for name, each in outside.items():
        if each[0][0][0] == "embed":
            yield f"model.{name}", [(place, _leaf(leaves, path, place, None, where), None) for path, place in each]
    for first, last in bounds(config, runs):
        key = (run_name(config, first),) if runs else ()
        for layer in range(first, last):
            for name, each in by_name.items():
                if name not in outside:
                    found: list[Part] = [
                        (place, _leaf(leaves, (LAYERS, *key, *path[1:]), place, last - first, where), layer - first)
                        for path, place in each
                    ]
                    yield f"model.{name.format(layer=layer)}", found
    for name, each in outside.items():
        if each[0][0][0] != "embed":
            full = name if name == "lm_head.weight" else f"model.{name}"
            yield full, [(place, _leaf(leaves, path, place, None, where), None) for path, place in each]


def _keys_of_layers(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {LAYERS: {path.split("/")[1]: None for path in leaves if path.startswith(f"{LAYERS}/")}}


def _leaf(leaves: Mapping[str, Any], path: Path, place: Place, layers: int | None, where: str) -> Any:
    name = "/".join(path)
    if name not in leaves:
        raise JQ4Error(f"{where}: the leaf {name} is missing. Give the params of a Decoder of this config.")
    wanted = place.shape if layers is None else (layers, *place.shape)
    if tuple(leaves[name].shape) != wanted:
        raise JQ4Error(f"{where}: {name} has shape {tuple(leaves[name].shape)}, wanted {wanted} by the config.")
    return leaves[name]


def _described(parts: list[Part]) -> tuple[Any, str]:
    """The tensor's arrays as ShapeDtypeStructs, and why it is dense though a leaf is packed; "" where it is not."""
    sketches = [_sketch(part, several=len(parts) > 1) for part in parts]
    try:
        return host_moves.described(_one(sketches)), ""
    except JQ4Error as error:
        return jax.ShapeDtypeStruct(parts[0][0].stored, _common([jnp.dtype(one.dtype) for one in sketches])), str(error)


def _sketch(part: Part, several: bool) -> Any:
    """The leaf's slice in the tensor's axes, without its values, but for those that joined weights must share."""
    place, leaf, layer = part
    abstract = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), leaf)
    drawn = _turned(place, _slice(host_moves.phantom(abstract), layer))
    if not several or not is_qarray(leaf):
        return drawn
    shared = {name: getattr(leaf, name) for name in _PER_INPUT if getattr(leaf, name) is not None}
    read = {name: np.asarray(_slice(value, layer)) for name, value in shared.items()}
    turned = {
        name: host_moves.transposed(one) if place.transposed and one.ndim > 1 else one for name, one in read.items()
    }
    return dataclasses.replace(drawn, **turned)


def _read(parts: list[Part], dense: bool, held: Any) -> Any:
    """`held` is only kept alive, as long as this may be called."""
    del held
    values = [_turned(place, jax.tree.map(np.asarray, _slice(leaf, layer))) for place, leaf, layer in parts]
    return _dense(values) if dense else _one(values)


def _peek(parts: list[Part], held: Any, path: str) -> np.ndarray | None:
    """An array of a leaf that a weight is made of alone; None of one that is joined."""
    del held
    (_, leaf, layer), *others = parts
    for name in path.split("/"):
        leaf = getattr(leaf, name, None)
    if leaf is None or others:
        return None
    return np.asarray(leaf[...] if layer is None else leaf[layer if leaf.shape[0] > 1 else 0])


def _slice(leaf: Any, layer: int | None) -> Any:
    if layer is not None:
        return host_moves.layer(leaf, layer)
    return jax.tree.map(lambda one: one[...], leaf)


def _turned(place: Place, value: Any) -> Any:
    return host_moves.transposed(value) if place.transposed else value


def _one(values: list[Any]) -> Any:
    """The tensor, of its parts; a JQ4Error says why it cannot be one."""
    packed = [value for value in values if is_qarray(value)]
    for value in packed:
        if value.axis != -1:
            raise JQ4Error(f"it is grouped along its outputs, axis {value.axis} of [N, K]")
    if not packed:
        return values[0] if len(values) == 1 else np.concatenate(values)
    if len(packed) < len(values):
        raise JQ4Error("some of its parts are packed and some dense")
    return packed[0] if len(packed) == 1 else host_moves.joined(packed)


def _dense(values: list[Any]) -> np.ndarray:
    arrays = [np.asarray(value.dequantize()) if is_qarray(value) else value for value in values]
    dtype = _common([one.dtype for one in arrays])
    return np.concatenate([one.astype(dtype, copy=False) for one in arrays])


def _common(dtypes: list[Any]) -> Any:
    return dtypes[0] if len(set(dtypes)) == 1 else np.dtype(np.float32)
