"""Oracle: a checkpoint is right as saved; whatever is changed in it afterwards must be found, and named."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jq4 import CheckpointError, QArray
from jq4.checkpoint import atomic, restore, save, verify
from jq4.checkpoint.manifest import _TAIL

TREE = {
    "w": QArray(
        np.arange(128, dtype=np.uint8).reshape(16, 8),
        np.ones((4, 8), np.float32),
        zero_point=np.ones((4, 8), np.uint8),
        group_size=8,
    ),
    "b": np.ones(7, np.float16),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "m"
    save(path, TREE, recipe={"bits": 4}, extra_files={"config.json": b'{"hidden_size": 8}'})
    return path


@pytest.fixture
def checkpoint(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "m"))


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in files_of(path)}


def rewrite_manifest(path: Path, change: Any) -> None:
    """Changes the manifest as someone would who knows the format: its own checksum is right."""
    members = json.loads((path / "jq4.json").read_text())
    del members["checksum"]
    members = change(members) or members
    body = json.dumps(members).encode()[:-1]
    (path / "jq4.json").write_bytes(body + (_TAIL % hashlib.sha256(body).hexdigest()).encode())


def data_of(path: Path) -> Path:
    return next(path.glob("data-*"))


def test_a_flipped_bit_anywhere_in_any_file_is_found(checkpoint):
    rng = random.Random(0)
    flips = 0
    for file in files_of(checkpoint):
        content = file.read_bytes()
        offsets = {0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(12))}
        for offset in sorted(offsets):
            damaged = bytearray(content)
            damaged[offset] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError) as caught:
                verify(checkpoint)
            assert file.name in str(caught.value)
            flips += 1
        with pytest.raises(CheckpointError, match=file.name):
            restore(checkpoint)
        file.write_bytes(content)
    assert flips > 100
    verify(checkpoint)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_of_the_manifest_is_found(pristine, data):
    content = (pristine / "jq4.json").read_bytes()
    offset = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != content[offset]))
    damaged = pristine.parent / "damaged"
    damaged.mkdir(exist_ok=True)
    (damaged / "jq4.json").write_bytes(content[:offset] + bytes([byte]) + content[offset + 1 :])
    with pytest.raises(CheckpointError, match=r"damaged or truncated|upgrade jq4"):
        verify(damaged)


@pytest.mark.parametrize("length", [0, 1, 100, -1, -50, -91])
def test_a_truncated_manifest_is_refused(checkpoint, length):
    file = checkpoint / "jq4.json"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"jq4.json: damaged or truncated.*restore this file from a copy"):
        restore(checkpoint)


def test_a_missing_a_short_and_an_added_file_are_named(checkpoint):
    for file in files_of(data_of(checkpoint)):
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(CheckpointError, match=rf"{file.name}: the file is missing"):
            restore(checkpoint, verify=False)
        file.write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match=rf"{file.name}: damaged, found {len(content) - 1} bytes"):
            restore(checkpoint, verify=False)
        file.write_bytes(content)
    (data_of(checkpoint) / "arrays-00000" / "stray").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="stray: a file that the manifest does not list"):
        restore(checkpoint)


def test_a_newer_version_is_refused_whatever_else_it_says(checkpoint):
    rewrite_manifest(checkpoint, lambda members: {"format": "jq4-checkpoint", "version": 2, "new": []})
    with pytest.raises(CheckpointError, match="found format version 2, this jq4 reads up to 1; upgrade jq4"):
        restore(checkpoint)


def first(leaves: list[dict[str, Any]], path: str) -> dict[str, Any]:
    return next(leaf for leaf in leaves if leaf["path"] == path)


def update_b(**members: Any) -> Any:
    return lambda manifest: first(manifest["leaves"], "b").update(members)


def update_w(**members: Any) -> Any:
    return lambda manifest: first(manifest["leaves"], "w").update(members)


def list_file(name: str) -> Any:
    return lambda manifest: manifest["files"].update({name: {"size": 1, "sha256": ""}})


def add_to_tree(number: int) -> Any:
    return lambda manifest: manifest["tree"]["dict"].append(["c", {"leaf": number}])


def name_an_array_twice(manifest: dict[str, Any]) -> None:
    manifest["leaves"].append(dict(manifest["leaves"][0]))
    add_to_tree(2)(manifest)


LIES = {
    "the data folder elsewhere": (lambda m: m.update(data="../m"), "data folder '../m'"),
    "a file elsewhere": (list_file("../../x"), "found the file name"),
    "an absolute file": (list_file("/etc/passwd"), "found the file name"),
    "an array elsewhere": (update_b(array="../arrays-00000/b"), "found the file name"),
    "an array that no file holds": (update_b(array="arrays-00000/c"), "lists no file"),
    "one array twice": (name_an_array_twice, "two leaves share one array"),
    "another dtype": (update_b(dtype="bfloat16"), r"\.zarray: leaf b: the array is float16"),
    "another shape": (update_b(shape=[8]), r"\.zarray: leaf b: the array is float16\(7,\)"),
    "an absurd shape": (update_b(shape=[2**60]), r"leaf b of shape .* absurd"),
    "a negative shape": (update_b(shape=[-7]), "leaf b: found -7, wanted a size"),
    "a 4-bit dtype": (update_b(dtype="int4"), "leaf b has dtype 'int4'"),
    "another group size": (update_w(group_size=16), "leaf w: scale has shape"),
    "no group size": (update_w(group_size=0), "wanted integers and a group_size of at least 1"),
    "another format": (update_w(format="int8"), "leaf w"),
    "an unknown format": (update_w(format="int9"), "unknown format 'int9'"),
    "another axis": (update_w(axis=1), "leaf w: axis 1"),
    "another padding": (update_w(padding=1), "leaf w"),
    "another shape of a weight": (update_w(shape=[32, 9]), r"has shape \(32, 9\), but"),
    "no scale": (lambda m: first(m["leaves"], "w")["parts"].pop("scale"), "wanted codes and scale"),
    "an unknown kind": (update_b(kind="pickle"), "kind 'pickle'"),
    "a leaf twice in the tree": (add_to_tree(0), "the tree names leaves"),
    "a leaf that is not there": (add_to_tree(9), "the tree names leaves"),
    "an unknown node": (lambda m: m.update(tree={"class": "os.system"}), "found the tree node"),
    "no tree": (lambda m: m.pop("tree"), "not a manifest that this jq4 can read"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_manifest_that_lies_is_refused_before_anything_is_read(checkpoint, name):
    change, message = LIES[name]
    rewrite_manifest(checkpoint, lambda members: change(members) and None)
    with pytest.raises(CheckpointError, match=message) as caught:
        restore(checkpoint)
    assert str(checkpoint) in str(caught.value)


def test_a_zarr_header_that_promises_more_than_its_file_can_hold_is_refused(checkpoint):
    """The hashes are right, so that only the sizes give it away: 2**40 bytes in a file of a few."""
    header = next(data_of(checkpoint).glob("arrays-00000/b/.zarray"))
    members = json.loads(header.read_bytes()) | {"shape": [2**39], "chunks": [2**39]}
    header.write_text(json.dumps(members))
    content = header.read_bytes()

    def change(manifest: dict[str, Any]) -> None:
        first(manifest["leaves"], "b").update(shape=[2**39])
        name = "arrays-00000/b/.zarray"
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    rewrite_manifest(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"leaf b: 1 files cannot hold an array of shape \(549755813888,\)"):
        restore(checkpoint)


UNSAVABLE = {
    "a 4-bit leaf": (lambda: jnp.ones(4, jnp.int4), "a/0: found an array of int4.*pack 4-bit"),
    "a PRNG key": (lambda: jax.random.key(0), "a/0: found a PRNG key; save jax.random.key_data"),
    "a function": (lambda: len, "a/0: found a builtin_function_or_method, wanted an array"),
    "an abstract array": (lambda: jax.ShapeDtypeStruct((1,), jnp.float32), "a/0: found a ShapeDtypeStruct"),
    "an infinite scale": (
        lambda: QArray(jnp.zeros((4, 4), jnp.uint8), jnp.full((1, 4), jnp.inf)),
        "a/0: its scale holds NaN or infinity",
    ),
    "a scale of another shape": (
        lambda: QArray(jnp.zeros((4, 4), jnp.uint8), jnp.ones((2, 4))),
        r"a/0: scale has shape \(2, 4\), wanted \(1, 4\)",
    ),
    "a key that is no name": (lambda: {(1, 2): jnp.ones(1)}, r"a/0: a dict key is .*wanted a string or an int"),
}


@pytest.mark.parametrize("name", UNSAVABLE)
def test_a_leaf_that_cannot_be_saved_is_named_and_nothing_changes(checkpoint, tmp_path, name):
    make, message = UNSAVABLE[name]
    before = snapshot(checkpoint)
    for path in (checkpoint, tmp_path / "new"):
        with pytest.raises(CheckpointError, match=message):
            save(path, {"a": [make()]})
    assert snapshot(checkpoint) == before
    assert not (tmp_path / "new").exists()


def test_saving_inside_jit_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="w: found a traced array; save outside of jit"):
        jax.jit(lambda w: save(tmp_path / "m", {"w": w}))(jnp.ones(1))


@pytest.mark.parametrize("name", ["../escape", "/etc/x", "a/../b", "", "a//b", "a\\b", "C:x", "."])
def test_an_extra_file_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="extra_files: found the file name"):
        save(tmp_path / "m", {}, extra_files={name: b""})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_or_file_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=r"thesis: holds something else.*chapter1.tex.*nothing was changed"):
        save(tmp_path / "thesis", TREE)
    with pytest.raises(CheckpointError, match="file: a file stands there, wanted a folder"):
        save(tmp_path / "file", TREE)
    assert snapshot(tmp_path) == before
    with pytest.raises(CheckpointError, match=r"jq4.json: cannot be read .*is it a jq4 checkpoint\?"):
        restore(tmp_path / "thesis")
    with pytest.raises(CheckpointError, match="found a URL"):
        restore("gs://bucket/model")


def test_a_folder_or_file_that_is_merely_called_data_is_not_ours(tmp_path):
    (tmp_path / "data-train").mkdir()
    (tmp_path / "data-train" / "rows.csv").write_text("precious")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="holds something else"):
        save(tmp_path, TREE)
    assert snapshot(tmp_path) == before
    save(tmp_path / "model", {"n": 1})
    (tmp_path / "model" / "data-notes.txt").write_text("precious")
    save(tmp_path / "model", {"n": 2})
    assert (tmp_path / "model" / "data-notes.txt").read_text() == "precious"
    assert restore(tmp_path / "model") == {"n": 2}


def test_an_empty_folder_is_used_and_overwrite_false_keeps_a_checkpoint(tmp_path):
    save(tmp_path, {"n": 1}, overwrite=False)
    with pytest.raises(CheckpointError, match="a checkpoint is there already; pass overwrite=True"):
        save(tmp_path, {"n": 2}, overwrite=False)
    assert restore(tmp_path) == {"n": 1}
    save(tmp_path, {"n": 2})
    assert restore(tmp_path) == {"n": 2}


def test_saving_over_a_damaged_checkpoint_heals_it(checkpoint):
    chunk = next(data_of(checkpoint).glob("arrays-00000/b/0"))
    good = snapshot(checkpoint)
    chunk.write_bytes(b"\0" * chunk.stat().st_size)
    save(checkpoint, TREE, recipe={"bits": 4}, extra_files={"config.json": b'{"hidden_size": 8}'})
    assert snapshot(checkpoint) == good


def test_two_savers_do_not_meet(tmp_path):
    save(tmp_path / "m", {"n": 1})
    with atomic.workspace(tmp_path / "m"), pytest.raises(CheckpointError, match="m: another process is saving there"):
        save(tmp_path / "m", {"n": 2})
    assert restore(tmp_path / "m") == {"n": 1}
    save(tmp_path / "m", {"n": 2})
    assert restore(tmp_path / "m") == {"n": 2}


def test_what_is_being_read_is_removed_by_the_next_save_only(tmp_path):
    save(tmp_path / "m", {"n": np.ones(1)})
    old = data_of(tmp_path / "m")
    before = snapshot(old)
    with atomic.reading(old):
        save(tmp_path / "m", {"n": np.zeros(2)})
    assert snapshot(old) == before
    save(tmp_path / "m", {"n": np.zeros(2)})
    assert not old.exists()


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from jq4.checkpoint import atomic\n"
        "with atomic.workspace(Path(sys.argv[1])) as work:\n"
        "    (work / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], env=environment, check=False)
    assert run.returncode == -signal.SIGKILL
    assert (tmp_path / "m" / atomic.WORKSPACE / "half").exists()
    with pytest.raises(CheckpointError, match="a save into it never finished: save again"):
        restore(tmp_path / "m")
    save(tmp_path / "m", {"n": 1})
    assert sorted(entry.name.split("-")[0] for entry in (tmp_path / "m").iterdir()) == ["data", "jq4.json"]


def test_a_save_that_fails_midway_changes_nothing(checkpoint, tmp_path, monkeypatch):
    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    before = snapshot(checkpoint)
    monkeypatch.setattr(atomic, "write_synced", full_disk)
    for path in (checkpoint, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            save(path, {"n": 1})
    assert snapshot(checkpoint) == before
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    assert restore(checkpoint)["b"].shape == (7,)
    save(tmp_path / "new", {"n": 1})
    assert restore(tmp_path / "new") == {"n": 1}


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(CheckpointError, match="one of 4 processes"):
        save(tmp_path / "m", TREE)
