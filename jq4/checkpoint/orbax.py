"""jq4's own checkpoints: packed weights in Orbax, described by a manifest, replaced atomically, checked byte by byte.

FORMAT.md is the specification. `save` writes any tree of QArrays and dense arrays; `restore` gives the same tree back
with no template and without the code of the model, placed as the caller asks. Neither holds more than the tree itself
and one group of arrays (jq4.checkpoint.arrays). The neutral layout is what is saved, whatever layout a leaf has.

One process saves. With several, each would have to write its own shards and the first one the manifest after all have
synced; until that is built, `save` and `restore` refuse to run in more than one.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from jq4.checkpoint import arrays, atomic, manifest, structure
from jq4.checkpoint.deferred import Deferred
from jq4.checkpoint.manifest import FileInfo, LeafInfo, Manifest, ScalarInfo
from jq4.checkpoint.reading import read_tree
from jq4.checkpoint.savable import as_saved, check_leaf, is_scalar
from jq4.checkpoint.structure import Keys, path_of
from jq4.checkpoint.verification import check_file, check_listing, verify_files
from jq4.errors import CheckpointError
from jq4.shardings import Shardings

_READ_AGAIN = 10


def save(
    path: Any,
    tree: Any,
    *,
    recipe: Any = None,
    source: Any = None,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = True,
) -> None:
    """Writes a tree of QArrays, arrays and Python scalars as the checkpoint folder `path`, whole or not at all.

    Killed at any moment it leaves the checkpoint that was there before, or the new one; the next save cleans up.

    Args:
      path: the folder. An existing jq4 checkpoint is replaced; any other folder with something in it is refused.
      tree: dicts, lists, tuples and other pytree nodes (kept as dicts of their path keys) over QArrays, jax or numpy
        arrays, bool, int, float, str and None; or leaves that are made when they are written (jq4.checkpoint.deferred).
      recipe: what made the weights: plain JSON, or anything with `to_dict()`.
      source: what they were made from, as plain JSON, such as {"model.safetensors": "sha256:..."}.
      extra_files: files to keep beside the weights, such as {"config.json": b"..."}; names may have sub-folders.
      overwrite: False refuses where a checkpoint stands.

    Raises:
      CheckpointError: for a leaf or a name that cannot be saved, a folder that is not ours, a save in progress. Nothing
        on disk is changed then.
    """
    target = _folder_of_one_process(path)
    atomic.check_ours(target)
    if not overwrite and (target / manifest.MANIFEST).exists():
        raise CheckpointError(f"{target}: a checkpoint is there already; pass overwrite=True or choose another path")
    node, leaves = structure.describe(tree)
    for keys, leaf in leaves:
        check_leaf(path_of(keys), leaf)
    recipe_json, source_json = manifest.plain_json(recipe, "recipe"), manifest.plain_json(source, "source")
    files = {manifest.check_relative(name, "extra_files"): content for name, content in (extra_files or {}).items()}
    with atomic.workspace(target) as work:
        prepared = work / "data"
        prepared.mkdir()
        infos = _write_leaves(prepared, leaves)
        _write_extra_files(prepared / "files", files)
        listing = atomic.hash_files(prepared, sync=True)
        new = Manifest(
            data=f"data-{listing_hash(listing)}",
            tree=node,
            leaves=tuple(infos),
            files=listing,
            recipe=recipe_json,
            source=source_json,
            versions=made_by(),
        )
        raw = manifest.to_bytes(new)
        manifest.from_bytes(raw, f"{target}: the manifest just made")  # what cannot be read back is never installed
        atomic.install(prepared, target, new.data, listing, raw)


def restore(path: Any, *, shardings: Shardings = None, verify: bool = True) -> Any:
    """Reads a checkpoint folder into a tree of QArrays, jax arrays and scalars in plain dicts, lists and tuples.

    Args:
      path: the folder.
      shardings: None (JAX's default device), a Sharding for all, a tree of them (a prefix of the tree: {"params": s}),
        or a callable (path, shape of the dense weight) -> Sharding or None. A NamedSharding of a packed weight is
        that of the dense one; along the grouped axis a shard must hold whole groups.
      verify: False skips the check of the files' SHA-256 (their names and sizes, and the manifest, are always checked).

    Returns:
      The tree. Arrays are jax arrays; those of a 64-bit dtype are numpy arrays while jax_enable_x64 is off.

    Raises:
      CheckpointError: naming the file or leaf that is missing, damaged, too new, or does not fit its sharding.
    """
    target = _folder_of_one_process(path)

    def read(found: Manifest) -> Any:
        if verify:
            verify_files(target / found.data, found)
        else:
            check_listing(target / found.data, found)
        arrays.check_zarr(target / found.data, found)
        return read_tree(target / found.data, found, shardings)

    return _with_manifest(target, read)


def read_manifest(path: Any) -> Manifest:
    """What jq4.json of a checkpoint folder says: its leaves, recipe, source and files; no array is read."""
    target = _folder(path)
    return manifest.from_bytes(_manifest_bytes(target), str(target / manifest.MANIFEST))


def verify(path: Any) -> Manifest:
    """Reads every byte of a checkpoint folder; its manifest, or CheckpointError naming the first file that is wrong."""
    target = _folder(path)

    def read(found: Manifest) -> Manifest:
        verify_files(target / found.data, found)
        arrays.check_zarr(target / found.data, found)
        return found

    return _with_manifest(target, read)


def files_folder(path: Any) -> Path:
    """The folder in which the extra files of a checkpoint lie (config.json, tokenizer.json); it may not exist."""
    return _folder(path) / read_manifest(path).data / "files"


def read_extra_file(path: Any, name: str) -> bytes:
    """The content of one extra file, checked against its SHA-256."""
    target = _folder(path)

    def read(found: Manifest) -> bytes:
        if name not in found.extra_files:
            raise CheckpointError(f"{target}: holds no file {name!r}, only {', '.join(found.extra_files) or 'none'}")
        file = target / found.data / "files" / name
        check_file(file, found.files[f"files/{name}"], atomic.hash_files(file.parent).get(file.name))
        return file.read_bytes()

    return _with_manifest(target, read)


def _folder_of_one_process(path: Any) -> Path:
    if jax.process_count() > 1:
        raise CheckpointError(
            f"{path}: this is one of {jax.process_count()} processes; jq4 checkpoints are saved and restored by one "
            "process: gather the weights in a job of one process first"
        )
    return _folder(path)


def _folder(path: Any) -> Path:
    if "://" in str(path):
        raise CheckpointError(f"{path}: found a URL, wanted a local folder; copy the checkpoint to or from it")
    return Path(path).expanduser().resolve()


def _write_leaves(folder: Path, leaves: Iterable[tuple[Keys, Any]]) -> list[LeafInfo]:
    writer = arrays.Writer(folder)
    infos: list[LeafInfo] = []
    for keys, leaf in leaves:
        if isinstance(leaf, Deferred):
            leaf = leaf.make()
            check_leaf(path_of(keys), leaf)
        infos.append(ScalarInfo(path_of(keys), leaf) if is_scalar(leaf) else writer.add(keys, as_saved(leaf)))
    writer.close()
    return infos


def _write_extra_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def made_by() -> dict[str, str]:
    """The versions that a manifest tells."""
    from jq4 import __version__

    return {
        "jq4": __version__,
        "jax": jax.__version__,
        "orbax-checkpoint": importlib.metadata.version("orbax-checkpoint"),
        "python": platform.python_version(),
    }


def listing_hash(files: Mapping[str, FileInfo]) -> str:
    """What a data folder is named by."""
    lines = "".join(f"{info.sha256} {info.size} {name}\n" for name, info in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _manifest_bytes(target: Path) -> bytes:
    file = target / manifest.MANIFEST
    try:
        return file.read_bytes()
    except OSError as error:
        unfinished = any(target.glob("data-*")) or (target / atomic.WORKSPACE).exists()
        hint = "a save into it never finished: save again" if unfinished else "is it a jq4 checkpoint?"
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error}); {hint}") from error


def _with_manifest(target: Path, read: Callable[[Manifest], Any]) -> Any:
    """`read(manifest)`, again where a save replaced the checkpoint meanwhile."""
    for _ in range(_READ_AGAIN):
        raw = _manifest_bytes(target)
        found = manifest.from_bytes(raw, str(target / manifest.MANIFEST))
        try:
            with atomic.reading(target / found.data):
                return read(found)
        except (CheckpointError, OSError) as error:
            if _manifest_bytes(target) == raw:
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(f"{target / found.data}: cannot be read ({error})") from error
    raise CheckpointError(f"{target}: is being replaced again and again while it is read; try later")
