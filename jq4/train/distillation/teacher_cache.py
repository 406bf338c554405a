"""A teacher's predictions on disk, so that it runs once and not in every step of every training.

    cache = TeacherCache.write("teacher", model.apply, params, rows, k=64)      # goes on where a killed one stopped
    cache = TeacherCache.open("teacher", rows=rows)

    step(pair, state, rows[indices], cache[indices])                            # divergence_from(cache[indices], ...)

Of each position the k likeliest tokens and the mass of the rest are kept (jq4.train.distillation.teacher), in

    k * (2 + 2) + 2 bytes a token up to 65,536 tokens of vocabulary, k * (4 + 2) + 2 beyond     (float16)

where the logits take 2 V: at V = 128,256 and k = 64, 386 bytes for 256,512. Held at a time, writing: the teacher, the
logits of a batch and a shard (64 MiB, say); reading: what is asked for, by memory maps.

A cache is of the rows that it was made from, one after the other: what makes rows (packing, shuffling) comes before.
Rows that are padded at their end are predicted like any other by a causal teacher, and the loss leaves them out.
"""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4 import jax_compat
from jq4.checkpoint.atomic import lock_folder
from jq4.errors import CheckpointError, JQ4Error
from jq4.paths import flatten_with_paths
from jq4.train.distillation.teacher import Likeliest, likeliest
from jq4.train.distillation.teacher_folder import (
    MANIFEST,
    Job,
    Manifest,
    check_ours,
    check_same,
    open_shard,
    read_manifest,
    sound_prefix,
    write_manifest,
    write_shard,
)

SHARD_BYTES = 64 * 2**20
_CHUNK = 2**24  # bytes that are hashed at a time
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of Python functions that a program's text names


class TeacherCache:
    """The predictions of a teacher for rows i32[R, T], read by the row: `cache[indices]`, `len(cache)`."""

    def __init__(self, folder: Path, manifest: Manifest, verify: bool = False) -> None:
        self.folder = folder
        self.job = manifest.job
        self._shards = [open_shard(folder, number, manifest, verify) for number in range(len(manifest.shards))]
        self._ends = np.cumsum([shard.rows for shard in manifest.shards], dtype=np.int64)

    @classmethod
    def write(
        cls,
        folder: str | Path,
        apply: Callable[[Any, jax.Array], jax.Array],
        params: Any,
        rows: Any,
        *,
        k: int = 64,
        batch_size: int = 8,
        dtype: str = "float16",
        teacher: str | None = None,
        shard_bytes: int = SHARD_BYTES,
        progress: Callable[[int, int], None] | None = None,
    ) -> "TeacherCache":
        """The cache in `folder`, made or gone on with; what is there already is not computed again.

        Args:
          apply: (params, tokens i32[B, T]) -> logits [B, T, V]; traceable.
          params: the teacher's, dense or packed, on however many devices; this process alone writes.
          rows: tokens i32[R, T]; may be a memory map.
          k: how many tokens are kept, at most V.
          batch_size: B; a short last batch is filled up.
          dtype: of the log-probabilities, "float16" or "float32".
          teacher: what names the teacher; by default `digest_of_teacher`, which is computed.
          shard_bytes: a shard's size, about.
          progress: called with (rows done, rows in all) after each batch.

        Raises:
          CheckpointError: the folder holds something else, the cache of another job, or is being written.
          JQ4Error: for arguments that cannot be, and for logits that are not finite.
        """
        folder, rows = Path(folder), checked_rows(rows)
        if dtype not in ("float16", "float32") or batch_size < 1 or shard_bytes < 1:
            raise JQ4Error(
                f"dtype {dtype!r}, batch_size {batch_size}, shard_bytes {shard_bytes}: wanted 'float16' or 'float32', "
                "and 1 or more"
            )
        job = _job_of(apply, params, rows, k, dtype, teacher)
        check_ours(folder)
        lock = lock_folder(folder, f"{folder}: another process is writing there; wait for it, or choose another folder")
        try:
            if (folder / MANIFEST).exists():
                held = read_manifest(folder)
                check_same(folder, held.job, vars(job))
                manifest = sound_prefix(folder, held)
            else:
                manifest = Manifest(job, _rows_a_shard(job, shard_bytes, batch_size))
                write_manifest(folder, manifest)
            manifest = _go_on(folder, manifest, apply, params, rows, batch_size, progress)
        finally:
            os.close(lock)
        return cls(folder, manifest)

    @classmethod
    def open(
        cls, folder: str | Path, *, rows: Any = None, teacher: str | None = None, verify: bool = False
    ) -> "TeacherCache":
        """The cache in `folder`, if it is whole, and of these rows i32[R, T] and this teacher where they are given.

        Args:
          teacher: as `write` was given it, or `digest_of_teacher` of its function and params.
          verify: read all of it and compare with the hashes that were taken when it was written.

        Raises:
          CheckpointError: it is not whole, damaged, no cache, or of other rows or another teacher.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        wanted = {} if teacher is None else {"teacher": teacher}
        if rows is not None:
            rows = checked_rows(rows)
            wanted |= {"rows": rows.shape[0], "length": rows.shape[1], "rows_digest": digest_of_rows(rows)}
        check_same(folder, manifest.job, wanted)
        if manifest.rows_done < manifest.job.rows:
            raise CheckpointError(
                f"{folder}: holds {manifest.rows_done} of {manifest.job.rows} rows. Call jq4.train.TeacherCache.write "
                "again, as before, which goes on from there"
            )
        return cls(folder, manifest, verify)

    def __len__(self) -> int:
        return self.job.rows

    def __getitem__(self, indices: Any) -> Likeliest:
        """The predictions for rows: numpy's tokens i32[*I, T, k], log_probabilities [*I, T, k], log_rest [*I, T].

        `indices` is what numpy takes for one axis: a number, a slice, integers or booleans.
        """
        places = np.asarray(np.arange(len(self))[indices])
        which = np.searchsorted(self._ends, places, side="right")
        made = Likeliest(*(np.empty((*places.shape, *part.shape[1:]), part.dtype) for part in self._shards[0]))
        for number in np.unique(which):
            here = which == number
            local = places[here] - (self._ends[number] - len(self._shards[number].tokens))
            for out, part in zip(made, self._shards[number], strict=True):
                out[here] = part[local]
        self._check_sound(made)
        return made._replace(tokens=made.tokens.astype(np.int32))

    @property
    def bytes_a_token(self) -> int:
        return self.job.bytes_a_token

    def _check_sound(self, made: Likeliest) -> None:
        tokens, logs, rest = (np.asarray(part) for part in made)
        if tokens.size and (tokens.max() >= self.job.vocabulary or not (logs <= 0).all() or not (rest <= 0).all()):
            raise CheckpointError(
                f"{self.folder}: holds what is no prediction over {self.job.vocabulary} tokens. It is damaged: open it "
                "with verify=True to learn which shard is, remove that and write again"
            )

    def __repr__(self) -> str:
        job = self.job
        return f"TeacherCache({str(self.folder)!r}: {job.rows} rows of {job.length} tokens, k={job.k}, {job.dtype})"


def digest_of_tree(tree: Any) -> str:
    """SHA-256 of a tree's leaves: their paths, dtypes, shapes and bytes; a leaf on the host at a time."""
    whole = hashlib.sha256()
    for path, leaf in flatten_with_paths(tree, is_leaf=None):
        array = np.asarray(leaf)
        whole.update(f"{path} {array.dtype.name}{array.shape};".encode())
        _hash(whole, array)
    return "sha256:" + whole.hexdigest()


def digest_of_teacher(apply: Callable[[Any, jax.Array], jax.Array], params: Any, length: int) -> str:
    """SHA-256 of all that a teacher predicts by for rows of `length` tokens: its program and its params.

    The program is the jaxpr of `apply`, as text, with the arrays that it and the programs within it close over: two
    functions of equal params are two teachers. Another version of JAX may write it otherwise, which makes of one
    teacher another: name it yourself where a cache shall outlive that.
    """
    program, _ = _traced(apply, params, length)
    return _digest_of(program, params)


def _traced(apply: Any, params: Any, length: int) -> tuple[Any, Any]:
    """(the jaxpr of a teacher, the shape of its logits) for a row."""
    return jax_compat.trace(apply, params, jax.ShapeDtypeStruct((1, length), jnp.int32))


def _digest_of(program: Any, params: Any) -> str:
    whole = hashlib.sha256(_ADDRESS.sub("", str(program)).encode())
    for held in (jax_compat.constants_of(program), params):
        whole.update(digest_of_tree(held).encode())
    return "sha256:" + whole.hexdigest()


def digest_of_rows(rows: np.ndarray) -> str:
    """SHA-256 of rows of tokens, whatever integers they are stored as."""
    whole = hashlib.sha256(f"{rows.shape};".encode())
    step = max(1, _CHUNK // max(1, 4 * rows.shape[1]))
    for start in range(0, len(rows), step):
        _hash(whole, np.asarray(rows[start : start + step], np.int32))
    return "sha256:" + whole.hexdigest()


def checked_rows(rows: Any) -> np.ndarray:
    rows = rows if isinstance(rows, np.ndarray) else np.asarray(rows)
    if rows.ndim != 2 or not rows.size or rows.dtype.kind not in "iu":
        raise JQ4Error(f"rows are {rows.dtype}{list(rows.shape)}, wanted tokens, integers [rows, length]")
    return rows


def _hash(whole: Any, array: np.ndarray) -> None:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, len(flat), _CHUNK):
        whole.update(flat[start : start + _CHUNK].data)


def _job_of(apply: Any, params: Any, rows: np.ndarray, k: int, dtype: str, teacher: str | None) -> Job:
    program, logits = _traced(apply, params, rows.shape[1])
    if len(getattr(logits, "shape", ())) != 3 or logits.shape[:2] != (1, rows.shape[1]):
        raise JQ4Error(f"the teacher gives {logits} for tokens i32[1, {rows.shape[1]}], wanted logits [1, T, V]")
    vocabulary = logits.shape[-1]
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= vocabulary:
        raise JQ4Error(f"k is {k!r}, wanted 1 to {vocabulary}, the teacher's vocabulary")
    teacher = _digest_of(program, params) if teacher is None else teacher
    return Job(teacher, digest_of_rows(rows), rows.shape[0], rows.shape[1], vocabulary, k, dtype)


def _rows_a_shard(job: Job, shard_bytes: int, batch_size: int) -> int:
    """As many as the bytes hold, whole batches of them where that is more than one."""
    rows = max(1, shard_bytes // (job.bytes_a_token * job.length))
    return rows if rows < batch_size else rows // batch_size * batch_size


def _go_on(
    folder: Path,
    manifest: Manifest,
    apply: Any,
    params: Any,
    rows: np.ndarray,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> Manifest:
    """Makes the shards that are missing."""
    job, width = manifest.job, min(batch_size, manifest.rows_a_shard, manifest.job.rows)
    predict = jax.jit(lambda params, tokens: likeliest(apply(params, tokens), job.k, job.dtype))
    while (start := manifest.rows_done) < job.rows:
        stop = min(start + manifest.rows_a_shard, job.rows)
        made: list[Likeliest] = []
        for first in range(start, stop, width):
            batch = np.asarray(rows[first : min(first + width, stop)], np.int32)
            filled = predict(params, jnp.asarray(np.resize(batch, (width, job.length))))
            made.append(Likeliest(*(np.asarray(part)[: len(batch)] for part in filled)))
            _check_numbers(made[-1], first)
            if progress is not None:
                progress(first + len(batch), job.rows)
        shard = Likeliest(*(np.concatenate(parts) for parts in zip(*made, strict=True)))
        manifest = manifest.with_shard(write_shard(folder, len(manifest.shards), job, shard))
        write_manifest(folder, manifest)
    return manifest


def _check_numbers(found: Likeliest, first: int) -> None:
    bad = np.argwhere(np.isnan(np.asarray(found.log_probabilities)).any(axis=-1))
    if len(bad):
        row, position = bad[0]
        raise JQ4Error(
            f"the teacher's logits are not finite at row {first + int(row)}, position {int(position)}. Look for NaN or "
            "Inf in its weights, or for overflow in a narrow dtype"
        )
