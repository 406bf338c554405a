"""jq4.quantize on trees. Oracle: jq4.quantize_weight leaf by leaf (itself tested against others' in test_rounding)."""

import warnings

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jq4
from jq4 import quantize_leaf
from jq4.paths import flatten_with_paths
from jq4.qarray import is_qarray, leaf_nbytes
from jq4.sqnr import sqnr

pytestmark = pytest.mark.arithmetic


def _array(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


def _params():
    """A decoder's tree as Linen makes it: scanned layers, an embedding, norms and a head."""
    return {
        "params": {
            "embed": {"embedding": _array(40, 16)},
            "layers": {
                "attention": {"q_proj": {"kernel": _array(3, 16, 8), "bias": _array(3, 8)}},
                "mlp": {"down_proj": {"kernel": _array(3, 33, 16)}},
                "norm": {"scale": _array(3, 16)},
            },
            "final_norm": {"scale": _array(16)},
            "lm_head": {"kernel": _array(16, 40)},
        }
    }


def _packed_paths(tree):
    return [path for path, leaf in flatten_with_paths(tree) if is_qarray(leaf)]


KERNELS = ["params/layers/attention/q_proj/kernel", "params/layers/mlp/down_proj/kernel"]


@pytest.mark.parametrize("preset", ["rtn-w4g32", "rtn-w8gc", "rtn-w3g16-asym", "nf4"])
def test_leaves_are_what_quantize_weight_makes_of_them(preset):
    params = _params()
    q = jq4.quantize(params, preset)
    rule = jq4.Recipe.preset(preset).rules[0]
    assert _packed_paths(q) == KERNELS
    for path, leaf in flatten_with_paths(q):
        dense = dict(flatten_with_paths(params))[path]
        if not is_qarray(leaf):
            assert leaf is dense
            continue
        alone = jq4.quantize_weight(dense, rule.format, group_size=rule.group_size, symmetric=rule.symmetric)
        chex.assert_trees_all_equal(leaf, alone)
    chex.assert_trees_all_equal(jq4.dequantize(q)["params"]["embed"], params["params"]["embed"])
    assert jax.tree.structure(jq4.dequantize(q)) == jax.tree.structure(params)


def test_dequantize_to_a_dtype_leaves_dense_leaves_alone():
    dense = jq4.dequantize(jq4.quantize(_params(), "rtn-w4g32"), jnp.bfloat16)
    assert dense["params"]["layers"]["mlp"]["down_proj"]["kernel"].dtype == jnp.bfloat16
    assert dense["params"]["lm_head"]["kernel"].dtype == jnp.float32


def test_quantize_is_pure_and_deterministic():
    params = _params()
    before = jax.tree.map(np.array, params)
    first, second = jq4.quantize(params, "hqq-w4g32-asym"), jq4.quantize(params, "hqq-w4g32-asym")
    chex.assert_trees_all_equal(params, before)
    chex.assert_trees_all_equal(first, second)


@pytest.mark.parametrize("preset", ["rtn-w4g32", "hqq-w4g32-asym"])
def test_it_traces(preset):
    params = _params()
    eager = jq4.quantize(params, preset)
    shapes = jax.eval_shape(lambda p: jq4.quantize(p, preset), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, eager)
    jitted = jax.jit(lambda p: jq4.quantize(p, preset))(params)
    assert jax.tree.structure(jitted) == jax.tree.structure(eager)
    for path, leaf in flatten_with_paths(jitted):
        if is_qarray(leaf):
            other = dict(flatten_with_paths(eager))[path]
            np.testing.assert_allclose(leaf.dequantize(), other.dequantize(), atol=1e-5)
    back = jax.eval_shape(jq4.dequantize, eager)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, params)


def test_nnx_state_merges_again():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(24, 8, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs)])

        def __call__(self, x):
            return self.layers[0](nnx.relu(self.first(x)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    q = jq4.quantize(state, "rtn-w8g8")
    assert isinstance(q, nnx.State) and _packed_paths(q) == ["first/kernel", "layers/0/kernel"]
    assert is_qarray(nnx.merge(graph, q).first.kernel.get_value())
    x = _array(2, 24)
    out = jq4.quantized(lambda s, x: nnx.merge(graph, s)(x), strict=True)(q, x)
    np.testing.assert_allclose(out, nnx.merge(graph, jq4.dequantize(q))(x), atol=1e-5)
    np.testing.assert_allclose(out, nnx.merge(graph, state)(x), atol=0.2)


def test_equinox_module_keeps_its_type_and_groups_along_the_last_axis():
    model = eqx.nn.MLP(12, 3, 20, 1, key=jax.random.key(0))
    q = jq4.quantize(model, "rtn-w8g4")
    assert isinstance(q, eqx.nn.MLP) and _packed_paths(q) == ["layers/0/weight", "layers/1/weight"]
    assert q.layers[0].weight.axis == -1 and q.activation is model.activation
    x = _array(12)
    out = jq4.quantized(lambda m, x: m(x), strict=True)(q, x)
    np.testing.assert_allclose(out, model(x), atol=0.1)


def test_bare_containers_and_numpy_leaves():
    tree = [{"w": np.ones((4, 2), np.float32)}, (np.arange(3), None, 2.0, "text")]
    q = jq4.quantize(tree, "rtn-w4gc")
    assert is_qarray(q[0]["w"]) and q[1][0] is tree[1][0] and q[1][2:] == (2.0, "text")


@pytest.mark.parametrize(
    ("module", "x", "path", "axis", "shape"),
    [
        (nn.DenseGeneral((4, 6), axis=-1), (2, 10), "params/kernel", -3, (10, 4, 6)),
        (nn.Conv(6, (3, 3)), (1, 8, 8, 10), "params/kernel", -2, (3, 3, 10, 6)),
        (nn.Dense(6), (2, 10), "params/kernel", -2, (10, 6)),
    ],
)
def test_kernels_of_more_than_two_axes(module, x, path, axis, shape):
    params = module.init(jax.random.key(0), jnp.ones(x))
    q = dict(flatten_with_paths(jq4.quantize(params, "rtn-w8g4", axes={path: axis})))[path]
    assert (q.shape, q.axis, q.group_size) == (shape, axis, 4)
    assert q.scale.shape == tuple(-(-n // 4) if i == len(shape) + axis else n for i, n in enumerate(shape))
    dense = dict(flatten_with_paths(params))[path]
    np.testing.assert_allclose(q.dequantize(), dense, atol=float(jnp.abs(dense).max()) / 127)


def test_the_axis_is_of_axes_then_stats_then_the_rule_then_the_name():
    class Stats(dict):
        axes = {"kernel": -1}  # noqa: RUF012

    tree = {"kernel": _array(8, 12)}
    rule = jq4.Rule("Linear", axis=-1)
    assert jq4.quantize(tree, rule, Stats(), {"kernel": -2})["kernel"].axis == -2
    assert jq4.quantize(tree, jq4.Rule("Linear"), Stats())["kernel"].axis == -1
    assert jq4.quantize(tree, rule)["kernel"].axis == -1
    assert jq4.quantize(tree, jq4.Rule("Linear"))["kernel"].axis == -2


def test_contraction_axes_tell_what_names_do_not():
    tree = {"up": _array(8, 12), "down": {"weight": _array(5, 12)}}

    def function(tree, x):
        return jnp.einsum("...f,gf->...g", x @ tree["up"], tree["down"]["weight"])

    axes = jq4.contraction_axes(function, tree, _array(2, 8))
    q = jq4.quantize(tree, jq4.Rule("re:.", num_bits=8, group_size=4), axes=axes)
    assert (q["up"].axis, q["down"]["weight"].axis) == (-2, -1)
    out = jq4.quantized(function, strict=True)(q, _array(2, 8))
    np.testing.assert_allclose(out, function(tree, _array(2, 8)), atol=0.5)


def test_donate_frees_each_dense_leaf_and_no_other():
    params = _params()
    kernel = params["params"]["layers"]["mlp"]["down_proj"]["kernel"]
    shared = {"a": {"kernel": kernel}, "b": {"kernel": kernel}, "c": {"bias": _array(4)}}
    kept = shared["c"]["bias"]
    expected = jq4.quantize_weight(kernel, "int4", group_size=32)
    q = jq4.quantize(shared, "rtn-w4g32", donate=True)
    assert kernel.is_deleted() and not kept.is_deleted()
    chex.assert_trees_all_equal(q["a"]["kernel"], expected)
    chex.assert_trees_all_equal(q["b"]["kernel"], expected)


@pytest.mark.parametrize(
    ("shape", "axis", "preset"),
    [
        ((6, 5, 64, 32), -2, "rtn-w4g32"),
        ((96, 200), -2, "hqq-w4g32-asym"),
        ((7, 300, 64), -1, "nf4"),
        ((64, 97), -2, "rtn-w4gt"),
    ],
)
def test_large_leaves_are_worked_on_piece_by_piece(shape, axis, preset, monkeypatch):
    """Slices of a stacked leaf, strips of a matrix (the last one overlaps): the codes of the whole, in less memory."""
    weight, rule, work = _array(*shape), jq4.Recipe.preset(preset).rules[0], 4096
    whole = jq4.quantize({"kernel": weight}, preset, axes={"kernel": axis})["kernel"]
    monkeypatch.setattr(quantize_leaf, "_WORK_ELEMENTS", work)
    arguments = (weight, None, rule.method, rule.encoding(axis), ())
    pieces = jq4.quantize({"kernel": weight}, preset, axes={"kernel": axis})["kernel"]
    chex.assert_trees_all_equal(pieces, whole)
    if rule.method == "hqq":
        needed = [
            quantize_leaf._in_parts.lower(*arguments, size).compile().memory_analysis().temp_size_in_bytes
            for size in (None, work)
        ]
        assert needed[1] < 0.5 * needed[0]


@pytest.mark.parametrize("spec", [("x", None, None), (None, None, "x"), (None, "x", None)])
def test_leaves_that_devices_share_stay_shared(spec):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    weight = _array(8, 256, 16)
    q = jq4.quantize({"kernel": jax.device_put(weight, sharding)}, "rtn-w4g32")["kernel"]
    assert q.codes.sharding.is_equivalent_to(sharding, 3) and q.scale.sharding.is_equivalent_to(sharding, 3)
    chex.assert_trees_all_equal(jax.device_get(q), jax.device_get(jq4.quantize_weight(weight, group_size=32)))


def test_progress_is_told_of_every_leaf_in_order():
    told = []
    jq4.quantize(_params(), "rtn-w4g32", progress=told.append)
    assert [leaf.path for leaf in told] == [path for path, _ in flatten_with_paths(_params())]
    assert [leaf.path for leaf in told if leaf.is_packed] == KERNELS


def test_the_report_lists_every_leaf_with_bytes_and_error():
    params, report = _params(), jq4.QuantizeReport()
    q = jq4.quantize(params, "rtn-w4g32", report=report)
    assert [leaf.path for leaf in report.packed] == KERNELS
    statuses = {leaf.path: leaf.status for leaf in report.unmatched}
    assert statuses["params/lm_head/kernel"] == statuses["params/embed/embedding"] == "ignored"
    assert statuses["params/layers/attention/q_proj/bias"] == "no rule"
    assert report.nbytes == sum(leaf_nbytes(array) for array in jax.tree.leaves(q))
    assert report.dense_nbytes == sum(array.nbytes for array in jax.tree.leaves(params))
    for leaf in report.packed:
        dense = np.asarray(dict(flatten_with_paths(params))[leaf.path], np.float64)
        noise = np.asarray(dict(flatten_with_paths(q))[leaf.path].dequantize(), np.float64) - dense
        assert leaf.sqnr_db == pytest.approx(10 * np.log10((dense**2).sum() / (noise**2).sum()), abs=1e-3)
    assert float(sqnr(jnp.full((2, 2), 7.0), jq4.quantize_weight(jnp.full((2, 2), 7.0)))) == np.inf


def test_the_plan_from_shapes_equals_what_is_done():
    report = jq4.QuantizeReport(measure=False)
    jq4.quantize(_params(), "rtn-w4g32", report=report)
    plan = jq4.quantize_report(jax.eval_shape(_params), "rtn-w4g32")
    for planned, done in zip(plan.leaves, report.leaves, strict=True):
        assert (planned.path, planned.shape, planned.format, planned.group_size, planned.axis) == (
            done.path,
            done.shape,
            done.format,
            done.group_size,
            done.axis,
        )
        assert planned.is_planned == done.is_packed and done.sqnr_db is None


def test_idle_rules_warn_and_say_why():
    recipe = jq4.Recipe((jq4.Rule("nowhere"), jq4.Rule("re:norm"), jq4.Rule("Linear", group_size=32)))
    with pytest.warns(jq4.IdleRuleWarning) as caught:
        jq4.quantize(_params(), recipe)
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2
    assert told[0] == "rule 0 of the recipe, for targets ['nowhere'], quantized no leaf: it matched none"
    assert told[1].endswith(
        "1 of 2: fewer than two axes; 1 of 2: contraction axis unknown: pass axes, stats, or the rule's axis"
    )


def test_integer_leaves_and_dense_rules_pass_through():
    tree = {"a": {"kernel": jnp.ones((4, 4), jnp.int32)}, "b": {"kernel": _array(4, 4)}, "c": {"kernel": _array(4, 4)}}
    recipe = jq4.Recipe((jq4.Rule("b", num_bits=16), jq4.Rule("Linear")))
    report = jq4.QuantizeReport()
    q = jq4.quantize(tree, recipe, report=report)
    assert _packed_paths(q) == ["c/kernel"]
    assert [leaf.status for leaf in report.leaves] == ["not a float array (int32)", "dense by rule", "packed"]


def test_packed_leaves_pass_through_unless_the_recipe_wants_others():
    once = jq4.quantize(_params(), "rtn-w4g32")
    again = jq4.quantize(once, "rtn-w4g32")
    assert all(a is b for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True))
    with pytest.raises(jq4.JQ4Error, match=r"q_proj/kernel: packed already as int4 in groups of 16 along axis -2, and"):
        jq4.quantize(once, "rtn-w8g32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chex.assert_trees_all_equal(
            jq4.quantize(once, jq4.Rule("lm_head"))["params"]["layers"], once["params"]["layers"]
        )


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        (
            jnp.full((2, 3), jnp.nan),
            r"a/kernel: 6 of 6 weights are not finite, the first nan at \(0, 0\): wanted finite",
        ),
        (jnp.ones((3, 2, 4)).at[2, 1, 3].set(-jnp.inf), r"a/kernel: 1 of 24 weights .* the first -inf at \(2, 1, 3\)"),
        (
            jnp.ones((2, 4), jnp.bfloat16).at[1, 0].set(jnp.inf),
            r"a/kernel: 1 of 8 weights .* the first inf at \(1, 0\)",
        ),
        (jnp.ones((0, 4)), r"a/kernel: the leaf is empty, shape \(0, 4\): ignore it in the recipe"),
    ],
)
def test_bad_leaves_are_named(leaf, text):
    with pytest.raises(jq4.JQ4Error, match=text):
        jq4.quantize({"a": {"kernel": leaf}}, "rtn-w4g32")


def test_bad_requests_are_named():
    with pytest.raises(jq4.JQ4Error, match=r"kernel: contraction axis -3 of a 2-d weight, wanted one of -2..-1"):
        jq4.quantize({"kernel": _array(4, 4)}, "rtn-w4g32", axes={"kernel": -3})
    with pytest.raises(jq4.JQ4Error, match=r"kernel: hqq: lp_norm=0, .*wanted 0 < lp_norm <= 1"):
        jq4.quantize({"kernel": _array(4, 4)}, jq4.Rule("Linear", method="hqq", options={"lp_norm": 0}))
    with pytest.raises(jq4.JQ4Error, match="wants the method 'magic'"):
        jq4.quantize({"kernel": _array(4, 4)}, "magic-w4g32")


def test_weights_that_the_scale_dtype_cannot_hold_are_refused():
    rule = jq4.Rule(("Linear",), group_size=8, scale_dtype="float16")
    with pytest.raises(jq4.JQ4Error, match=r"kernel: a weight of magnitude 1e\+06 may need a scale that float16"):
        jq4.quantize({"kernel": jnp.full((8, 8), 1e6)}, rule)
