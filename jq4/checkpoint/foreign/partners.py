"""The tensors that make one packed weight: found by their common prefix, and checked against each other unread.

Files name them after the module: "model.layers.0.mlp.up_proj" + ".qweight", ".scales", ... The dense weight of the
module would be called prefix + ".weight".
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.safetensors_files import StoredTensor
from jq4.errors import JQ4Error

FLOATS = ("F16", "BF16", "F32")
_DOWNLOAD = "The parts are not of one checkpoint, or damaged; download it again."


@dataclasses.dataclass(frozen=True)
class Partners:
    """The tensors of one module, by what follows the prefix in their names."""

    prefix: str
    held: Mapping[str, StoredTensor]

    @property
    def weight_name(self) -> str:
        return f"{self.prefix}.weight"

    def get(self, part: str) -> StoredTensor | None:
        """The tensor, or None where it is missing or empty."""
        tensor = self.held.get(part)
        return tensor if tensor is not None and 0 not in tensor.shape else None

    def need(self, part: str, *dtypes: str) -> StoredTensor:
        """The tensor, of one of the dtypes; an error that names it and its partners otherwise."""
        tensor = self.get(part)
        if tensor is None:
            file = next(iter(self.held.values())).file
            raise JQ4Error(
                f"{file}: tensor {self.prefix + '.' + part!r} is missing or empty, wanted beside "
                f"{', '.join(sorted(self.held))}. Download the checkpoint again."
            )
        if dtypes and tensor.dtype not in dtypes:
            raise contradiction(tensor, f"dtype {' or '.join(dtypes)}")
        return tensor

    def names(self, *parts: str) -> tuple[str, ...]:
        """The full names of those of the parts that there are."""
        return tuple(self.held[part].name for part in parts if part in self.held)


def contradiction(tensor: StoredTensor, wanted: str, remedy: str = _DOWNLOAD) -> JQ4Error:
    """What to raise where a tensor's dtype or shape does not fit its partners."""
    return JQ4Error(
        f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}{list(tensor.shape)}, wanted {wanted}. {remedy}"
    )


def modules_with(tensors: Mapping[str, StoredTensor], part: str) -> Iterator[Partners]:
    """Every module that has a tensor called `part`, with all its tensors, in the order of the file."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        modules.setdefault(prefix, {})[last] = tensor
    return (Partners(prefix, held) for prefix, held in modules.items() if part in held)


def finite(array: Any, tensor: StoredTensor) -> np.ndarray:
    """The scales themselves; raises where one of them is NaN or infinite."""
    array = np.asarray(array)
    if not np.isfinite(array.astype(np.float32)).all():
        raise JQ4Error(
            f"{tensor.file}: tensor {tensor.name!r} holds NaN or infinity, wanted finite scales. "
            "The checkpoint is damaged, or its quantization failed; download or quantize it again."
        )
    return array
