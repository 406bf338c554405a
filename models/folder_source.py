"""A Hugging Face folder as the blocks of a chain (see jq4.chain): one layer's tensors are read at a time.

Headers, names and shapes of the whole checkpoint are checked before the first block is read; leaves have the dtype that
`load_params` would give them, so that a model quantized block by block has the bytes of one quantized whole.
"""

import dataclasses
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from jq4.checkpoint.safetensors_files import StoredTensor, open_tensors
from models.config import DecoderConfig
from models.folds import untied
from models.hf import fill_leaf, matched_tensors, nested
from models.tensor_names import Path, places


class FolderSource:
    """The dense params of a folder, block by block; a jq4.chain.BlockSource.

    Raises JQ4Error, naming file and tensor, as `load_params` does, when it is made.
    """

    def __init__(self, folder: str | FilePath, config: DecoderConfig) -> None:
        self._places = places(config)
        self._tensors = matched_tensors(FilePath(folder), open_tensors(FilePath(folder)), config)

    def outside(self) -> dict[str, Any]:
        """Embedding, last norm and head."""
        return self._filled({path: each for path, each in self._tensors.items() if not self._places[path].stacked})

    def block(self, index: int) -> dict[str, Any]:
        """{"layers": ...} of one layer."""
        stacked = {path: each for path, each in self._tensors.items() if self._places[path].stacked}
        return self._filled({path: [each[index]] for path, each in stacked.items()})

    def _filled(self, tensors: dict[Path, list[StoredTensor]]) -> dict[str, Any]:
        leaves = {}
        for path, each in tensors.items():
            of_one_layer = dataclasses.replace(self._places[path], name=each[0].name)
            mixed = len({tensor.dtype for tensor in self._tensors[path]}) > 1
            leaves[path] = fill_leaf(of_one_layer, each, np.float32 if mixed else None)
        return nested(leaves)


class UntiedSource:
    """A source of a model whose head is its embedding, with the head as a leaf of its own (see models.folds.untied)."""

    def __init__(self, source: FolderSource, config: DecoderConfig) -> None:
        self._source = source
        self._config = config

    def outside(self) -> dict[str, Any]:
        return untied(self._config, self._source.outside())[1]

    def block(self, index: int) -> dict[str, Any]:
        return self._source.block(index)
