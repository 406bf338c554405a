"""Where every byte of the output goes, known before the first is made: so weights may be written in any order.

A file of safetensors begins with a header that tells where each tensor lies, which follows from dtypes and shapes
alone. Tensors keep the order of the source; a shard is closed before the tensor that would make it larger than asked
(a tensor that is larger itself gets a shard of its own). The index, config.json and the tokenizer are small and are
written last: a folder without them is no model.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jq4.checkpoint.foreign.gguf.block_types import BY_NAME
from jq4.checkpoint.foreign.writing import Planned
from jq4.checkpoint.safetensors_files import DTYPES, INDEX, SINGLE, head_of
from jq4.errors import JQ4Error

SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one tensor lies."""

    file: str
    start: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """The files of an output.

    Attributes:
      heads: what each data file begins with, by the file's name.
      sizes: bytes of each data file.
      places: where each tensor lies, by its name.
      beside: the small files, by name.
    """

    heads: Mapping[str, bytes]
    sizes: Mapping[str, int]
    places: Mapping[str, Place]
    beside: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(self.sizes.values()) + sum(map(len, self.beside.values()))


def safetensors_layout(planned: Iterable[Planned], shard_bytes: int, beside: Mapping[str, bytes]) -> Layout:
    """One model.safetensors, or shards and their index where it would be larger than `shard_bytes`."""
    shards = _shards(_tensors_of(planned), shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}" for i in range(len(shards))]
    names = [name.removesuffix(".safetensors") + ".safetensors" for name in names]
    heads, sizes, places = {}, {}, {}
    for name, tensors in zip(names, shards, strict=True):
        heads[name], lying = head_of(tensors)
        places |= {tensor: Place(name, start, stop - start) for tensor, (start, stop) in lying.items()}
        sizes[name] = max([len(heads[name]), *(stop for _, stop in lying.values())])
    index = {} if len(shards) == 1 else {INDEX: _index(places)}
    return Layout(heads, sizes, places, {**beside, **index})


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Of a tensor, by safetensors' name of its dtype or GGUF's of its type."""
    if dtype in DTYPES:
        return math.prod(shape) * DTYPES[dtype].itemsize
    return math.prod(shape) // BY_NAME[dtype].length * BY_NAME[dtype].nbytes


def _tensors_of(planned: Iterable[Planned]) -> dict[str, tuple[str, tuple[int, ...]]]:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for each in planned:
        for name, described in each.tensors.items():
            if name in tensors or name == "__metadata__":
                raise JQ4Error(
                    f"{each.weight.name}: would be written as {name!r}, a name that is "
                    f"{'taken by another weight' if name in tensors else 'no tensor may have'}; rename it in the source"
                )
            tensors[name] = described
    return tensors


def _shards(tensors: Mapping[str, Any], shard_bytes: int) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = [{}]
    held = 0
    for name, (dtype, shape) in tensors.items():
        size = nbytes_of(dtype, shape)
        if shards[-1] and held + size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = (dtype, shape)
        held += size
    return shards


def _index(places: Mapping[str, Place]) -> bytes:
    total = sum(place.nbytes for place in places.values())
    index = {"metadata": {"total_size": total}, "weight_map": {name: place.file for name, place in places.items()}}
    return json.dumps(index, indent=2).encode()
