"""An opened checkpoint: every weight by the name that Hugging Face's dense tensor has, described, and read when asked.

What a reader makes of a file's tensors is checked from names, dtypes and shapes before anything is read; a weight's
`read` then takes memory for that weight alone.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jq4.checkpoint.safetensors_files import DTYPES, StoredTensor
from jq4.qarray import QArray, is_qarray, leaf_nbytes


@dataclasses.dataclass(frozen=True)
class LazyWeight:
    """One weight of a checkpoint.

    Attributes:
      name: Hugging Face's name of the dense tensor: "model.layers.0.mlp.up_proj.weight".
      abstract: what `read` will give, with jax.ShapeDtypeStruct for arrays: a QArray [*E, N, K] grouped along its axis
        -1, or a ShapeDtypeStruct where the weight is dense.
      read: reads it: a QArray of numpy arrays, or a numpy array (often a view of a mapped file).
      tensors: the tensors of the file that it is made of.
      read_rows: reads some indices of axis 0 alone (rows; of a stack of experts whole matrices), as `read` gives them;
        None where the file's layout has them in one piece with the others.
      peek: reads a small array of it by its path ("scale/offset"), and nothing else; None where it is not to be had so.
    """

    name: str
    abstract: Any
    read: Callable[[], Any] = dataclasses.field(repr=False)
    tensors: tuple[str, ...] = ()
    read_rows: Callable[[slice], Any] | None = dataclasses.field(default=None, repr=False)
    peek: Callable[[str], np.ndarray | None] = dataclasses.field(default=lambda path: None, repr=False)

    @property
    def packed(self) -> bool:
        return is_qarray(self.abstract)

    @property
    def shape(self) -> tuple[int, ...]:
        """The dense weight's."""
        return tuple(self.abstract.shape)

    @property
    def format(self) -> str:
        """The number format's name, or the dtype of a dense weight."""
        return self.abstract.format if self.packed else np.dtype(self.abstract.dtype).name

    @property
    def nbytes(self) -> int:
        return sum(leaf_nbytes(part) for part in jax.tree.leaves(self.abstract))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a folder or file holds.

    Attributes:
      format: the name of the reader: "gptq", "awq", "gguf", ..., "safetensors" for a dense one.
      weights: by name, in the order of the file.
      config: what config.json says of the model, without `quantization_config`; None where there is none.
      quantization: `quantization_config`; empty where there is none.
      files: the small files beside the weights (tokenizer.json, ...), by name.
      notes: where label and contents disagree, and what was made of it; to be shown to the user.
    """

    format: str
    weights: Mapping[str, LazyWeight]
    config: Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()


def dense_weight(tensor: StoredTensor) -> LazyWeight:
    """A tensor of a safetensors file as it is."""
    abstract = jax.ShapeDtypeStruct(tensor.shape, DTYPES[tensor.dtype])
    return LazyWeight(tensor.name, abstract, tensor.read, (tensor.name,))


def abstract_qarray(
    shape: tuple[int, ...],
    *,
    format: str,
    group_size: int,
    dtype: Any,
    parts: Mapping[str, tuple[tuple[int, ...], Any]],
) -> QArray:
    """The QArray [*E, N, K] (grouped along K) whose arrays have these shapes and dtypes; `shape` tells that of codes.

    parts: name -> (shape, dtype) of scale, zero_point, offset, permutation, ...
    """
    from jq4.formats import get_format
    from pallas_kernels import packing

    bits = get_format(format).bits
    codes = jax.ShapeDtypeStruct((*shape[:-1], packing.packed_length(shape[-1], bits)), np.uint8)
    held: dict[str, Any] = {name: jax.ShapeDtypeStruct(*one) for name, one in parts.items()}
    return QArray(
        codes=codes, format=format, group_size=group_size, axis=-1, padding=packing.padding_of(shape[-1], bits),
        dtype=np.dtype(dtype).name, **held,
    )  # fmt: skip
