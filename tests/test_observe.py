"""Oracle: numpy's own sums over the inputs that reach each weight, computed beside the function."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import jq4
from jq4.axes import contraction_axes
from jq4.observe import observe

ALL = ("absmax", "mean", "mean_square", "hessian")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def check(found, rows, lead=()):
    """Compares statistics (one slice of them) with those of rows [M, K] by numpy in float64."""
    rows = np.asarray(rows, np.float64).reshape(-1, np.shape(rows)[-1])
    assert int(found.count[lead]) == len(rows)
    np.testing.assert_allclose(found.absmax[lead], np.abs(rows).max(0), rtol=1e-5)
    np.testing.assert_allclose(found.mean[lead], rows.mean(0), atol=1e-5)
    np.testing.assert_allclose(found.mean_square[lead], (rows**2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.hessian[lead], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_two_batches_are_one_stream():
    tree = {"a": normal(6, 5), "b": normal(4, 5, seed=1)}
    batches = [normal(3, 6, seed=2), normal(7, 6, seed=3)]
    stats = observe(lambda t, x: jax.nn.relu(x @ t["a"]) @ t["b"].T, tree, iter(batches), collect=ALL)
    x = np.concatenate(batches)
    check(stats["a"], x)
    check(stats["b"], np.maximum(x @ np.asarray(tree["a"]), 0))
    assert stats.axes == {"a": -2, "b": -1}


def test_a_hessian_is_not_collected_unasked():
    stats = observe(lambda t, x: x @ t["w"], {"w": normal(6, 5)}, [normal(3, 6)])
    with pytest.raises(jq4.JQ4Error, match="hessian was not collected: call observe"):
        _ = stats["w"].hessian
    chosen = observe(lambda t, x: x @ t["w"], {"w": normal(6, 5)}, [normal(3, 6)], collect=lambda path: ("hessian",))
    assert chosen["w"].absmax is None and chosen["w"].hessian.shape == (6, 6)


def test_bad_requests_say_what_was_wanted():
    with pytest.raises(jq4.JQ4Error, match="cannot collect 'fisher': wanted some of absmax"):
        observe(lambda t, x: x @ t["w"], {"w": normal(6, 5)}, [normal(3, 6)], collect=("fisher",))
    with pytest.raises(jq4.JQ4Error, match="no batches"):
        observe(lambda t, x: x @ t["w"], {"w": normal(6, 5)}, [])


class Block(nn.Module):
    features: int = 6

    @nn.compact
    def __call__(self, x, _=None):
        return x + jax.nn.silu(nn.Dense(self.features)(x)), None


class Stack(nn.Module):
    depth: int = 3
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        return scanned(name="layers")(x, None)[0]


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_keep_statistics_of_their_own(remat):
    model, x = Stack(remat=remat), normal(2, 5, 6)
    variables = model.init(jax.random.key(0), x)
    stats = observe(model.apply, variables, [x], collect=ALL)
    path = "params/layers/Dense_0/kernel"
    assert stats.axes[path] == -2
    assert stats[path].hessian.shape == (3, 6, 6)
    kernel, bias = (np.asarray(variables["params"]["layers"]["Dense_0"][name]) for name in ("kernel", "bias"))
    hidden = np.asarray(x, np.float64)
    for layer in range(3):
        check(stats[path], hidden, (layer,))
        out = hidden @ kernel[layer] + bias[layer]
        hidden = hidden + out / (1 + np.exp(-out))


def test_a_weight_shared_by_every_step_of_a_loop_is_summed():
    w, xs = normal(4, 4), normal(5, 3, 4, seed=1)

    def f(tree, xs):
        return jax.lax.scan(lambda carry, x: (carry + jnp.sum(x @ tree["w"]), None), jnp.float32(0), xs)[0]

    check(observe(f, {"w": w}, [xs], collect=ALL)["w"], xs)

    def g(tree, xs):
        def body(state):
            i, y = state
            return i + 1, y + xs[i] @ tree["w"]

        return jax.lax.while_loop(lambda state: state[0] < 4, body, (0, jnp.zeros((3, 4))))[1]

    check(observe(g, {"w": w}, [xs], collect=ALL)["w"], xs[:4])


def test_layers_indexed_by_a_python_or_a_fori_loop_are_slices():
    w, x = normal(3, 4, 4), normal(5, 4, seed=1)

    def unrolled(tree, x):
        for i in range(3):
            x = jnp.tanh(x @ tree["w"][i])
        return x

    def looped(tree, x):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ tree["w"][i]), x)

    for f in (unrolled, looped):
        stats = observe(f, {"w": w}, [x], collect=ALL)["w"]
        hidden = np.asarray(x)
        for layer in range(3):
            check(stats, hidden, (layer,))
            hidden = np.tanh(hidden @ np.asarray(w[layer]))


def test_only_the_branch_taken_counts():
    tree, x = {"a": normal(4, 4), "b": normal(4, 4, seed=1)}, normal(5, 4, seed=2)
    f = lambda t, x: jax.lax.cond(x[0, 0] > 100, lambda x: x @ t["a"], lambda x: 2 * x @ t["b"], x)  # noqa: E731
    stats = observe(f, tree, [x], collect=ALL)
    assert int(stats["a"].count) == 0 and float(jnp.max(stats["a"].absmax)) == 0
    check(stats["b"], 2 * x)


def test_experts_by_ragged_dot_and_by_batched_einsum():
    w, x, sizes = normal(3, 4, 5), normal(9, 4, seed=1), jnp.asarray([4, 0, 5], jnp.int32)
    ragged = observe(lambda t, x: jax.lax.ragged_dot(x, t["w"], sizes), {"w": w}, [x], collect=ALL)["w"]
    check(ragged, x[:4], (0,))
    check(ragged, x[4:], (2,))
    assert int(ragged.count[1]) == 0 and not np.isnan(ragged.mean[1]).any()
    per_expert = normal(3, 6, 4, seed=2)
    batched = observe(lambda t, x: jnp.einsum("emk,ekn->emn", x, t["w"]), {"w": w}, [per_expert], collect=ALL)["w"]
    for expert in range(3):
        check(batched, per_expert[expert], (expert,))


def test_a_convolution_sees_patches_in_the_kernels_order():
    kernel, x = normal(3, 2, 4, 5), normal(2, 7, 6, 4, seed=1)
    dims = ("NHWC", "HWIO", "NHWC")
    f = lambda t, x: jax.lax.conv_general_dilated(x, t["k"], (1, 2), "VALID", dimension_numbers=dims)  # noqa: E731
    stats = observe(f, {"k": kernel}, [x], collect=ALL)
    assert stats.axes == {"k": -2}
    patches = [
        np.asarray(x)[n, i : i + 3, j : j + 2].ravel() for n in range(2) for i in range(5) for j in range(0, 5, 2)
    ]
    check(stats["k"], np.stack(patches))


def test_a_mesh_sums_over_its_devices():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    w, x = normal(6, 8), normal(8, 6, seed=1)

    def f(tree, x):
        def local(w, x):
            return x @ w

        return jax.shard_map(local, mesh=mesh, in_specs=(P(None, "model"), P("data")), out_specs=P("data", "model"))(
            tree["w"], x
        )

    check(observe(f, {"w": w}, [x], collect=ALL)["w"], x)
    rows = lambda t, x: jax.shard_map(  # noqa: E731
        lambda w, x: jax.lax.psum(x @ w, "model"),
        mesh=mesh,
        in_specs=(P("model"), P("data", "model")),
        out_specs=P("data"),
    )(t["w"], x)
    stats = observe(rows, {"w": w}, [x])["w"]
    np.testing.assert_allclose(stats.mean, np.asarray(x).mean(0), atol=1e-6)
    with pytest.raises(jq4.JQ4Error, match="w: its inputs are sharded along axis -2 over mesh axis 'model'"):
        observe(rows, {"w": w}, [x], collect=ALL)


def test_it_traces():
    f, tree, x = lambda t, x: x @ t["w"], {"w": normal(6, 5)}, normal(3, 6)
    check(jax.jit(lambda t, x: observe(f, t, [x], collect=ALL))(tree, x)["w"], x)
    shapes = jax.eval_shape(lambda t, x: observe(f, t, [x], collect=ALL), tree, x)
    assert shapes["w"].outer_total.shape == (6, 6) and shapes.axes == {"w": -2}


@pytest.mark.parametrize(
    ("name", "shape", "call", "axis"),
    [
        ("x @ w", (4, 6), lambda w, x: x @ w, -2),
        ("x @ w.T", (6, 4), lambda w, x: x @ w.T, -1),
        ("w @ x", (6, 4), lambda w, x: w @ x.T, -1),
        ("dense general", (2, 2, 6), lambda w, x: jnp.einsum("bhd,hdo->bo", x.reshape(5, 2, 2), w), -2),
        ("heads out", (4, 2, 3), lambda w, x: jnp.einsum("bk,khd->bhd", x, w), -3),
        ("reshaped", (4, 6), lambda w, x: jnp.einsum("bhd,hdo->bo", x.reshape(5, 2, 2), w.reshape(2, 2, 6)), -2),
        ("odd letters", (6, 4), lambda w, x: jnp.einsum("zq,pq->pz", x, w), -1),
        ("a cast", (4, 6), lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), -2),
    ],
)
def test_contraction_axes_of(name, shape, call, axis):
    tree = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    assert contraction_axes(lambda t, x: call(t["w"], x), tree, jax.ShapeDtypeStruct((5, 4), jnp.float32)) == {
        "w": axis
    }


def test_a_tied_embedding_is_grouped_along_its_rows():
    tree = {"e": normal(11, 4)}
    f = lambda t, ids: jnp.take(t["e"], ids, axis=0) @ t["e"].T  # noqa: E731
    assert contraction_axes(f, tree, jnp.asarray([1, 2])) == {"e": -1}
    assert contraction_axes(lambda t, ids: t["e"][ids], tree, jnp.asarray([1, 2])) == {"e": -1}


def test_what_a_function_does_with_a_leaf_goes_before_its_name():
    """Bare leaves of any name are quantized where they are multiplied by, and tables are left as embeddings."""
    tree = {"table": normal(64, 32), "up": normal(32, 64, seed=1), "down": normal(32, 64, seed=2)}
    f = lambda t, ids: jnp.take(t["table"], ids, axis=0) @ t["up"] @ t["down"].T  # noqa: E731
    axes = contraction_axes(f, tree, jnp.asarray([1, 2]))
    assert axes == {"table": -1, "up": -2, "down": -1} and axes.looked_up == {"table"}
    packed = jq4.quantize(tree, "rtn-w4g32", axes=axes)
    assert [type(packed[name]) for name in tree] == [type(tree["table"]), jq4.QArray, jq4.QArray]
    assert (packed["up"].axis, packed["down"].axis) == (-2, -1)
    assert jq4.explain(f, packed, jnp.asarray([1, 2])).entries == []
    stats = observe(f, tree, [jnp.asarray([1, 2])])
    assert stats.axes == axes and stats.axes.looked_up == {"table"}
    assert isinstance(jq4.quantize(tree, jq4.Recipe.preset("rtn-w4g32", embeddings=True), stats)["table"], jq4.QArray)


def test_nnx_and_equinox():
    x = normal(3, 4)
    layer = eqx.nn.Linear(4, 6, key=jax.random.key(0))
    assert contraction_axes(lambda m, x: jax.vmap(m)(x), layer, x) == {"weight": -1}
    graph, state = nnx.split(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    stats = observe(lambda s, x: nnx.merge(graph, s)(x), state, [x], collect=ALL)
    assert stats.axes == {"kernel": -2}
    check(stats["kernel"], x)


def test_wide_inputs_under_shard_map_are_summed_over_devices():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("d",))
    x, w = np.random.default_rng(0).normal(size=(16, 600)).astype(np.float32), jnp.ones((600, 4))

    def sharded(tree, x):
        return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))(tree["w"], x)

    found = jq4.observe(sharded, {"w": w}, [jnp.asarray(x)], collect=("hessian",))["w"]
    np.testing.assert_allclose(found.outer_total, x.T.astype(np.float64) @ x, rtol=1e-4, atol=1e-4)


def test_rows_are_kept_only_where_they_are_less_than_their_product():
    """Layers picked out of a stack, and a weight used often, are summed as they come."""

    def unrolled(tree, x):
        for layer in range(8):
            x = jnp.tanh(x @ tree["stack"][layer]) @ tree["tied"]
        return x

    tree = {"stack": jnp.full((8, 128, 128), 0.01), "tied": jnp.full((128, 128), 0.01)}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 128)), jnp.float32)
    step = jax.jit(lambda tree, x: jq4.observe(unrolled, tree, [x], collect=("hessian",)))
    sums = 4 * (8 + 1) * 128 * 128
    assert step.lower(tree, x).compile().memory_analysis().temp_size_in_bytes < 4 * sums
    found = jq4.observe(unrolled, tree, [x, x], collect=("hessian",))
    rows = np.asarray(x, np.float64)
    np.testing.assert_allclose(found["stack"].outer_total[0], 2 * rows.T @ rows, rtol=1e-4, atol=1e-3)
    assert int(found["tied"].count) == 2 * 8 * 64
