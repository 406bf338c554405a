"""A Hugging Face folder as the blocks of a chain (see jq4.chain): one layer's tensors are read at a time.

Headers, names and shapes of the whole checkpoint are checked before the first block is read; leaves have the dtype that
`load_params` would give them, so that a model quantized block by block has the bytes of one quantized whole.
"""

from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp

from jq4.checkpoint.foreign import LazyWeight, open_checkpoint
from jq4.checkpoint.structure import nested
from models.config import DecoderConfig
from models.filling import dense_dtype, leaf_of
from models.folds import untied
from models.matching import check_dense, matched_weights
from models.tensor_names import Path, places


class FolderSource:
    """The dense params of a folder, block by block; a jq4.chain.BlockSource.

    Raises JQ4Error, naming file and tensor, as `load_params` does, when it is made.
    """

    def __init__(self, folder: str | FilePath, config: DecoderConfig) -> None:
        checkpoint = open_checkpoint(FilePath(folder))
        check_dense(str(folder), checkpoint)
        self._places = places(config)
        self._weights = matched_weights(str(folder), checkpoint, config)

    def outside(self) -> dict[str, Any]:
        """Embedding, last norm and head."""
        return nested({path: self._leaf(path, each) for path, each in self._weights.items() if not self._stacked(path)})

    def block(self, index: int) -> dict[str, Any]:
        """{"layers": ...} of one layer."""
        layers = {path: each[index : index + 1] for path, each in self._weights.items() if self._stacked(path)}
        return nested({path: self._leaf(path, each)[0] for path, each in layers.items()})

    def _stacked(self, path: Path) -> bool:
        return self._places[path].stacked

    def _leaf(self, path: Path, weights: list[LazyWeight]) -> jax.Array:
        return jnp.asarray(leaf_of(path, self._places[path], weights, dense_dtype(self._weights[path])).read())


class UntiedSource:
    """A source of a model whose head is its embedding, with the head as a leaf of its own (see models.folds.untied)."""

    def __init__(self, source: FolderSource, config: DecoderConfig) -> None:
        self._source = source
        self._config = config

    def outside(self) -> dict[str, Any]:
        return untied(self._config, self._source.outside())[1]

    def block(self, index: int) -> dict[str, Any]:
        return self._source.block(index)
