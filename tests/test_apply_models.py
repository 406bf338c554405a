"""Oracle: the same function on the dequantized tree. Nine unmodified models, twelve uses each, nothing dense."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from zoo import MODELS, Model, arrays_of, jit, model

from jq4.apply import Quantized, quantized
from jq4.layouts import prepare
from jq4.qarray import is_qarray

close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
DATA, WHOLE = PartitionSpec("data"), PartitionSpec()


@dataclasses.dataclass
class Use:
    """One model, transformed: `call(arrays, x)` runs it on the packed tree's arrays."""

    m: Model
    f: Quantized
    arrays: list[jax.Array]
    call: Callable[[list[jax.Array], Any], Any]

    @property
    def x_is_float(self) -> bool:
        return jnp.issubdtype(self.m.x.dtype, jnp.floating)


def use_of(m: Model) -> Use:
    f = quantized(m.function, strict=True)
    arrays, rebuild = arrays_of(m.qtree)
    return Use(m, f, arrays, lambda arrays, x: f(rebuild(arrays), x))


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:2]), ("data",))


def check_eager(use: Use, _):
    close(use.f(use.m.qtree, use.m.x), use.m.expected)


def check_jit(use: Use, _):
    close(jit(use.call)(use.arrays, use.m.x), use.m.expected)


def check_eval_shape(use: Use, _):
    shape = jax.eval_shape(use.call, use.arrays, use.m.x)
    assert (shape.shape, shape.dtype) == (use.m.expected.shape, use.m.expected.dtype)


def check_grad_by_input(use: Use, folder):
    if not use.x_is_float:  # token ids have no gradient
        return check_grad_by_float_leaves(use, folder)
    packed = jit(jax.grad(lambda x, arrays: jnp.sum(jnp.sin(use.call(arrays, x)))))(use.m.x, use.arrays)
    return close(packed, dense_input_gradient(use.m, jnp.sin))


def check_grad_by_float_leaves(use: Use, _):
    m = use.m
    leaves, structure = jax.tree.flatten(m.qtree, is_leaf=is_qarray)
    dense = jax.tree.leaves(m.dense)
    floats = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def loss(values, function, leaves, x):
        merged = list(leaves)
        for i, value in zip(floats, values, strict=True):
            merged[i] = value
        return jnp.sum(jnp.sin(function(jax.tree.unflatten(structure, merged), x)))

    values = ([leaves[i] for i in floats], m.x)
    packed = jit(jax.grad(lambda values, x: loss(values, use.f, leaves, x)))(*values)
    wanted = jit(jax.grad(lambda values, x: loss(values, m.function, dense, x)))(*values)
    jax.tree.map(close, packed, wanted)
    assert not floats or any(jnp.any(gradient != 0) for gradient in packed)


def check_vmap(use: Use, _):
    if use.m.vmaps_by_x:
        stacked = jnp.stack([use.m.x, use.m.x[::-1]])
        by_input = jit(jax.vmap(use.call, in_axes=(None, 0)))(use.arrays, stacked)
        close(by_input[0], use.m.expected)
    trees = [jnp.stack([array, jnp.zeros_like(array)]) for array in use.arrays]
    by_tree = jit(jax.vmap(use.call, in_axes=(0, None)))(trees, use.m.x)
    close(by_tree[0], use.m.expected)


def check_checkpoint(use: Use, _):
    rematerialized = jax.checkpoint(use.call)
    if not use.x_is_float:
        return close(jit(rematerialized)(use.arrays, use.m.x), use.m.expected)
    gradient = jit(jax.grad(lambda x, arrays: jnp.sum(rematerialized(arrays, x))))(use.m.x, use.arrays)
    return close(gradient, dense_input_gradient(use.m, lambda out: out))


def check_outer_scan(use: Use, _):
    stacked = jnp.stack([use.m.x, use.m.x[::-1]])
    _, out = jit(lambda arrays, xs: jax.lax.scan(lambda c, x: (c, use.call(arrays, x)), 0, xs))(use.arrays, stacked)
    close(out[0], use.m.expected)


def check_named_sharding(use: Use, _):
    def place(leaf):
        if not is_qarray(leaf):
            return jax.device_put(leaf, NamedSharding(mesh(), WHOLE)) if isinstance(leaf, jax.Array) else leaf
        even = all(part.shape[-1] % 2 == 0 for part in jax.tree.leaves(leaf))
        spec = PartitionSpec(*(None,) * (leaf.ndim - 1), "data" if even else None)
        return jax.device_put(leaf, NamedSharding(mesh(), spec))

    arrays, _ = arrays_of(jax.tree.map(place, use.m.qtree, is_leaf=is_qarray))
    close(jit(use.call)(arrays, jax.device_put(use.m.x, NamedSharding(mesh(), DATA))), use.m.expected)


def check_shard_map(use: Use, _):
    mapped = jax.shard_map(use.call, mesh=mesh(), in_specs=(WHOLE, DATA), out_specs=DATA)
    close(jit(mapped)(use.arrays, use.m.x), use.m.expected)


def check_orbax(use: Use, folder):
    named = {f"array_{i}": array for i, array in enumerate(use.arrays)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "tree", named)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(folder / "tree", jax.tree.map(ocp.utils.to_shape_dtype_struct, named))
    close(jit(use.call)([restored[name] for name in named], use.m.x), use.m.expected)


def check_export(use: Use, _):
    exported = jax.export.export(jax.jit(use.call))(use.arrays, use.m.x)
    close(exported.call(use.arrays, use.m.x), use.m.expected)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", MODELS)
def test_packed_as_dense(name, check, tmp_path):
    use = use_of(model(name))
    CHECKS[check](use, tmp_path)
    assert not use.f.record.entries, use.f.record.report()


def test_there_are_twelve_checks():
    assert len(CHECKS) == 12


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_packed(name):
    m = model(name)
    assert sum(map(is_qarray, jax.tree.leaves(m.qtree, is_leaf=is_qarray))) == m.packed


@pytest.mark.parametrize("device_kind", ["TPU v6 lite", "NVIDIA H200"])
@pytest.mark.parametrize("name", ["linen_scan_remat", "nnx_stack", "equinox", "nnx_attention", "tied_embedding"])
def test_prepared_trees_run_as_neutral_ones(name, device_kind):
    m = model(name)
    f = quantized(m.function, strict=True)
    arrays, rebuild = arrays_of(prepare(m.qtree, device_kind))
    close(jit(lambda arrays, x: f(rebuild(arrays), x))(arrays, m.x), m.expected)
    relaid = {entry.path for entry in f.record.relaid}  # [heads, head, out] contracts two axes: not the prepared form
    assert relaid == ({"out/kernel"} if name == "nnx_attention" else set())


def dense_input_gradient(m: Model, head: Callable[[Any], Any]) -> jax.Array:
    """The oracle's gradient of sum(head(f(tree, x))) by x."""
    arrays, rebuild = arrays_of(m.dense)
    return jit(jax.grad(lambda x, arrays: jnp.sum(head(m.function(rebuild(arrays), x)))))(m.x, arrays)
