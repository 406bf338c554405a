"""A folder of jq4's own that holds weights by their names and not a model's tree, as a checkpoint.

Such is what `jq4 convert --to orbax` makes of a model that jq4 does not run: {"model.layers.0.mlp.up_proj.weight":
QArray [N, K], ...}. A weight is read when it is asked for.
"""

import functools
import json
from pathlib import Path
from typing import Any

from jq4.checkpoint import arrays, atomic, orbax
from jq4.checkpoint.foreign.weights import Checkpoint, LazyWeight
from jq4.checkpoint.manifest import ArrayInfo, Manifest, QArrayInfo, ScalarInfo, abstract, arrays_of, assemble
from jq4.checkpoint.verification import check_listing
from jq4.checkpoint.zarr_slices import StoredArray


def holds_named_weights(folder: Path) -> bool:
    """Whether the tree is a dict of weights alone, packed ones grouped along their last axis."""
    manifest = orbax.read_manifest(folder)
    ((kind, entries),) = (manifest.tree or {"null": None}).items()
    flat = kind == "dict" and all(isinstance(key, str) and set(node or ()) == {"leaf"} for key, node in entries)
    return flat and not any(isinstance(leaf, ScalarInfo) or _grouped_elsewhere(leaf) for leaf in manifest.leaves)


def checkpoint_of_names(folder: Path) -> Checkpoint:
    """The checkpoint of such a folder, after every file's SHA-256 is checked."""
    manifest = orbax.verify(folder)
    data = folder / manifest.data
    check_listing(data, manifest)
    arrays.check_zarr(data, manifest)
    held = atomic.reading(data)
    held.__enter__()  # as long as any of the weights may be read
    files = {name: orbax.read_extra_file(folder, name) for name in manifest.extra_files}
    config = json.loads(files.pop("config.json", b"null"))
    weights = {leaf.path: _weight(data, leaf, held) for leaf in _leaves(manifest)}
    return Checkpoint(format="orbax", weights=weights, config=config, files=files)


def _weight(data: Path, leaf: ArrayInfo | QArrayInfo, held: Any) -> LazyWeight:
    read, peek = functools.partial(_read, data, leaf, held), functools.partial(_peek, data, leaf, held)
    return LazyWeight(leaf.path, abstract(leaf), read, (leaf.path,), read if _is_of_rows(leaf) else None, peek)


def _is_of_rows(leaf: ArrayInfo | QArrayInfo) -> bool:
    """Whether each array of it has the rows of axis 0, or one for all of them; a permutation of K is that of all."""
    order = leaf.parts.get("permutation") if isinstance(leaf, QArrayInfo) and len(leaf.shape) == 2 else None
    parts = [info.shape for info in arrays_of(leaf) if info is not order]
    return all(len(part) == len(leaf.shape) > 0 and part[0] in (1, leaf.shape[0]) for part in parts)


def _read(data: Path, leaf: ArrayInfo | QArrayInfo, held: Any, rows: Any = ...) -> Any:
    """`held` is only kept alive, as long as this may be called. What has other axes than the weight is read whole."""
    del held
    stored = {info.path: StoredArray(data, info) for info in arrays_of(leaf)}
    rank, first = len(leaf.shape), leaf.shape[:1]
    cut = {path: array.ndim == rank and array.shape[:1] == first for path, array in stored.items()}
    return assemble(leaf, {path: array[rows if cut[path] else ...] for path, array in stored.items()})


def _peek(data: Path, leaf: ArrayInfo | QArrayInfo, held: Any, path: str) -> Any:
    del held
    found: Any = leaf
    for name in path.split("/"):
        found = getattr(found, "parts", {}).get(name)
    return StoredArray(data, found)[...] if isinstance(found, ArrayInfo) else None


def _leaves(manifest: Manifest) -> list[ArrayInfo | QArrayInfo]:
    return [leaf for leaf in manifest.leaves if not isinstance(leaf, ScalarInfo)]


def _grouped_elsewhere(leaf: Any) -> bool:
    return isinstance(leaf, QArrayInfo) and leaf.axis != -1
