"""A whole GGUF file: the header from the plan, then one tensor after another, so that memory is that of one weight.

It is written beside its place and takes it at the end, whole, once it has reached the disk.
"""

import io
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jq4.checkpoint.foreign.gguf.block_types import BY_NAME, BlockType
from jq4.checkpoint.foreign.gguf.config_out import Settings, factors_of, metadata_of, notes_of
from jq4.checkpoint.foreign.gguf.container import ALIGNMENT, ARRAY, MAGIC, SCALARS, STRING
from jq4.checkpoint.foreign.gguf.experts import whole_tensors
from jq4.checkpoint.foreign.gguf.planning import file_type_number
from jq4.checkpoint.foreign.gguf.tokenizer_out import tokenizer_metadata
from jq4.checkpoint.foreign.weights import Checkpoint
from jq4.checkpoint.foreign.writing import Planned
from jq4.errors import JQ4Error

Described = Mapping[str, tuple[BlockType, tuple[int, ...]]]

_VERSION, _QUANTIZATION_VERSION = 3, 2
_LONGEST_NAME = 63  # bytes; ggml's
_NUMBERS = {np.dtype(dtype): number for number, dtype in SCALARS.items()}
_OF_PYTHON = {bool: np.bool_, int: np.uint32, float: np.float32}


def write(
    file: Path,
    planned: list[Planned],
    checkpoint: Checkpoint,
    options: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the planned weights, the settings and the tokenizer of a checkpoint as one .gguf file, whole or not at
    all.

    progress: called with the bytes of tensors written and in all, after each tensor.
    """
    planned, head, places, size = outline(planned, checkpoint, options)
    total = sum(places[name][1] - places[name][0] for one in planned for name in one.tensors)
    temporary = file.with_name(file.name + ".partial")
    try:
        with temporary.open("wb") as stream:
            stream.write(head)
            stream.truncate(size)
            written = 0
            for one in planned:
                for name, array in one.encode(one.weight.read()).items() if one.tensors else ():
                    start, stop = places[name]
                    stream.seek(start)
                    _write(stream, name, stop - start, array)
                    written += stop - start
                    if progress:
                        progress(written, total)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def notes(planned: list[Planned], checkpoint: Checkpoint, options: Mapping[str, Any]) -> list[str]:
    """What a file made of this plan says otherwise than the checkpoint's config and tokenizer do."""
    return _outside(planned, checkpoint, options)[2]


def outline(
    planned: list[Planned], checkpoint: Checkpoint, options: Mapping[str, Any]
) -> tuple[list[Planned], bytes, dict[str, tuple[int, int]], int]:
    """For who writes the tensors one by one: the weights that are written, what the file begins with (its header, and
    the tensors that no weight makes), where each tensor or share of one lies, and the file's size.
    """
    planned = _each_tensor_once(planned)
    metadata, factors, _ = _outside(planned, checkpoint, options)
    described = {name: (BY_NAME["F32"], tuple(array.shape)) for name, array in factors.items()}
    for one in planned:
        described |= {name: (BY_NAME[kind], shape) for name, (kind, shape) in one.tensors.items()}
    whole, shares = whole_tensors(described, Settings(options.get("config")).experts)
    head = header(metadata, whole)
    places, stop = {}, len(head)
    for name, one in whole.items():
        places[name] = (stop, stop + _size(one))
        stop += _filled(_size(one))
    for name, (tensor, expert) in shares.items():
        start = places[tensor][0] + expert * _size(described[name])
        places[name] = (start, start + _size(described[name]))
    places = {name: place for name, place in places.items() if name in described}
    stream = io.BytesIO()
    for name, array in factors.items():
        size = _size(described[name])
        _write(stream, name, size, array)
        stream.write(bytes(_filled(size) - size))
    return planned, head + stream.getvalue(), places, stop


def header(metadata: Mapping[str, Any], described: Described) -> bytes:
    """All that stands before the data. Values are str, bool, int (u32), float (f32), arrays and lists of strings."""
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(described), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _typed(key, value)]
    offset = 0
    for name, one in described.items():
        kind, shape = one
        if len(name.encode()) > _LONGEST_NAME:
            raise JQ4Error(f"{name}: the name is longer than {_LONGEST_NAME} bytes, which llama.cpp reads. Shorten it.")
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_string(name), dims, struct.pack("<IQ", kind.number, offset)]
        offset += _filled(_size(one))
    content = b"".join(parts)
    return content + bytes(_filled(len(content)) - len(content))


def _each_tensor_once(planned: list[Planned]) -> list[Planned]:
    """The plan without a tied head, where the embedding that it equals is there too."""
    embedded = any(one.weight.name.endswith("embed_tokens.weight") for one in planned)
    tied = [one for one in planned if one.weight.name.endswith("lm_head.weight") and "token_embd.weight" in one.tensors]
    return [one for one in planned if not embedded or one not in tied]


def _outside(
    planned: list[Planned], checkpoint: Checkpoint, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray], list[str]]:
    """The metadata, the tensors that no weight makes, and the notes."""
    settings = Settings(options.get("config"))
    tensors = {name: one for each in planned for name, one in each.tensors.items()}
    if "token_embd.weight" not in tensors:
        raise JQ4Error("model.embed_tokens.weight: is missing among the weights, wanted in every GGUF file of a model.")
    vocabulary = tensors["token_embd.weight"][1][0]
    tokenizer, doubts = tokenizer_metadata(checkpoint.files, settings.whole, vocabulary)
    model_type = str(settings.whole.get("model_type"))
    metadata: dict[str, Any] = {
        "general.architecture": settings.architecture,
        "general.type": "model",
        "general.name": _model_name(str(options.get("name") or model_type), tokenizer),
        "general.basename": model_type,
        "general.file_type": file_type_number(options, planned),
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    metadata |= metadata_of(settings, vocabulary) | tokenizer
    return metadata, factors_of(settings), [*notes_of(settings), *doubts]


def _model_name(name: str, tokenizer: Mapping[str, Any]) -> str:
    """The name, but none that has llama.cpp look up Phi-3's tokens, and give up, where they are not there."""
    missing = {"<unk>", "<s>", "<|endoftext|>"} - set(tokenizer.get("tokenizer.ggml.tokens", ()))
    return re.sub("(?i)phi-?3", "phi", name) if missing else name


def _write(stream: BinaryIO, name: str, size: int, array: np.ndarray) -> None:
    if array.nbytes != size:
        raise JQ4Error(f"{name}: came out as {array.nbytes} bytes, wanted {size}; no file was written.")
    stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _size(described: tuple[BlockType, tuple[int, ...]]) -> int:
    kind, shape = described
    return math.prod(shape) // kind.length * kind.nbytes


def _filled(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _typed(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", ARRAY, _NUMBERS[value.dtype], value.size) + value.tobytes()
    if type(value) is int and not 0 <= value < 2**32:
        raise JQ4Error(f"{key}: is {value}, wanted a whole number of 32 bits. Take the config.json of the weights.")
    scalar = np.asarray(value, _OF_PYTHON[type(value)])
    return struct.pack("<I", _NUMBERS[scalar.dtype]) + scalar.tobytes()
