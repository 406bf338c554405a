"""A folder that is replaced whole or not at all, whenever the process that does it is killed.

    NAME/jq4.json              the switch: names the data folder that counts
    NAME/data-<hash>/          the data, named by its contents, never changed once it has this name
    NAME/.saving/              the workspace of the save in progress, and its lock

A save writes and syncs everything in the workspace, moves the new data folder beside the old one, syncs, and then
replaces jq4.json by one rename: before it the folder is the old checkpoint, after it the new one. What a killed save
leaves (a workspace, a data folder that no manifest names) is never read, and the next save removes it.

The lock is `flock` on the workspace: the system drops it when its process dies, however that happens. Readers share a
lock on the data folder that they read, and a save leaves what is being read to the next one to remove.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jq4.checkpoint.manifest import DATA_NAME, MANIFEST, FileInfo
from jq4.errors import CheckpointError

WORKSPACE = ".saving"


@contextlib.contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """An empty folder inside `target` (made if need be), held by this process alone and removed afterwards."""
    check_ours(target)
    created = not target.exists()
    folder = target / WORKSPACE
    busy = f"{target}: another process is saving there; wait for it to end, or choose another path"
    lock = lock_folder(folder, busy)
    try:
        for leftover in folder.iterdir():
            remove(leftover)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        if created:
            with contextlib.suppress(OSError):
                target.rmdir()


def check_ours(target: Path) -> None:
    """Raises CheckpointError if `target` is something that a save must not touch: changes nothing."""
    if os.sep == "/" and "\\" in str(target):
        raise CheckpointError(f"{target}: has a backslash in it, which Orbax takes for a slash; choose another path")
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: a file stands there, wanted a folder; choose another path or remove it")
    found = sorted(entry.name for entry in target.iterdir())
    if MANIFEST in found or all(name == WORKSPACE or DATA_NAME.fullmatch(name) for name in found):
        return
    raise CheckpointError(
        f"{target}: holds something else than a jq4 checkpoint (found {', '.join(found[:5])}, wanted {MANIFEST}); "
        "choose another path or remove it; nothing was changed"
    )


def overlap(one: Path, other: Path) -> bool:
    """Whether a folder is another one or lies in it, or the other in it; both resolved."""
    return one == other or one in other.parents or other in one.parents


def install(prepared: Path, target: Path, data: str, files: Mapping[str, FileInfo], manifest: bytes) -> None:
    """Makes the synced folder `prepared` the data folder `data` of `target` and switches to it."""
    place, switch = target / data, prepared.parent / MANIFEST
    write_synced(switch, manifest)
    if place.exists():
        if _holds(place, files):
            remove(prepared)
        else:  # a killed removal or a damaged copy: nothing that could be restored is lost
            place.replace(prepared.parent / "damaged")
            prepared.replace(place)
    else:
        prepared.replace(place)
    sync_folder(target)
    switch.replace(target / MANIFEST)
    sync_folder(target)
    sync_folder(target.parent)
    for other in target.glob("data-*"):
        if other.name != data and DATA_NAME.fullmatch(other.name):
            _remove_unless_read(other)


@contextlib.contextmanager
def reading(data: Path) -> Iterator[None]:
    """Keeps saves from removing the data folder `data` while it is read, where the file system has locks."""
    descriptor = os.open(data, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def hash_files(folder: Path, sync: bool = False) -> dict[str, FileInfo]:
    """Size and SHA-256 of every file below `folder`, by relative path; `sync` syncs them and the folders."""
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        infos = list(pool.map(lambda path: _hash_file(path, sync), paths))
    if sync:
        for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
            sync_folder(inner)
    return {path.relative_to(folder).as_posix(): info for path, info in zip(paths, infos, strict=True)}


def write_synced(path: Path, content: bytes) -> None:
    """Writes a new file and waits until the disk has it."""
    with naming(path), path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def unfinished(path: Path) -> Path:
    """Where `replace_file` writes first, beside the file; a killed one may leave it."""
    return path.with_name(path.name + ".new")


def replace_file(path: Path, content: bytes) -> None:
    """Makes a file, or replaces it: killed at any moment, it is as it was or as it shall be. The disk has it then."""
    temporary = unfinished(path)
    temporary.unlink(missing_ok=True)
    write_synced(temporary, content)
    temporary.replace(path)
    sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError that names no file, such as that of a write to a full disk, the name of this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Waits until the disk has the names in `folder`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def lock_folder(folder: Path, busy: str) -> int:
    """A descriptor that holds `folder`, made if need be; CheckpointError(busy) where another process has it."""
    import fcntl  # POSIX alone has it; reading a checkpoint does without

    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if folder.stat().st_ino == os.fstat(descriptor).st_ino:  # not one that was just removed
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise CheckpointError(busy) from None
        os.close(descriptor)


def _remove_unless_read(data: Path) -> None:
    """Removes a data folder, or leaves it to the next save where a reader holds it."""
    import fcntl

    descriptor = os.open(data, os.O_RDONLY)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(data)
    finally:
        os.close(descriptor)


def _hash_file(path: Path, sync: bool) -> FileInfo:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return FileInfo(os.fstat(file.fileno()).st_size, digest)


def _holds(place: Path, files: Mapping[str, FileInfo]) -> bool:
    return place.is_dir() and hash_files(place) == dict(files)
