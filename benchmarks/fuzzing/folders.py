"""Folders of safetensors, changed on every level: tensors, header, config, text, bytes, and what else stands there."""

import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.fuzzing import values
from benchmarks.fuzzing.seeds import Arrays, Folder
from jq4.checkpoint.safetensors_files import DTYPES, INDEX

NAMES = {dtype: name for name, dtype in DTYPES.items()}
_DTYPES = tuple(DTYPES.values())


@dataclasses.dataclass(frozen=True)
class Link:
    """A symbolic link."""

    to: str


Files = dict[str, bytes | Link | None]  # None is a folder


def hostile(draw: random.Random, seed: Folder) -> Files:
    """The folder with one to three changes."""
    shards, config = {name: dict(held) for name, held in seed.shards.items()}, dict(seed.config)
    metadata: Any = dict(seed.metadata)
    lies, damages = 0, 0
    for _ in range(draw.choice((1, 1, 2, 3))):
        way = draw.random()
        if way < 0.5:
            name = draw.choice(list(shards))
            shards[name] = _tensors(draw, shards[name])
        elif way < 0.75:
            config = values.changed(draw, config)
            if not isinstance(config, dict):
                break
        elif way < 0.85:
            lies += 1
        elif way < 0.9 and len(metadata) > 1:
            metadata = _metadata(draw, metadata)
        else:
            damages += 1
    files: Files = {name: _file(draw, held, metadata, lies) for name, held in shards.items()}
    files["config.json"] = values.as_text(draw, config)
    if len(shards) > 1:
        files[INDEX] = values.as_text(draw, _index(draw, shards))
    for _ in range(damages):
        _damage(draw, files)
    return files


def sound(seed: Folder) -> Files:
    """The folder as it should be."""
    files: Files = {name: _of(_header(held), _data(held), seed.metadata) for name, held in seed.shards.items()}
    files["config.json"] = json.dumps(seed.config).encode()
    if len(seed.shards) > 1:
        where = {name: shard for shard, held in seed.shards.items() for name in held}
        files[INDEX] = json.dumps({"weight_map": where}).encode()
    return files


def _tensors(draw: random.Random, tensors: Arrays) -> Arrays:
    """The tensors with one of them dropped, renamed, copied, cast, cut, reshaped, or with other values; still sound."""
    if not tensors:
        return tensors
    held = dict(tensors)
    packed = [name for name in held if "norm" not in name and "lm_head" not in name]
    name = draw.choice(packed or list(held))
    array = held[name]
    ways: tuple[Callable[[], Any], ...] = (
        lambda: held.pop(name),
        lambda: held.update({_other_name(draw, name): held.pop(name)}),
        lambda: held.update({_other_name(draw, name): array}),
        lambda: held.update({name: _cast(draw, array)}),
        lambda: held.update({name: _resized(draw, array)}),
        lambda: held.update({name: _reshaped(draw, array)}),
        lambda: held.update({name: values.array(draw, array)}),
        lambda: held.update({name: values.array(draw, array)}),
        lambda: held.update({name: held[draw.choice(list(held))]}),
    )
    draw.choice(ways)()
    return held


def _other_name(draw: random.Random, name: str) -> str:
    if draw.random() < 0.3:
        return draw.choice((*values.STRINGS, name + draw.choice(values.STRINGS)))
    return name.rpartition(".")[0] + "." + draw.choice(values.SUFFIXES)


def _cast(draw: random.Random, array: np.ndarray) -> np.ndarray:
    """The same bytes, or the same shape, of another dtype."""
    dtype = draw.choice(_DTYPES)
    if isinstance(array, np.ndarray) and draw.random() < 0.5:
        return np.zeros(array.shape, dtype) if draw.random() < 0.5 else np.ones(array.shape, np.uint8).astype(dtype)
    raw = array.tobytes()
    raw = raw[: len(raw) // dtype.itemsize * dtype.itemsize]
    flat = np.frombuffer(raw, dtype)
    rows = array.shape[0] if array.ndim and array.shape[0] and flat.size % array.shape[0] == 0 else 1
    return flat.reshape(rows, -1) if flat.size else flat


def _resized(draw: random.Random, array: np.ndarray) -> np.ndarray:
    if not isinstance(array, np.ndarray) or not array.ndim:
        return np.resize(array, draw.choice(((0,), (2,), (1, 1))))
    shape = list(array.shape)
    at = draw.randrange(len(shape))
    shape[at] = max(0, draw.choice((0, 1, shape[at] - 1, shape[at] + 1, shape[at] * 2, shape[at] // 2, shape[at] + 8)))
    return np.resize(array, shape) if array.size else np.zeros(shape, array.dtype)


def _reshaped(draw: random.Random, array: np.ndarray) -> np.ndarray:
    flat = array.reshape(-1)
    divisors = [one for one in (2, 3, 4, 8, 16, 32) if flat.size % one == 0]
    rank = draw.choice((1, 2, 3, 33, 70))
    shapes = [flat.shape, (1, *array.shape), (*array.shape, 1), array.shape[::-1]]
    shapes += [(one, flat.size // one) for one in divisors]
    if rank > 32:
        return _Shaped(flat, (1,) * rank + flat.shape)  # pyright: ignore[reportReturnType]
    if flat.size and draw.random() < 0.15:
        return flat[0].reshape(())
    return array.reshape(draw.choice(shapes))


class _Shaped:
    """An array of more axes than numpy has."""

    def __init__(self, flat: np.ndarray, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape, self.ndim, self.size, self._flat = flat.dtype, shape, len(shape), flat.size, flat

    def tobytes(self) -> bytes:
        return self._flat.tobytes()

    def reshape(self, *_: Any) -> np.ndarray:
        return self._flat

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self._flat


def _metadata(draw: random.Random, metadata: dict[str, str]) -> Any:
    """Its texts are often JSON, and are changed as such."""
    key = draw.choice(list(metadata))
    try:
        return metadata | {key: json.dumps(values.changed(draw, json.loads(metadata[key])))}
    except (ValueError, TypeError, RecursionError):
        return values.changed(draw, metadata)


def _header(tensors: Arrays) -> dict[str, Any]:
    header, at = {}, 0
    for name, array in tensors.items():
        stop = at + array.size * array.dtype.itemsize
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [at, stop]}
        at = stop
    return header


def _data(tensors: Arrays) -> bytes:
    return b"".join(array.tobytes() for array in tensors.values())


def _of(header: Any, data: bytes, metadata: Any) -> bytes:
    return _framed(json.dumps({"__metadata__": metadata, **header}).encode(), data)


def _framed(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def _file(draw: random.Random, tensors: Arrays, metadata: Any, lies: int) -> bytes:
    header, data = _header(tensors), _data(tensors)
    if not lies:
        return _of(header, data, metadata)
    for _ in range(lies):
        header = _lie(draw, header)
    whole = {"__metadata__": draw.choice((metadata, metadata, values.value(draw))), **header}
    text = values.as_text(draw, whole)
    return _framed(text, data)


def _lie(draw: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    """A header that says something else of one tensor."""
    if not header or draw.random() < 0.2:
        changed = values.changed(draw, header)
        return changed if isinstance(changed, dict) else header
    name = draw.choice(list(header))
    entry = dict(header[name]) if isinstance(header[name], dict) else {}
    key = draw.choice(list(entry)) if entry else "dtype"
    if not isinstance(entry.get(key), list):
        entry[key] = draw.choice((*DTYPES, "F4", "", None, 4, ["F32"], "f32"))
    else:
        held = list(entry[key])
        at = draw.randrange(len(held) + 1)
        if at < len(held):
            held[at] = draw.choice((*values.NUMBERS, 1.0, True, "4", None, *_beside(held[at])))
        else:
            held.append(draw.choice((1, 0, 2**60)))
        entry[key] = draw.choice((held, held, held, [0, 2**62], [2**40, 0], [], held[::-1], values.value(draw)))
    return header | {name: entry}


def _beside(number: Any) -> tuple[Any, ...]:
    return (number + 1, number - 1) if isinstance(number, int) else ()


def _index(draw: random.Random, shards: dict[str, Arrays]) -> Any:
    where: dict[str, Any] = {name: shard for shard, held in shards.items() for name in held}
    index: Any = {"metadata": {"total_size": 1}, "weight_map": where}
    if draw.random() < 0.4 and where:
        hostile_names = (
            "../x.safetensors",
            "/etc/passwd",
            "a/b",
            "..",
            "",
            ".",
            "\0",
            "x" * 300,
            "\ud800",
            "config.json",
            7,
        )
        where[draw.choice(list(where))] = draw.choice((*hostile_names, *shards, "missing.safetensors"))
    return values.changed(draw, index) if draw.random() < 0.4 else index


def _damage(draw: random.Random, files: Files) -> None:
    """One file's bytes changed, cut or grown; a file missing, a link, a folder in its place, or another beside it."""
    bytes_of = {name: content for name, content in files.items() if isinstance(content, bytes)}
    if not bytes_of:
        return
    name = draw.choice(list(bytes_of))
    content = bytes_of[name]
    way = draw.randrange(9)
    if way < 3:
        files[name] = values.flipped(draw, content)
    elif way == 3:
        files[name] = content[: draw.randrange(len(content) + 1)]
    elif way == 4:
        files[name] = content + draw.randbytes(draw.choice((1, 8, 100)))
    elif way == 5:
        files[name] = values.flipped(draw, content[:200]) + content[200:]
    elif way == 6:
        del files[name]
    elif way == 7:
        files[name] = draw.choice((None, Link("nowhere"), Link(name), Link("/dev/zero"), Link("..")))
    else:
        beside = ("model.safetensors", "x.safetensors", INDEX, "quantize_config.json", "tokenizer.json", "config.json")
        files[draw.choice(beside)] = draw.choice((b"", content, None, Link("."), b"{}", b"[" * 9000))
