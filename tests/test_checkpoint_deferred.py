"""Trees that are saved and never whole. Oracle: the same tree saved whole; a data folder is named by its contents."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_model import make_random_model
from test_checkpoint_roundtrip import assert_same, packed_weight

import jq4
from jq4.checkpoint import arrays
from jq4.checkpoint.deferred import Deferred, deferred_tree, shapes_of
from jq4.errors import CheckpointError
from jq4.qarray import holds_qarrays
from models.language_model import LanguageModel


def read(tree):
    return jax.tree.map(lambda leaf: leaf.make() if isinstance(leaf, Deferred) else leaf, tree)


def test_a_folder_is_read_and_written_again_leaf_by_leaf(tmp_path):
    tree = {
        "a": [packed_weight(parts=("nested", "offset")), jnp.arange(5.0)],
        "b": {"steps": 3, "empty": jnp.zeros((0, 2)), "wide": np.arange(3, dtype=np.int64)},
    }
    jq4.save(tmp_path / "whole", tree)
    found = jq4.read_manifest(tmp_path / "whole")
    unread = deferred_tree(tmp_path / "whole", found)
    assert [leaf.abstract.shape for leaf in unread["a"]] == [(40, 6), (5,)] and unread["b"]["steps"] == 3
    assert_same(read(unread), tree)
    jq4.save(tmp_path / "again", unread)
    assert jq4.read_manifest(tmp_path / "again").data == found.data
    doubled = [leaf.then(lambda leaf: 2 * leaf) if leaf.abstract.shape == (5,) else leaf for leaf in unread["a"]]
    jq4.save(tmp_path / "changed", {**unread, "a": doubled})
    assert_same(jq4.restore(tmp_path / "changed")["a"][1], 2 * jnp.arange(5.0))


def test_what_was_written_is_let_go(tmp_path, monkeypatch):
    """Of leaves that fill a group each: the one in hand, and the one before it until its group is written."""
    monkeypatch.setattr(arrays, "GROUP_BYTES", 1)
    made, alive = [], []

    def make(number):
        array = np.full((4, 4), number, np.float32)
        made.append(weakref.ref(array))
        alive.append(sum(each() is not None for each in made))
        return array

    jq4.save(tmp_path / "out", [Deferred(None, lambda i=i: make(i)) for i in range(6)])
    assert len(made) == 6 and max(alive) == 2
    assert_same(jq4.restore(tmp_path / "out"), [jnp.full((4, 4), i, jnp.float32) for i in range(6)])


def test_what_cannot_be_saved_is_told_when_it_is_made_and_leaves_the_older_folder(tmp_path):
    jq4.save(tmp_path / "out", {"a": np.ones(3)})
    held = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    weight = packed_weight()
    bad = jax.tree.map(lambda part: part * np.nan if part.dtype == jnp.float32 else part, weight)
    with pytest.raises(CheckpointError, match="b: its scale holds NaN or infinity"):
        jq4.save(tmp_path / "out", {"a": np.zeros(3), "b": Deferred(None, lambda: bad)})
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == held


def test_a_damaged_file_is_told_before_a_leaf_is_read(tmp_path):
    jq4.save(tmp_path / "out", {"a": np.ones(300)})
    found = jq4.read_manifest(tmp_path / "out")
    file = next(path for path in (tmp_path / "out" / found.data).rglob("0"))
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match="damaged, found SHA-256"):
        deferred_tree(tmp_path / "out", found)


def test_a_model_is_opened_unread(tmp_path):
    source = make_random_model(tmp_path / "random")
    dense = LanguageModel.from_folder(source)
    LanguageModel(dense.config, jq4.quantize(dense.params, "rtn-w4g32"), dense.tokenizer).save(tmp_path / "packed")
    for folder in (source, tmp_path / "packed"):
        model, unread = LanguageModel.from_folder(folder), LanguageModel.unread(folder)
        assert_same(read(unread.params), model.params)
        assert holds_qarrays(shapes_of(unread.params)) == (folder != source)
        unread.save(tmp_path / "again")
        assert_same(LanguageModel.from_folder(tmp_path / "again").params, model.params)
