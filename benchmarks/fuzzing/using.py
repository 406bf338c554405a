"""What is done with a file once it is there: opened, every weight read and checked, dequantized, and written again."""

import importlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.fuzzing.folders import Files, Link
from jq4.checkpoint.foreign import Checkpoint, LazyWeight, open_checkpoint
from jq4.checkpoint.foreign.host_dequantize import host_dequantize
from jq4.errors import JQ4Error
from jq4.qarray import PARTS, QArray, is_qarray, validate
from models.config import DecoderConfig
from models.tokenizer import Tokenizer

_WRITERS = ("compressed_tensors_writing", "gptq_writing", "awq_writing")


def laid(folder: Path, files: Files) -> None:
    """Makes the folder hold these files and nothing else."""
    for entry in os.scandir(folder):
        shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else Path(entry.path).unlink()
    for name, content in files.items():
        if isinstance(content, Link):
            (folder / name).symlink_to(content.to)
        elif content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)


def use_checkpoint(path: Path) -> None:
    """Opens, reads, checks, dequantizes, writes. What is not a JQ4Error is a defect."""
    checkpoint = open_checkpoint(path)
    for note in checkpoint.notes:
        note.encode()
    refusals = [error for error in _used(checkpoint) if error]
    if checkpoint.config is not None:
        json.dumps(checkpoint.config)
    if checkpoint.format == "gguf":
        _used_as_a_model(checkpoint)
    if refusals:
        raise refusals[0]


def _used_as_a_model(checkpoint: Checkpoint) -> None:
    """Config and tokenizer are read from what was made of the metadata."""
    Tokenizer.from_files(checkpoint.files.get, "m.gguf")
    if checkpoint.config is not None:
        hash(DecoderConfig.from_hf(checkpoint.config))


def use_config(raw: bytes, where: str) -> None:
    """Reads a config.json."""
    from jq4.checkpoint.safetensors_files import parse_json

    config = DecoderConfig.from_hf(parse_json(raw, where))
    hash(config)
    config.to_hf()


def _used(checkpoint: Checkpoint) -> Iterator[JQ4Error | None]:
    """An entry for each weight: the error that reading it gave, or None."""
    for name, weight in checkpoint.weights.items():
        name.encode()
        assert weight.name == name and weight.format and weight.nbytes >= 0
        try:
            value = weight.read()
        except JQ4Error as error:
            yield error
            continue
        yield None
        _check_rows(weight, value)
        if not is_qarray(value):
            assert (value.shape, value.dtype) == (weight.shape, weight.abstract.dtype), (
                name,
                value.shape,
                weight.shape,
            )
            value.tobytes()
            continue
        _check_same(value, weight.abstract, name)
        validate(value, name)
        with np.errstate(all="ignore"):
            dense = host_dequantize(value)
            assert dense.shape == weight.shape, (name, dense.shape, weight.shape)
            _written(LazyWeight(name, weight.abstract, lambda value=value: value), value)


def _check_same(q: QArray, abstract: QArray, where: str) -> None:
    for part in PARTS:
        found, wanted = getattr(q, part), getattr(abstract, part)
        if is_qarray(wanted):
            _check_same(found, wanted, f"{where} {part}")
        else:
            described = None if found is None else (tuple(found.shape), found.dtype)
            assert described == (None if wanted is None else (wanted.shape, wanted.dtype)), (
                where,
                part,
                described,
                wanted,
            )
    for field in ("format", "group_size", "axis", "padding", "dtype"):
        assert getattr(q, field) == getattr(abstract, field), (where, field)


def _check_rows(weight: LazyWeight, value: Any) -> None:
    """Read in two parts, it must be the same."""
    if weight.read_rows is None or not weight.shape or weight.shape[0] < 2:
        return
    for rows in (slice(0, weight.shape[0] // 2), slice(weight.shape[0] // 2, weight.shape[0])):
        for whole, part in zip(jax.tree.leaves(value), jax.tree.leaves(weight.read_rows(rows)), strict=True):
            wanted = whole if whole.shape == part.shape else whole[rows]
            assert wanted.dtype == part.dtype and wanted.tobytes() == part.tobytes(), (weight.name, rows)


def _written(weight: LazyWeight, value: Any) -> None:
    """Planned and encoded by every writer that takes it."""
    for name in _WRITERS:
        writer = importlib.import_module(f"jq4.checkpoint.foreign.{name}")
        try:
            planned = writer.plan(weight, {})
            made: Mapping[str, np.ndarray] = planned.encode(value)
        except JQ4Error:
            continue
        for tensor, array in made.items():
            assert tuple(array.shape) == tuple(planned.tensors[tensor][1]), (name, tensor)
