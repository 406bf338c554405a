"""Hugging Face folders: config.json and safetensors in, a decoder's params out, and back.

Leaves are filled one after another, layer by layer, from memory-mapped files, so that reading takes the memory of
the model and of its largest leaf. Everything about names and shapes is checked before the first byte is copied.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.checkpoint.safetensors_files import DTYPES, SINGLE, StoredTensor, open_tensors, read_json, write
from jq4.errors import JQ4Error
from models.config import DecoderConfig
from models.tensor_names import Place, places

_FLOATS = ("F64", "F32", "F16", "BF16")
_MARK = "layers.0.input_layernorm.weight"  # what stands before it is the prefix of the body's names
_HARMLESS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")  # recomputed from the config
_OF_IMAGES = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def load_config(folder: str | Path) -> DecoderConfig:
    """The config of a Hugging Face folder. Raises JQ4Error if it is missing, damaged or of an unknown architecture."""
    return DecoderConfig.from_hf(read_json(Path(folder) / "config.json"))


def load_params(folder: str | Path, config: DecoderConfig, dtype: Any = None) -> dict[str, Any]:
    """The decoder's params from a folder's safetensors, in the dtype of the files unless another is given.

    Raises JQ4Error, naming file and tensor, for a missing, unknown or misshapen tensor, a missing or damaged shard,
    a pickle, and a checkpoint whose weights are packed.
    """
    stored = open_tensors(Path(folder))
    names = matched_tensors(Path(folder), stored, config)
    return nested({path: fill_leaf(places(config)[path], each, dtype) for path, each in names.items()})


def save_params(folder: str | Path, config: DecoderConfig, params: Mapping[str, Any]) -> None:
    """Writes dense params as model.safetensors under Hugging Face's names, each in its dtype, and then config.json."""
    folder = Path(folder)
    sources: dict[str, list[tuple[Place, Any, int | None]]] = defaultdict(list)
    for path, place in places(config).items():
        leaf = _leaf(params, path)
        layers = range(config.num_layers) if place.stacked else [None]
        wanted = (config.num_layers, *place.shape) if place.stacked else place.shape
        if leaf.shape != wanted:
            raise JQ4Error(f"{'/'.join(path)}: found shape {leaf.shape}, wanted {wanted} by the config.")
        for layer in layers:
            sources[_full_name(place, "model.", layer)].append((place, leaf, layer))
    tensors = {}
    for name, parts in sources.items():
        place, leaf, _ = parts[0]
        tensors[name] = (_DTYPE_NAMES[np.dtype(leaf.dtype)], place.stored, lambda parts=parts: _joined(parts))
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / SINGLE, tensors)
    _write_config(folder, config, str(np.dtype(_leaf(params, ("embed", "embedding")).dtype)))


def matched_tensors(
    folder: Path, stored: Mapping[str, StoredTensor], config: DecoderConfig
) -> dict[tuple[str, ...], list[StoredTensor]]:
    """The tensors of every leaf, one for each layer, after all names, shapes and dtypes are found to be as wanted."""
    prefix = _prefix(stored)
    heads = {prefix.removesuffix("model.") + "lm_head.weight", "lm_head.weight"} & set(stored)
    aliases = {"lm_head.weight": next(iter(sorted(heads)), "lm_head.weight")}
    shared = prefix + "embed_tokens.weight"
    if config.tied_embeddings and shared not in stored:
        aliases[shared] = aliases["lm_head.weight"]
    elif config.tied_embeddings and heads:
        _check_same(stored[shared], stored[aliases["lm_head.weight"]])
    matched, missing = {}, []
    for path, place in places(config).items():
        names = [_full_name(place, prefix, layer) for layer in (range(config.num_layers) if place.stacked else [None])]
        names = [aliases.get(name, name) for name in names]
        missing += [name for name in names if name not in stored]
        matched[path] = [_checked(stored[name], place) for name in names if name in stored]
    if missing:
        raise _missing(folder, missing, stored, config)
    used = {tensor.name for each in matched.values() for tensor in each} | heads
    extra = [name for name in stored if name not in used and not _ignored(name, config)]
    if extra:
        raise JQ4Error(
            f"{stored[extra[0]].file}: found {_listed(extra)}, which a {config.family} model with "
            f"{config.num_layers} layers has no place for. Take the config.json that belongs to these weights."
        )
    return matched


def _prefix(stored: Iterable[str]) -> str:
    found = sorted(name.removesuffix(_MARK) for name in stored if name.endswith(_MARK))
    return found[0] if found else "model."


def _full_name(place: Place, prefix: str, layer: int | None) -> str:
    return place.name if place.name == "lm_head.weight" else prefix + place.name.format(layer=layer)


def _checked(tensor: StoredTensor, place: Place) -> StoredTensor:
    if tensor.shape != place.stored:
        raise JQ4Error(
            f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}, wanted {place.stored} by config.json. "
            "Take the config.json that belongs to these weights."
        )
    if tensor.dtype not in _FLOATS:
        raise JQ4Error(
            f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}, wanted one of {', '.join(_FLOATS)}. "
            "The checkpoint is quantized already; jq4 reads dense ones: take the original."
        )
    return tensor


def _check_same(embedding: StoredTensor, head: StoredTensor) -> None:
    if embedding.shape != head.shape or not np.array_equal(embedding.read(), head.read()):
        raise JQ4Error(
            f"{head.file}: {head.name!r} differs from {embedding.name!r}, but config.json says that they are one "
            '(tie_word_embeddings). Write "tie_word_embeddings": false in config.json if the head is its own.'
        )


def _missing(folder: Path, missing: list[str], stored: Mapping[str, StoredTensor], config: DecoderConfig) -> JQ4Error:
    raw = json.loads(config.source) if config.source else {}
    method = (raw.get("quantization_config") or {}).get("quant_method")
    if method:
        return JQ4Error(f"{folder}: the weights are packed ({method}), wanted dense ones. Take the dense original.")
    remedy = "Take the config.json that belongs to these weights, or download them again."
    if missing == ["lm_head.weight"]:
        remedy = 'Write "tie_word_embeddings": true in config.json if the head is the embedding.'
    return JQ4Error(f"{folder}: missing {_listed(missing)}; found {len(stored)} other tensors. {remedy}")


def _ignored(name: str, config: DecoderConfig) -> bool:
    return bool(_HARMLESS.search(name) or (config.family == "gemma3_text" and _OF_IMAGES.match(name)))


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{len(names)} tensor{'s' * (len(names) > 1)}: {shown}{', ...' * (len(names) > 3)}"


def fill_leaf(place: Place, tensors: list[StoredTensor], dtype: Any) -> jax.Array:
    """The leaf [L, ...] or [...]: allocated once, then filled layer by layer."""
    names = {tensor.dtype for tensor in tensors}
    found = DTYPES[names.pop()] if len(names) == 1 else np.dtype(np.float32)
    kept = np.dtype(dtype) if dtype is not None else np.dtype(np.float32) if found == np.float64 else found
    leaf = np.empty((len(tensors), *place.shape) if place.stacked else (1, *place.shape), kept)
    for row, tensor in zip(leaf, tensors, strict=True):
        part = tensor.read()[slice(*place.rows)]
        np.copyto(row, part.T if place.transposed else part, casting="unsafe")
    return jnp.asarray(leaf if place.stacked else leaf[0])


def _joined(parts: list[tuple[Place, Any, int | None]]) -> np.ndarray:
    """A tensor of the file from the leaves that share it."""
    rows = []
    for place, leaf, layer in parts:
        part = np.asarray(leaf) if layer is None else np.asarray(leaf)[layer]
        rows.append(part.T if place.transposed else part)
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _leaf(params: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    node: Any = params
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            raise JQ4Error(f"{'/'.join(path)}: the leaf is missing from the params. Give the tree of Decoder.init.")
        node = node[key]
    if not isinstance(node, jax.Array | np.ndarray):
        raise JQ4Error(
            f"{'/'.join(path)}: found a {type(node).__name__}, wanted a dense array. "
            "Use jq4.save for a packed model, or jq4.dequantize it first."
        )
    return node


def nested(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def _write_config(folder: Path, config: DecoderConfig, dtype: str) -> None:
    raw = config.to_hf()
    raw.pop("quantization_config", None)
    raw["dtype" if "dtype" in raw else "torch_dtype"] = dtype
    temporary = folder / "config.json.partial"
    temporary.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / "config.json")
