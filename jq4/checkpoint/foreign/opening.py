"""Opens a folder or file of any format that jq4 reads, known by its contents and not by its label alone.

A reader is a module with

    NAME                                        what the format is called
    claims(tensors, quantization) -> bool       whether these tensors (names, dtypes, shapes) are of its format
    read(tensors, quantization, config) -> (weights, notes)

where `weights` are the LazyWeights that it makes of packed tensors, each naming the tensors that it takes. What no
weight takes is dense, and kept as it is. `notes` say where the label and the contents disagree.
"""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from jq4.checkpoint.foreign.weights import Checkpoint, LazyWeight, dense_weight
from jq4.checkpoint.safetensors_files import INDEX, SINGLE, StoredTensor, open_tensors, read_json, read_small_file
from jq4.errors import JQ4Error

# the modules of this package that read a format, in the order in which they are asked
READERS: tuple[str, ...] = (
    "bitsandbytes",
    "mxfp4",
    "hqq",
    "torchao",
    "gemma",
    "mlx",
    "quanto",
    "compressed_tensors",
    "gptq",
    "awq",
)

_LATER_SHARD = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")

_ADAPTER = "adapter_config.json"

# what belongs to a model beside its weights
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class Reader(Protocol):
    """A module of this package."""

    NAME: str

    def claims(self, tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> bool: ...

    def read(
        self, tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any], config: Mapping[str, Any]
    ) -> tuple[list[LazyWeight], list[str]]: ...


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in a Hugging Face folder, a .safetensors file, or a .gguf file or its folder; nothing is read yet.

    Raises JQ4Error, naming file and tensor, for what is missing, damaged, contradictory or of a format that is not
    read; a pickle is always refused.
    """
    path = Path(path)
    of_llama_cpp = _gguf_file(path)
    if of_llama_cpp is not None:
        from jq4.checkpoint.foreign.gguf import open_gguf

        return open_gguf(of_llama_cpp)
    folder = path if path.is_dir() else path.parent
    if (folder / _ADAPTER).exists() and not (folder / "config.json").exists():
        raise JQ4Error(
            f"{folder}: holds an adapter ({_ADAPTER}), which is no model by itself. Merge it into its base first: "
            "peft's merge_and_unload(), then save_pretrained."
        )
    tensors = open_tensors(path)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if not isinstance(config, dict):
        raise JQ4Error(f"{folder / 'config.json'}: holds {type(config).__name__}, wanted an object of settings.")
    quantization = quantization_of(folder, config)
    reader = next((each for each in map(_module, READERS) if each.claims(tensors, quantization)), None)
    packed, notes = reader.read(tensors, quantization, config) if reader else ([], [])
    return Checkpoint(
        format=reader.NAME if reader else "safetensors",
        weights=_with_the_dense(packed, tensors),
        config={key: value for key, value in config.items() if key != "quantization_config"} or None,
        quantization=quantization,
        files={name: read_small_file(folder / name) for name in COMPANIONS if (folder / name).is_file()},
        notes=(*notes, *_left_aside(path)),
    )


def _left_aside(path: Path) -> list[str]:
    """What else lies in a folder that is read for its safetensors."""
    files = sorted(file.name for file in path.glob("*.gguf")) if path.is_dir() else []
    return (
        [f"{path} holds {', '.join(files[:3])} too; its safetensors are read: name the .gguf for that"] if files else []
    )


def _gguf_file(path: Path) -> Path | None:
    """The .gguf file (the first shard of one) that a path is, or that is all the weights of a folder."""
    if path.is_dir():
        if any((path / name).exists() for name in (SINGLE, INDEX)):
            return None
        files = [file for file in sorted(path.glob("*.gguf")) if not _LATER_SHARD.search(file.name)]
        if len(files) > 1:
            raise JQ4Error(f"{path}: holds {len(files)} .gguf files ({files[0].name}, ...); say which one.")
        return files[0] if files else None
    if path.suffix == ".gguf":
        return path
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return path if stream.read(4) == b"GGUF" else None


def quantization_of(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`quantization_config` of config.json, or what older tools wrote into a file of its own."""
    found = config.get("quantization_config") or {}
    for name in ("quantize_config.json", "quant_config.json", "quantization_config.json"):
        if not found and (folder / name).is_file():
            found = read_json(folder / name)
    if not isinstance(found, dict):
        raise JQ4Error(f"{folder}: quantization_config is {type(found).__name__}, wanted an object of settings.")
    return found


def _with_the_dense(packed: list[LazyWeight], tensors: Mapping[str, StoredTensor]) -> dict[str, LazyWeight]:
    """All weights in the order of the file, each where its first tensor stands."""
    taken = {name: weight for weight in packed for name in weight.tensors}
    weights: dict[str, LazyWeight] = {}
    for name, tensor in tensors.items():
        weight = taken.get(name) or dense_weight(tensor)
        weights.setdefault(weight.name, weight)
    return weights


def _module(name: str) -> Reader:
    return importlib.import_module(f"jq4.checkpoint.foreign.{name}")  # pyright: ignore[reportReturnType]
