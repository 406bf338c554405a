"""The readers as functions of bytes, for an engine that keeps the inputs which reach new code and changes them further.

What one reader is given is one text (a config, a manifest, a journal, a recipe) or several files, framed:

    u8 kind ("f" a file, "l" a link, "d" a folder), u16 length of the name, the name, u32 length, the content or target

`changed` is the engine's mutation. Bytes changed blindly rarely leave a header that parses, so most of the time the
input is taken apart (by jq4's own readers: what they refuse stays whole) and changed as `benchmarks.fuzz` changes its
seeds, tensor by tensor and value by value; otherwise the engine changes the bytes of one file, or of one text. The
inputs that reach rare code are mostly refused, so that now and then a sound one is changed in their place.
"""

import contextlib
import json
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from benchmarks.fuzzing import ours, readers, values
from benchmarks.fuzzing.folders import Files, Link
from benchmarks.fuzzing.seeds import GGUF, SEEDS, Folder
from jq4.checkpoint.foreign.gguf.container import read_container
from jq4.checkpoint.safetensors_files import parse_json, read_header, read_metadata
from jq4.errors import JQ4Error

LONGEST = 256 * 2**10
_APART, _SOUND = 0.7, 0.25  # how often what parses is changed in parts, and a seed takes an input's place
Mutate = Callable[[bytes, int], bytes]  # content and its greatest length to another content
_HEAD = struct.Struct("<cHI")


class Input(Protocol):
    """A reader that is fed with bytes."""

    def warm_up(self) -> None: ...
    def seeds(self) -> list[bytes]: ...
    def work(self, content: bytes) -> readers.Work: ...
    def changed(self, draw: random.Random, content: bytes, mutate: Mutate) -> bytes: ...


def input_of(name: str, folder: Path) -> Input:
    """Of a reader in READERS. Not of "checkpoint": what restores one is TensorStore's C++, of which no engine that
    watches Python sees a line."""
    return FramedFiles(name, folder) if name in SEEDS else Text(name, folder)


class FramedFiles:
    """The files of a foreign checkpoint."""

    def __init__(self, name: str, folder: Path) -> None:
        self._reader = readers.Foreign(name, folder)
        self.warm_up = self._reader.warm_up

    def seeds(self) -> list[bytes]:
        return [framed(readers.sound(seed)) for seed in self._reader.seeds]

    def work(self, content: bytes) -> readers.Work:
        return self._reader.work(unframed(content))

    def changed(self, draw: random.Random, content: bytes, mutate: Mutate) -> bytes:
        files = unframed(draw.choice(self.seeds()) if draw.random() < _SOUND else content)
        if draw.random() < _APART and (seed := _taken_apart(files)) is not None:
            with contextlib.suppress(Exception):  # of an array that changes of seeds do not know of
                return framed(readers.hostile(draw, seed))
        texts = [name for name, held in files.items() if isinstance(held, bytes)]
        if not texts:
            return draw.choice(self.seeds())
        name = draw.choice(texts)
        held = files[name]
        assert isinstance(held, bytes)
        files[name] = _changed_json(draw, held, mutate) if name.endswith(".json") else mutate(held, LONGEST)
        return framed(files)


class Text:
    """The one text of a reader of jq4's own files, or config.json. A manifest is given without its checksum."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._reader = name, readers.READERS[name](folder)
        self.warm_up = self._reader.warm_up

    def seeds(self) -> list[bytes]:
        held = self._reader
        if isinstance(held, ours.Recipes):
            return [json.dumps(held.RULES).encode(), *(text.encode() for text in held.TEXTS)]
        if isinstance(held, ours.Journals):
            return [b"".join(json.dumps(line).encode() + b"\n" for line in held.entries(end)) for end in (False, True)]
        texts = [held.members] if isinstance(held, ours.Checkpoints) else held.seeds
        return [json.dumps(text).encode() for text in texts]

    def work(self, content: bytes) -> readers.Work:
        return self._reader.work(ours.signed_text(content) if self._name == "manifest" else content)

    def changed(self, draw: random.Random, content: bytes, mutate: Mutate) -> bytes:
        content = draw.choice(self.seeds()) if draw.random() < _SOUND else content
        if not isinstance(self._reader, ours.Journals):
            return _changed_json(draw, content, mutate)
        lines = content.split(b"\n")
        at = draw.randrange(len(lines))
        lines[at] = _changed_json(draw, lines[at], mutate)
        return b"\n".join(lines)


def framed(files: Files) -> bytes:
    """As one input."""
    parts = []
    for name, held in files.items():
        kind = b"d" if held is None else b"l" if isinstance(held, Link) else b"f"
        content = b"" if held is None else held.to.encode() if isinstance(held, Link) else held
        parts += [_HEAD.pack(kind, len(name.encode()), len(content)), name.encode(), content]
    return b"".join(parts)


def unframed(content: bytes) -> Files:
    """What an input holds, as far as it is framed; names of no file (a path, nothing) are passed over."""
    files, at = {}, 0
    while at + _HEAD.size <= len(content):
        kind, named, held = _HEAD.unpack_from(content, at)
        name = content[at + _HEAD.size : at + _HEAD.size + named].decode(errors="replace")
        at += _HEAD.size + named + held
        if name.isprintable() and 0 < len(name.encode()) < 200 and "/" not in name and name not in (".", ".."):
            raw = content[at - held : at]
            files[name] = None if kind == b"d" else Link(_target(raw)) if kind == b"l" else raw
    return files


def _target(raw: bytes) -> str:
    text = raw.decode(errors="replace")[:200]
    return text if text.isprintable() and text else "nowhere"


def _taken_apart(files: Files) -> Folder | GGUF | None:
    """The files as a seed that can be changed part by part; None where they are no such thing (any more)."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(JQ4Error, ValueError, OSError):
        for name, held in files.items():
            if isinstance(held, bytes):
                (Path(folder) / name).write_bytes(held)
        return _gguf_of(Path(folder)) or _folder_of(Path(folder))
    return None


def _gguf_of(folder: Path) -> GGUF | None:
    for file in folder.glob("*.gguf"):
        found = read_container(file)
        tensors = {name: (one.kind, one.shape, one.blocks().tobytes()) for name, one in found.tensors.items()}
        return GGUF(found.metadata, tensors)
    return None


def _folder_of(folder: Path) -> Folder:
    shards, metadata = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        shards[file.name] = {name: tensor.read() for name, tensor in read_header(file).items()}
        metadata |= read_metadata(file)
    config = parse_json((folder / "config.json").read_bytes(), "config.json")
    if not shards or not isinstance(config, dict):
        raise ValueError("changed as bytes")
    return Folder(shards, config, metadata)


def _changed_json(draw: random.Random, text: bytes, mutate: Mutate) -> bytes:
    if draw.random() < _APART:
        with contextlib.suppress(JQ4Error):
            tree: Any = parse_json(text, "a text")
            return values.as_text(draw, values.changed(draw, tree))
    return mutate(text, LONGEST)
