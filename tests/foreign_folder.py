"""Folders as other software leaves them, made from arrays: what tests of foreign formats open, and what they write."""

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jq4.checkpoint import safetensors_files
from jq4.checkpoint.foreign import Checkpoint, LazyWeight, open_checkpoint
from jq4.checkpoint.foreign.host_dequantize import dense_rows
from jq4.checkpoint.foreign.writing import Planned
from jq4.host_moves import described
from jq4.qarray import QArray, is_qarray, validate
from tests.packed_oracle import BITS, dequantize64, unpack_bits

NAMES = {dtype: name for name, dtype in safetensors_files.DTYPES.items()}


def write_checkpoint(folder: Path, tensors: Mapping[str, np.ndarray], config: Any = None, metadata: Any = None) -> Path:
    """A Hugging Face folder of these arrays, written by the safetensors library itself."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: np.array(array, order="C") for name, array in tensors.items()}  # not ascontiguousarray: keeps ()
    save_file(held, folder / "model.safetensors", metadata)
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def save(folder: Path, tensors: Mapping[str, np.ndarray], quantization: Any = None, **config: Any) -> Path:
    """The same, with this quantization_config."""
    told = {} if quantization is None else {"quantization_config": quantization}
    return write_checkpoint(folder, tensors, config | told)


def opened(folder: Path, tensors: Mapping[str, np.ndarray], quantization: Any = None, **config: Any) -> Checkpoint:
    return open_checkpoint(save(folder, tensors, quantization, **config))


def read_weight(held: Checkpoint | Path, name: str, expected_format: str | None = None) -> QArray:
    """A packed weight of a checkpoint or folder, which must be as it was described."""
    checkpoint = held if isinstance(held, Checkpoint) else open_checkpoint(held)
    if expected_format:
        assert checkpoint.format == expected_format
    weight = checkpoint.weights[name]
    q = weight.read()
    assert is_qarray(q) and validate(q, name) is q
    assert jax.tree.structure(q) == jax.tree.structure(weight.abstract)
    for mine, told in zip(jax.tree.leaves(q), jax.tree.leaves(weight.abstract), strict=True):
        assert isinstance(mine, np.ndarray) and (mine.shape, mine.dtype) == (told.shape, told.dtype), name
    return q


def dense(q: QArray, dtype: Any = None) -> np.ndarray:
    """The dense weight [*B, N, K], by numpy, in `dtype` or the QArray's own: no program is compiled for it."""
    values = np.concatenate([block for _, block in dense_rows(q)]).reshape(q.shape)
    return values.astype(dtype or np.dtype(q.dtype))


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


def weight_of(value: Any, name: str = "m.weight") -> LazyWeight:
    """A weight in memory as a writer is given it."""
    return LazyWeight(name, described(value), lambda: value)


def convert(
    writer_name: str, weights: Mapping[str, LazyWeight] | list[LazyWeight], **options: Any
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(the tensors, the quantization_config) that a writer makes; shapes and dtypes are those that it planned."""
    writer = importlib.import_module(f"jq4.checkpoint.foreign.{writer_name}_writing")
    tensors, planned = _encoded(writer, weights.values() if isinstance(weights, Mapping) else weights, options)
    return tensors, writer.quantization_config(planned, options)


def as_folder(
    folder: Path, weights: Iterable[LazyWeight], writer: Any, options: Any = None, config: Any = None
) -> list[Planned]:
    """Writes weights with a writer of jq4 as a Hugging Face folder; what was planned comes back."""
    tensors, planned = _encoded(writer, weights, options or {})
    told = {"quantization_config": writer.quantization_config(planned, options or {})}
    write_checkpoint(folder, tensors, (config or {}) | told, {"format": "pt"})
    return planned


def _encoded(
    writer: Any, weights: Iterable[LazyWeight], options: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], list[Planned]]:
    planned = [writer.plan(weight, options) for weight in weights]
    tensors: dict[str, np.ndarray] = {}
    for one in planned:
        made = one.encode(one.weight.read())
        assert {name: (NAMES[a.dtype], a.shape) for name, a in made.items()} == dict(one.tensors)
        tensors |= made
    return tensors, planned


def assert_same_tensors(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name
