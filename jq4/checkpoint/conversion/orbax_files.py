"""A folder of jq4's own (FORMAT.md), filled slice by slice: as jq4.save does it, of a tree that is never whole.

A leaf may be a stack of layers, each of which is a weight of the source. Its zarr arrays are cut into chunks that hold
parts of one layer only, so that a layer is written on its own, to files of its own: a slice counts once the journal has
the SHA-256 of these files, which go into the manifest as they are.
"""

import dataclasses
import functools
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jq4.checkpoint import atomic, manifest, structure
from jq4.checkpoint.arrays import Writer
from jq4.checkpoint.conversion.layout import nbytes_of
from jq4.checkpoint.conversion.slabs import Part
from jq4.checkpoint.conversion.stream import Target
from jq4.checkpoint.conversion.zarr_arrays import ArrayToBe, chunk_files, make_group, size_and_digest, write_slice
from jq4.checkpoint.foreign.weights import LazyWeight
from jq4.checkpoint.foreign.writing import Planned
from jq4.checkpoint.manifest import ArrayInfo, FileInfo, LeafInfo, Manifest
from jq4.checkpoint.orbax import listing_hash, made_by
from jq4.checkpoint.safetensors_files import DTYPES
from jq4.checkpoint.structure import Keys
from jq4.qarray import PARTS, is_qarray

NAME = "orbax"
WORK = "data"
_SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Leaf(Protocol):
    """One leaf of the tree, made of one weight or of a stack of them.

    Attributes:
      keys: where it stands in the tree.
      abstract: the leaf, with a ShapeDtypeStruct for every array.
      slices: a weight for each index of its first axis, or the leaf itself where it is not stacked.
      stacked: whether it is.
      outer: the axis of a slice along which the bytes of the source lie furthest apart: large ones are cut there.
    """

    @property
    def keys(self) -> Keys: ...
    @property
    def abstract(self) -> Any: ...
    @property
    def slices(self) -> tuple[LazyWeight, ...]: ...
    @property
    def stacked(self) -> bool: ...
    @property
    def outer(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class SingleLeaf:
    """A weight that is a leaf of its own, by its own name."""

    weight: LazyWeight
    stacked: bool = False
    outer: int = 0

    @property
    def keys(self) -> Keys:
        return (self.weight.name,)

    @property
    def abstract(self) -> Any:
        return self.weight.abstract

    @property
    def slices(self) -> tuple[LazyWeight, ...]:
        return (self.weight,)


@dataclasses.dataclass(frozen=True)
class _Slice:
    """Where one weight goes: the arrays of its leaf, its index in them, and the axis along which it is cut."""

    arrays: tuple[ArrayInfo, ...]
    index: int | None
    outer: int


def plan(weight: LazyWeight, options: Mapping[str, Any]) -> Planned:
    """A weight as jq4 holds it: the arrays of its QArray, or itself."""
    del options
    return _planned(SingleLeaf(weight), 0, weight)


def quantization_config(planned: list[Planned], options: Mapping[str, Any]) -> dict[str, Any]:
    """None: the manifest tells all."""
    del planned, options
    return {}


def orbax_target(leaves: Sequence[Leaf], files: Mapping[str, bytes], recipe: Any = None, source: Any = None) -> Target:
    """A folder of jq4's own of these leaves; nothing is lost."""
    planned = tuple(_planned(leaf, index, weight) for leaf in leaves for index, weight in enumerate(leaf.slices))
    sizes = {each.weight.name: sum(nbytes_of(*told) for told in each.tensors.values()) for each in planned}
    identity = {
        "arrays": {name: told for each in planned for name, told in each.tensors.items()},
        "leaves": [[structure.path_of(leaf.keys), str(leaf.abstract), leaf.stacked, leaf.outer] for leaf in leaves],
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "versions": made_by(),
    }

    def opened(folder: Path) -> OrbaxFiles:
        return OrbaxFiles(folder, leaves, files, recipe, source)

    return Target(planned, sizes, sum(sizes.values()) + sum(map(len, files.values())), identity, opened)


class OrbaxFiles:
    """The folder `folder`, which exists, of these leaves; `files` lie beside the arrays."""

    def __init__(
        self, folder: Path, leaves: Sequence[Leaf], files: Mapping[str, bytes], recipe: Any = None, source: Any = None
    ) -> None:
        self._folder, self._data = folder, folder / WORK
        self._files, self._recipe, self._source = files, recipe, source
        _undo_finish(folder)
        self._data.mkdir(exist_ok=True)
        abstract = {leaf.keys: jax.tree.map(functools.partial(_array_of, leaf), leaf.abstract) for leaf in leaves}
        self._node, described = structure.describe(structure.nested(abstract))
        by_keys = {leaf.keys: leaf for leaf in leaves}
        writer = Writer(self._data, make_group)
        self._infos: list[LeafInfo] = []
        self._slices: dict[str, _Slice] = {}
        for keys, array in described:
            info, leaf = writer.add(keys, array), by_keys[keys]
            self._infos.append(info)
            for index, weight in enumerate(leaf.slices):
                place = _Slice(tuple(manifest.arrays_of(info)), index if leaf.stacked else None, leaf.outer)
                self._slices[slice_name(leaf, index, weight)] = place
        writer.close()

    def write(self, planned: Planned, parts: Iterable[Part]) -> dict[str, Any]:
        """Writes a slice, whose rows come part by part; the size and SHA-256 of each file."""
        place = self._slices[planned.weight.name]
        for rows, value in parts:
            for info, array in zip(place.arrays, _arrays_in(value), strict=True):
                if info.array is not None:
                    write_slice(self._data / info.array, array, place.index, place.outer, rows.start)
        files = (
            f"{info.array}/{name}"
            for info in place.arrays
            if info.array is not None
            for name in chunk_files(self._data / info.array, place.index)
        )
        return {name: size_and_digest(self._data / name) for name in files}

    def holds(self, planned: Planned, record: Mapping[str, Any]) -> bool:
        """Whether the files are there as `write` left them."""
        del planned
        return all(
            (self._data / name).is_file() and size_and_digest(self._data / name) == told
            for name, told in record.items()
        )

    def finish(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Syncs everything, and writes the manifest."""
        written = {name: FileInfo(*told) for record in records for name, told in record.items()}
        for name, content in self._files.items():
            file = self._data / "files" / manifest.check_relative(name, "files")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        listing = self._synced_listing(written)
        made = Manifest(
            data=f"data-{listing_hash(listing)}",
            tree=self._node,
            leaves=tuple(self._infos),
            files=listing,
            recipe=self._recipe,
            source=self._source,
            versions=made_by(),
        )
        raw = manifest.to_bytes(made)
        manifest.from_bytes(raw, f"{self._folder}: the manifest just made")
        self._data.rename(self._folder / made.data)
        atomic.write_synced(self._folder / manifest.MANIFEST, raw)
        atomic.sync_folder(self._folder)

    def close(self) -> None:
        """Nothing is held open."""

    def _synced_listing(self, written: Mapping[str, FileInfo]) -> dict[str, FileInfo]:
        """Every file that belongs to the data, synced; what a killed write left is removed."""
        listing: dict[str, FileInfo] = {}
        for path in sorted(each for each in self._data.rglob("*") if each.is_file()):
            name = path.relative_to(self._data).as_posix()
            if name in written:
                listing[name] = written[name]
            elif path.name in (".zarray", "_METADATA") or name.startswith("files/"):
                listing[name] = FileInfo(*size_and_digest(path))
            else:
                path.unlink()
                continue
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for inner in (*(path for path in self._data.rglob("*") if path.is_dir()), self._data):
            atomic.sync_folder(inner)
        return listing


def slice_name(leaf: Leaf, index: int, weight: LazyWeight) -> str:
    """What the slice is called in the journal and in errors."""
    path = structure.path_of(leaf.keys)
    return f"{path}[{index}]" if leaf.stacked else path if path != weight.name else weight.name


def _planned(leaf: Leaf, index: int, weight: LazyWeight) -> Planned:
    name = slice_name(leaf, index, weight)
    renamed = dataclasses.replace(weight, name=name)
    tensors = {
        structure.path_of((name, *keys[len(leaf.keys) :])): (
            _SAFETENSORS_NAMES[np.dtype(array.dtype)],
            tuple(array.shape),
        )
        for keys, array in zip(_array_keys(leaf.keys, weight.abstract), _arrays_in(weight.abstract), strict=True)
    }
    pieces = None if weight.packed else lambda value: iter((value,))  # chunks of it are taken one by one

    def encode(value: Any) -> dict[str, Any]:
        return dict(zip(tensors, _arrays_in(value), strict=True))

    return Planned(renamed, tensors, encode, pieces=pieces, by_rows=tuple(tensors))


def _array_of(leaf: Leaf, array: Any) -> ArrayToBe:
    outer = max(0, min(leaf.outer, len(array.shape) - 1 - leaf.stacked))
    return ArrayToBe(tuple(array.shape), np.dtype(array.dtype), leaf.stacked, outer)


def _undo_finish(folder: Path) -> None:
    """Where a run was killed in the midst of `finish`: the work as it was before."""
    (folder / manifest.MANIFEST).unlink(missing_ok=True)
    for named in folder.glob("data-*"):
        shutil.rmtree(folder / WORK, ignore_errors=True)
        named.rename(folder / WORK)


def _array_keys(keys: Keys, leaf: Any) -> list[Keys]:
    """The keys of the arrays of a leaf, in the order of manifest.arrays_of."""
    if not is_qarray(leaf):
        return [keys]
    parts = [(name, part) for name in PARTS if (part := getattr(leaf, name)) is not None]
    return [inner for name, part in parts for inner in _array_keys((*keys, name), part)]


def _arrays_in(leaf: Any) -> list[Any]:
    if not is_qarray(leaf):
        return [leaf]
    return [inner for name in PARTS if (part := getattr(leaf, name)) is not None for inner in _arrays_in(part)]
