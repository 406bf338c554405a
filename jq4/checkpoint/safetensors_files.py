"""Safetensors files: read tensor by tensor through a memory map, written tensor by tensor.

A file is 8 bytes (the header's length, u64 little-endian), that many bytes of JSON, and the data. The JSON maps a
tensor's name to its dtype, its shape and where its row-major little-endian bytes lie in the data; `__metadata__` maps
strings to strings. The tensors cover the data exactly, in any order, without gaps or overlaps. A file that
does not keep to this is refused before any of it is used: a header is not to be believed because it parses.
"""

import json
import math
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jq4.errors import JQ4Error

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_METADATA = "__metadata__"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MOST_DIMS, _LARGEST = 32, 2**63  # numpy's axes, and the bytes that it can address
_DEEPEST = 64  # levels of JSON; what walks over it later may recurse
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its dtype by safetensors' name, its shape, and its bytes' place in the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def rows(self, rows: slice) -> "StoredTensor":
        """Some indices of axis 0, which lie together."""
        width = (self.stop - self.start) // self.shape[0]
        shape = (rows.stop - rows.start, *self.shape[1:])
        return replace(self, shape=shape, start=self.start + rows.start * width, stop=self.start + rows.stop * width)

    def read(self) -> np.ndarray:
        """The tensor as a view of the file, which is read as the view is used."""
        if self.stop == self.start:
            return np.zeros(self.shape, DTYPES[self.dtype])
        return (
            np.memmap(self.file, np.uint8, "r", self.start, (self.stop - self.start,))
            .view(DTYPES[self.dtype])
            .reshape(self.shape)
        )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name. Raises JQ4Error naming the file, the tensor and the remedy."""
    entries, length, size = _header(file)
    entries.pop(_METADATA, None)
    tensors = {name: _tensor(file, name, entry, 8 + length, size - 8 - length) for name, entry in entries.items()}
    _check_cover(file, tensors.values(), 8 + length, size)
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """What a file's header says beside its tensors; empty where it says nothing."""
    metadata = _header(file)[0].get(_METADATA) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, f"its {_METADATA} is {str(metadata)[:80]!r}", "an object of texts")
    return metadata


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header as it parses, its length, and the file's size."""
    size = _size(file)
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise _damaged(file, f"it has {size} bytes", "at least 8, the length of the header")
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, _LONGEST_HEADER):
            raise _damaged(file, f"its header claims {length} bytes", f"at most {min(size - 8, _LONGEST_HEADER)}")
        text = stream.read(length)
    return _parse(file, text), length, size


def read_json(file: Path) -> Any:
    """A JSON file's contents. Raises JQ4Error if it is missing or does not parse."""
    return parse_json(read_small_file(file), str(file))


def read_small_file(file: Path) -> bytes:
    """What a regular file holds; raises JQ4Error for anything else, such as a device that never ends."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise JQ4Error(f"{file}: is not a regular file. Give a folder that holds {file.name}.")
        return file.read_bytes()
    except OSError as error:
        raise JQ4Error(f"{file}: cannot be read ({error.strerror}). Give a folder that holds {file.name}.") from error


def parse_json(content: bytes, where: str) -> Any:
    """Parsed JSON. Raises JQ4Error, saying where it came from, if it does not parse."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise JQ4Error(f"{where}: is not JSON ({error}). It is damaged; download it again.") from error
    level = [value]
    for _ in range(_DEEPEST):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [one for members in inner for one in members]
    if level:
        raise JQ4Error(f"{where}: is nested in more than {_DEEPEST} levels. It is damaged; download it again.")
    return value


def holds_tensors(folder: Path) -> bool:
    """Whether a folder has safetensors files."""
    return folder.is_dir() and any(folder.glob("*.safetensors*"))


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors by name, of a folder's one file or of the shards of its index, or of the one file given.

    Packers call their files by names of their own: without a model.safetensors or its index, all safetensors files are
    taken together.
    """
    if not folder.is_dir():
        _check_kind(folder)
        return read_header(folder)
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if (folder / INDEX).exists():
        return _open_shards(folder, read_json(folder / INDEX))
    others = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if others:
        return _of_all(folder, others)
    pickles = [one for ending in _PICKLES for one in sorted(folder.glob(f"*{ending}"))]
    if pickles:
        raise _pickle(pickles[0])
    raise JQ4Error(f"{folder}: found neither {SINGLE} nor {INDEX}. Give the folder that holds the weights.")


def _check_kind(file: Path) -> None:
    """Raises JQ4Error for a file that is no safetensors file by its name or its first bytes."""
    if file.suffix == ".safetensors" or not file.is_file():
        return
    with file.open("rb") as stream:
        start = stream.read(9)
    if start[8:] == b"{":
        return
    if file.suffix in _PICKLES or start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        raise _pickle(file)
    raise JQ4Error(
        f"{file}: is neither a safetensors nor a GGUF file by its first bytes. Give the folder of a model, a "
        ".safetensors or a .gguf file."
    )


def _pickle(file: Path) -> JQ4Error:
    return JQ4Error(
        f"{file}: is a pickle, which can run any code when opened and is never read. "
        "Save the model with save_pretrained(..., safe_serialization=True), or take its safetensors."
    )


def _check_shards(folder: Path, files: list[Path]) -> None:
    """Raises JQ4Error where the files' own names tell that some are missing."""
    families = Counter(told.groups() for file in files if (told := _SHARD.fullmatch(file.name)))
    for (stem, count), found in families.items():
        if found < int(count):
            raise JQ4Error(f"{folder}: holds {found} of the {int(count)} shards of {stem!r}. Download it again.")


def _of_all(folder: Path, files: list[Path]) -> dict[str, StoredTensor]:
    _check_shards(folder, files)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise JQ4Error(
                    f"{folder}: tensor {name!r} is in both {tensors[name].file.name} and {file.name}. Remove the file "
                    "that is not of this model."
                )
            tensors[name] = tensor
    return tensors


def _open_shards(folder: Path, index: Any) -> dict[str, StoredTensor]:
    where, file = index.get("weight_map") if isinstance(index, dict) else None, folder / INDEX
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise JQ4Error(f"{file}: found no weight_map from tensors to files. It is damaged; download it again.")
    shards = {}
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard:
            raise JQ4Error(f"{file}: names the shard {shard!r}, wanted a file name without folders. Do not trust it.")
        if not shard.isprintable() or len(shard.encode()) > 255 or not (folder / shard).exists():
            raise JQ4Error(f"{folder / shard}: the shard is missing, wanted by {INDEX}. Download it again.")
        shards[shard] = read_header(folder / shard)
    tensors: dict[str, StoredTensor] = {}
    for shard, held in shards.items():
        for name, tensor in held.items():
            if where.get(name) != shard:
                raise JQ4Error(
                    f"{folder / shard}: holds {name!r}, which {INDEX} places in {where.get(name, 'no file')!r}. "
                    "The shards are not of one checkpoint; download them again."
                )
            tensors[name] = tensor
    for name, shard in where.items():
        if name not in tensors:
            raise JQ4Error(f"{folder / shard}: tensor {name!r} is missing, wanted by {INDEX}. Download it again.")
    return tensors


def write(file: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]) -> None:
    """Writes a safetensors file atomically.

    tensors: name -> (safetensors' name of the dtype, shape, what makes the array when its turn comes).
    """
    head, _ = head_of({name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()})
    temporary = file.with_name(file.name + ".partial")
    with temporary.open("wb") as stream:
        stream.write(head)
        for name, (dtype, shape, make) in tensors.items():
            array = np.ascontiguousarray(make(), DTYPES[dtype])
            if array.shape != shape:
                raise JQ4Error(f"{name}: found shape {array.shape}, wanted {shape}; nothing was written to {file}.")
            stream.write(array.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def head_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """What a file of these tensors begins with, and where each lies in it.

    tensors: name -> (safetensors' name of the dtype, shape).
    """
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        stop = offset + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    del header[_METADATA]
    places = {name: entry["data_offsets"] for name, entry in header.items()}
    return head, {name: (len(head) + start, len(head) + stop) for name, (start, stop) in places.items()}


def _size(file: Path) -> int:
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise JQ4Error(f"{file}: is not a regular file, wanted safetensors. Download it again or check the path.")
        return found.st_size
    except OSError as error:
        raise JQ4Error(f"{file}: cannot be read ({error.strerror}). Download it again or check the path.") from error


def _damaged(file: Path, found: str, wanted: str) -> JQ4Error:
    return JQ4Error(
        f"{file}: not a sound safetensors file: {found}, wanted {wanted}. "
        "It is truncated or damaged; download it again."
    )


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    def refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise _damaged(file, f"its header names {key!r} {count} times", "each tensor once")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=refuse_twins)
    except JQ4Error:
        raise
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header does not parse ({error})", "JSON") from error
    if not isinstance(header, dict):
        raise _damaged(file, f"its header is a {type(header).__name__}", "a JSON object")
    return header


def _tensor(file: Path, name: str, entry: Any, base: int, data: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(file, f"tensor {name!r} is described by {_short(entry)}", "dtype, shape and data_offsets")
    if not name.isprintable():
        raise _damaged(file, f"a tensor is called {name!r}", "a name of printable characters")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise JQ4Error(
            f"{file}: tensor {name!r} has dtype {_short(dtype)}, wanted one of {', '.join(DTYPES)}. "
            "Save the checkpoint again in bfloat16 or float32."
        )
    if not _whole_numbers(shape) or len(shape) > _MOST_DIMS:
        raise _damaged(
            file, f"tensor {name!r} has shape {_short(shape)}", f"a list of whole numbers, {_MOST_DIMS} at most"
        )
    if 0 in shape and math.prod(filter(None, shape)) * DTYPES[dtype].itemsize >= _LARGEST:
        raise _damaged(file, f"tensor {name!r} has shape {_short(shape)}", "one that a machine can address")
    if not _whole_numbers(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data:
        raise _damaged(
            file, f"tensor {name!r} lies at {_short(offsets)}", f"an ascending pair within {data} bytes of data"
        )
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise _damaged(
            file, f"tensor {name!r} has {offsets[1] - offsets[0]} bytes", f"{needed} for {dtype}{list(shape)}"
        )
    return StoredTensor(file, name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(one) is int and 0 <= one < _LARGEST for one in values)


def _short(value: Any) -> str:
    """What a header says, which may be long or deep."""
    return reprlib.repr(value)


def _check_cover(file: Path, tensors: Iterable[StoredTensor], start: int, stop: int) -> None:
    reached, last = start, "the header"
    for tensor in sorted(tensors, key=lambda one: (one.start, one.stop)):
        if tensor.start != reached:
            found = "overlap" if tensor.start < reached else f"leave {tensor.start - reached} bytes between"
            raise _damaged(file, f"tensor {tensor.name!r} and {last} {found}", "tensors that follow each other")
        reached, last = tensor.stop, f"tensor {tensor.name!r}"
    if reached != stop:
        raise _damaged(file, f"{stop - reached} bytes follow {last}", "none")
