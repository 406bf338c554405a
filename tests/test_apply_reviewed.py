"""What a hostile review found. Oracle: the function itself on the dequantized weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jq4


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = normal(3, 32, seed=1)
W = jq4.quantize_weight(normal(32, 6), group_size=8)
STACK = jq4.quantize_weight(normal(4, 32, 6, seed=2), group_size=8)


def same(function, *args, tolerance=2e-5):
    transformed = jq4.quantized(function)
    wanted = function(*jq4.dequantize(args))
    np.testing.assert_allclose(transformed(*args), wanted, rtol=tolerance, atol=tolerance)
    return transformed.record


def test_a_complex_product_keeps_its_imaginary_part_and_is_recorded():
    product = lambda w, z: jax.lax.dot_general(z, w, (((1,), (0,)), ((), ())))  # noqa: E731
    with pytest.warns(jq4.DensifiedWarning, match="a product of dtype complex64"):
        record = same(product, W, jax.lax.complex(X, X[::-1]))
    assert record.entries


@pytest.mark.parametrize("index", [-9, -6, -5, -4, -1, 0, 3, 4, 9])
def test_an_index_outside_is_clamped_as_jax_does(index):
    take = jax.jit(lambda s, x, i: x @ s[i])
    wanted = take(STACK.dequantize(), X, jnp.int32(index))
    np.testing.assert_allclose(jax.jit(jq4.quantized(take))(STACK, X, jnp.int32(index)), wanted, atol=2e-5)
    counts = jq4.observe(lambda p, x, i: (x @ p[i]).sum(), STACK.dequantize(), [(X, jnp.int32(index))])
    layer = int(np.clip(index + 4 if index < 0 else index, 0, 3))
    assert counts[""].count.tolist() == [3 * (i == layer) for i in range(4)]


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
def test_a_number_times_a_weight_is_not_rounded_to_its_scales_dtype(scale_dtype):
    w = jq4.quantize_weight(normal(32, 6), group_size=8, scale_dtype=scale_dtype)
    for function in (lambda w, x: x @ (w * 0.3), lambda w, x: x @ (w / 3.0), lambda w, x: x @ -w):
        assert same(function, w, X).entries == []
    tiny = lambda w, x: x @ (w * 1e-6)  # noqa: E731
    np.testing.assert_allclose(jq4.quantized(tiny)(w, X), tiny(w.dequantize(), X), rtol=1e-4, atol=1e-10)


def test_stop_gradient_stops_the_scales_gradient():
    loss = jq4.quantized(lambda w, x: (x @ jax.lax.stop_gradient(w)).sum())
    assert float(jnp.max(jnp.abs(jax.grad(loss, allow_int=True)(W, X).scale))) == 0


def test_no_rows_at_all():
    same(lambda w, x: x @ w, W, jnp.zeros((0, 32)))
    sizes = jnp.zeros(4, jnp.int32)
    same(lambda s, x: jax.lax.ragged_dot(x, s, sizes), STACK, jnp.zeros((0, 32)))
    kernel = jq4.quantize_weight(normal(3, 3, 32, 6), group_size=8)
    dims = ("NHWC", "HWIO", "NHWC")
    same(
        lambda k, x: jax.lax.conv_general_dilated(x, k, (2, 2), "VALID", dimension_numbers=dims),
        kernel,
        jnp.zeros((2, 1, 8, 32)),
    )


def test_a_scan_over_the_grouped_axis_goes_dense_and_says_so():
    with pytest.warns(jq4.DensifiedWarning, match="slices it along its grouped axis"):
        same(lambda w: jax.lax.map(lambda row: row * 2, w), W)


def test_the_record_is_of_the_last_call():
    transformed = jq4.quantized(lambda w: jnp.sin(w))
    with pytest.warns(jq4.DensifiedWarning):
        transformed(W)
    assert transformed.record.entries
    transformed(W.dequantize())
    assert transformed.record.entries == []


def test_a_scaled_weight_is_still_watched_and_equal_statics_of_other_types_are_not_one():
    tree = {"a": normal(32, 6)}
    for function in (lambda t, x: x @ (t["a"] * 0.5), lambda t, x: x @ -t["a"], lambda t, x: x @ (2 * t["a"])):
        assert jq4.contraction_axes(function, tree, X) == {"a": -2}
    branch = lambda t, x, flag: x @ t["a"] if flag is True else (x[:1] @ t["a"])  # noqa: E731
    assert int(jq4.observe(branch, tree, [(X, 1), (X, True)])["a"].count) == 4
