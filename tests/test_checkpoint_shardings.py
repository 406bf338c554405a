"""Oracle: JAX's own shards of the dense weight, to which the shards of the packed one must dequantize."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jq4 import CheckpointError, QArray
from jq4.checkpoint import restore, save
from jq4.qarray import dequantize_array
from pallas_kernels import packing


def mesh_of(rows: int, columns: int) -> jax.sharding.Mesh:
    return jax.make_mesh((rows, columns), ("r", "c"), axis_types=(AxisType.Auto, AxisType.Auto))


MESH = mesh_of(2, 4)


def sharded(*spec: Any) -> NamedSharding:
    return NamedSharding(MESH, P(*spec))


def packed_weight(rows: int = 64, columns: int = 16, group_size: int = 8, bits: int = 4, **parts: Any) -> QArray:
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 2**bits, (2, rows, columns), dtype=np.uint8))
    scale = jnp.asarray(rng.random((2, -(-rows // group_size), columns), np.float32))
    padding = packing.padding_of(rows, bits)
    static: dict[str, Any] = {"format": f"int{bits}", "group_size": group_size, "padding": padding}
    return QArray(packing.pack(codes, bits, -2), scale, **parts, **static)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m"


CASES = [
    (4, spec)
    for spec in (
        (),
        (None, None, "c"),
        (None, "c"),
        (None, ("r", "c")),
        ("r", "c", None),
        ("r", None, "c"),
        (None, "r", "c"),
    )
]
CASES += [(bits, (None, "c", "r")) for bits in (2, 3, 8)]


@pytest.mark.parametrize(("bits", "spec"), CASES, ids=str)
def test_each_shard_of_a_packed_weight_is_that_shard_of_the_dense_one(path, bits, spec):
    weight = packed_weight(bits=bits, zero_point=jnp.ones((2, 8, 16), jnp.uint8))
    save(path, {"w": weight})
    found = restore(path, shardings=sharded(*spec))["w"]
    dense = jax.device_put(dequantize_array(weight), sharded(*spec))
    parts = [{s.device: s.data for s in part.addressable_shards} for part in jax.tree.leaves(found)]
    for shard in dense.addressable_shards:
        leaves = [jax.device_put(part[shard.device], jax.devices()[0]) for part in parts]
        local = jax.tree.unflatten(jax.tree.structure(found), leaves)
        np.testing.assert_array_equal(np.asarray(dequantize_array(local)), np.asarray(shard.data))
    assert found.scale.sharding.is_equivalent_to(sharded(*spec), 3)


def test_what_was_sharded_over_eight_devices_is_restored_on_one_and_the_other_way(path):
    weight = packed_weight()
    spread = jax.tree.map(lambda part: jax.device_put(part, sharded("r", "c")), weight)
    save(path, {"w": spread, "b": jax.device_put(jnp.arange(8.0), sharded("c"))})
    on_one = restore(path)
    assert on_one["w"].codes.sharding == SingleDeviceSharding(jax.devices()[0])
    on_all = restore(path, shardings=NamedSharding(mesh_of(8, 1), P()))
    for found in (on_one, on_all):
        assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), found["w"], weight))
        np.testing.assert_array_equal(np.asarray(found["b"]), np.arange(8.0))


def test_shardings_are_given_as_a_prefix_a_full_tree_a_callable_or_by_part(path):
    weight = packed_weight()
    save(path, {"params": {"w": weight, "b": jnp.zeros(16)}, "layers": [jnp.zeros((8, 4)), 3]})
    seen = []

    def choose(leaf_path: str, shape: tuple[int, ...]) -> NamedSharding | None:
        seen.append((leaf_path, shape))
        return sharded("r") if leaf_path == "layers/0" else None

    assert restore(path, shardings=choose)["layers"][0].sharding == sharded("r")
    assert seen == [("layers/0", (8, 4)), ("params/b", (16,)), ("params/w", (2, 64, 16))]
    found = restore(path, shardings={"params": sharded(), "layers": [sharded(None, "c"), None]})
    assert found["params"]["b"].sharding == sharded()
    assert found["params"]["w"].codes.sharding.is_equivalent_to(sharded(), 3)
    assert found["layers"][0].sharding == sharded(None, "c")
    found = restore(path, shardings={"params": {"w": sharded(None, None, "c")}})
    assert found["params"]["b"].sharding == SingleDeviceSharding(jax.devices()[0])
    again = restore(path, shardings=jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), found))
    assert again["params"]["w"].scale.sharding == found["params"]["w"].scale.sharding
    on_last = restore(path, shardings=SingleDeviceSharding(jax.devices()[7]))
    assert on_last["params"]["w"].scale.devices() == {jax.devices()[7]}


def test_the_default_device_of_jax_is_where_unplaced_leaves_go(path):
    save(path, {"w": packed_weight(), "b": jnp.zeros(3), "empty": jnp.zeros((0, 2))})
    with jax.default_device(jax.devices()[3]):
        found = restore(path)
    assert {leaf.device for leaf in jax.tree.leaves(found)} == {jax.devices()[3]}


def test_parts_of_size_one_and_one_group_for_the_whole_axis_are_replicated(path):
    weight = packed_weight(group_size=64)
    save(path, {"whole": weight, "tensor": QArray(weight.codes, jnp.ones((2, 1, 1)), group_size=64)})
    found = restore(path, shardings=sharded("r", "c", None))
    assert found["whole"].codes.sharding == sharded("r", "c", None)
    assert found["whole"].scale.sharding == sharded("r", None, None)
    found = restore(path, shardings=sharded(None, None, "c"))
    assert found["tensor"].scale.sharding == sharded(None, None, None)


def test_a_nested_scale_is_placed_with_its_weight(path):
    rng = np.random.default_rng(0)
    scale = QArray(jnp.asarray(rng.integers(0, 256, (2, 8, 16), dtype=np.uint8)), jnp.ones((2, 1, 16)), format="int8")
    weight = packed_weight()
    save(path, {"w": QArray(weight.codes, scale, group_size=8)})
    found = restore(path, shardings=sharded("r", None, "c"))["w"]
    assert found.scale.codes.sharding == sharded("r", None, "c")
    np.testing.assert_array_equal(
        np.asarray(found.dequantize()), np.asarray(QArray(weight.codes, scale, group_size=8).dequantize())
    )


UNEVEN = {
    "groups cut in two": (
        lambda: packed_weight(group_size=32),
        (None, "c"),
        "w: axis -2 is the grouped one, its 64 elements in 2 groups give shards of 16 over 4 devices, but a shard must "
        "hold whole groups of 32",
    ),
    "bytes cut in two": (lambda: packed_weight(rows=4, group_size=1), (None, "c"), "whole bytes of 4-bit codes"),
    "a short last group": (lambda: packed_weight(rows=60, group_size=8), (None, "c"), "whole groups of 8"),
    "padding": (lambda: packed_weight(rows=36, group_size=9, bits=3), (None, "c"), "whole bytes of 3-bit codes"),
    "permuted rows": (
        lambda: packed_weight(permutation=jnp.tile(jnp.arange(64, dtype=jnp.int32), (2, 1))),
        (None, "c"),
        "its rows are permuted",
    ),
    "columns": (
        lambda: packed_weight(columns=6),
        (None, None, "c"),
        r"w: axis 2 of \(2, 64, 6\) has 6 elements, which 4 shards over mesh axis 'c' do not divide",
    ),
    "too many axes": (packed_weight, (None, None, None, "c"), "w: found the partition .* for an array of 3 axes"),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_a_sharding_that_does_not_fit_is_refused_with_leaf_axis_and_sizes(path, name):
    make, spec, message = UNEVEN[name]
    save(path, {"w": make()})
    with pytest.raises(CheckpointError, match=message):
        restore(path, shardings=sharded(*spec))


def test_permuted_rows_are_sharded_along_the_other_axes(path):
    order = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(64, dtype=np.int32), (2, 1)), axis=1))
    weight = packed_weight(permutation=order)
    save(path, {"w": weight})
    found = restore(path, shardings=sharded("r", None, "c"))["w"]
    assert found.permutation.sharding == sharded("r", None)
    np.testing.assert_array_equal(np.asarray(found.dequantize()), np.asarray(weight.dequantize()))


def test_shardings_that_name_no_leaf_or_are_none_are_refused(path):
    save(path, {"w": packed_weight(), "f64": np.ones(8)})
    with pytest.raises(CheckpointError, match="shardings: 'v' is no path of the checkpoint, whose leaves are f64, w"):
        restore(path, shardings={"v": sharded()})
    with pytest.raises(CheckpointError, match="shardings: at 'w' found str"):
        restore(path, shardings={"w": "c"})
    with pytest.raises(CheckpointError, match="f64: float64 cannot be sharded while jax_enable_x64 is off"):
        restore(path, shardings={"f64": sharded()})
