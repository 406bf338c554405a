"""The container: a header of typed values and tensor descriptions, then the tensors' bytes. Reading it (v2, v3).

    "GGUF", u32 version, u64 tensors, u64 values; the values; the tensors; filling; the data
    value    string key, u32 type, the value (a string is a u64 length and UTF-8; an array its type, a u64 count, ...)
    tensor   string name, u32 rank, u64 dims[rank] (innermost first), u32 type, u64 offset into the data

The data begins, and every tensor in it, at a multiple of `general.alignment` (32 where it is not said). A header
is not to be believed because it parses: every count and length is checked against the bytes that are left before
anything is allocated for it, and every tensor must lie in the file, aligned, and apart from the others.
"""

import itertools
import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.gguf.block_types import BY_NUMBER, READABLE, BlockType
from jq4.errors import JQ4Error

MAGIC = b"GGUF"
ALIGNMENT = 32
# GGUF's number of a value's type -> how it is stored
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "bool", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
STRING, ARRAY = 8, 9

_MOST_DIMS = 4
# values that are asked for as one, and not as an array
_KINDS: dict[str, type | tuple[type, ...]] = {
    "general.architecture": str,
    "general.name": str,
    "general.basename": str,
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    "tokenizer.ggml.add_bos_token": (bool, int),
    "tokenizer.ggml.add_eos_token": (bool, int),
    "tokenizer.ggml.add_space_prefix": (bool, int),
    "split.count": int,
    "split.tensors.count": int,
}
_MOST_STRINGS = 2**24  # in one array; the largest vocabularies have 2**18 tokens and twice as many merges


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: its type, its shape in Hugging Face's order ([N, K]), and its bytes' place in the file."""

    file: Path
    name: str
    kind: BlockType
    shape: tuple[int, ...]
    start: int
    stop: int

    def rows(self, rows: slice) -> "GGUFTensor":
        """Some indices of axis 0, which lie together."""
        width = (self.stop - self.start) // self.shape[0]
        shape = (rows.stop - rows.start, *self.shape[1:])
        return replace(self, shape=shape, start=self.start + rows.start * width, stop=self.start + rows.stop * width)

    def blocks(self) -> np.ndarray:
        """u8[..., N, B, nbytes]: a view of the file, which is read as the view is used."""
        shape = (*self.shape[:-1], self.shape[-1] // self.kind.length, self.kind.nbytes)
        return np.memmap(self.file, np.uint8, "r", self.start, (self.stop - self.start,)).reshape(shape)


@dataclass(frozen=True)
class Container:
    """A file's header: values (str, bool, int, float, an array, or a list of strings) and tensors, by name."""

    file: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def read_container(file: Path) -> Container:
    """The header of a .gguf file. Raises JQ4Error naming the file, what was found in it and the remedy."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            if size < 24:
                raise damaged(file, f"it has {size} bytes", "at least 24")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _read(_Cursor(file, content, size))
    except OSError as error:
        raise JQ4Error(f"{file}: cannot be read ({error.strerror}). Download it again or check the path.") from error


def damaged(file: Path, found: str, wanted: str) -> JQ4Error:
    return JQ4Error(
        f"{file}: not a sound GGUF file: {found}, wanted {wanted}. It is truncated or damaged; download it again."
    )


class _Cursor:
    """A place in the header; whatever is taken is checked to be there."""

    def __init__(self, file: Path, content: mmap.mmap, size: int) -> None:
        self.file, self._content, self.size, self.at = file, content, size, 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise damaged(self.file, f"{what} has {count} bytes at {self.at} of {self.size}", "it to end in the file")
        self.at += count
        return self._content[self.at - count : self.at]

    def whole(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def count(self, smallest: int, what: str) -> int:
        """A u64 count of things that take `smallest` bytes or more each."""
        count = self.whole(8, what)
        if count > (self.size - self.at) // smallest:
            raise damaged(self.file, f"{what} is {count}", f"no more than {self.size - self.at} bytes can hold")
        return count

    def text(self, what: str) -> str:
        content = self.take(self.whole(8, what), what)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise damaged(self.file, f"{what} is {content[:40]!r}", "UTF-8") from error


def _read(cursor: _Cursor) -> Container:
    _check_beginning(cursor)
    version = cursor.whole(4, "the version")
    num_tensors = cursor.count(8 + 4 + 8 + 4 + 8, "the number of tensors")
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count(8 + 4 + 1, "the number of values")):
        key = cursor.text("a key")
        if key in metadata:
            raise damaged(cursor.file, f"the key {key!r} is there twice", "each once")
        metadata[key] = _value(cursor, cursor.whole(4, f"the type of {key!r}"), key)
        if not isinstance(metadata[key], _KINDS.get(key, object)):
            raise damaged(
                cursor.file, f"{key} is a {type(metadata[key]).__name__}", "a single value, and a name a text"
            )
    described: dict[str, tuple[BlockType, tuple[int, ...], int]] = {}
    for _ in range(num_tensors):
        name = cursor.text("a tensor's name")
        if name in described:
            raise damaged(cursor.file, f"tensor {name!r} is there twice", "each once")
        described[name] = _description(cursor, name)
    alignment = _alignment(cursor.file, metadata)
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: _placed(cursor, name, *one, start, alignment) for name, one in described.items()}
    _check_apart(cursor.file, tensors.values())
    return Container(cursor.file, version, metadata, tensors)


def _check_beginning(cursor: _Cursor) -> None:
    magic = cursor.take(4, "the beginning")
    version = int.from_bytes(cursor.take(4, "the version"), "little")
    if magic == MAGIC[::-1] or (magic == MAGIC and version and not version & 0xFFFF):
        raise JQ4Error(f"{cursor.file}: is big-endian, wanted a little-endian GGUF file. Convert the original again.")
    if magic != MAGIC:
        raise JQ4Error(f"{cursor.file}: begins with {magic!r}, wanted {MAGIC!r}. It is no GGUF file.")
    if version not in (2, 3):
        raise JQ4Error(
            f"{cursor.file}: is version {version} of GGUF, wanted 2 or 3. "
            "Convert the original again with a llama.cpp of 2023-09 or later."
        )
    cursor.at -= 4


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    what = f"the value of {key!r}"
    if kind == STRING:
        return cursor.text(what)
    if kind == ARRAY:
        return _array(cursor, cursor.whole(4, what), what)
    return _numbers(cursor, kind, 1, what)[0].item()


def _array(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind == STRING:
        count = cursor.count(8, f"the length of {what}")
        if count > _MOST_STRINGS:
            raise damaged(cursor.file, f"{what} has {count} strings", f"at most {_MOST_STRINGS}")
        return [cursor.text(what) for _ in range(count)]
    size = np.dtype(SCALARS[kind]).itemsize if kind in SCALARS else 1
    return _numbers(cursor, kind, cursor.count(size, f"the length of {what}"), what)


def _numbers(cursor: _Cursor, kind: int, count: int, what: str) -> np.ndarray:
    if kind not in SCALARS:
        raise damaged(cursor.file, f"{what} has the type {kind}", "one of 0 to 12, and no array of arrays")
    dtype = np.dtype(SCALARS[kind])
    content = cursor.take(count * dtype.itemsize, what)
    if kind == 7 and content.strip(b"\0\1"):
        raise damaged(cursor.file, f"{what} holds a truth value other than 0 and 1", "0 or 1")
    return np.frombuffer(content, dtype)


def _description(cursor: _Cursor, name: str) -> tuple[BlockType, tuple[int, ...], int]:
    rank = cursor.whole(4, f"the rank of {name!r}")
    if not 1 <= rank <= _MOST_DIMS:
        raise damaged(cursor.file, f"tensor {name!r} has {rank} dimensions", f"1 to {_MOST_DIMS}")
    dims = struct.unpack(f"<{rank}Q", cursor.take(8 * rank, f"the shape of {name!r}"))
    number = cursor.whole(4, f"the type of {name!r}")
    offset = cursor.whole(8, f"the offset of {name!r}")
    kind = BY_NUMBER.get(number)
    if kind is None or not kind.length:
        found = f"the type {kind.name if kind else f'number {number}'}"
        raise JQ4Error(
            f"{cursor.file}: tensor {name!r} has {found}, wanted one of {', '.join(READABLE)}. "
            "Take another file of the model (Q4_K_M, Q8_0, ...), or requantize it with llama-quantize."
        )
    if 0 in dims or dims[0] % kind.length:
        raise damaged(
            cursor.file, f"tensor {name!r} has the shape {dims}", f"sizes above 0, whole blocks of {kind.length}"
        )
    return kind, dims[::-1], offset


def _alignment(file: Path, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise damaged(file, f"general.alignment is {alignment!r}", "a power of two")
    return alignment


def _placed(
    cursor: _Cursor, name: str, kind: BlockType, shape: tuple[int, ...], offset: int, start: int, alignment: int
) -> GGUFTensor:
    size = math.prod(shape) // kind.length * kind.nbytes
    if offset % alignment:
        raise damaged(cursor.file, f"tensor {name!r} lies at {offset}", f"a multiple of {alignment}")
    if start + offset + size > cursor.size:
        raise damaged(
            cursor.file, f"tensor {name!r} has {size} bytes at {start + offset} of {cursor.size}", "it in the file"
        )
    return GGUFTensor(cursor.file, name, kind, shape, start + offset, start + offset + size)


def _check_apart(file: Path, tensors: Iterable[GGUFTensor]) -> None:
    ordered = sorted(tensors, key=lambda one: (one.start, one.stop))
    for one, after in itertools.pairwise(ordered):
        if after.start < one.stop:
            raise damaged(file, f"tensors {one.name!r} and {after.name!r} overlap", "each in a place of its own")
