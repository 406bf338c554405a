"""Oracle: the function itself on dense weights W + scaling A B, and JAX's gradients through them."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from zoo import RULE, WIDTH, arrays_of, jit, model, packed, rows

import jq4
from jq4.paths import leaf_path
from jq4.qarray import is_qarray
from jq4.train.adapters.merge_lora import Merging

RANDOM = np.random.default_rng(3)
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
MODELS = ["linen_scan_remat", "nnx_scan_remat", "nnx_attention", "experts"]


def drawn(adapters):
    """Random numbers in the place of A and B."""
    return jax.tree.map(lambda part: jnp.asarray(RANDOM.normal(0, 0.3, part.shape), jnp.float32), adapters)


def merged(tree, adapters):
    """The oracle's tree: dense, with A B added."""

    def add(keys, leaf):
        adapter = adapters.by_path.get(leaf_path(keys))
        leaf = leaf.dequantize() if is_qarray(leaf) else leaf
        return leaf if adapter is None else leaf + adapter.delta()

    return jax.tree_util.tree_map_with_path(add, tree, is_leaf=is_qarray)


def value_and_gradients(function, adapters, tree, *args):
    arrays, rebuild = arrays_of(tree)
    loss = lambda adapters, arrays: jnp.sum(jnp.sin(function(rebuild(arrays), adapters, *args)))  # noqa: E731
    return jit(jax.value_and_grad(loss))(adapters, arrays)


def assert_same(function, adapters, tree, *args, strict=True):
    """with_lora(function) on the pair is function on the sum, values and gradients; returns with_lora's record."""
    forward = jq4.with_lora(function, strict=strict)
    found = value_and_gradients(lambda tree, a, *x: forward((tree, a), *x), adapters, tree, *args)
    wanted = value_and_gradients(lambda tree, a, *x: function(merged(tree, a), *x), adapters, tree, *args)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4 * max(1.0, float(jnp.abs(other).max())))
    assert all(np.asarray(gradient).any() for gradient in jax.tree.leaves(found[1]))
    return forward.record


@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_framework_learn_beside_packed_weights(name):
    m = model(name)
    axes = jq4.contraction_axes(m.function, m.tree, m.x)
    adapters = drawn(jq4.lora(m.qtree, 2, ignore=["router"], alpha=3.0, axes=axes))
    assert len(adapters.by_path) == m.packed - (name == "experts")  # a choice has no gradient
    assert not assert_same(m.function, adapters, m.qtree, m.x).entries


def test_dense_weights_learn_by_the_same_call_and_names_tell_the_axes():
    m = model("linen_scan_remat")
    adapters = jq4.lora(m.tree, 2, ignore=["output"])
    assert {path.split("/")[-2] for path in adapters.by_path} == {"up_proj", "down_proj"}
    assert adapters.by_path["params/layers/up_proj/kernel"].a.shape == (2, WIDTH, 2)
    assert not assert_same(m.function, drawn(adapters), m.tree, m.x).entries


def test_contracted_axes_are_told_by_the_function():
    m = model("nnx_attention")
    adapters = jq4.lora(m.qtree, 3, axes=jq4.contraction_axes(m.function, m.tree, m.x))
    query, out = adapters.by_path["query/kernel"], adapters.by_path["out/kernel"]
    assert (query.a.shape, query.b.shape) == ((WIDTH, 3), (3, 2, 8))  # [K, r], [r, H, D]
    assert (out.a.shape, out.b.shape) == ((2, 8, 3), (3, WIDTH))  # [H, D, r], [r, O]
    experts = model("experts")
    axes = jq4.contraction_axes(experts.function, experts.tree, experts.x)
    assert axes.products["up/kernel"] == ((-2,), (-3,))
    scanned = model("nnx_scan_remat")
    products = jq4.contraction_axes(scanned.function, scanned.tree, scanned.x).products
    assert products["layers/up_proj/kernel"] == ((-2,), (-3,))


def test_a_weight_is_followed_through_what_moves_its_axes():
    tree = {"qkv": {"kernel": packed((16, 24))}, "heads": {"kernel": packed((3, 16, 4, 8), axis=-3, seed=1)}}
    tree["back"] = {"kernel": jnp.asarray(RANDOM.normal(0, 0.3, (16, 8)), jnp.float32)}

    def function(tree, x):  # [4, 16]
        q, k, v = jnp.split(tree["qkv"]["kernel"] * 2.0, [8, 16], axis=1)
        mixed = jnp.concatenate([x @ q, x @ -k, jnp.einsum("kn,mk->mn", v, x)], axis=1)[:, :16]
        each = jnp.einsum("mk,lknd->lmnd", mixed, tree["heads"]["kernel"])
        second = jnp.tanh(mixed @ tree["heads"]["kernel"][1].reshape(16, 32))
        return jnp.sum(each, 0).reshape(4, -1)[:, :8] @ tree["back"]["kernel"].T + second[:, :16]

    adapters = drawn(jq4.lora(tree, 2, axes=jq4.contraction_axes(function, jq4.dequantize(tree), rows())))
    assert not assert_same(function, adapters, tree, rows()).entries


def test_a_shard_map_cuts_adapters_as_it_cuts_weights():
    tree, x = {"a": {"kernel": packed((16, 32))}, "b": {"kernel": packed((32, 16), seed=1)}}, rows()
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    specs = {"a": {"kernel": PartitionSpec(None, "model")}, "b": {"kernel": PartitionSpec("model")}}

    def of_shard(tree, x):
        return jax.lax.psum(jnp.tanh(x @ tree["a"]["kernel"]) @ tree["b"]["kernel"], "model")

    function = jax.shard_map(of_shard, mesh=mesh, in_specs=(specs, PartitionSpec()), out_specs=PartitionSpec())
    assert not assert_same(function, drawn(jq4.lora(tree, 2)), tree, x).entries


def test_what_no_rule_follows_takes_the_sum_and_says_so():
    """A derivative of the user's own, and an operation that is no product."""
    tree, x = {"a": {"kernel": packed((16, 16))}, "b": {"kernel": jnp.ones((16, 16))}}, rows()

    @jax.custom_vjp
    def own(x, w):
        return x @ w

    own.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, dy: (dy @ kept[1].T, kept[0].T @ dy))
    function = lambda tree, x: own(x, tree["a"]["kernel"]) @ jnp.sin(tree["b"]["kernel"])  # noqa: E731
    adapters = drawn(jq4.lora(tree, 2))
    with pytest.warns(jq4.DensifiedWarning):
        record = assert_same(function, adapters, tree, x, strict=False)
    assert record and {(entry.kind, entry.path) for entry in record.entries} == {
        ("dense", "a/kernel"),
        ("merged", "b/kernel"),
    }
    with pytest.raises(jq4.DensifiedError, match=r"a/kernel: .* would dequantize"):
        jq4.with_lora(function, strict=True)((tree, adapters), x)
    with pytest.raises(jq4.DensifiedError, match="b/kernel: sin takes the weight and its adapter as one dense matrix"):
        jq4.with_lora(lambda tree, x: x @ jnp.sin(tree["b"]["kernel"]), strict=True)((tree, adapters), x)


def test_an_adapter_that_meets_nothing_is_told():
    tree, x = {"a": {"kernel": packed((16, 16))}, "b": {"kernel": packed((16, 16))}}, rows()
    function, adapters = (lambda tree, x: x @ tree["a"]["kernel"]), jq4.lora(tree, 2)
    forward = jq4.with_lora(function)
    with pytest.warns(jq4.IdleAdapterWarning, match="b/kernel: has an adapter, and the function multiplies nothing"):
        forward((tree, adapters), x)
    assert [(entry.kind, entry.path) for entry in forward.record.entries] == [("unused", "b/kernel")]
    with pytest.raises(jq4.JQ4Error, match="b/kernel: has an adapter"):
        jq4.with_lora(function, strict=True)((tree, adapters), x)


# Memory -------------------------------------------------------------------------------------------------------------

LAYERS, K, N = 3, 1024, 768


def deep(tree, x):
    def layer(x, weights):
        return jnp.tanh(x @ weights["up"]["kernel"]) @ weights["down"]["kernel"], None

    return jax.lax.scan(jax.checkpoint(layer), x, tree)[0]


def avals(jaxpr):
    """Every value of a jaxpr and of those it calls."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield from (variable.aval for variable in eqn.outvars)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda one: hasattr(one, "eqns") or hasattr(one, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from avals(inner)


def largest_float(function, *args):
    sizes = [one.size for one in avals(jax.make_jaxpr(function)(*args)) if jnp.issubdtype(one.dtype, jnp.floating)]
    return max(sizes)


def test_no_dense_weight_is_made_in_either_direction():
    """Every value of the traced step, in all its loops and branches.

    The control: gradients by the packed weights' sum with A B, which are as large as a weight.
    """
    shapes = {"up": (LAYERS, K, N), "down": (LAYERS, N, K)}
    dense = {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in shapes.items()}
    tree = jax.eval_shape(lambda tree: jq4.quantize(tree, "nf4-dq"), dense)
    adapters, x = jax.eval_shape(lambda: jq4.lora(dense, 4)), jax.ShapeDtypeStruct((2, K), jnp.float32)
    forward = jq4.with_lora(deep, strict=True)
    step = jax.grad(lambda adapters, tree, x: jnp.sum(forward((tree, adapters), x)))
    assert largest_float(step, adapters, tree, x) < K * N / 2  # a tile of one
    summed = jax.grad(lambda adapters, tree, x: jnp.sum(deep(merged(tree, adapters), x)))
    assert largest_float(summed, adapters, tree, x) >= K * N


def test_packed_scales_stay_packed_until_their_layers_turn():
    shapes = {"up": (LAYERS, K, N), "down": (LAYERS, N, K)}
    dense = {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in shapes.items()}
    tree = jax.eval_shape(lambda tree: jq4.quantize(tree, "nf4-dq"), dense)
    whole = (LAYERS, K // 64, N)
    found = [
        one.shape for one in avals(jax.make_jaxpr(jq4.quantized(deep))(tree, jnp.ones((2, K)))) if one.shape == whole
    ]
    assert found == []


# Where adapters begin, and what they become -------------------------------------------------------------------------


def test_training_moves_adapters_alone_and_learns():
    tree = {"a": {"kernel": packed((16, 32))}, "b": {"kernel": packed((32, 4), seed=1)}}
    function = lambda tree, x: jnp.tanh(x @ tree["a"]["kernel"]) @ tree["b"]["kernel"]  # noqa: E731
    x = jnp.asarray(RANDOM.normal(size=(64, 16)), jnp.float32)
    start = jq4.lora(tree, 4, key=jax.random.key(2))
    wanted = function(merged(tree, drawn(start)), x)
    forward, optimizer = jq4.with_lora(function, strict=True), optax.adam(1e-2)
    np.testing.assert_allclose(forward((tree, start), x), jq4.quantized(function)(tree, x), rtol=1e-6)

    @jax.jit
    def step(carry, _):
        adapters, state = carry
        loss, gradients = jax.value_and_grad(lambda a: jnp.mean((forward((tree, a), x) - wanted) ** 2))(adapters)
        updates, state = optimizer.update(gradients, state, adapters)
        return (optax.apply_updates(adapters, updates), state), loss

    with jax.numpy_dtype_promotion("standard"):  # optax's own
        _, losses = jax.lax.scan(step, (start, optimizer.init(start)), length=300)
    assert losses[-1] < losses[0] / 20
    assert start.size == 4 * (16 + 32) + 4 * (32 + 4)


def test_the_residual_is_numpys_truncated_svd():
    weight = jnp.asarray(RANDOM.normal(size=(2, 24, 40)), jnp.float32)
    tree = jq4.quantize({"kernel": weight}, RULE)
    adapter = jq4.lora(tree, 3, init="residual", reference={"params": {"kernel": weight}}, alpha=7.0, rslora=True)
    left = np.asarray(weight - tree["kernel"].dequantize(), np.float64)
    u, s, vt = np.linalg.svd(left)
    best = np.einsum("bkr,br,brn->bkn", u[..., :3], s[..., :3], vt[:, :3])
    found = adapter.by_path["kernel"]
    assert found.scaling == pytest.approx(7 / 3**0.5)
    np.testing.assert_allclose(found.delta(), best, atol=2e-5)
    np.testing.assert_allclose(  # balanced: A and B carry the same
        np.linalg.norm(found.a, axis=1), np.linalg.norm(found.b, axis=2), rtol=1e-3
    )


def test_loftq_is_nearer_to_the_weight_than_one_turn_and_one_turn_is_the_residual():
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(32, 48)), jnp.float32), "bias": jnp.ones(48)}
    recipe = jq4.Recipe.preset("rtn-w2g32")
    left = lambda tree, a: float(jnp.linalg.norm(params["kernel"] - merged(tree, a)["kernel"]))  # noqa: E731
    once, five = jq4.loftq(params, recipe, 4, turns=1), jq4.loftq(params, recipe, 4)
    plain = jq4.quantize(params, recipe)
    np.testing.assert_array_equal(once[0]["kernel"].codes, plain["kernel"].codes)
    residual = jq4.lora(plain, 4, init="residual", reference=params)
    np.testing.assert_allclose(once[1].by_path["kernel"].delta(), residual.by_path["kernel"].delta(), atol=1e-6)
    assert left(*five) < left(*once) < left(plain, jq4.Adapters({}))


def test_merging_says_what_it_lost():
    tree, x = {"a": {"kernel": packed((16, 32))}, "b": {"kernel": packed((32, 16), seed=1)}}, rows()
    function = lambda tree, x: jnp.tanh(x @ tree["a"]["kernel"]) @ tree["b"]["kernel"]  # noqa: E731
    adapters = drawn(jq4.lora(tree, 2, ["a/kernel"]))
    dense, lossless = jq4.merge_lora(tree, adapters)
    expected = jq4.with_lora(function)((tree, adapters), x)
    np.testing.assert_allclose(jq4.quantized(function)(dense, x), expected, **CLOSE)
    assert [(leaf.path, leaf.format, leaf.change_db) for leaf in lossless] == [("a/kernel", "dense", np.inf)]
    assert dense["b"]["kernel"] is tree["b"]["kernel"]
    fine, (told,) = jq4.merge_lora(tree, adapters, "rtn-w8gc")
    exact, delta = merged(tree, adapters)["a"]["kernel"], adapters.by_path["a/kernel"].delta()
    lost = jnp.sum((fine["a"]["kernel"].dequantize() - exact) ** 2)
    assert told.format == fine["a"]["kernel"].format == "int8"
    assert told.error.sqnr_db == pytest.approx(float(10 * jnp.log10(jnp.sum(exact**2) / lost)), abs=1e-2)
    assert told.change_db == pytest.approx(float(10 * jnp.log10(jnp.sum(delta**2) / lost)), abs=1e-2)
    _, (coarse,) = jq4.merge_lora(tree, adapters, "rtn-w2g32")
    assert coarse.change_db < told.change_db - 20


def stack_with_adapters():
    """(three packed layers, their stack, its adapters)."""
    kernels = [packed((64, 32), seed=i) for i in range(3)]
    tree = {"kernel": jax.tree.map(lambda *parts: jnp.stack(parts), *kernels)}
    return kernels, tree, drawn(jq4.lora(tree, 2))


@pytest.mark.parametrize("to", ["dense", "rtn-w3g32", "hqq-w4g32-asym", "rtn-w4g32-a8"])
def test_a_stack_is_merged_as_its_layers_are(to, monkeypatch):
    """Oracles: each layer merged by itself, as a tree of its own; of what is told, the sums in NumPy."""
    kernels, tree, adapters = stack_with_adapters()
    seen = shapes_merged(monkeypatch)
    whole, (told,) = jq4.merge_lora(tree, adapters, to)
    assert seen == [(64, 32)] * 3
    exact = np.stack([kernel.dequantize() for kernel in kernels]) + np.asarray(adapters.by_path["kernel"].delta())
    near = np.asarray(jq4.dequantize(whole)["kernel"])
    lost = np.sum((exact - near) ** 2, (1, 2), dtype=np.float64)
    if to != "dense":
        wanted = 10 * np.log10(np.sum(exact**2, (1, 2)) / lost)
        np.testing.assert_allclose([each.sqnr_db for each in told.error.slices], wanted, atol=1e-3)
        assert told.error.sqnr_db == pytest.approx(10 * np.log10(np.sum(exact**2) / lost.sum()), abs=1e-3)
        delta = np.sum(np.square(adapters.by_path["kernel"].delta()))
        assert told.change_db == pytest.approx(10 * np.log10(delta / lost.sum()), abs=1e-3)
    for i, kernel in enumerate(kernels):
        of_layer = jq4.Adapters({"kernel": adapters.by_path["kernel"].layer(i)})
        alone, _ = jq4.merge_lora({"kernel": kernel}, of_layer, to)
        layer = jax.tree.map(lambda part, i=i: part[i], whole["kernel"])
        jax.tree.map(np.testing.assert_array_equal, layer, alone["kernel"])


def shapes_merged(monkeypatch):
    """The shapes that `Merging` makes in float32, as they come."""
    seen, whole = [], Merging._merged
    monkeypatch.setattr(Merging, "_merged", lambda *given: seen.append(given[2].shape) or whole(*given))
    return seen


def test_layers_that_depend_on_each_other_are_merged_together(monkeypatch):
    """Scales that are packed as well, in blocks that run on through all layers; statistics; leaves on two devices."""
    _, tree, adapters = stack_with_adapters()
    dense, _ = jq4.merge_lora(tree, adapters)
    seen = shapes_merged(monkeypatch)
    double, _ = jq4.merge_lora(tree, adapters, "nf4-dq")
    wanted = jq4.quantize(dense, "nf4-dq")
    jax.tree.map(np.testing.assert_array_equal, double, wanted)
    scanned = lambda tree, x: jax.lax.scan(lambda x, w: (x, x @ w), x, tree["kernel"])[1]  # noqa: E731
    x = jnp.asarray(np.random.default_rng(0).normal(size=(200, 64)), jnp.float32)
    stats = jq4.observe(scanned, jax.tree.map(jnp.asarray, dense), [x], collect=("mean_square", "hessian"))
    _, (told,) = jq4.merge_lora(tree, adapters, "gptq-w4g32", stats=stats)
    assert len(told.error.slices) == 3 and 0 < told.error.output_error < 0.1
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("parts",))
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(None, None, "parts"))
    cut = {"kernel": jax.device_put(dense["kernel"], sharding)}
    apart, _ = jq4.merge_lora(cut, adapters)
    assert seen == [(3, 64, 32)] * 3 and len(apart["kernel"].devices()) == 2
    second = jax.devices()[1]
    moved, _ = jq4.merge_lora(jax.device_put(tree, second), jax.device_put(adapters, second))
    assert moved["kernel"].devices() == {second}


def test_what_cannot_be_merged_is_named():
    _, tree, adapters = stack_with_adapters()
    kernel = jq4.dequantize(tree)["kernel"].at[1, 2, 3].set(jnp.nan)
    with pytest.raises(jq4.JQ4Error, match=r"kernel: .* not finite.*\(2, 3\).* \(in layer 1 of the stack\)"):
        jq4.merge_lora({"kernel": kernel}, adapters, "rtn-w4g32")
    nothing = {"kernel": jnp.zeros((0, 64, 32))}
    with pytest.raises(jq4.JQ4Error, match=r"kernel: the leaf is empty, shape \(0, 64, 32\)"):
        jq4.merge_lora(nothing, jax.tree.map(lambda part: part[:0], adapters))
    infinite = jax.tree.map(lambda part: 1e30 * part, adapters)
    _, (told,) = jq4.merge_lora({"kernel": kernel.astype(jnp.float16).at[1, 2, 3].set(65000)}, infinite)
    assert np.isnan(told.error.sqnr_db)


def test_adapters_come_back_from_disk(tmp_path):
    m = model("nnx_attention")
    adapters = drawn(jq4.lora(m.qtree, 3, axes=jq4.contraction_axes(m.function, m.tree, m.x), alpha=5.0, rslora=True))
    jq4.save_lora(tmp_path / "adapters", adapters)
    restored = jq4.restore_lora(tmp_path / "adapters")
    assert jax.tree.structure(restored) == jax.tree.structure(adapters)  # static: axes, alpha, rslora
    jax.tree.map(np.testing.assert_array_equal, restored, adapters)
    jq4.save(tmp_path / "other", {"w": jnp.ones(3)}, recipe="rtn")
    with pytest.raises(
        jq4.CheckpointError, match=r"other: holds no adapters: wanted a folder that jq4.save_lora wrote"
    ):
        jq4.restore_lora(tmp_path / "other")


def test_dropout_drops_inputs_of_a_alone_and_each_layers_own():
    """A and B are identities and W is zero: what comes out of the last layer tells what was dropped in both."""
    tree = {"kernel": jnp.zeros((2, 64, 64))}
    ones = jnp.broadcast_to(jnp.eye(64), (2, 64, 64))
    adapters = jax.tree.map(lambda _: ones, jq4.lora(tree, 64))
    forward = jq4.with_lora(lambda tree, x: jax.lax.scan(lambda x, w: (x, x @ w), x, tree["kernel"])[1])
    x = jnp.ones((50, 64))
    out = forward((tree, adapters.with_dropout(0.25, jax.random.key(0))), x)  # [2, 50, 64]
    again = forward((tree, adapters.with_dropout(0.25, jax.random.key(0))), x)
    np.testing.assert_array_equal(out, again)
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    assert float(out.mean()) == pytest.approx(1, abs=0.05)
    assert 0.3 < float(jnp.mean(out[0] != out[1])) < 0.45  # 2 * 0.25 * 0.75
    np.testing.assert_array_equal(forward((tree, adapters), x), jnp.ones((2, 50, 64)))
    with pytest.raises(jq4.JQ4Error, match=r"dropout is 1.5, wanted a share"):
        adapters.with_dropout(1.5, jax.random.key(0))


def test_what_is_dropped_of_a_row_depends_on_its_own_key():
    """Of all rows at once, of a few, in another order, and under a scan over layers: the same."""
    tree = {"kernel": packed((2, 32, 32))}
    adapters = drawn(jq4.lora(tree, 4))
    function = lambda tree, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, tree["kernel"])[0]  # noqa: E731
    forward = jax.jit(jq4.with_lora(function, strict=True))
    x, keys = jnp.asarray(RANDOM.normal(size=(6, 5, 32)), jnp.float32), jax.random.split(jax.random.key(1), 6)

    def dropped(some):
        return forward((tree, adapters.with_dropout(0.5, keys[some])), x[some])

    whole = dropped(np.arange(6))
    for some in (np.array([2]), np.array([4, 1, 5]), np.arange(6)[::-1]):
        np.testing.assert_allclose(dropped(some), whole[some], **CLOSE)
    assert np.abs(whole - forward((tree, adapters), x)).max() > 0.1
    same = jnp.broadcast_to(x[:1], x.shape)
    out = forward((tree, adapters.with_dropout(0.5, keys)), same)
    assert all(np.abs(out[0] - other).max() > 0.01 for other in out[1:])
    assert np.abs(out[0, 0] - forward((tree, adapters), same)[0, 0]).max() > 0.01
    with pytest.raises(jq4.JQ4Error, match=r"dropout by the row, with 6 keys for inputs whose free axes are \[4, 5\]"):
        forward((tree, adapters.with_dropout(0.5, keys)), x[:4])


def test_experts_inputs_are_dropped_by_the_first_key():
    """Rows come sorted by expert: they are dropped as with that key alone, and not left whole."""
    m = model("experts")
    axes = jq4.contraction_axes(m.function, m.tree, m.x)
    adapters = drawn(jq4.lora(m.qtree, 2, ignore=["router"], axes=axes))
    forward = jax.jit(jq4.with_lora(m.function, strict=True))
    keys = jax.random.split(jax.random.key(1), 2)
    one, both = (forward((m.qtree, adapters.with_dropout(0.5, key)), m.x) for key in (keys[0], keys))
    np.testing.assert_allclose(both, one, **CLOSE)
    other = forward((m.qtree, adapters.with_dropout(0.5, keys[::-1])), m.x)
    assert np.abs(both - other).max() > 0.01 and np.abs(both - forward((m.qtree, adapters), m.x)).max() > 0.01


def test_dense_leaves_begin_at_zero_beside_a_residual():
    """A and B would both be zero, and have no gradient, if they were what packing lost of such a leaf."""
    params = {
        "a": {"kernel": jnp.asarray(RANDOM.normal(size=(16, 24)), jnp.bfloat16)},
        "b": {"kernel": jnp.ones((16, 8))},
    }
    recipe = jq4.Recipe.of(jq4.recipe.Rule(num_bits=2, group_size=8, targets=("a/kernel",)))
    tree = jq4.quantize(params, recipe)
    found = jq4.lora(tree, 2, init="residual", reference=params).by_path
    zero = jq4.lora(tree, 2).by_path["b/kernel"]
    np.testing.assert_array_equal(found["b/kernel"].a, zero.a)
    assert found["a/kernel"].delta().any() and not found["b/kernel"].b.any()
    fitted, adapters = jq4.loftq(params, recipe, 2)
    assert fitted["a"]["kernel"].dtype == tree["a"]["kernel"].dtype
    again = jq4.lora(fitted, 2, init="residual", reference=params)
    jax.tree.map(np.testing.assert_array_equal, adapters, again)  # LoftQ's adapters are what its codes left


def test_bfloat16_inputs_are_summed_in_float32():
    tree, x = {"kernel": packed((16, 32))}, rows().astype(jnp.bfloat16)
    adapters = drawn(jq4.lora(tree, 2))
    out = jq4.with_lora(lambda tree, x: x @ tree["kernel"].astype(x.dtype))((tree, adapters), x)
    assert out.dtype == jnp.bfloat16
    exact = x.astype(jnp.float32) @ merged(tree, adapters)["kernel"]
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02 * float(jnp.abs(exact).max()))


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
def test_layers_are_taken_from_a_stack_by_number_too(pack):
    dense = {"up_proj": {"kernel": jnp.asarray(RANDOM.normal(0, 0.3, (3, WIDTH, WIDTH)), jnp.float32)}}
    tree = jq4.quantize(dense, RULE) if pack else dense
    adapters, x = drawn(jq4.lora(tree, 2, alpha=3.0)), rows(5)

    def function(tree, x):
        kernel, number = tree["up_proj"]["kernel"], jnp.int32(x[0, 0, 0] > 0)
        chosen = jax.lax.dynamic_index_in_dim(kernel, number, 0, keepdims=False)
        return jnp.tanh(x @ kernel[2]) @ kernel[-2] + x @ chosen

    assert_same(function, adapters, tree, x)


def test_a_weight_that_is_rounded_to_integers_has_its_adapter_in_it():
    tree = {"kernel": jnp.asarray(RANDOM.normal(0, 3, (WIDTH, 8)), jnp.float32)}
    adapters, x = drawn(jq4.lora(tree, 2)), rows(5)
    function = lambda tree, x: x @ tree["kernel"].astype(jnp.int32).astype(jnp.float32)  # noqa: E731
    forward = jq4.with_lora(function)
    with pytest.warns(jq4.DensifiedWarning, match="convert_element_type takes the weight and its adapter .* int32"):
        found = forward((tree, adapters), x)
    np.testing.assert_allclose(found, function(merged(tree, adapters), x), **CLOSE)


def test_impossible_adapters_are_refused():
    tree = {"kernel": jnp.ones((16, 8)), "norm": {"scale": jnp.ones(8)}}
    refused = [
        (lambda: jq4.lora(tree, 9), "kernel: rank 9 of matrices 16 x 8, wanted at most 8"),
        (lambda: jq4.lora(tree, 0), "rank is 0, wanted a whole number of 1 or more"),
        (lambda: jq4.loftq(tree, "rtn-w4g32", 0), "rank is 0, wanted a whole number of 1 or more"),
        (lambda: jq4.lora(tree, 2, alpha=0), "alpha is 0, wanted a number above 0"),
        (lambda: jq4.lora(tree, 2, alpha=-1.0, init="residual", reference=tree), "alpha is -1.0, wanted a number"),
        (lambda: jq4.lora(tree, 2, "scale"), "no leaf is a matrix that targets .'scale'. mean.*kernel, norm/scale"),
        (lambda: jq4.lora(tree, 2, init="loftq"), "init is 'loftq'.*jq4.loftq"),
        (lambda: jq4.lora(tree, 2, init="residual"), "init 'residual' wants the dense tree as reference"),
        (lambda: jq4.lora({"u": jnp.ones((4, 4))}, 2, "u"), "u: which axis of .4, 4. is contracted is not told"),
        (lambda: jq4.loftq(jq4.quantize(tree, RULE), "rtn-w4g32", 2), "kernel: is packed already: LoftQ starts from"),
    ]
    for call, message in refused:
        with pytest.raises(jq4.JQ4Error, match=message):
            call()
    other = jq4.lora({"kernel": jnp.ones((16, 4))}, 2)
    for call in (lambda: jq4.with_lora(lambda t: t["kernel"])((tree, other)), lambda: jq4.merge_lora(tree, other)):
        with pytest.raises(jq4.JQ4Error, match=r"kernel: its adapter is for .*16, 4.*found .16, 8."):
            call()
    with pytest.raises(jq4.JQ4Error, match="gone/w: the adapters have it, and the params have no such leaf"):
        jq4.with_lora(lambda t: t)((tree, jq4.lora({"gone": {"w": jnp.ones((4, 4))}}, 2)))


def test_keys_and_paths_alone_tell_where_a_begins():
    small, large = (
        {"a": {"kernel": jnp.ones((8, 8))}},
        {"a": {"kernel": jnp.ones((8, 8))}, "b": {"kernel": jnp.ones((8, 4))}},
    )
    one, both = jq4.lora(small, 2), jq4.lora(large, 2)
    np.testing.assert_array_equal(one.by_path["a/kernel"].a, both.by_path["a/kernel"].a)
    assert np.abs(one.by_path["a/kernel"].a).max() <= 8**-0.5 and not one.by_path["a/kernel"].b.any()
    assert (jq4.lora(small, 2, key=jax.random.key(1)).by_path["a/kernel"].a != one.by_path["a/kernel"].a).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = jax.eval_shape(lambda tree: jq4.lora(tree, 2), large)
    assert traced.by_path["b/kernel"].shape == (8, 4)
