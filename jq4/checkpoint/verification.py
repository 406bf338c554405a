"""Are all the files of a checkpoint there, no other, and each byte as it was written?"""

from pathlib import Path

from jq4.checkpoint.atomic import hash_files
from jq4.checkpoint.manifest import FileInfo, Manifest
from jq4.errors import CheckpointError


def check_listing(data: Path, found: Manifest) -> None:
    """Every listed file is there with its size, and no other."""
    there = {p.relative_to(data).as_posix(): p for p in data.rglob("*") if not p.is_dir() or p.is_symlink()}
    for name, info in found.files.items():
        if name not in there:
            raise CheckpointError(f"{data / name}: the file is missing; copy the whole folder again, or save it again")
        size = there[name].stat().st_size
        if size != info.size:
            raise CheckpointError(
                f"{data / name}: damaged, found {size} bytes, wanted {info.size}; take it from a copy"
            )
    extra = sorted(set(there) - set(found.files))
    if extra:
        raise CheckpointError(f"{data / extra[0]}: a file that the manifest does not list; move it elsewhere")


def verify_files(data: Path, found: Manifest) -> None:
    """Reads every file and compares its SHA-256."""
    check_listing(data, found)
    hashed = hash_files(data)
    for name, info in found.files.items():
        check_file(data / name, info, hashed.get(name))


def check_file(file: Path, wanted: FileInfo, found: FileInfo | None) -> None:
    """Raises CheckpointError, naming `file`, unless it was found as wanted."""
    if found != wanted:
        digest = "nothing" if found is None else f"SHA-256 {found.sha256} of {found.size} bytes"
        raise CheckpointError(
            f"{file}: damaged, found {digest}, wanted SHA-256 {wanted.sha256} of {wanted.size} bytes; "
            "take it from a copy"
        )
