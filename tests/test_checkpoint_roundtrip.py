"""Oracle: the arrays that were saved, bit for bit; zarr and JSON as read by tensorstore and Orbax alone, not by jq4."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import flax.core
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from etils import epath
from flax import nnx

from jq4 import CheckpointError, QArray
from jq4.checkpoint import arrays as checkpoint_arrays
from jq4.checkpoint import files_folder, read_extra_file, read_manifest, restore, save
from jq4.checkpoint.manifest import ArrayInfo, FileInfo, Manifest, QArrayInfo, ScalarInfo, from_bytes, to_bytes
from jq4.formats import FORMATS
from jq4.layouts import prepare
from jq4.paths import flatten_with_paths
from jq4.qarray import dequantize_array
from pallas_kernels import packing

ROOT = Path(__file__).resolve().parents[1]


def packed_weight(
    seed: int = 0,
    *,
    format: str = "int4",
    shape: tuple[int, ...] = (40, 6),
    group_size: int = 16,
    axis: int = -2,
    scale_dtype: Any = np.float32,
    parts: tuple[str, ...] = (),
) -> QArray:
    """A QArray of random codes; `parts` names the optional parts that it has."""
    rng = np.random.default_rng(seed)
    bits, length = FORMATS[format].bits, shape[axis]
    codes = jnp.asarray(rng.integers(0, 2**bits, shape, dtype=np.uint8))
    grouped = list(shape)
    grouped[axis] = -(-length // group_size)
    scale: Any = jnp.asarray(rng.normal(size=grouped).astype(scale_dtype))
    if "nested" in parts:
        nested = rng.integers(0, 256, grouped, dtype=np.uint8)
        scale = QArray(jnp.asarray(nested), jnp.ones((*grouped[:-1], 1)), format="int8", group_size=1000, axis=-1)
    return QArray(
        codes=packing.pack(codes, bits, axis),
        scale=scale,
        zero_point=jnp.asarray(rng.integers(0, 2**bits, grouped, dtype=np.uint8)) if "zero_point" in parts else None,
        offset=jnp.asarray(rng.normal(size=grouped).astype(np.float32)) if "offset" in parts else None,
        permutation=jnp.asarray(rng.permutation(length).astype(np.int32)) if "permutation" in parts else None,
        format=format,
        group_size=group_size,
        axis=axis,
        padding=packing.padding_of(length, bits),
        dtype="bfloat16",
    )


def assert_same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for have, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if hasattr(want, "dtype"):
            assert (have.shape, have.dtype) == (want.shape, want.dtype)
            assert np.asarray(have).tobytes() == np.asarray(want).tobytes()
        else:
            assert type(have) is type(want)
            assert repr(have) == repr(want)


WEIGHTS = {
    **{name: packed_weight(format=name) for name in FORMATS},
    "int3 of 13 rows": packed_weight(format="int3", shape=(13, 5), group_size=4),
    "zero_point": packed_weight(parts=("zero_point",)),
    "offset": packed_weight(format="int2", parts=("offset",)),
    "permutation": packed_weight(parts=("permutation", "zero_point")),
    "nested scale": packed_weight(format="nf4", parts=("nested",)),
    "stacked, along the last axis": packed_weight(shape=(3, 5, 32), axis=-1, scale_dtype=jnp.bfloat16),
    "one scale": QArray(jnp.zeros((8, 4), jnp.uint8), jnp.ones((1, 1)), group_size=16),
    "f8 scale": packed_weight(scale_dtype=jnp.float8_e4m3fn),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_packed_weights_come_back_bit_for_bit(tmp_path, name):
    save(tmp_path / "m", {"w": WEIGHTS[name]})
    found = restore(tmp_path / "m")["w"]
    assert_same(found, WEIGHTS[name])
    assert_same(dequantize_array(found), dequantize_array(WEIGHTS[name]))
    leaf = read_manifest(tmp_path / "m").leaves[0]
    assert leaf.nbytes == WEIGHTS[name].nbytes
    assert leaf.shape == WEIGHTS[name].shape


DTYPES = "bool int8 uint8 int16 uint16 int32 uint32 float16 bfloat16 float32 complex64 float8_e4m3fn float8_e5m2"


@pytest.mark.parametrize("kind", ["jax", "numpy"])
def test_dense_leaves_of_every_dtype_come_back_bit_for_bit(tmp_path, kind):
    names = [*DTYPES.split(), "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3b11fnuz"]
    tree = {name: np.arange(12).reshape(3, 4).astype(jnp.dtype(name)) for name in names}
    tree |= {f"{name} scalar": leaf[1, 1].reshape(()) for name, leaf in tree.items()}
    tree |= {"empty": np.zeros((0, 3), np.float32), "NaN": np.asarray([np.nan, -0.0, np.inf], np.float32)}
    if kind == "jax":
        tree = jax.tree.map(jax.device_put, tree)
    save(tmp_path / "m", tree)
    found = restore(tmp_path / "m")
    assert_same(found, tree)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))


def test_64_bit_arrays_come_back_whole_as_numpy(tmp_path):
    tree = {"f": np.asarray([1 / 3]), "i": np.asarray([2**40]), "u": np.uint64(2**63), "c": np.asarray([1j])}
    save(tmp_path / "m", tree)
    found = restore(tmp_path / "m")
    assert_same(found, jax.tree.map(np.asarray, tree))
    assert all(isinstance(leaf, np.ndarray) for leaf in found.values())


def test_containers_and_scalars_come_back_as_they_were(tmp_path):
    tree = {
        "list": [jnp.ones(2), {}, [], None, ()],
        "tuple": (1, 2**70, -0.1, float("inf"), True, "text", ""),
        "int keys": {0: jnp.zeros(1), 10: jnp.ones(1)},
        "nan": float("nan"),
        "": {"a/b": jnp.ones(3), "a": {"b": jnp.zeros(3)}, "..": jnp.ones(1), "W": jnp.ones(2), "w": jnp.zeros(2)},
        "é.%20 ": {"x" * 300: jnp.arange(3)},
        "clash": {"%array-00001": jnp.ones(1)},
    }
    save(tmp_path / "m", tree)
    found = restore(tmp_path / "m")
    assert_same(found, tree)
    assert type(found["tuple"]) is tuple
    assert type(found["list"]) is list


@pytest.mark.parametrize("tree", [None, {}, [], 7, {"a": [{}, None]}])
def test_trees_without_arrays_are_checkpoints_too(tmp_path, tree):
    save(tmp_path / "m", tree)
    assert_same(restore(tmp_path / "m"), tree)


class Pair(NamedTuple):
    first: Any
    second: Any


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs) for _ in range(2)])


def test_other_nodes_come_back_as_dicts_of_their_path_keys(tmp_path):
    w = jnp.arange(4.0)
    save(tmp_path / "m", {"pair": Pair(w, {"x": w}), "frozen": flax.core.freeze({"a": {"b": w}})})
    assert_same(restore(tmp_path / "m"), {"pair": {"first": w, "second": {"x": w}}, "frozen": {"a": {"b": w}}})
    save(tmp_path / "m", {"boxed": flax.linen.Partitioned(w, names=("model",))})
    assert_same(restore(tmp_path / "m"), {"boxed": w})


def test_an_nnx_state_comes_back_as_its_pure_dict_and_fits_the_model_again(tmp_path):
    _, state = nnx.split(Net(nnx.Rngs(0)))
    save(tmp_path / "m", state)
    found = restore(tmp_path / "m")
    assert_same(found, nnx.to_pure_dict(state))
    assert [leaf.path for leaf in read_manifest(tmp_path / "m").leaves] == [p for p, _ in flatten_with_paths(state)]
    graph, fresh = nnx.split(Net(nnx.Rngs(1)))
    nnx.replace_by_pure_dict(fresh, found)
    assert_same(nnx.to_pure_dict(nnx.split(nnx.merge(graph, fresh))[1]), nnx.to_pure_dict(state))


@pytest.mark.skipif(importlib.util.find_spec("equinox") is None, reason="equinox is not installed")
def test_an_equinox_module_comes_back_as_dicts_by_field(tmp_path):
    import equinox

    linear = equinox.nn.Linear(2, 3, key=jax.random.key(0))
    save(tmp_path / "m", equinox.filter(linear, equinox.is_array))
    assert_same(restore(tmp_path / "m"), {"weight": linear.weight, "bias": linear.bias})


def test_the_manifest_tells_recipe_source_versions_and_files(tmp_path):
    class Recipe:
        def to_dict(self) -> dict[str, Any]:
            return {"rules": [{"targets": "re:.*", "num_bits": 4}]}

    files = {"config.json": b"{}", "nested/tokenizer.json": bytes(range(256))}
    source = {"model.safetensors": "sha256:00"}
    save(tmp_path / "m", {"w": WEIGHTS["int4"]}, recipe=Recipe(), source=source, extra_files=files)
    manifest = read_manifest(tmp_path / "m")
    assert manifest.recipe == Recipe().to_dict()
    assert manifest.source == source
    assert manifest.versions["jax"] == jax.__version__
    assert manifest.extra_files == tuple(sorted(files))
    assert manifest.leaves[0].format == "int4"
    assert (files_folder(tmp_path / "m") / "config.json").read_bytes() == b"{}"
    assert {name: read_extra_file(tmp_path / "m", name) for name in files} == files
    with pytest.raises(CheckpointError, match=r"holds no file 'vocab\.txt', only config\.json"):
        read_extra_file(tmp_path / "m", "vocab.txt")


GOLDEN = b"""{
"format": "jq4-checkpoint",
"version": 1,
"versions": {
  "jq4": "0.1.0"
},
"data": "data-0123456789abcdef",
"recipe": null,
"source": {
  "weights": "sha256:00"
},
"tree": {
  "dict": [["n", {"leaf": 0}], ["w", {"list": [{"leaf": 1}, null]}]]
},
"leaves": [
  {"path": "n", "kind": "scalar", "type": "float", "value": "0.1"},
  {"path": "w/0", "kind": "qarray", "shape": [5, 2], "dtype": "bfloat16", "format": "int4", "group_size": 8, \
"axis": -2, "padding": 1, "parts": {"codes": {"path": "w/0/codes", "kind": "dense", "shape": [3, 2], "dtype": "uint8", \
"array": "arrays-00000/w.0.codes"}, "scale": {"path": "w/0/scale", "kind": "dense", "shape": [1, 2], \
"dtype": "float32", "array": "arrays-00000/w.0.scale"}}}
],
"files": {
  "arrays-00000/w.0.codes/.zarray": {"size": 2, "sha256": "aa"},
  "arrays-00000/w.0.scale/.zarray": {"size": 3, "sha256": "bb"}
},
"checksum": "sha256:(of all the bytes before this member)"
}
"""


def test_the_text_of_the_manifest_is_what_the_format_says():
    codes = ArrayInfo("w/0/codes", (3, 2), "uint8", "arrays-00000/w.0.codes")
    scale = ArrayInfo("w/0/scale", (1, 2), "float32", "arrays-00000/w.0.scale")
    parts = {"codes": codes, "scale": scale}
    manifest = Manifest(
        data="data-0123456789abcdef",
        tree={"dict": [["n", {"leaf": 0}], ["w", {"list": [{"leaf": 1}, None]}]]},
        leaves=(ScalarInfo("n", 0.1), QArrayInfo("w/0", (5, 2), "bfloat16", "int4", 8, -2, 1, parts)),
        files={f"{codes.array}/.zarray": FileInfo(2, "aa"), f"{scale.array}/.zarray": FileInfo(3, "bb")},
        source={"weights": "sha256:00"},
        versions={"jq4": "0.1.0"},
    )
    body = GOLDEN[: GOLDEN.index(b',\n"checksum"')]
    tail = f',\n"checksum": "sha256:{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()
    assert len(tail) == 90
    assert to_bytes(manifest) == body + tail
    assert from_bytes(body + tail, "jq4.json") == manifest


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_tree_gives_the_same_bytes_and_saving_it_again_changes_nothing(tmp_path):
    tree = {"layers": [WEIGHTS["permutation"], WEIGHTS["nested scale"]], "b": jnp.ones(5), "n": 3}
    save(tmp_path / "a", tree)
    save(tmp_path / "b", dict(reversed(tree.items())))
    before = contents_of(tmp_path / "a")
    assert contents_of(tmp_path / "b") == before
    save(tmp_path / "a", restore(tmp_path / "b"))
    assert contents_of(tmp_path / "a") == before


def test_a_fresh_process_without_the_models_code_restores_the_tree(tmp_path):
    save(tmp_path / "m", {"params": {"w": WEIGHTS["int4"], "b": jnp.ones(3)}})
    code = (
        "import sys; from jq4.checkpoint import restore; tree = restore(sys.argv[1])\n"
        "print(tree['params']['w'].shape, tree['params']['w'].dequantize().sum(), tree['params']['b'].sum())\n"
        "print(sorted({'flax', 'models'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "m")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    wanted = WEIGHTS["int4"]
    assert run.stdout.splitlines() == [f"{wanted.shape} {wanted.dequantize().sum()} 3.0", "[]"]
    assert run.stderr == ""


def test_orbax_and_tensorstore_read_the_arrays_without_jq4(tmp_path):
    weight = packed_weight(format="int3", shape=(24, 4), group_size=8)
    save(tmp_path / "m", {"params": {"w": weight, "b": jnp.ones(3, jnp.bfloat16)}})
    group = tmp_path / "m" / read_manifest(tmp_path / "m").data / "arrays-00000"
    with pytest.warns(UserWarning, match="Sharding info not provided"):
        tree = ocp.PyTreeCheckpointer().restore(epath.Path(group))
    assert_same(tree["params"]["w"], {"codes": weight.codes, "scale": weight.scale})
    leaf = json.loads((tmp_path / "m" / "jq4.json").read_text())["leaves"][1]
    place = tmp_path / "m" / read_manifest(tmp_path / "m").data / leaf["parts"]["codes"]["array"]
    store = tensorstore.open({"driver": "zarr", "kvstore": f"file://{place}/"}).result()
    bytes_ = store.read().result()
    bits = np.unpackbits(bytes_, axis=0, bitorder="little").reshape(24, 3, 4)  # FORMAT.md: one little-endian bit string
    codes = bits[:, 0] + 2 * bits[:, 1] + 4 * bits[:, 2]
    dense = (codes.astype(np.float32) - 4) * np.repeat(np.asarray(weight.scale), 8, axis=0)
    assert_same(weight.dequantize(jnp.float32), dense)


def test_a_large_tree_is_written_in_groups_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_arrays, "GROUP_BYTES", 3000)
    monkeypatch.setattr(checkpoint_arrays, "CHUNK_BYTES", 1024)
    rng = np.random.default_rng(0)
    tree = {f"w{i}": rng.random((8, 64), np.float32) for i in range(5)} | {"q": WEIGHTS["int8"]}
    save(tmp_path / "m", tree)
    names = {name.split("/")[0] for name in read_manifest(tmp_path / "m").files}
    assert names == {f"arrays-0000{i}" for i in range(5)}
    assert max(info.size for info in read_manifest(tmp_path / "m").files.values()) < 1700
    assert_same(restore(tmp_path / "m"), tree)


@pytest.mark.parametrize("device_kind", ["TPU v6 lite", "NVIDIA H200"])
def test_a_prepared_weight_is_saved_in_the_neutral_layout(tmp_path, device_kind):
    weight = packed_weight(shape=(2, 256, 256), group_size=128, parts=("zero_point",))
    prepared = prepare({"w": weight}, device_kind)["w"]
    assert prepared.layout != "neutral"
    save(tmp_path / "m", {"w": prepared})
    assert_same(restore(tmp_path / "m")["w"], weight)
