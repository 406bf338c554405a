"""Checkpoints of other formats for the tests, written by the safetensors library itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jq4.checkpoint.foreign import LazyWeight, open_checkpoint
from jq4.checkpoint.foreign.row_blocks import dense_blocks
from jq4.qarray import is_qarray, validate


def write_checkpoint(folder, tensors, config=None, metadata=None):
    """A Hugging Face folder of these numpy arrays."""
    folder.mkdir(exist_ok=True)
    held = {name: np.array(array, order="C") for name, array in tensors.items()}  # not ascontiguousarray: keeps ()
    save_file(held, folder / "model.safetensors", metadata)
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def read_weight(folder, name, expected_format=None):
    """A packed weight as it was opened and read, which must be as it was described."""
    checkpoint = open_checkpoint(folder)
    if expected_format:
        assert checkpoint.format == expected_format
    weight = checkpoint.weights[name]
    q = weight.read()
    assert is_qarray(q) and validate(q) is q
    assert jax.tree.structure(q) == jax.tree.structure(weight.abstract)
    for mine, described in zip(jax.tree.leaves(q), jax.tree.leaves(weight.abstract), strict=True):
        assert isinstance(mine, np.ndarray) and (mine.shape, mine.dtype) == (described.shape, described.dtype)
    return q


def dense(q, dtype=None):
    """The dense weight [*B, N, K], by numpy, in `dtype` or the QArray's own: no program is compiled for it."""
    values = np.concatenate([block for _, block in dense_blocks(q)]).reshape(q.shape)
    return values.astype(dtype or jnp.dtype(q.dtype))


def as_folder(folder, weights, writer, options=None, config=None):
    """Writes LazyWeights with a writer of jq4 as a Hugging Face folder; what was planned comes back."""
    planned = [writer.plan(weight, options or {}) for weight in weights]
    tensors = {}
    for one in planned:
        encoded = one.encode(one.weight.read())
        assert {name: array.shape for name, array in encoded.items()} == {n: s for n, (_, s) in one.tensors.items()}
        tensors |= encoded
    quantization = writer.quantization_config(planned, options or {})
    write_checkpoint(folder, tensors, (config or {}) | {"quantization_config": quantization}, {"format": "pt"})
    return planned


def lazy(name, value):
    """A weight in memory as a writer is given it."""
    return LazyWeight(name, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), value), lambda: value)
