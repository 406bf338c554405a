"""A slice of an array of one of our folders, without the rest of it: only the chunks that it touches are decoded."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jq4.checkpoint.manifest import ArrayInfo
from jq4.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array on disk: its shape and dtype, and, indexed, its values."""

    data: Path
    info: ArrayInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.info.dtype)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        if self.info.array is None:
            return np.zeros(self.shape, self.dtype)[index]
        import tensorstore as ts

        folder = self.data / self.info.array
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)}}
        try:
            return np.asarray(ts.open(spec, open=True, read=True).result()[index].read().result())
        except ValueError as error:
            raise CheckpointError(f"{folder}: leaf {self.info.path} cannot be read ({error})") from error
