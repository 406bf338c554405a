"""Zarr arrays as Orbax writes them, one slice of a stack at a time.

A folder an array: `.zarray`, a header in JSON, and the chunks, zstd-compressed, named by their place ("3.0.1"). A group
of arrays is an Orbax checkpoint by its `_METADATA`. Both are known before any value is, and are the bytes that Orbax
itself would write; the chunks are TensorStore's. In an array that stacks layers a chunk holds (a part of) one layer.
"""

import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jq4.errors import CheckpointError
from jq4.freed_pages import give_back_mapped_pages
from jq4.host_moves import copy

CHUNK_BYTES = 16 * 2**20  # TensorStore holds several copies of one on its way


@dataclasses.dataclass(frozen=True)
class ArrayToBe:
    """An array before its values: in place of a ShapeDtypeStruct, with how it is cut.

    Attributes:
      stacked: whether the first axis counts slices that are written one by one.
      outer: the axis of a slice along which a large one is cut.
    """

    shape: tuple[int, ...]
    dtype: Any
    stacked: bool
    outer: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def make_group(folder: Path, arrays: Mapping[tuple[str, ...], ArrayToBe]) -> None:
    """The empty arrays of a group, and what Orbax wants to know of them."""
    folder.mkdir(exist_ok=True)
    told: dict[str, Any] = {}
    for keys, array in sorted(arrays.items()):
        place = folder / ".".join(keys)
        place.mkdir(exist_ok=True)
        (place / ".zarray").write_text(json.dumps(_zarr_header(array), separators=(",", ":")))
        told[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    about = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": told, **about, "custom_metadata": None}))


def _zarr_header(array: ArrayToBe) -> dict[str, Any]:
    builtin = np.dtype(array.dtype).isbuiltin == 1
    return {
        "chunks": list(_chunk_shape(array)),
        "compressor": {"id": "zstd", "level": 1},
        "dimension_separator": ".",
        "dtype": np.dtype(array.dtype).str if builtin else np.dtype(array.dtype).name,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(array.shape),
        "zarr_format": 2,
    }


def _chunk_shape(array: ArrayToBe) -> tuple[int, ...]:
    """A slice whole, or cut along its outer axis where it is large."""
    chunks = [1, *array.shape[1:]] if array.stacked else list(array.shape)
    axis = array.outer + array.stacked
    if len(chunks) > axis:
        rest = max(1, math.prod(chunks) // chunks[axis] * np.dtype(array.dtype).itemsize)
        chunks[axis] = min(chunks[axis], max(1, CHUNK_BYTES // rest))
    return tuple(chunks)


def write_slice(folder: Path, array: Any, index: int | None, outer: int, first: int = 0) -> None:
    """Writes all chunks of one slice, one at a time; of fewer rows than it has, where they lie: from `first` on."""
    import tensorstore as ts

    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(folder)},
        "context": {"file_io_sync": False},
        "store_data_equal_to_fill_value": True,
    }
    try:
        store = ts.open(spec, open=True).result()
        store = store if index is None else store[index]
        if not array.ndim:
            store.write(array).result()
            return
        outer = min(outer, array.ndim - 1)
        step = json.loads((folder / ".zarray").read_bytes())["chunks"][outer - array.ndim]
        if store.shape[0] != array.shape[0]:
            store = store[first : first + array.shape[0]].translate_to[0]
        for start in range(0, array.shape[outer], step):
            part = (slice(None),) * outer + (slice(start, min(start + step, array.shape[outer])),)
            chunk = np.empty(array[part].shape, array.dtype)
            copy(chunk, array[part])
            store[part].write(chunk).result()
            give_back_mapped_pages(array)
    except ValueError as error:  # TensorStore's
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise CheckpointError(f"{folder}: TensorStore cannot write this array ({error})") from error


def chunk_files(folder: Path, index: int | None) -> list[str]:
    """The names of a slice's chunks."""
    header = json.loads((folder / ".zarray").read_bytes())
    counts = [range(-(-size // chunk)) for size, chunk in zip(header["shape"], header["chunks"], strict=True)]
    if index is not None:
        counts[0] = range(index, index + 1)
    return [".".join(map(str, at)) or "0" for at in itertools.product(*counts)]


def size_and_digest(file: Path) -> list[Any]:
    """The size and SHA-256 of a file."""
    with file.open("rb") as stream:
        return [os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest()]
