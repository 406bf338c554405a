"""Folders as other software leaves them, made from arrays: what tests of foreign formats open, and what they write."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jq4.checkpoint import safetensors_files
from jq4.checkpoint.foreign import Checkpoint, LazyWeight, open_checkpoint
from jq4.qarray import QArray, is_qarray, validate
from tests.packed_oracle import BITS, dequantize64, unpack_bits

NAMES = {dtype: name for name, dtype in safetensors_files.DTYPES.items()}


def save(folder: Path, tensors: Mapping[str, np.ndarray], quantization: Any = None, **config: Any) -> Path:
    """A Hugging Face folder with these tensors and this quantization_config."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {name: (NAMES[a.dtype], a.shape, lambda a=a: a) for name, a in tensors.items()}
    safetensors_files.write(folder / "model.safetensors", described)
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def opened(folder: Path, tensors: Mapping[str, np.ndarray], quantization: Any = None, **config: Any) -> Checkpoint:
    return open_checkpoint(save(folder, tensors, quantization, **config))


def read_weight(checkpoint: Checkpoint, name: str) -> QArray:
    """The packed weight, after a check that it is what its abstract says."""
    weight = checkpoint.weights[name]
    q = weight.read()
    validate(q, name)
    check_same_description(q, weight.abstract, name)
    return q


def check_same_description(q: QArray, abstract: QArray, where: str) -> None:
    for part in ("codes", "scale", "zero_point", "offset", "permutation"):
        found, wanted = getattr(q, part), getattr(abstract, part)
        if is_qarray(wanted):
            check_same_description(found, wanted, f"{where} {part}")
        else:
            description = None if found is None else (found.shape, found.dtype)
            assert description == (None if wanted is None else (wanted.shape, wanted.dtype)), (where, part)
    for field in ("format", "group_size", "axis", "padding", "dtype"):
        assert getattr(q, field) == getattr(abstract, field), (where, field)


def dense64(q: QArray) -> np.ndarray:
    """The weight [N, K] of a QArray grouped along K, in float64, by an oracle of its own."""
    codes = unpack_bits(np.asarray(q.codes), BITS[q.format], -1, q.shape[-1])
    scale = dense64(q.scale) if is_qarray(q.scale) else np.asarray(q.scale).astype(np.float64)
    packed = dequantize64(codes, scale, q.zero_point, q.offset, q.format, q.group_size, -1)
    if q.permutation is None:
        return packed
    weight = np.empty_like(packed)
    weight[..., np.asarray(q.permutation)] = packed
    return weight


def weight_of(q: QArray, name: str = "m.weight") -> LazyWeight:
    """A weight in memory as a converter has it."""
    return LazyWeight(name, q, lambda: q)


def convert(
    writer_name: str, weights: Mapping[str, LazyWeight] | list[LazyWeight], **options: Any
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(the tensors, the quantization_config) that a writer makes; shapes and dtypes are those that it planned."""
    writer = importlib.import_module(f"jq4.checkpoint.foreign.{writer_name}_writing")
    held = list(weights.values()) if isinstance(weights, Mapping) else weights
    planned = [writer.plan(weight, options) for weight in held]
    tensors: dict[str, np.ndarray] = {}
    for one in planned:
        made = one.encode(one.weight.read())
        assert {name: (NAMES[a.dtype], a.shape) for name, a in made.items()} == dict(one.tensors)
        tensors |= made
    return tensors, writer.quantization_config(planned, options)


def assert_same_tensors(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name
