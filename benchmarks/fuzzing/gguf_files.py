"""GGUF files, changed: values of other types, counts and lengths that lie, tensors elsewhere; then bytes."""

import math
import random
import struct
from typing import Any

import numpy as np

from benchmarks.fuzzing import values
from benchmarks.fuzzing.seeds import GGUF
from jq4.checkpoint.foreign.gguf.block_types import BY_NUMBER, BlockType
from jq4.checkpoint.foreign.gguf.container import SCALARS
from jq4.checkpoint.foreign.gguf.file_writing import header

_TYPES = tuple(number for number, dtype in SCALARS.items() if dtype != "bool")
_HUGE = (2**16, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)
_NAMES = (
    "blk.%s.attn_q.weight" % ("9" * 5000),
    "blk.0.attn_q.bias",
    "blk.-1.x.weight",
    "blk.\u0663.attn_q.weight",
    "output.weight",
    "blk.00.attn_q.weight",
    "token_embd.weight",
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "",
    "../x",
    "x\0y",
    "x" * 5000,
)


def sound(seed: GGUF) -> bytes:
    described = {name: (kind, shape) for name, (kind, shape, _) in seed.tensors.items()}
    content = header(seed.metadata, described)
    return content + b"".join(_filled(raw) for _, _, raw in seed.tensors.values())


def hostile(draw: random.Random, seed: GGUF) -> bytes:
    metadata: dict[str, Any] = dict(seed.metadata)
    tensors = [[name, kind, shape, raw] for name, (kind, shape, raw) in seed.tensors.items()]
    lies, damages = 0, 0
    for _ in range(draw.choice((1, 1, 2, 3))):
        way = draw.random()
        if way < 0.4:
            _value(draw, metadata)
        elif way < 0.7 and tensors:
            _tensor(draw, tensors)
        elif way < 0.85:
            lies += 1
        else:
            damages += 1
    content = _written(draw, metadata, tensors, lies)
    for _ in range(damages):
        way = draw.randrange(4)
        if way == 0:
            content = content[: draw.randrange(len(content) + 1)]
        elif way == 1:
            content = content + draw.randbytes(draw.choice((1, 32, 100)))
        elif way == 2:
            content = values.flipped(draw, content)
        else:
            content = values.flipped(draw, content[:400]) + content[400:]
    return content


def _value(draw: random.Random, metadata: dict[str, Any]) -> None:
    keys = (
        [key for key in metadata if "tokens" not in key and "scores" not in key] if draw.random() < 0.7 else [*metadata]
    )
    key = draw.choice(keys)
    way = draw.randrange(8)
    if way == 0:
        del metadata[key]
    elif way == 1:
        metadata[
            draw.choice(("general.alignment", "split.count", "split.tensors.count", "llama.rope.scaling.type", *keys))
        ] = 3
    elif way == 2 and isinstance(metadata[key], list):
        held = list(metadata[key])
        held[draw.randrange(len(held))] = draw.choice((*values.STRINGS[:40], "t0", "t0 t1 t2"))
        metadata[key] = draw.choice((held, held * 2, held[:-1], []))
    elif way == 3 and isinstance(metadata[key], np.ndarray):
        metadata[key] = draw.choice(
            (values.array(draw, metadata[key]), metadata[key][:-1], metadata[key].astype(np.float32))
        )
    else:
        typed: tuple[Any, ...] = (
            np.array([1, 2], np.int32),
            np.zeros(0, np.float32),
            np.array([1, 1], np.uint32),
            np.array([True, False]),
            ["a", "b"],
            [],
            True,
            float("nan"),
            float("inf"),
            -1.0,
            0.0,
            1e30,
        )
        strings = tuple(one for one in values.STRINGS if "\ud800" not in one and "\udcff" not in one)
        metadata[key] = draw.choice((*typed, *(one for one in values.NUMBERS if 0 <= one < 2**32), *strings))


def _tensor(draw: random.Random, tensors: list[list[Any]]) -> None:
    one = draw.choice(tensors)
    kind, shape = one[1], one[2]
    way = draw.randrange(6)
    if way == 0:
        tensors.remove(one)
    elif way == 1:
        one[0] = draw.choice((*_NAMES, draw.choice(tensors)[0]))
    elif way == 2:
        rows = draw.choice((1, 2, 3, 7, shape[0] * 2))
        one[2] = (rows, *shape[1:]) if len(shape) > 1 else (kind.length * rows,)
        one[3] = (one[3] * (rows + 1))[: _size(kind, one[2])]
    elif way == 3:
        one[2] = draw.choice(((1, *shape), (1, 1, *shape[-2:]), (*shape[:-2], math.prod(shape[-2:])), shape))
    elif way == 4:
        one[1] = draw.choice([BY_NUMBER[number] for number in BY_NUMBER if BY_NUMBER[number].length])
        one[2] = (*shape[:-1], one[1].length * draw.choice((1, 2, 3)))
        one[3] = (one[3] * 40)[: _size(one[1], one[2])]
    else:
        one[3] = values.array(draw, np.frombuffer(one[3], np.uint8)).tobytes()


def _size(kind: BlockType, shape: tuple[int, ...]) -> int:
    return math.prod(shape) // kind.length * kind.nbytes


def _filled(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % 32)


def _written(draw: random.Random, metadata: dict[str, Any], tensors: list[list[Any]], lies: int) -> bytes:
    """As `file_writing.header` has it, with as many lies among its numbers."""
    parts, at = [struct.pack("<QQ", len(tensors), len(metadata))], 0
    places = [0, 8]  # of u64 numbers that a lie can replace
    length = 16

    def put(piece: bytes, *numbers: int) -> None:
        nonlocal length
        parts.append(piece)
        places.extend(length + one for one in numbers)
        length += len(piece)

    for key, held in metadata.items():
        put(_string(key), 0)
        put(*_typed(draw, held))
    for name, kind, shape, raw in tensors:
        put(_string(name), 0)
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        put(dims, *(4 + 8 * i for i in range(len(shape))))
        put(struct.pack("<IQ", kind.number, at), 4)
        at += len(_filled(raw))
    content = bytearray(b"".join(parts))
    for _ in range(lies):
        place = draw.choice(places)
        found = int.from_bytes(content[place : place + 8], "little")
        lie = draw.choice((*_HUGE, 0, 1, found + 1, found - 1, found * 2, found + 32, len(content)))
        content[place : place + 8] = (lie % 2**64).to_bytes(8, "little")
    head = b"GGUF" + struct.pack("<I", draw.choice((3, 3, 3, 2))) + bytes(content)
    return _filled(head) + b"".join(_filled(raw) for *_, raw in tensors)


def _string(text: str) -> bytes:
    content = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(content)) + content


def _typed(draw: random.Random, held: Any) -> tuple[bytes, *tuple[int, ...]]:
    """A value with its type, and where in it a u64 stands."""
    if isinstance(held, str):
        return struct.pack("<I", 8) + _string(held), 4
    if isinstance(held, list):
        return struct.pack("<IIQ", 9, 8, len(held)) + b"".join(map(_string, held)), 8
    if isinstance(held, np.ndarray):
        number = next(number for number, dtype in SCALARS.items() if np.dtype(dtype) == held.dtype)
        return struct.pack("<IIQ", 9, number, held.size) + held.tobytes(), 8
    if isinstance(held, bool):
        return struct.pack("<IB", 7, held), *()
    if isinstance(held, float):
        return struct.pack("<If", 6, min(held, 3e38)) if held != float("inf") else struct.pack("<Id", 12, held), *()
    number = draw.choice((4, 4, 4, 10, 5, 11))
    dtype = np.dtype(SCALARS[number])
    return struct.pack("<I", number) + (held % 2**31).to_bytes(dtype.itemsize, "little"), *()
