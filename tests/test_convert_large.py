"""Oracle: the same conversion of weights that are held as a whole, which other tests compare with others' software."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.fuzzing import folders, gguf_files, seeds
from benchmarks.fuzzing.seeds import GGUF, SEEDS, Folder
from benchmarks.fuzzing.using import laid
from jq4.checkpoint.conversion import slabs
from jq4.checkpoint.conversion.slabs import share
from jq4.checkpoint.foreign import LazyWeight, open_checkpoint
from jq4.checkpoint.foreign.writing import Planned, as_it_is
from tests.test_convert import converted, refused

SMALL = 1000  # bytes of a slab


def contents(folder: Path) -> dict[str, bytes]:
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written(folder: Path, seed: Folder | GGUF) -> Path:
    """A file or folder that is sound."""
    folder.mkdir()
    if isinstance(seed, GGUF):
        (folder / "m.gguf").write_bytes(gguf_files.sound(seed))
        return folder / "m.gguf"
    laid(folder, folders.sound(seed))
    return folder


def repeated(seed: Folder | GGUF, times: int) -> Folder:
    """The seed with its matrices' rows several times."""
    assert isinstance(seed, Folder)
    ((name, held),) = seed.shards.items()
    packed = {key: one for key, one in held.items() if ".mlp." in key and one.ndim > 1}
    return dataclasses.replace(
        seed, shards={name: held | {key: np.repeat(one, times, 0) for key, one in packed.items()}}
    )


Route = tuple[Callable[[], Folder | GGUF], int, list[str]]  # a source, rows that are kept together, steps
ROUTES: dict[str, Route] = {
    "zero points packed along the rows": (
        lambda: seeds._compressed(4, (96, 64), 32, False),
        8,
        ["compressed-tensors", "orbax", "safetensors"],
    ),
    "words of three-bit codes": (
        lambda: seeds._compressed(3, (96, 96), None, False),
        32,
        ["compressed-tensors", "orbax"],
    ),
    "a stack": (SEEDS["compressed-tensors"][1], 32, ["compressed-tensors", "orbax"]),
    "mxfp4": (lambda: repeated(seeds._fp4("mxfp4"), 8), 8, ["mxfp4", "gpt-oss", "orbax"]),
    "nvfp4": (lambda: repeated(seeds._fp4("nvfp4"), 8), 8, ["orbax", "safetensors"]),
    "blocks of experts": (SEEDS["mxfp4"][0], 32, ["mxfp4", "orbax", "gpt-oss"]),
    "words across the rows": (SEEDS["gptq"][1], 8, ["orbax", "gptq"]),
    "act-order": (SEEDS["gptq"][2], 8, ["orbax", "safetensors"]),
    "blocks of llama.cpp": (SEEDS["gguf"][1], 8, ["gguf", "safetensors"]),
    "blocks that are rounded again": (SEEDS["gguf"][0], 8, ["gguf", "compressed-tensors --requantize"]),
}


@pytest.mark.parametrize("route", ROUTES)
def test_weights_taken_in_slabs_make_the_same_bytes(tmp_path, capsys, monkeypatch, route):
    make, rows, targets = ROUTES[route]
    source = written(tmp_path / "in", make())
    for step, target in enumerate(targets):
        words = ["--to", *target.split(), "--verify"]
        ending = ".gguf" if target == "gguf" else ""
        whole, cut = tmp_path / f"whole{step}{ending}", tmp_path / f"cut{step}{ending}"
        told = converted(capsys, source, whole, *words)
        with monkeypatch.context() as patch:
            patch.setattr(slabs, "_ROWS", rows)
            taken = _count_slabs(patch)
            told_again = converted(capsys, source, cut, *words)
        assert max(taken) > 1 or target == "gptq"
        assert contents(whole) == contents(cut)
        assert told["verified"] == told_again["verified"] and told["requantized"] == told_again["requantized"]
        source = source if "requantize" in target or target == "safetensors" else cut


def _count_slabs(patch: pytest.MonkeyPatch) -> list[int]:
    """Makes slabs small; how many of them each weight is taken in."""
    taken: list[int] = []
    parts = slabs.parts

    def counted(planned: Planned, made: int) -> Any:
        found = list(parts(planned, made))
        taken.append(len(found))
        return iter(found)

    patch.setattr(slabs, "SLAB_BYTES", SMALL)
    patch.setattr("jq4.checkpoint.conversion.stream.parts", counted)
    return taken


def test_an_orbax_array_of_several_chunks_is_filled_in_slabs_that_cross_them(tmp_path, capsys, monkeypatch):
    source = written(tmp_path / "in", SEEDS["mxfp4"][0]())
    monkeypatch.setattr("jq4.checkpoint.conversion.zarr_arrays.CHUNK_BYTES", 200)
    converted(capsys, source, tmp_path / "whole", "--to", "orbax")
    monkeypatch.setattr(slabs, "SLAB_BYTES", SMALL)
    converted(capsys, source, tmp_path / "cut", "--to", "orbax", "--verify")
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


def planned_of(rows: int, width: int, by_rows: bool = True) -> Planned:
    array = np.zeros((rows, width), np.float16)
    weight = LazyWeight("w", array, lambda: array, read_rows=(lambda at: array[at]) if by_rows else None)
    return as_it_is(weight)


def test_a_slab_is_of_whole_words_of_rows_and_of_few_bytes(monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_BYTES", 2**14)
    cut = slabs.slabs((100, 64), 100 * 128 * 2)
    assert cut == [slice(0, 64), slice(64, 100)]
    assert slabs.slabs((3, 7, 64), 2**30) == [slice(i, i + 1) for i in range(3)]
    assert slabs.slabs((0, 4), 0) == [slice(0, 0)] and slabs.slabs((), 4) == [slice(0, 1)]
    assert share(planned_of(1000, 64), 128_000) == 64 / 1000
    assert share(planned_of(1000, 64, by_rows=False), 128_000) == 1


def test_what_does_not_lie_by_rows_says_so_where_it_is_too_large(tmp_path, capsys, monkeypatch):
    written(tmp_path / "gptq", SEEDS["gptq"][0]())
    monkeypatch.setattr("jq4.checkpoint.convert.room_within", lambda memory: 6_000)
    monkeypatch.setattr(slabs, "SLAB_BYTES", SMALL)
    monkeypatch.setattr(slabs, "_ROWS", 8)
    said = refused(capsys, tmp_path / "gptq", tmp_path / "out", "--to", "gptq")
    assert "mlp.up_proj.weight: converting it as a whole (one of the two formats does not keep its rows apart)" in said
    converted(capsys, tmp_path / "gptq", tmp_path / "out", "--to", "compressed-tensors")


@pytest.mark.parametrize("reader", ["gptq", "compressed-tensors", "mxfp4", "gguf"])
def test_what_is_packed_can_be_read_by_rows(tmp_path, reader):
    opened = open_checkpoint(written(tmp_path / "in", SEEDS[reader][0]()))
    packed = [weight for weight in opened.weights.values() if weight.packed and "self_attn" not in weight.name]
    assert packed and all(weight.read_rows is not None for weight in packed)
