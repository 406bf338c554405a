"""The tensors that make one packed weight: found by name, and checked by dtype and shape before any of them is read.

Files name them after the module: "model.layers.0.mlp.up_proj" + ".qweight", ".scales", ... The dense weight of the
module would be called prefix + ".weight". `Partners` are all tensors of one prefix; `partner` finds them one by one,
where names are made in other ways.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jq4.checkpoint.safetensors_files import StoredTensor
from jq4.errors import JQ4Error

FLOATS = ("F16", "BF16", "F32")
DAMAGED = (
    "The checkpoint is damaged or of another layout; download it again, or convert it with the tool that wrote it."
)


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

    def rows(self, rows: slice, *parts: str) -> "Partners":
        """The same with those of the parts cut to some indices of axis 0."""
        cut = {part: self.held[part].rows(rows) for part in parts if part in self.held}
        return dataclasses.replace(self, held={**self.held, **cut})

    def names(self, *parts: str) -> tuple[str, ...]:
        """The full names of those of the parts that there are."""
        return tuple(self.held[part].name for part in parts if part in self.held)


def modules_with(tensors: Mapping[str, StoredTensor], part: str) -> Iterator[Partners]:
    """Every module that has a tensor called `part`, with all its tensors, in the order of the file."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        modules.setdefault(prefix, {})[last] = tensor
    return (Partners(prefix, held) for prefix, held in modules.items() if part in held)


def partner(
    tensors: Mapping[str, StoredTensor],
    owner: StoredTensor,
    name: str,
    dtypes: Sequence[str],
    shape: Sequence[int | None] | None = None,
) -> StoredTensor:
    """The tensor `name` that `owner` cannot be read without; a None in `shape` is any length."""
    if name not in tensors:
        raise JQ4Error(f"{owner.file}: tensor {owner.name!r} comes without {name!r}. {DAMAGED}")
    return checked(tensors[name], dtypes, shape)


def checked(tensor: StoredTensor, dtypes: Sequence[str], shape: Sequence[int | None] | None = None) -> StoredTensor:
    """The tensor, if it has one of these dtypes (by safetensors' names) and this shape."""
    if tensor.dtype not in dtypes:
        raise refusal(tensor, f"has dtype {tensor.dtype}", f"{' or '.join(dtypes)}")
    if shape is not None and not (
        len(shape) == len(tensor.shape)
        and all(want is None or have == want for have, want in zip(tensor.shape, shape, strict=True))
    ):
        wanted = ", ".join("any" if one is None else str(one) for one in shape)
        raise refusal(tensor, f"has shape {list(tensor.shape)}", f"[{wanted}]")
    return tensor


def contradiction(tensor: StoredTensor, wanted: str, remedy: str = DAMAGED) -> JQ4Error:
    """What to raise where a tensor's dtype or shape does not fit its partners."""
    return refusal(tensor, f"is {tensor.dtype}{list(tensor.shape)}", wanted, remedy)


def refusal(tensor: StoredTensor, found: str, wanted: str, remedy: str = DAMAGED) -> JQ4Error:
    """What to raise of a tensor that has, holds or is something else than is wanted."""
    return JQ4Error(f"{tensor.file}: tensor {tensor.name!r} {found}, wanted {wanted}. {remedy}")


def read_finite(tensor: StoredTensor) -> np.ndarray:
    """The values of a tensor of floats; a JQ4Error where one is NaN or infinite."""
    return finite(tensor.read(), tensor)


def finite(values: np.ndarray, tensor: StoredTensor) -> np.ndarray:
    """The same, of those values of a tensor that are used."""
    bad = ~np.isfinite(values.astype(np.float32, copy=False))
    if bad.any():
        raise refusal(tensor, f"holds {int(bad.sum())} values that are NaN or infinite", "finite scales")
    return values


def read_scalar(tensor: StoredTensor) -> Any:
    """The one value of a tensor of one element, as a Python number."""
    if tensor.shape not in ((), (1,)):
        raise refusal(tensor, f"has shape {list(tensor.shape)}", "one value")
    return tensor.read().reshape(()).item()
