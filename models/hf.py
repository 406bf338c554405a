"""Hugging Face folders: config.json and safetensors in, a decoder's params out, and back.

What is dense here; packed folders and files of other formats are read by models.filling, which this reads with too.
Everything about names and shapes is checked before the first byte is copied (models.matching).
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jq4.checkpoint.foreign import open_checkpoint
from jq4.checkpoint.safetensors_files import DTYPES, SINGLE, read_json, write
from jq4.errors import JQ4Error
from models.config import DecoderConfig
from models.filling import params_of
from models.matching import check_dense
from models.tensor_names import Place, places

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def load_config(folder: str | Path) -> DecoderConfig:
    """The config of a Hugging Face folder. Raises JQ4Error if it is missing, damaged or of an unknown architecture."""
    return DecoderConfig.from_hf(read_json(Path(folder) / "config.json"))


def load_params(folder: str | Path, config: DecoderConfig, dtype: Any = None) -> dict[str, Any]:
    """The decoder's dense params from a folder's safetensors, in the dtype of the files unless another is given.

    Raises JQ4Error, naming file and tensor, for a missing, unknown or misshapen tensor, a missing or damaged shard,
    a pickle, and a checkpoint whose weights are packed.
    """
    checkpoint = open_checkpoint(folder)
    check_dense(str(folder), checkpoint)
    return params_of(str(folder), checkpoint, config, dtype)


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
            sources[_full_name(place, layer)].append((place, leaf, layer))
    tensors = {}
    for name, parts in sources.items():
        place, leaf, _ = parts[0]
        tensors[name] = (_DTYPE_NAMES[np.dtype(leaf.dtype)], place.stored, lambda parts=parts: _joined(parts))
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / SINGLE, tensors)
    _write_config(folder, config, str(np.dtype(_leaf(params, ("embed", "embedding")).dtype)))


def _full_name(place: Place, layer: int | None) -> str:
    return place.name if place.name == "lm_head.weight" else "model." + place.name.format(layer=layer)


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


def _write_config(folder: Path, config: DecoderConfig, dtype: str) -> None:
    raw = config.to_hf()
    raw.pop("quantization_config", None)
    raw["dtype" if "dtype" in raw else "torch_dtype"] = dtype
    temporary = folder / "config.json.partial"
    temporary.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / "config.json")
