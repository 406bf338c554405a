"""Oracle: the QArray itself. Preparing for a device and going back gives every bit again, the same weight between."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_oracle import BITS, pack_bits

from jq4.errors import JQ4Error
from jq4.layouts import DEVICE_LAYOUTS, layout_of_device, logical_shape, prepare, to_neutral
from jq4.matmul import dot_general, matmul
from jq4.qarray import QArray, is_qarray
from jq4.qarray_ops import index, transpose
from pallas_kernels.int4_matmul.gpu_chips import KNOWN


def weight(shape, axis, group_size, format="int4", zero_points=False, offsets=False, seed=0, dtype="float32") -> QArray:
    rng = np.random.default_rng(seed)
    groups = list(shape)
    groups[axis] = -(-shape[axis] // group_size)
    codes = rng.integers(0, 2 ** BITS[format], shape).astype(np.uint8)
    packed = pack_bits(codes, BITS[format], axis)
    return QArray(
        jnp.asarray(packed),
        jnp.asarray(rng.uniform(0.5, 1.5, groups), jnp.float32),
        jnp.asarray(rng.integers(0, 2 ** BITS[format], groups), jnp.uint8) if zero_points else None,
        jnp.asarray(rng.normal(size=groups), jnp.float32) if offsets else None,
        format=format,
        group_size=group_size,
        axis=axis,
        padding=packed.shape[axis] * 8 // BITS[format] - shape[axis],
        dtype=dtype,
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


SHAPES = [((12, 5), -2, 4), ((5, 12), -1, 5), ((3, 13, 5), -2, 4), ((2, 3, 5, 13), -1, 4)]
DEVICES = {"cpu": "neutral", "TPU v6 lite": "tpu", "NVIDIA H200": "gpu"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape, axis, group_size", SHAPES)
def test_prepare_is_lossless_and_keeps_shape_value_and_products(shape, axis, group_size, device):
    q = weight(shape, axis, group_size, zero_points=True, offsets=axis == -1)
    prepared = prepare({"layer": q, "norm": jnp.ones(3)}, device)["layer"]
    assert (prepared.layout, prepared.shape, prepared.dtype) == (DEVICES[device], q.shape, q.dtype)
    assert prepared.num_groups == q.num_groups
    assert_same(to_neutral(prepared), q)
    assert_same(prepare(prepared, "cpu"), q)
    np.testing.assert_array_equal(prepared.dequantize(), q.dequantize())
    x = jnp.asarray(np.random.default_rng(1).normal(size=(*shape[:-2], 7, shape[axis])), jnp.float32)
    lead = tuple(range(len(shape) - 2))
    numbers = (((len(shape) - 1,), (axis % len(shape),)), (lead, lead))
    wanted = jax.lax.dot_general(x, q.dequantize(), numbers, precision="highest")
    np.testing.assert_allclose(dot_general(x, prepared, numbers, weight_side="rhs"), wanted, rtol=1e-4, atol=1e-4)
    turned = transpose(prepared, (*lead, len(shape) - 1, len(shape) - 2))
    assert turned.layout == prepared.layout
    np.testing.assert_array_equal(turned.dequantize(), jnp.swapaxes(q.dequantize(), -1, -2))


@pytest.mark.parametrize("device", ["TPU v6 lite", "NVIDIA H200"])
def test_a_short_last_group_and_odd_rows_keep_their_bits(device):
    q = weight((101, 6), -2, 32, zero_points=True)
    prepared = prepare(q, device)
    assert q.padding == 1
    assert_same(to_neutral(prepared), q)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 101)), jnp.float32)
    np.testing.assert_allclose(matmul(x, prepared), x @ q.dequantize(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["TPU v6 lite", "NVIDIA H200"])
def test_slices_of_stacked_prepared_leaves_are_qarrays(device):
    q = weight((4, 12, 5), -2, 4, zero_points=True)
    prepared = prepare(q, device)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3, 12)), jnp.float32)
    wanted = jnp.matmul(x, q.dequantize())
    _, scanned = jax.lax.scan(lambda _, pair: (None, matmul(*pair)), None, (x, prepared))
    np.testing.assert_allclose(scanned, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(matmul)(x, prepared), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(matmul(x, prepared), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(index(prepared, 2).dequantize(), q.dequantize()[2])


def test_prepare_traces():
    tree = {"kernel": weight((12, 5), -2, 4), "other": jnp.ones(3)}
    shapes = jax.eval_shape(lambda tree: prepare(tree, "TPU v5e"), tree)
    assert shapes["kernel"].codes.dtype == jnp.int4
    assert shapes["kernel"].shape == logical_shape(shapes["kernel"]) == (12, 5)
    assert_same(jax.jit(lambda tree: prepare(tree, "TPU v5e"))(tree), prepare(tree, "TPU v5e"))


def test_half_a_byte_a_code_is_what_is_reported():
    q = weight((128, 64), -2, 32)
    assert prepare(q, "TPU v6 lite").nbytes == q.nbytes == 128 * 64 // 2 + 4 * 64 * 4


def test_leaves_without_a_layout_stay_neutral():
    permuted = dataclasses.replace(weight((12, 5), -2, 4), permutation=jnp.arange(12)[::-1])
    tree = {
        "int3": weight((16, 5), -2, 4, "int3"),
        "int8": weight((16, 5), -2, 4, "int8"),
        "nf4": weight((16, 5), -2, 4, "nf4"),
        "permuted": permuted,
        "heads": {"kernel": weight((12, 2, 5), -3, 4)},
        "embedding": weight((11, 12), -1, 4),
    }
    assert all(leaf.layout == "neutral" for leaf in jax.tree.leaves(prepare(tree, "NVIDIA H100"), is_leaf=is_qarray))


def test_device_kinds_as_jax_spells_them():
    assert layout_of_device("NVIDIA H100 80GB HBM3") == layout_of_device("NVIDIA A100-SXM4-80GB") == "gpu"
    assert {layout_of_device(gpu.kind) for gpu in KNOWN} == {"gpu"}
    assert set(DEVICE_LAYOUTS.values()) == {"neutral", "tpu", "gpu"}
    assert layout_of_device(jax.devices()[0].device_kind) == "neutral"
    with pytest.raises(JQ4Error, match=r"device kind 'TPU v99': wanted one of .*NVIDIA H200.*TPU v6 lite.*cpu"):
        prepare({}, "TPU v99")
