"""Oracle: the function on `q.dequantize()`. One primitive or call at a time, strict, so that nothing goes dense."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from zoo import jit, packed

from jq4.apply import quantized
from jq4.qarray import QArray
from jq4.record import DensifiedWarning

close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)


def x_of(*shape, dtype=jnp.float32):
    return jax.device_put(np.random.default_rng(len(shape)).normal(size=shape).astype(jnp.dtype(dtype)))


def same(f, q, *args, close=close):
    """quantized(f) on q gives what f gives on the dense weight, all of it packed."""
    g = quantized(f, strict=True)
    out = jit(g)(q, *args)
    wanted = jit(f)(q.dequantize(), *args)
    jax.tree.map(lambda a, b: close(np.asarray(a, np.float32), np.asarray(b, np.float32)), out, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), out, wanted)
    assert not g.record.entries, g.record.report()
    return out


PRODUCTS = {
    "right": (lambda w, x: x @ w, (24, 10), -2, (3, 24)),
    "left": (lambda w, x: w @ x, (10, 24), -1, (24, 3)),
    "transposed": (lambda w, x: x @ w.T, (10, 24), -1, (3, 24)),
    "vector": (lambda w, x: x @ w, (24, 10), -2, (24,)),
    "einsum": (lambda w, x: jnp.einsum("btd,dhk->bhtk", x, w), (24, 2, 5), -3, (2, 3, 24)),
    "einsum backwards": (lambda w, x: jnp.einsum("ohd,bthd->bto", w, x), (10, 2, 8), -1, (2, 3, 2, 8)),
    "two contracted": (lambda w, x: jnp.tensordot(x, w, 2), (2, 8, 10), -2, (3, 2, 8)),
    "experts": (lambda w, x: jnp.einsum("ebd,edf->ebf", x, w), (3, 24, 10), -2, (3, 4, 24)),
    "experts, transposed": (lambda w, x: jnp.einsum("ebd,efd->bef", x, w), (3, 10, 24), -1, (3, 4, 24)),
    "free axes out of order": (lambda w, x: jnp.einsum("bd,dhk->bkh", x, w), (24, 2, 5), -3, (3, 24)),
    "swapped before": (lambda w, x: jnp.tensordot(x, jnp.transpose(w, (2, 0, 1)), 1), (2, 5, 24), -1, (3, 24)),
    "vmapped": (lambda w, x: jax.vmap(lambda w, x: x @ w)(w, x), (3, 24, 10), -2, (3, 4, 24)),
    "ragged": (lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 0, 3])), (3, 24, 10), -2, (5, 24)),
    "short last group": (lambda w, x: x @ w, (21, 10), -2, (3, 21)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    f, shape, axis, x_shape = PRODUCTS[name]
    same(f, packed(shape, axis), x_of(*x_shape))


def test_products_of_half_precision():
    q = packed((24, 10))
    bf16_close = functools.partial(close, rtol=2e-2, atol=2e-2)
    out = same(lambda w, x: x @ w.astype(jnp.bfloat16), q, x_of(3, 24, dtype=jnp.bfloat16), close=bf16_close)
    assert out.dtype == jnp.bfloat16


STRUCTURE = {
    "cast": lambda w, x: x.astype(jnp.bfloat16).astype(jnp.float32) @ w.astype(jnp.float32),
    "unit axes": lambda w, x: x @ jnp.squeeze(w[None, :, None], (0, 2)),
    "merge outer": lambda w, x: x[:, :16] @ w.reshape(3, 8, 10)[:2].reshape(16, 10),
    "split columns": lambda w, x: jnp.einsum("bd,dhk->bhk", x, w.reshape(24, 2, 5)),
    "twice transposed": lambda w, x: x @ w.T.T,
    "slice": lambda w, x: x @ w[:, 2:7],
    "strided slice": lambda w, x: x @ w[:, ::3],
    "dynamic slice": lambda w, x: x @ lax.dynamic_slice_in_dim(w, x.shape[0], 4, 1),
    "split": lambda w, x: [x @ part for part in jnp.split(w, 2, axis=1)],
    "concatenate": lambda w, x: x @ jnp.concatenate([w, w[:, :3]], axis=1),
    "scaled": lambda w, x: x @ (w * 0.5 / 3.0),
    "scaled by an array": lambda w, x: x @ (w * x[0, 0]),
    "reversed": lambda w, x: x @ jnp.flip(w, axis=1),
    "negated": lambda w, x: x @ -w,
    "stop_gradient": lambda w, x: x @ lax.stop_gradient(w),
    "copy": lambda w, x: x @ jnp.copy(w),
    "barrier": lambda w, x: x @ lax.optimization_barrier((w, x))[0],
    "checkpoint_name": lambda w, x: x @ checkpoint_name(w, "weight"),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure(name):
    same(STRUCTURE[name], packed((24, 10)), x_of(3, 24))


GATHERS = {
    "take": (lambda w, i: jnp.take(w, i, axis=0), (2, 3)),
    "out of bounds": (lambda w, i: jnp.nan_to_num(jnp.take(w, i + 35, axis=0), nan=7.0), (5,)),
    "clipped": (lambda w, i: jnp.take(w, i + 35, axis=0, mode="clip"), (5,)),
    "fancy": (lambda w, i: w[i], (4,)),
    "one": (lambda w, i: w[i[0]] @ w[3], (2,)),
    "vmapped": (lambda w, i: jax.vmap(lambda j: lax.dynamic_index_in_dim(w, j, keepdims=False))(i), (4,)),
    "tied": (lambda w, i: jnp.tanh(w[i]) @ w.T, (4,)),
}


@pytest.mark.parametrize("name", GATHERS)
@pytest.mark.parametrize("options", [{}, {"symmetric": False}], ids=["symmetric", "zero points"])
def test_gathers_of_rows(name, options):
    f, shape = GATHERS[name]
    ids = jnp.asarray(np.random.default_rng(3).integers(0, 40, shape), jnp.int32)
    if name == "one":
        f = lambda w, i: jnp.sum(jnp.take(w, i, axis=0)[0] * jnp.take(w, i, axis=0)[1])  # noqa: E731
    same(f, packed((40, 16), -1, **options), ids)


def test_an_expert_taken_by_each_token_stays_packed():
    q, ids = packed((3, 24, 10)), jnp.array([2, 0, 2, 1])
    same(lambda w, x: jnp.einsum("td,tdf->tf", x, w[ids]), q, x_of(4, 24))
    same(lambda w, x: x @ w[1], q, x_of(4, 24))
    same(lambda w, x, i: x @ w[i], q, x_of(4, 24), 1)


CONVOLUTIONS = {
    "plain": ({"window_strides": (1, 1), "padding": "SAME"}, "NHWC,HWIO,NHWC", (2, 5, 6, 8), (2, 3, 8, 5), 2),
    "strided": ({"window_strides": (2, 3), "padding": "VALID"}, "NHWC,HWIO,NHWC", (2, 7, 8, 8), (2, 3, 8, 5), 2),
    "torch's order": ({"window_strides": (1, 2), "padding": "SAME"}, "NCHW,OIHW,NCHW", (2, 8, 5, 6), (5, 8, 2, 1), 1),
    "dilated kernel": (
        {"window_strides": (1, 1), "padding": ((2, 0), (1, -1)), "rhs_dilation": (2, 3)},
        "NHWC,HWIO,NHWC", (1, 7, 8, 8), (2, 2, 8, 5), 2,
    ),
    "transposed": (
        {"window_strides": (1,), "padding": ((1, 2),), "lhs_dilation": (3,)}, "NHC,HIO,HNC", (2, 5, 8), (2, 8, 5), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    params, numbers, x_shape, w_shape, axis = CONVOLUTIONS[name]

    def f(w, x):
        return lax.conv_general_dilated(x, w, dimension_numbers=tuple(numbers.split(",")), **params)

    same(f, packed(w_shape, axis - len(w_shape)), x_of(*x_shape))


@jax.custom_jvp
def with_jvp(w, x):
    return jnp.sin(x @ w)


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), 2.0 * tangents[1] @ primals[0]))


@jax.custom_vjp
def with_vjp(w, x):
    return x @ w


with_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda res, ct: (jnp.zeros((24, 24)), 3.0 * res[1] * (ct @ res[0]).sum()))


def scan_with_constant(w, x):
    return lax.scan(lambda c, _: (jnp.tanh(c @ w), c.sum()), x, None, length=3)


def scan_with_unchanged_carry(w, x):
    def body(carry, _):
        w, x = carry
        return (w, jnp.tanh(x @ w)), None

    return lax.scan(body, (w, x), None, length=3)[0][1]


def while_loop(w, x):
    def body(carry):
        i, w, x = carry
        return i + 1, w, jnp.tanh(x @ w)

    return lax.while_loop(lambda carry: (carry[2] @ carry[1]).sum() + carry[0] < 5, body, (0, w, x))[2]


def nested(w, x):
    @jax.checkpoint
    def body(c, i):
        return lax.cond(
            i > 0, lambda c: jax.jit(jnp.dot)(c, w), lambda c: lax.fori_loop(0, 2, lambda _, c: c @ w, c), c
        )

    return lax.scan(lambda c, i: (body(c, i), None), x, jnp.arange(2))[0]


CALLS = {
    "jit": lambda w, x: jax.jit(lambda w, x: x @ w)(w, x),
    "donating jit": lambda w, x: jax.jit(lambda w, x: x @ w, donate_argnums=1)(w, x * 2),
    "remat": jax.checkpoint(lambda w, x: jnp.sin(x @ w), policy=jax.checkpoint_policies.dots_saveable),
    "scan": scan_with_constant,
    "scan, carried": scan_with_unchanged_carry,
    "while": while_loop,
    "fori": lambda w, x: lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c @ w), x),
    "cond": lambda w, x: lax.cond(x[0, 0] > 0, lambda w, x: x @ w, lambda w, x: x @ w.astype(jnp.float32) - 1, w, x),
    "switch": lambda w, x: lax.switch(x.shape[0] - 2, [lambda x: x, lambda x: x @ w, lambda x: -x], x),
    "platform_dependent": lambda w, x: lax.platform_dependent(
        w, x, cpu=lambda w, x: x @ w, cuda=lambda w, x: x @ w + 1, default=lambda w, x: x
    ),
    "custom_jvp": lambda w, x: with_jvp(w, x),
    "custom_vjp": lambda w, x: with_vjp(w, x),
    "nested": nested,
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    same(CALLS[name], packed((24, 24)), x_of(3, 24))


def test_a_weight_passes_through_a_cond_and_a_loop_packed():
    def f(w, x):
        w, x = lax.cond(x[0, 0] > 0, lambda w, x: (w, x + 1), lambda w, x: (w, x @ w), w, x)
        w, x = lax.fori_loop(0, 2, lambda _, c: (c[0], c[1] @ c[0]), (w, x))
        return x @ w

    same(f, packed((24, 24)), x_of(3, 24))


def test_a_stack_scanned_backwards_and_returned_is_still_packed():
    q = packed((3, 24, 24))
    f = quantized(lambda w, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), w), x, w, reverse=True), strict=True)
    out, stack = jit(f)(q, x_of(2, 24))
    assert isinstance(stack, QArray)
    close(stack.dequantize(), q.dequantize())
    wanted = np.asarray(x_of(2, 24))
    for layer in np.asarray(q.dequantize())[::-1]:
        wanted = np.tanh(wanted @ layer)
    close(out, wanted)


@pytest.mark.parametrize("options", [{"symmetric": False}, {"strategy": "tensor", "group_size": None}])
def test_stacks_with_zero_points_and_with_one_scale_are_scanned(options):
    q = packed((3, 24, 24), **{"group_size": 8, **options})
    same(lambda w, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0], q, x_of(2, 24))


@pytest.mark.parametrize("name", ["custom_vjp", "remat", "scan", "nested", "cond"])
def test_gradients_through_calls(name):
    q, x = packed((24, 24)), x_of(3, 24)

    def loss(f):
        return lambda x, w: jnp.sum(jnp.sin(jax.tree.leaves(f(w, x))[0]))

    packed_gradient = jit(jax.grad(loss(quantized(CALLS[name], strict=True))))(x, q)
    close(packed_gradient, jit(jax.grad(loss(CALLS[name])))(x, q.dequantize()))


def test_the_users_own_backward_rule_is_kept():
    q, x = packed((24, 24)), x_of(3, 24)
    gradient = jit(jax.grad(lambda x, w, f: jnp.sum(f(w, x))), static_argnums=2)
    close(gradient(x, q, quantized(with_vjp, strict=True)), gradient(x, q.dequantize(), with_vjp))


def test_the_users_own_tangent_rule_is_kept_by_going_dense():
    q, x = packed((24, 24)), x_of(3, 24)
    gradient = jit(jax.grad(lambda x, w, f: jnp.sum(f(w, x))), static_argnums=2)
    f = quantized(with_jvp)
    with pytest.warns(DensifiedWarning, match="tangents need a transposable product"):
        close(gradient(x, q, f), gradient(x, q.dequantize(), with_jvp))
    assert [entry.primitive for entry in f.record.dense] == ["dot_general"]


@pytest.mark.parametrize("flag", ["jax_remat3", "jax_custom_vjp3", "jax_custom_jvp3"])
def test_the_newer_call_like_primitives(flag):
    if not hasattr(jax.config, "jax_custom_jvp3"):
        pytest.skip("this JAX has only the beginnings of these primitives")
    q, x = packed((24, 24)), x_of(3, 24)
    before = getattr(jax.config, flag)
    jax.config.update(flag, True)
    try:
        f = _made_anew()
        same(f, q, x)
        packed_gradient = jit(jax.grad(lambda x, q: jnp.sum(quantized(f)(q, x))))(x, q)
        close(packed_gradient, jit(jax.grad(lambda x, w: jnp.sum(f(w, x))))(x, q.dequantize()))
    finally:
        jax.config.update(flag, before)


def _made_anew():
    @jax.custom_vjp
    def product(w, x):
        return x @ w

    product.defvjp(lambda w, x: (x @ w, (w, x)), lambda res, ct: (None, 3.0 * res[1] * (ct @ res[0]).sum()))

    @jax.custom_jvp
    def sine(x):
        return jnp.sin(x)

    sine.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), 2.0 * tangents[0]))

    @jax.checkpoint
    def block(w, x):
        return sine(product(w, x)) + x @ w

    return lambda w, x: lax.scan(lambda c, _: (block(w, c), None), x, None, length=2)[0]
