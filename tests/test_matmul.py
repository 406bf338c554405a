"""Oracle: lax.dot_general, jnp.matmul and lax.ragged_dot on the dequantized weight, at full precision."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_layouts import weight

from jq4 import qarray_ops
from jq4.matmul import NoPackedForm, dot_general, matmul, ragged_dot, spec_of
from jq4.qarray import validate
from pallas_kernels.grouped_int4_matmul.xla import grouped_input_cotangent, grouped_xla
from pallas_kernels.int4_matmul.tiles import Packed

pytestmark = pytest.mark.arithmetic


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(got, wanted, tolerance=1e-4):
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


# the weight's shape, its grouped axis, dimension numbers (x on the left), x's shape
CONTRACTIONS = {
    "[K, N]": ((12, 5), -2, (((1,), (0,)), ((), ())), (3, 12)),
    "[N, K]": ((5, 12), -1, (((1,), (1,)), ((), ())), (3, 12)),
    "heads out, merged": ((4, 8, 5), -2, (((1, 2), (0, 1)), ((), ())), (3, 4, 8)),
    "heads out, groups broken: summed": ((4, 6, 5), -2, (((1, 2), (0, 1)), ((), ())), (3, 4, 6)),
    "grouped axis first of two": ((8, 4, 5), -3, (((1, 2), (1, 0)), ((), ())), (3, 4, 8)),
    "columns first, merged": ((5, 4, 8), -1, (((1, 2), (1, 2)), ((), ())), (3, 4, 8)),
    "columns between, merged": ((4, 5, 8), -1, (((1, 2), (0, 2)), ((), ())), (3, 4, 8)),
    "columns between, summed": ((4, 5, 7), -1, (((1, 2), (0, 2)), ((), ())), (3, 4, 7)),
    "several columns": ((12, 3, 2), -3, (((2,), (0,)), ((), ())), (3, 2, 12)),
    "experts": ((6, 12, 3), -2, (((2,), (1,)), ((0,), (0,))), (6, 2, 12)),
    "batch axis in the middle": ((12, 6, 3), -3, (((2,), (0,)), ((1,), (1,))), (2, 6, 12)),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
@pytest.mark.parametrize("kind", [{}, {"format": "int3", "offsets": True}])
def test_dot_general_on_either_side(name, kind):
    shape, axis, numbers, x_shape = CONTRACTIONS[name]
    q, x = validate(weight(shape, axis, 4, zero_points=True, **kind)), normal(*x_shape)
    close(
        dot_general(x, q, numbers, weight_side="rhs"), lax.dot_general(x, q.dequantize(), numbers, precision="highest")
    )
    turned = tuple(pair[::-1] for pair in numbers)
    close(dot_general(q=q, x=x, dimension_numbers=turned, weight_side="lhs"),
          lax.dot_general(q.dequantize(), x, turned, precision="highest"))  # fmt: skip


@pytest.mark.parametrize("w_shape, x_shape", [
    ((12, 5), (12,)), ((12, 5), (2, 3, 12)), ((4, 12, 5), (3, 12)), ((4, 12, 5), (4, 3, 12)), ((4, 12, 5), (1, 3, 12)),
    ((4, 12, 5), (2, 4, 3, 12)), ((4, 12, 5), (12,)), ((4, 12, 5), (2, 1, 3, 12)),
])  # fmt: skip
def test_matmul_broadcasts_as_jnp_does(w_shape, x_shape):
    q, x = weight(w_shape, -2, 4), normal(*x_shape)
    wanted = jnp.matmul(x, q.dequantize(), precision="highest") if x.ndim else None
    close(matmul(x, q), wanted)


def test_no_rows_of_x_give_no_rows():
    q = weight((12, 5), -2, 4)
    for x in (normal(0, 12), normal(3, 0, 12)):
        close(matmul(x, q), jnp.matmul(x, q.dequantize()))
        assert jax.grad(lambda x: jnp.sum(matmul(x, q)))(x).shape == x.shape


def test_dtypes_are_those_of_the_dense_product():
    q = weight((12, 5), -2, 4, dtype="bfloat16")
    x = normal(3, 12).astype(jnp.bfloat16)
    numbers = (((1,), (0,)), ((), ()))
    assert dot_general(x, q, numbers, weight_side="rhs").dtype == jnp.bfloat16
    wide = dot_general(x, q, numbers, weight_side="rhs", preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(dataclasses.replace(q, dtype="float32").dequantize(), np.float64)
    np.testing.assert_allclose(wide, exact, rtol=1e-5, atol=1e-5)
    assert matmul(x, q.dequantize()).dtype == jnp.bfloat16  # a dense weight is accepted


def test_one_scale_for_a_whole_stack():
    q = dataclasses.replace(weight((4, 12, 5), -2, 12), scale=jnp.full((1, 1, 1), 0.5))
    x = normal(4, 2, 12)
    close(matmul(x, q), jnp.matmul(x, q.dequantize(), precision="highest"))


@pytest.mark.parametrize("stack", [(), (4,)])
def test_activation_order_gathers_columns_of_x(stack):
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(12) for _ in range(4)]) if stack else rng.permutation(12)
    q = dataclasses.replace(weight((*stack, 12, 5), -2, 4), permutation=jnp.asarray(order, jnp.int32))
    close(matmul(normal(*stack, 3, 12), q), jnp.matmul(normal(*stack, 3, 12), q.dequantize(), precision="highest"))
    if stack:  # the batch axis of x elsewhere
        numbers, x = (((1,), (1,)), ((2,), (0,))), normal(3, 12, 4)
        wanted = lax.dot_general(x, q.dequantize(), numbers, precision="highest")
        close(dot_general(x, q, numbers, weight_side="rhs"), wanted)


def test_a_contraction_across_the_grouped_axis_has_no_packed_form():
    q = weight((12, 5), -2, 4)
    with pytest.raises(NoPackedForm, match=r"contracts axes \[1\] of QArray\(int4\[12, 5\].* grouped along axis -2"):
        dot_general(normal(3, 5), q, (((1,), (1,)), ((), ())), weight_side="rhs")
    with pytest.raises(NoPackedForm, match="matmul"):
        matmul(normal(3, 5), weight((5, 12), -1, 4))


RAGGED = {
    "an empty group": (7, 3, 12, 5, [2, 0, 4]),
    "many rows": (300, 4, 32, 40, [100, 3, 0, 197]),
    "more experts than rows": (5, 9, 16, 8, [0, 0, 1, 0, 0, 3, 0, 0, 1]),
    "all rows in one": (64, 2, 24, 6, [64, 0]),
}


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_dot(name):
    m, e, k, n, sizes = RAGGED[name]
    q, x, sizes = weight((e, k, n), -2, 8, zero_points=True, offsets=True), normal(m, k), jnp.asarray(sizes, jnp.int32)
    wanted = lax.ragged_dot(x, q.dequantize(), sizes, precision="highest")
    close(ragged_dot(x, q, sizes), wanted)
    close(ragged_dot(x, q, sizes, implementation="reference"), wanted)


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_gradients_of_ragged_dot(format):
    q, x = weight((4, 33, 6), -2, 8, format, zero_points=format == "int4", offsets=True), normal(20, 33)
    sizes = jnp.asarray([5, 0, 9, 3], jnp.int32)

    def of(product):
        def loss(x, scale, offset):
            return jnp.sum(jnp.sin(product(x, dataclasses.replace(q, scale=scale, offset=offset), sizes)))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(x, q.scale, q.offset)

    dense = of(lambda x, q, sizes: lax.ragged_dot(x, q.dequantize(), sizes, precision="highest"))
    for got, wanted in zip(of(ragged_dot), dense, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("orientation", ["kn", "nk"])
def test_the_ragged_form_of_accelerators(orientation):
    q = weight((4, 40, 6), -2, 8, zero_points=True)
    x, dy, sizes = normal(20, 40), normal(20, 6, seed=1), jnp.asarray([5, 0, 9, 3], jnp.int32)
    dense = q.dequantize()
    q = q if orientation == "kn" else qarray_ops.transpose(q, (0, 2, 1))
    w, spec = Packed(q.codes, q.scale, q.zero_point, None), spec_of(q)
    got = jax.jit(lambda x, w: grouped_xla(x, w, sizes, spec, platform="tpu"))(x, w)
    close(got, lax.ragged_dot(x, dense, sizes, precision="highest"))
    back = jax.jit(
        lambda dy, w: grouped_input_cotangent(dy, w, sizes, spec, jnp.float32, platform="tpu", precision=None)
    )(dy, w)
    close(back, lax.ragged_dot(dy, jnp.swapaxes(dense, 1, 2), sizes, precision="highest"))


def test_ragged_dot_never_holds_the_experts_dense():
    q = jax.eval_shape(lambda: weight((16, 512, 1024), -2, 128))
    x, sizes = jax.ShapeDtypeStruct((8, 512), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.int32)
    for function in (ragged_dot, jax.grad(lambda x, q, s: jnp.sum(ragged_dot(x, q, s)), argnums=0)):
        compiled = jax.jit(function).lower(x, q, sizes).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 16 * 512 * 1024 * 4 / 6


# --- moving packed weights about --------------------------------------------------------------------------------


def test_transpose_is_the_dense_one():
    q = weight((4, 8, 5), -2, 4, zero_points=True)
    for order in itertools.permutations(range(3)):
        turned = validate(qarray_ops.transpose(q, order))
        np.testing.assert_array_equal(turned.dequantize(), q.dequantize().transpose(order))


@pytest.mark.parametrize("shape", [(32, 5), (2, 2, 8, 5), (4, 2, 4, 5), (2, 16, 5), (4, 8, 5, 1), (1, 4, 8, 5)])
def test_reshape_keeps_groups_whole(shape):
    q = weight((4, 8, 5), -2, 4, zero_points=True, offsets=True)
    np.testing.assert_array_equal(validate(qarray_ops.reshape(q, shape)).dequantize(), q.dequantize().reshape(shape))


def test_reshape_splits_rows_that_share_one_group():
    q = weight((8, 6), -2, 100, zero_points=True)
    np.testing.assert_array_equal(qarray_ops.reshape(q, (2, 4, 6)).dequantize(), q.dequantize().reshape(2, 4, 6))


@pytest.mark.parametrize("shape", [(8, 2, 10), (160,), (4, 40), (4, 4, 2, 5)])
def test_reshape_refuses_to_break_groups(shape):
    with pytest.raises(NoPackedForm, match=r"breaks groups of 4|on its right"):
        qarray_ops.reshape(weight((4, 8, 5), -2, 4), shape)


def test_rows_slices_and_indices():
    table = weight((11, 8), -1, 4, zero_points=True)
    ids = jnp.asarray([[1, 2], [3, 10]])
    np.testing.assert_array_equal(qarray_ops.take_rows(table, ids).dequantize(), table.dequantize()[ids])
    per_tensor = dataclasses.replace(weight((11, 8), -1, 8), scale=jnp.full((1, 1), 0.5))
    np.testing.assert_array_equal(qarray_ops.take_rows(per_tensor, ids).dequantize(), per_tensor.dequantize()[ids])
    q = weight((4, 8, 5), -2, 4)
    dense = q.dequantize()
    np.testing.assert_array_equal(qarray_ops.index(q, 2).dequantize(), dense[2])
    np.testing.assert_array_equal(qarray_ops.index(q, 2, axis=2).dequantize(), dense[:, :, 2])
    np.testing.assert_array_equal(qarray_ops.slice_in_dim(q, 1, 4, 2, axis=0).dequantize(), dense[1:4:2])
    np.testing.assert_array_equal(
        qarray_ops.dynamic_slice_in_dim(q, jnp.asarray(1), 3, axis=2).dequantize(), dense[:, :, 1:4]
    )
    with pytest.raises(NoPackedForm, match=r"slice along axis 1 of \(4, 8, 5\), which is the grouped one"):
        qarray_ops.slice_in_dim(q, 0, 4, axis=1)
