"""A .gguf file (or its shards) as a Checkpoint: weights by Hugging Face's names, a config, a tokenizer.

Weights come as QArrays [N, K] or dense; llama's query and key rows are put back in Hugging Face's order, and Gemma's
norms, kept as 1 + w, come as w; experts come one by one (experts.py). An architecture that is not known keeps GGUF's
names, and has no config.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jq4.checkpoint.foreign.gguf import qarrays
from jq4.checkpoint.foreign.gguf.config_in import FREQUENCIES, LONG, SHORT, config_of
from jq4.checkpoint.foreign.gguf.container import Container, GGUFTensor, damaged, read_container
from jq4.checkpoint.foreign.gguf.expert_settings import number_of_experts
from jq4.checkpoint.foreign.gguf.experts import Made, made_of
from jq4.checkpoint.foreign.gguf.names import from_llama_order, hf_name, is_shifted_norm, permuted_heads
from jq4.checkpoint.foreign.gguf.tokenizer_in import tokenizer_files
from jq4.checkpoint.foreign.weights import Checkpoint, LazyWeight
from jq4.errors import JQ4Error

NAME = "gguf"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def open_gguf(file: Path) -> Checkpoint:
    """The checkpoint of a .gguf file; given one shard, all of them. Raises JQ4Error as `read_container` does."""
    container = _with_its_shards(file)
    architecture = str(container.metadata.get("general.architecture", ""))
    config = config_of(container)
    files, notes = tokenizer_files(container.metadata, str(container.file))
    if config is None:
        notes.append(f"the architecture {architecture!r} is not known: weights keep GGUF's names; there is no config")
    weights: dict[str, LazyWeight] = {}
    for tensor in container.tensors.values():
        if config is not None and tensor.name in (FREQUENCIES, LONG, SHORT):
            continue  # these became rope_scaling
        made = None if config is None else made_of(tensor, container.tensors, architecture, number_of_experts(config))
        for weight in [_weight(tensor, architecture, config, notes)] if made is None else map(_of_experts, made):
            if weight.name in weights:
                raise damaged(tensor.file, f"tensor {tensor.name!r} is another {weight.name!r}", "each weight once")
            weights[weight.name] = weight
    return Checkpoint(NAME, weights, config, {}, files, tuple(notes))


def _weight(tensor: GGUFTensor, architecture: str, config: Mapping[str, Any] | None, notes: list[str]) -> LazyWeight:
    name = None if config is None else hf_name(tensor.name, architecture)
    if config is None or name is None:
        if config is not None:
            notes.append(f"tensor {tensor.name!r} has no name in a {config['model_type']} model: it keeps its own")
        return _weight_called(tensor.name, tensor, 0, False)
    heads = permuted_heads(tensor.name, architecture, config)
    return _weight_called(name, tensor, heads, is_shifted_norm(tensor.name, architecture))


def _weight_called(name: str, tensor: GGUFTensor, heads: int, shifted: bool) -> LazyWeight:
    """`heads`: of a tensor whose rows are in llama.cpp's order, which are read together."""
    by_rows = None if heads else lambda rows: _reader(tensor.rows(rows), 0, shifted)()
    abstract, read = _abstract(tensor, tensor.shape), _reader(tensor, heads, shifted)
    return LazyWeight(name, abstract, read, (tensor.name,), by_rows)


def _of_experts(made: Made) -> LazyWeight:
    kind, shape = made.tensors[0].kind, made.shape

    def read() -> Any:
        held = made.of([_array(one) for one in made.tensors])
        if kind.dtype is None:
            return qarrays.to_qarray(kind, held)
        return np.swapaxes(held, -1, -2) if made.turned else held

    given = (*shape[:-2], shape[-1], shape[-2]) if made.turned else shape
    return LazyWeight(made.name, _abstract(made.tensors[0], given), read, tuple(one.name for one in made.tensors))


def _array(tensor: GGUFTensor) -> np.ndarray:
    """The blocks of a tensor, or the elements of a dense one."""
    if tensor.kind.dtype is None:
        return tensor.blocks()
    return tensor.blocks().reshape(-1).view(tensor.kind.dtype).reshape(tensor.shape)


def _abstract(tensor: GGUFTensor, shape: tuple[int, ...]) -> Any:
    if tensor.kind.dtype is not None:
        return jax.ShapeDtypeStruct(shape, tensor.kind.dtype)
    if len(shape) < 2:
        raise JQ4Error(
            f"{tensor.file}: tensor {tensor.name!r} is a row in {tensor.kind.name}, wanted a matrix, or a dense type. "
            "The file is damaged; download it again."
        )
    return qarrays.abstract(tensor.kind, shape)


def _reader(tensor: GGUFTensor, heads: int, shifted: bool) -> Callable[[], Any]:
    def read() -> Any:
        held = _array(tensor)
        if shifted and tensor.kind.dtype is not None:
            with np.errstate(invalid="ignore"):  # a NaN stays one
                return (held.astype(np.float32) - np.float32(1)).astype(held.dtype)
        ordered = from_llama_order(held, heads, tensor.name)
        return ordered if tensor.kind.dtype is not None else qarrays.to_qarray(tensor.kind, ordered)

    return read


def _with_its_shards(file: Path) -> Container:
    """The container of a file, with the tensors of all shards if it is one of several."""
    named = _SHARD.fullmatch(file.name)
    if named is None:
        container = read_container(file)
        if container.metadata.get("split.count", 1) != 1:
            raise JQ4Error(
                f"{file}: is one of {container.metadata['split.count']} shards, wanted a name that ends in "
                "-00001-of-0000N.gguf so that the others are found. Rename the shards as they were downloaded."
            )
        return container
    count = int(named[3])
    if not 1 <= count <= 10_000:
        raise JQ4Error(f"{file}: its name says {count} shards, wanted 1 to 10000. Rename it as it was downloaded.")
    shards = []
    for number in range(1, count + 1):
        shard = file.with_name(f"{named[1]}-{number:05}-of-{named[3]}.gguf")
        if not shard.exists():
            raise JQ4Error(f"{shard}: the shard is missing, wanted beside {file.name}. Download it again.")
        shards.append(read_container(shard))
    tensors: dict[str, GGUFTensor] = {}
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name in tensors:
                raise damaged(shard.file, f"tensor {name!r} is in {tensors[name].file.name} too", "each tensor once")
            tensors[name] = tensor
    wanted = shards[0].metadata.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise damaged(file, f"its shards hold {len(tensors)} tensors", f"{wanted}")
    return Container(shards[0].file, shards[0].version, shards[0].metadata, tensors)
