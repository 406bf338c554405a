"""Arrays to disk and back by Orbax: zarr arrays in a few Orbax checkpoints, each of bounded size.

The arrays of a tree are written in groups of about 256 MiB (or one leaf), each an Orbax PyTree checkpoint of its own,
`arrays-00000`, `arrays-00001`, ...: Orbax holds a copy of what it is writing, so this bounds what a save or a restore
takes beside the model itself. Orbax's plain zarr form is used, not its OCDBT database: a folder an array, named after
it, of the same bytes every time, that any zarr library opens.
"""

import json
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.checkpoint.manifest import ArrayInfo, Manifest, QArrayInfo, arrays_of
from jq4.checkpoint.structure import Keys, nested, path_of
from jq4.errors import CheckpointError
from jq4.qarray import PARTS, is_qarray, leaf_nbytes

GROUP_BYTES = 256 * 2**20
CHUNK_BYTES = 64 * 2**20
_LEAST_SLICE = 2**18
_LONGEST_NAME = 200  # file systems allow 255 bytes
_LARGEST_ZSTD_RATIO = 40_000  # a zstd block of at most 128 KiB takes at least 4 bytes


class Writer:
    """Writes leaves one after the other into Orbax checkpoints below `folder`, holding one group of them at a time.

    `write(folder of the group, arrays by their Orbax key path)` is what writes a group.
    """

    def __init__(self, folder: Path, write: Callable[[Path, Mapping[tuple[str, ...], Any]], None] | None = None):
        self._folder = folder
        self._write = write or write_group
        self._pending: dict[tuple[str, ...], Any] = {}
        self._pending_bytes = 0
        self._groups = 0
        self._names: set[str] = set()

    def add(self, keys: Keys, leaf: Any) -> ArrayInfo | QArrayInfo:
        """Takes an array or a neutral QArray; it is on disk after `close` at the latest."""
        size = sum(leaf_nbytes(array) for array in jax.tree.leaves(leaf))
        if self._pending and self._pending_bytes + size > GROUP_BYTES:
            self._flush()
        self._pending_bytes += size
        return self._add(keys, leaf)

    def close(self) -> None:
        self._flush()

    def _add(self, keys: Keys, leaf: Any) -> ArrayInfo | QArrayInfo:
        if is_qarray(leaf):
            parts = {name: getattr(leaf, name) for name in PARTS if getattr(leaf, name) is not None}
            return QArrayInfo(
                path=path_of(keys),
                shape=leaf.shape,
                dtype=leaf.dtype,
                format=leaf.format,
                group_size=leaf.group_size,
                axis=leaf.axis,
                padding=leaf.padding,
                activations=leaf.activations,
                input_rotation=leaf.input_rotation,
                parts={name: self._add((*keys, name), part) for name, part in parts.items()},
            )
        place = self._store(keys, leaf) if leaf.size else None
        return ArrayInfo(path_of(keys), tuple(leaf.shape), jnp.dtype(leaf.dtype).name, place)

    def _store(self, keys: Keys, array: Any) -> str:
        orbax_keys = tuple(urllib.parse.quote(str(key), safe="").replace(".", "%2E") or "%" for key in keys) or ("%",)
        name = ".".join(orbax_keys)
        if len(name) > _LONGEST_NAME or name.casefold() in self._names:
            name = f"%array-{len(self._names):05d}"  # no quoted key looks like this
            orbax_keys = (name,)
        self._names.add(name.casefold())
        self._pending[orbax_keys] = array
        return f"arrays-{self._groups:05d}/{name}"

    def _flush(self) -> None:
        if self._pending:
            self._write(self._folder / f"arrays-{self._groups:05d}", self._pending)
            self._groups += 1
        self._pending, self._pending_bytes = {}, 0


def write_group(folder: Path, arrays: Mapping[tuple[str, ...], Any]) -> None:
    """Writes jax or numpy arrays, by their Orbax key path, as one Orbax PyTree checkpoint."""
    import orbax.checkpoint as ocp
    from etils import epath

    folder.mkdir()
    tree = nested(arrays)
    save_args = jax.tree.map(
        lambda array: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if _is_stack(array) else ()), tree
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    try:
        handler.save(epath.Path(folder), args=ocp.args.PyTreeSave(tree, save_args=save_args))
    except ValueError as error:  # TensorStore's, of a full disk too
        raise CheckpointError(f"{folder}: Orbax cannot write these arrays ({error})") from error
    finally:
        handler.close()


def _is_stack(array: Any) -> bool:
    """Whether it is worth it that a slice along the first axis can be read alone: layers, or experts."""
    return array.ndim > 2 and array.nbytes // array.shape[0] >= _LEAST_SLICE


def read_group(folder: Path, arrays: Mapping[str, tuple[ArrayInfo, Any]]) -> dict[str, Any]:
    """Reads all the arrays of one group. `arrays` and what is returned go by the name of the zarr array in the group.

    A sharding of None asks for a numpy array.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    args = {
        tuple(name.split(".")): ocp.RestoreArgs(restore_type=np.ndarray)
        if sharding is None
        else ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding, strict=True)
        for name, (_, sharding) in arrays.items()
    }
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    try:
        tree = handler.restore(epath.Path(folder), args=ocp.args.PyTreeRestore(restore_args=nested(args)))
    except Exception as error:
        raise CheckpointError(f"{folder}: Orbax cannot read these arrays ({type(error).__name__}: {error})") from error
    finally:
        handler.close()
    restored = {name: _at(tree, name.split(".")) for name in arrays}
    for name, (info, _) in arrays.items():
        found = restored[name]
        if tuple(found.shape) != info.shape or jnp.dtype(found.dtype).name != info.dtype:
            raise CheckpointError(f"{info.path}: {folder / name} holds {found.dtype}{found.shape}, wanted {info}")
    return restored


def check_zarr(data: Path, manifest: Manifest) -> None:
    """Compares the arrays' own headers with the manifest, before anything of their size is allocated."""
    chunks: dict[str, list[int]] = {}
    for name, file in manifest.files.items():
        if not name.endswith("/.zarray"):
            chunks.setdefault(name.rpartition("/")[0], []).append(file.size)
    for leaf in manifest.leaves:
        for info in arrays_of(leaf):
            if info.array is not None:
                _check_zarr_array(data / info.array, info, chunks.get(info.array, []))


def _check_zarr_array(folder: Path, info: ArrayInfo, held: list[int]) -> None:
    """`held`: the sizes in bytes of the array's chunk files."""
    where = f"{folder / '.zarray'}: leaf {info.path}"
    try:
        header = json.loads((folder / ".zarray").read_bytes())
        shape, chunks, dtype = tuple(header["shape"]), tuple(header["chunks"]), _dtype_name(header["dtype"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: no readable zarr header ({type(error).__name__}: {error})") from error
    if (shape, dtype) != (info.shape, info.dtype):
        raise CheckpointError(f"{where}: the array is {dtype}{shape}, but the manifest says {info.dtype}{info.shape}")
    if len(chunks) != len(shape) or not all(type(chunk) is int and chunk > 0 for chunk in chunks):
        raise CheckpointError(f"{where}: found chunks {chunks} for an array of shape {shape}")
    wanted = _product(-(-dim // chunk) for dim, chunk in zip(shape, chunks, strict=True))
    chunk_bytes = _product(chunks) * jnp.dtype(dtype).itemsize
    largest = 2**20 + _LARGEST_ZSTD_RATIO * min(held, default=0)
    if len(held) != wanted or chunk_bytes > largest:
        raise CheckpointError(
            f"{where}: {len(held)} files cannot hold an array of shape {shape} in chunks of {chunks} "
            f"({wanted} chunks of {chunk_bytes} bytes)"
        )


def _dtype_name(zarr_dtype: str) -> str:
    return np.dtype(zarr_dtype).name if zarr_dtype[0] in "<>|" else jnp.dtype(zarr_dtype).name


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _at(tree: Any, keys: Iterable[str]) -> Any:
    for key in keys:
        tree = tree[key]
    return tree
