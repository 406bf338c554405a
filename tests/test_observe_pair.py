"""Oracle: numpy's own sums over the inputs of both models, run one after the other."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jq4
from jq4.observe_pair import observe_pair


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def check(found, x, y, lead=()):
    """Compares one slice of statistics with those of rows x (dense) and y (quantized) [M, K] in float64."""
    x, y = (np.asarray(rows, np.float64).reshape(-1, np.shape(rows)[-1]) for rows in (x, y))
    assert int(found.count[lead]) == len(y)
    np.testing.assert_allclose(found.hessian[lead], y.T @ y / len(y), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.cross[lead], x.T @ y / len(y), rtol=1e-4, atol=1e-5)


def two_layers(tree, x):
    return jax.nn.relu(x @ tree["a"]) @ tree["b"].T


def test_the_inputs_of_both_models_pair_row_by_row():
    dense = {"a": normal(8, 6), "b": normal(4, 6, seed=1)}
    packed = jq4.quantize(dense, jq4.Rule(("a",), num_bits=3, axis=-2))
    pairs = [(normal(rows, 8, seed=rows), normal(rows, 8, seed=rows) + 0.1) for rows in (3, 7)]
    stats = observe_pair(two_layers, dense, packed, iter(pairs), collect=("hessian", "absmax"))
    x, y = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    check(stats["a"], x, y)
    hidden = np.maximum(x @ np.asarray(dense["a"]), 0), np.maximum(y @ np.asarray(packed["a"].dequantize()), 0)
    check(stats["b"], *hidden)
    np.testing.assert_allclose(stats["b"].absmax, hidden[1].max(0), rtol=1e-5)
    assert stats.axes == {"a": -2, "b": -1}


def test_a_weight_alone_has_what_the_cross_correlation_makes_of_it():
    dense = {"a": normal(8, 300), "b": normal(4, 300, seed=1).T}
    other = {name: leaf + 0.1 for name, leaf in dense.items()}
    pairs = [(normal(rows, 8, seed=rows), normal(rows, 8, seed=rows) + 0.1) for rows in (3, 2)]

    def layers(tree, x):
        return jnp.tanh(x @ tree["a"]) @ tree["b"]

    stats = observe_pair(layers, dense, other, pairs, alone=["b"])
    x, y = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    x, y = (np.tanh(rows @ np.asarray(tree["a"])).astype(np.float64) for rows, tree in ((x, dense), (y, other)))
    assert stats["b"].cross is None and stats["a"].way_total is None and stats["a"].cross is not None
    np.testing.assert_allclose(stats["b"].outer_total, y.T @ y, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats["b"].way_total, y.T @ (x - y) @ np.asarray(dense["b"]), rtol=1e-4, atol=1e-4)


def test_a_weight_alone_may_be_used_twice_by_batches_of_any_size():
    dense = {"a": normal(24, 8), "b": normal(8, 24, seed=1)}
    other = {name: leaf + 0.1 for name, leaf in dense.items()}
    pairs = [(normal(rows, 24, seed=rows), normal(rows, 24, seed=rows) + 0.1) for rows in (3, 40)]
    stats = observe_pair(lambda tree, x: x @ tree["a"] @ tree["b"] @ tree["a"], dense, other, pairs, alone=["a"])["a"]
    x, y = (np.concatenate([pair[side] for pair in pairs]).astype(np.float64) for side in (0, 1))
    x, y = (np.concatenate([rows, rows @ tree["a"] @ tree["b"]]) for rows, tree in ((x, dense), (y, other)))
    np.testing.assert_allclose(stats.way_total, y.T @ (x - y) @ np.asarray(dense["a"]), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    "shape, product",
    [
        ((6, 6), lambda tree, x: x @ tree["w"].T),
        ((4, 6), lambda tree, x: x @ tree["w"].T),
        ((2, 3, 4), lambda tree, x: jnp.einsum("bhd,hdo->bo", x.reshape(-1, 2, 3), tree["w"])),
    ],
)
def test_a_weight_alone_that_is_no_matrix_by_inputs_and_outputs_keeps_the_cross_correlation(shape, product):
    dense, x = {"w": normal(*shape)}, normal(5, 6, seed=2)
    stats = observe_pair(product, dense, dense, [(x, x + 0.1)], alone=["w"])["w"]
    np.testing.assert_allclose(stats.cross_total, x.T @ (x + 0.1), rtol=1e-4, atol=1e-4)
    assert stats.way_total is None


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + jax.nn.silu(nn.Dense(6)(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scanned(name="layers")(x, None)[0]


def test_scanned_layers_keep_pairs_of_their_own():
    model, x = Stack(), normal(2, 5, 6)
    dense = model.init(jax.random.key(0), x)
    quantized = jax.tree.map(lambda leaf: leaf + 0.05 * jnp.sin(17 * leaf), dense)
    stats = observe_pair(model.apply, dense, quantized, [(x, x)])
    inputs = [np.asarray(x)] * 2
    kernels = [tree["params"]["layers"]["Dense_0"]["kernel"] for tree in (dense, quantized)]
    biases = [tree["params"]["layers"]["Dense_0"]["bias"] for tree in (dense, quantized)]
    for layer in range(3):
        check(stats["params/layers/Dense_0/kernel"], *inputs, lead=(layer,))
        sides = zip(inputs, kernels, biases, strict=True)
        inputs = [h + np.asarray(jax.nn.silu(h @ k[layer] + b[layer][None, None])) for h, k, b in sides]


def test_kept_rows_and_the_vmapped_function_agree(monkeypatch):
    def network(tree, x):
        hidden = jnp.tanh(jnp.einsum("btk,khd->bthd", x, tree["a"]))
        return jnp.einsum("bthd,hdn->btn", hidden, tree["b"]) @ tree["c"]

    random = np.random.default_rng(0)
    dense = {
        name: jnp.asarray(random.normal(size=shape), jnp.float32)
        for name, shape in (("a", (12, 2, 8)), ("b", (2, 8, 20)), ("c", (20, 4)))
    }
    other = {name: leaf + 0.1 for name, leaf in dense.items()}
    pairs = [(jnp.asarray(x), jnp.asarray(x + 0.1)) for x in random.normal(size=(2, 3, 5, 12)).astype(np.float32)]
    kept = observe_pair(network, dense, other, pairs)
    module = importlib.import_module("jq4.observe_pair")  # jq4.observe_pair is the function
    monkeypatch.setattr(module, "_one_after_the_other", lambda *_: None)
    vmapped = observe_pair(network, dense, other, pairs)
    assert kept.axes == vmapped.axes and set(kept) == set(vmapped) == {"a", "b", "c"}
    for path in kept:
        assert int(kept[path].count) == int(vmapped[path].count) == 30
        for name in ("outer_total", "cross_total"):
            np.testing.assert_allclose(
                getattr(kept[path], name), getattr(vmapped[path], name), rtol=2e-5, atol=1e-4, err_msg=path
            )


def test_a_weight_that_both_sides_feed_alike_has_its_hessian_for_a_cross():
    constant = normal(9, 5, seed=4)
    stats = observe_pair(lambda t, x: x * (constant @ t["w"]), {"w": normal(5, 4)}, {"w": normal(5, 4)}, [(1.0, 1.0)])
    check(stats["w"], constant, constant)


def test_experts_are_counted_by_the_quantized_router():
    dense = {"router": normal(6, 3), "experts": normal(3, 6, 4, seed=1)}
    quantized = {"router": normal(6, 3, seed=9), "experts": dense["experts"]}

    def mixture(tree, x):
        expert = jnp.argmax(x @ tree["router"], axis=-1)
        order = jnp.argsort(expert)
        return jax.lax.ragged_dot(x[order], tree["experts"], jnp.bincount(expert, length=3).astype(jnp.int32))

    x = normal(40, 6, seed=2)
    found = observe_pair(mixture, dense, quantized, [(x, x)])["experts"]
    alone = jq4.observe(mixture, quantized, [x], collect=("hessian",))["experts"]
    assert found.cross is None
    np.testing.assert_array_equal(found.count, alone.count)
    np.testing.assert_allclose(found.hessian, alone.hessian, rtol=1e-5, atol=1e-6)


def test_what_does_not_pair_is_refused():
    tree, x = {"a": normal(8, 6), "b": normal(4, 6)}, normal(3, 8)
    with pytest.raises(jq4.JQ4Error, match="observe_pair was given no batches"):
        observe_pair(two_layers, tree, tree, [])
    with pytest.raises(jq4.JQ4Error, match="differ in structure"):
        observe_pair(two_layers, tree, {"a": tree["a"]}, [(x, x)])
    with pytest.raises(jq4.JQ4Error, match=r"float32\[3, 8\] on the dense side and float32\[2, 8\]"):
        observe_pair(two_layers, tree, tree, [(x, x[:2])])
    with pytest.raises(jq4.JQ4Error, match=r"float32\[2, 6, 8\] on the dense side and float32\[3, 4, 8\]"):
        observe_pair(two_layers, tree, tree, [(normal(2, 6, 8), normal(3, 4, 8))])
    with pytest.raises(jq4.JQ4Error, match=r"\['b'\] is float32\[4, 6\] on the dense side and float32\[5, 6\]"):
        observe_pair(two_layers, tree, tree | {"b": normal(5, 6)}, [(x, x)])
    with pytest.raises(jq4.JQ4Error, match="wanted a pair"):
        observe_pair(two_layers, tree, tree, [x])  # pyright: ignore[reportArgumentType]
