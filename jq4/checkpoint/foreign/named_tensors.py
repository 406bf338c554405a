"""The tensors that make one weight, found by name and checked by dtype and shape before any of them is read."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jq4.checkpoint.safetensors_files import StoredTensor
from jq4.errors import JQ4Error

FLOATS = ("F32", "BF16", "F16")
DAMAGED = (
    "The checkpoint is damaged or of another layout; download it again, or convert it with the tool that wrote it."
)


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


def refusal(tensor: StoredTensor, found: str, wanted: str, remedy: str = DAMAGED) -> JQ4Error:
    return JQ4Error(f"{tensor.file}: tensor {tensor.name!r} {found}, wanted {wanted}. {remedy}")


def read_finite(tensor: StoredTensor) -> np.ndarray:
    """The values of a tensor of floats; a JQ4Error where one is NaN or infinite."""
    values = tensor.read()
    finite = np.isfinite(values.astype(np.float32, copy=False))
    if not finite.all():
        raise refusal(tensor, f"holds {int((~finite).sum())} values that are NaN or infinite", "finite scales")
    return values


def read_scalar(tensor: StoredTensor) -> Any:
    """The one value of a tensor of one element, as a Python number."""
    if tensor.shape not in ((), (1,)):
        raise refusal(tensor, f"has shape {list(tensor.shape)}", "one value")
    return tensor.read().reshape(()).item()
