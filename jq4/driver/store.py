"""What is done of a model: its blocks on disk, one file for each array of each leaf, and the tree put together again.

    NAME/tree.json     how the leaves of a block are made of arrays (a QArray of its parts), once, by the first block
    NAME/0007.bin      array number 7 of every block, [num_blocks, *shape], row-major; block i lies at i * its bytes

All blocks have one structure, so block i of a file can be written before the blocks around it, and written again after
a kill: the same bytes at the same place. The whole tree is read as memory maps, never into memory.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.checkpoint.atomic import naming, replace_file
from jq4.errors import JQ4Error
from jq4.paths import flatten_with_paths
from jq4.qarray import QArray, is_qarray

_TREE = "tree.json"


class BlockStore:
    """Blocks of one structure below `folder`, which exists; written one by one, read one by one or stacked."""

    def __init__(self, folder: Path, num_blocks: int) -> None:
        self._folder = folder
        self._num_blocks = num_blocks
        file = folder / _TREE
        self._leaves: dict[str, Any] | None = json.loads(file.read_bytes()) if file.exists() else None

    def write(self, index: int, block: Mapping[str, Any]) -> None:
        """Puts a block's arrays at their place, and waits until the disk has them."""
        arrays: list[np.ndarray] = []
        described = {path: _describe(leaf, arrays) for path, leaf in flatten_with_paths(block)}
        if self._leaves is None:
            self._begin(described)
        self._check_same(index, described)
        for number, array in enumerate(arrays):
            with naming(self._file(number)), self._file(number).open("r+b") as file:
                file.seek(index * array.nbytes)
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                file.flush()
                os.fsync(file.fileno())

    def block(self, index: int) -> dict[str, Any]:
        """The tree of one block, its arrays on JAX's default device."""
        return self._tree(lambda spec: jnp.asarray(self._map(spec)[index]))

    def stacked(self) -> dict[str, Any]:
        """The tree of all blocks, each leaf with a leading axis of them, as memory maps."""
        return self._tree(self._map)

    def _begin(self, described: dict[str, Any]) -> None:
        self._leaves = described
        for spec in _specs_of(described):
            with naming(self._file(spec["array"])), self._file(spec["array"]).open("wb") as file:
                file.truncate(self._num_blocks * _nbytes(spec))
        replace_file(self._folder / _TREE, json.dumps(described).encode())

    def _check_same(self, index: int, described: dict[str, Any]) -> None:
        assert self._leaves is not None
        for path, spec in described.items():
            if self._leaves.get(path) != spec:
                raise JQ4Error(
                    f"block {index}: {path} became {spec}, but {self._leaves.get(path)} in the blocks before it; all "
                    "blocks of a chain must have one structure"
                )

    def _tree(self, make: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        assert self._leaves is not None
        tree: dict[str, Any] = {}
        for path, spec in self._leaves.items():
            *outer, name = path.split("/")
            node = tree
            for key in outer:
                node = node.setdefault(key, {})
            node[name] = _assemble(spec, make)
        return tree

    def _map(self, spec: dict[str, Any]) -> np.ndarray:
        shape = (self._num_blocks, *spec["shape"])
        if not _nbytes(spec):
            return np.zeros(shape, jnp.dtype(spec["dtype"]))
        size = self._num_blocks * _nbytes(spec)
        return np.memmap(self._file(spec["array"]), np.uint8, "r", 0, (size,)).view(_dtype(spec)).reshape(shape)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:04d}.bin"


def _describe(leaf: Any, arrays: list[np.ndarray]) -> dict[str, Any]:
    """JSON of a leaf; its arrays are appended to `arrays`."""
    if not is_qarray(leaf):
        arrays.append(np.asarray(leaf))
        return {"array": len(arrays) - 1, "shape": list(leaf.shape), "dtype": jnp.dtype(leaf.dtype).name}
    fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
    parts = {name: _describe(value, arrays) for name, value in fields.items() if is_qarray(value) or _is_array(value)}
    return {"parts": parts, "static": {name: value for name, value in fields.items() if name not in parts}}


def _assemble(spec: dict[str, Any], make: Callable[[dict[str, Any]], Any]) -> Any:
    if "array" in spec:
        return make(spec)
    return QArray(**{name: _assemble(part, make) for name, part in spec["parts"].items()}, **spec["static"])


def _specs_of(described: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arrays of a tree, those of nested parts too."""
    found = []
    for spec in described.values():
        found += [spec] if "array" in spec else _specs_of(spec["parts"])
    return found


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def _dtype(spec: dict[str, Any]) -> Any:
    return jnp.dtype(spec["dtype"])


def _nbytes(spec: dict[str, Any]) -> int:
    return int(np.prod(spec["shape"], dtype=np.int64)) * _dtype(spec).itemsize
