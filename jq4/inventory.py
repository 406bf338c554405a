"""What a tree of weights holds, leaf by leaf: formats, groups, bytes, and how far it is from another tree.

Bytes are counted where they are: on the device (packed codes are bytes; int4 arrays take half a byte an element), and
on the host (where numpy and jnp.int4 take a whole byte an element). `bits_per_weight` of a tree is over all of its
parameters, dense ones included; `bits_per_weight_packed` over the packed leaves alone. Leaves may be
jax.ShapeDtypeStruct: nothing but shapes and dtypes is read, unless errors are asked for.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jq4.errors import JQ4Error
from jq4.evaluate import sqnr_db
from jq4.paths import flatten_with_paths
from jq4.qarray import is_qarray, leaf_nbytes


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One weight. `format` is the number format's name, or the dtype of a dense leaf; `axis` the grouped one.

    Attributes:
      bytes: held on the device, scales and zero points included.
      host_bytes: the same on the host.
      activations: what products round their inputs to (jq4.activations), "" for nothing.
      sqnr_db: signal to quantization noise against the reference, None where there is none or nothing differs.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    bytes: int
    host_bytes: int
    packed: bool = False
    group_size: int | None = None
    axis: int | None = None
    scale_dtype: str | None = None
    sqnr_db: float | None = None
    activations: str = ""

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / max(1, self.size)

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "bits_per_weight": self.bits_per_weight}


def inventory(tree: Any) -> list[Leaf]:
    """The leaves of `tree` in tree order; a QArray is one leaf."""
    return [_leaf(path, leaf) for path, leaf in flatten_with_paths(tree)]


def with_errors(
    leaves: Sequence[Leaf], tree: Any, reference: Any, progress: Callable[[int, int], None] | None = None
) -> list[Leaf]:
    """The leaves with the SQNR of every one that differs from the leaf of the same path in `reference`.

    Raises:
      JQ4Error: where the trees do not have the same paths and shapes.
    """
    ours, theirs = dict(flatten_with_paths(tree)), dict(flatten_with_paths(reference))
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise JQ4Error(f"the model and its reference are not of one shape: {odd[0]} is in one of them only")
    found = []
    for done, leaf in enumerate(leaves, 1):
        if leaf.shape != tuple(theirs[leaf.path].shape):
            raise JQ4Error(f"{leaf.path}: shape {leaf.shape}, but {tuple(theirs[leaf.path].shape)} in the reference")
        error = sqnr_db(theirs[leaf.path], ours[leaf.path])
        found.append(dataclasses.replace(leaf, sqnr_db=None if error == float("inf") else error))
        if progress is not None:
            progress(done, len(leaves))
    return found


def totals(leaves: Sequence[Leaf]) -> dict[str, Any]:
    """Sums over leaves: parameters, bytes on device and host, bits a weight."""
    packed = [leaf for leaf in leaves if leaf.packed]
    parameters, held = sum(leaf.size for leaf in leaves), sum(leaf.bytes for leaf in leaves)
    in_packed = sum(leaf.size for leaf in packed)
    return {
        "parameters": parameters,
        "parameters_packed": in_packed,
        "bytes": held,
        "bytes_host": sum(leaf.host_bytes for leaf in leaves),
        "bits_per_weight": 8 * held / max(1, parameters),
        "bits_per_weight_packed": 8 * sum(leaf.bytes for leaf in packed) / in_packed if in_packed else None,
    }


def bytes_on_disk(folder: str | Path) -> int:
    """Bytes of all files in a folder, or of a single file."""
    folder = Path(folder)
    files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def _leaf(path: str, leaf: Any) -> Leaf:
    host = sum(int(np.prod(part.shape)) * np.dtype(part.dtype).itemsize for part in jax.tree.leaves(leaf))
    if not is_qarray(leaf):
        return Leaf(path, tuple(leaf.shape), str(leaf.dtype), leaf_nbytes(leaf), host)
    scales = leaf.scale.format if is_qarray(leaf.scale) else str(leaf.scale.dtype)
    group = min(leaf.group_size, leaf.shape[leaf.axis])
    found = Leaf(path, leaf.shape, leaf.format, leaf.nbytes, host, True, group, leaf.axis, scales)
    return dataclasses.replace(found, activations=leaf.activations)
