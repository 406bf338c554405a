"""The folder of a teacher's predictions (teacher_cache.py): what says whose they are, and how far they are.

    teacher.json                       the manifest: the job, and the shards that are done
    predictions-00000.safetensors      tokens u16|i32[R, T, k], log_probabilities f16|f32[R, T, k], log_rest [R, T]
    predictions-00001.safetensors      the next rows

A shard counts once the manifest names it, and the manifest is replaced by one rename after the shard is on the disk, so
that a killed writer leaves what it has done, and goes on from there. The job is all that the predictions depend on: no
writer goes on with another's work, and no reader takes it for its own.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from jq4.checkpoint.atomic import naming, replace_file, sync_folder, unfinished
from jq4.checkpoint.safetensors_files import DTYPES, read_header, read_json, write
from jq4.errors import CheckpointError
from jq4.train.distillation.teacher import Likeliest

MANIFEST = "teacher.json"
_NEW = unfinished(Path(MANIFEST)).name
_FORMAT, _VERSION = "jq4 teacher", 1
_STORED = {"float16": "F16", "float32": "F32"}
_TWO_BYTES = 2**16  # the largest vocabulary whose tokens are stored in two bytes


@dataclasses.dataclass(frozen=True)
class Job:
    """Whose predictions, of what.

    Attributes:
      teacher: what names the teacher, such as the SHA-256 of its program and weights (`digest_of_teacher`).
      rows_digest: SHA-256 of the rows of tokens.
      rows, length: how many rows, of how many tokens.
      vocabulary, k: tokens that there are, and the likeliest of them that are kept.
      dtype: of the log-probabilities, float16 or float32.
    """

    teacher: str
    rows_digest: str
    rows: int
    length: int
    vocabulary: int
    k: int
    dtype: str

    @property
    def bytes_a_token(self) -> int:
        stored = self.tensors(1).values()
        return sum(DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in stored) // self.length

    def tensors(self, rows: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (safetensors' dtype, shape) of a shard of so many rows."""
        of_tokens, of_logs = "U16" if self.vocabulary <= _TWO_BYTES else "I32", _STORED[self.dtype]
        places = (rows, self.length)
        return {
            "tokens": (of_tokens, (*places, self.k)),
            "log_probabilities": (of_logs, (*places, self.k)),
            "log_rest": (of_logs, places),
        }


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file that is done: its rows, its size and its SHA-256."""

    rows: int
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What teacher.json says."""

    job: Job
    rows_a_shard: int
    shards: tuple[Shard, ...] = ()

    @property
    def rows_done(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def with_shard(self, shard: Shard) -> "Manifest":
        return dataclasses.replace(self, shards=(*self.shards, shard))


def shard_name(number: int) -> str:
    return f"predictions-{number:05d}.safetensors"


def check_ours(folder: Path) -> None:
    """Raises CheckpointError where a cache must not be written: changes nothing."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: a file stands there, wanted a folder; choose another path or remove it")
    found = sorted(path.name for path in folder.iterdir())
    if MANIFEST not in found and (strangers := [name for name in found if name != _NEW]):
        raise CheckpointError(
            f"{folder}: holds {strangers[0]} and no {MANIFEST}, so it is no teacher's cache; choose another path or "
            "remove it; nothing was changed"
        )


def check_same(folder: Path, found: Job, wanted: dict[str, Any]) -> None:
    """Raises CheckpointError where a cache's job is not as it is wanted."""
    differing = {name: value for name, value in wanted.items() if getattr(found, name) != value}
    if differing:
        told = ", ".join(f"{name} is {getattr(found, name)!r} and not {value!r}" for name, value in differing.items())
        raise CheckpointError(
            f"{folder}: holds the predictions of another teacher or of other rows: {told}. Give what it was made "
            "with, or another folder"
        )


def read_manifest(folder: Path) -> Manifest:
    """What a folder's teacher.json says. Raises CheckpointError where that is not ours or is damaged."""
    file = folder / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{folder}: has no {MANIFEST}. Give the folder that jq4.train.TeacherCache.write made")
    held = read_json(file)
    if not isinstance(held, dict) or held.get("format") != _FORMAT:
        raise CheckpointError(f"{file}: is not the manifest of a teacher's cache. Write it again")
    if held.get("version") != _VERSION:
        raise CheckpointError(f"{file}: is of version {held.get('version')!r}, wanted {_VERSION}. Update jq4")
    try:
        shards = tuple(_typed(Shard, shard) for shard in held["shards"])
        manifest = Manifest(_typed(Job, held["job"]), held["rows_a_shard"], shards)
        sound = manifest.job.dtype in _STORED and type(manifest.rows_a_shard) is int and manifest.rows_a_shard > 0
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: is damaged ({error}). Remove {folder} and write it again") from error
    if not sound or not 1 <= manifest.job.k <= manifest.job.vocabulary or manifest.rows_done > manifest.job.rows:
        raise CheckpointError(f"{file}: is damaged: its figures contradict each other. Remove {folder}")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replaces teacher.json."""
    content = {"format": _FORMAT, "version": _VERSION, **dataclasses.asdict(manifest)}
    replace_file(folder / MANIFEST, json.dumps(content, indent=1).encode())


def write_shard(folder: Path, number: int, job: Job, predictions: Likeliest) -> Shard:
    """Writes a shard atomically; it is on the disk when this returns."""
    file, rows = folder / shard_name(number), len(predictions.tokens)
    parts = predictions._asdict()
    with naming(file):
        write(file, {
            name: (dtype, shape, lambda name=name, dtype=dtype: np.asarray(parts[name]).astype(DTYPES[dtype]))
            for name, (dtype, shape) in job.tensors(rows).items()
        })  # fmt: skip
    sync_folder(folder)
    return Shard(rows, file.stat().st_size, _sha256(file))


def open_shard(folder: Path, number: int, manifest: Manifest, verify: bool = False) -> Likeliest:
    """A shard's arrays as views of its file. Raises JQ4Error where it is not the one that the manifest names."""
    file, shard = folder / shard_name(number), manifest.shards[number]
    tensors = read_header(file)
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    wanted = manifest.job.tensors(shard.rows)
    if found != wanted or file.stat().st_size != shard.size:
        raise CheckpointError(
            f"{file}: holds {_told(found)} in {file.stat().st_size} bytes, and {MANIFEST} says {_told(wanted)} in "
            f"{shard.size}. It is not of this cache, or damaged: remove it and write the cache again"
        )
    if verify and _sha256(file) != shard.sha256:
        raise CheckpointError(f"{file}: its SHA-256 is not the manifest's. It is damaged: remove it and write again")
    return Likeliest(**{name: tensors[name].read() for name in wanted})


def sound_prefix(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest with the shards before the first that is missing or not whole."""
    for number in range(len(manifest.shards)):
        try:
            open_shard(folder, number, manifest)
        except ValueError:
            return dataclasses.replace(manifest, shards=manifest.shards[:number])
    return manifest


def _typed(kind: Any, held: Any) -> Any:
    """A dataclass of texts and counts from what JSON holds; TypeError for anything else."""
    if not isinstance(held, dict):
        raise TypeError(f"found a {type(held).__name__}, wanted an object")
    made = kind(**held)
    for field in dataclasses.fields(kind):
        value = getattr(made, field.name)
        if type(value) is not field.type or (type(value) is int and value < 0):
            raise TypeError(f"{field.name} is {value!r}")
    return made


def _told(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (dtype, shape) in sorted(tensors.items())) or "nothing"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
