"""Oracle: the untransformed function, JAX's own jaxprs of it, and the text of the errors and of the record."""

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from zoo import LinenScanRemat, arrays_of, model, packed, rows

from jq4.apply import explain, quantized
from jq4.errors import DensifiedError, JQ4Error
from jq4.layouts import prepare
from jq4.qarray import QArray
from jq4.quantize import quantize
from jq4.record import DensifiedWarning
from jq4.rule import Rule

pytestmark = pytest.mark.arithmetic

close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)


def gram(tree, x):
    """Uses a weight as no matrix: elementwise, which has no packed rule."""
    w = tree["params"]["mlp"]["kernel"]
    return x @ w + jnp.sum(jnp.sin(w))


def tree_of(q):
    return {"params": {"mlp": {"kernel": q}}}


# The record -------------------------------------------------------------------------------------------------------


def test_strict_names_leaf_primitive_bytes_and_remedy():
    with pytest.raises(DensifiedError) as error:
        quantized(gram, strict=True)(tree_of(packed((16, 12))), rows(1)[0])
    message = str(error.value)
    for wanted in ("params/mlp/kernel", "sin", "(16, 12)", "768 bytes", "`ignore`", "contraction_axes"):
        assert wanted in message, message


def test_what_goes_dense_is_recorded_and_warned_of_once():
    f, q = quantized(gram), packed((16, 12))
    with pytest.warns(DensifiedWarning, match="params/mlp/kernel went dense at sin") as caught:
        out = jax.jit(f)(tree_of(q), rows(1)[0])
    assert len(caught) == 1
    close(out, gram(tree_of(q.dequantize()), rows(1)[0]))
    (entry,) = f.record.entries
    assert (entry.kind, entry.path, entry.primitive) == ("dense", "params/mlp/kernel", "sin")
    assert (entry.nbytes, entry.times) == (16 * 12 * 4, 1)
    assert f.record and json.loads(f.record.to_json())[0]["path"] == "params/mlp/kernel"
    assert "params/mlp/kernel" in f.record.report() and "sin has no packed rule" in f.record.report()


def test_the_path_survives_scan_jit_casts_and_transposes():
    def f(tree, x):
        @jax.checkpoint
        def body(x, w):
            return jax.jit(lambda x, w: jnp.tanh(w.astype(jnp.float32)).T @ x)(x, w.T.T), None

        return jax.lax.scan(body, x, tree["params"]["layers"]["kernel"])[0]

    record = explain(f, {"params": {"layers": {"kernel": packed((3, 16, 16))}}}, rows(1)[0].T)
    (entry,) = record.entries
    assert (entry.path, entry.primitive, entry.nbytes) == ("params/layers/kernel", "tanh", 16 * 16 * 4)


def test_a_product_across_the_groups_is_dense_with_its_reason():
    record = explain(lambda w, x: x @ w, packed((16, 16), axis=-1), rows(1)[0])
    assert record and "grouped along axis -1" in record.entries[0].reason


def test_a_weight_changed_in_a_loop_is_densified_before_it():
    def f(w, x):
        return jax.lax.fori_loop(0, 2, lambda _, c: (c[0] * 0.5, c[1] @ c[0]), (w, x))[1]

    q, x = packed((16, 16)), rows(1)[0]
    g = quantized(f)
    with pytest.warns(DensifiedWarning, match="carries it on changed"):
        close(g(q, x), f(q.dequantize(), x))


def test_explain_computes_nothing_and_takes_shapes():
    m = model("linen_scan_remat")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), m.qtree)
    record = explain(m.function, shapes, jax.ShapeDtypeStruct(m.x.shape, m.x.dtype))
    assert not record and record.report() == "every packed leaf stayed packed"


def test_the_record_is_that_of_the_last_trace():
    f, q = quantized(lambda w, x, dense: x @ jnp.sin(w) if dense else x @ w), packed((16, 16))
    with pytest.warns(DensifiedWarning):
        f(q, rows(1)[0], True)
    assert f.record
    f(q, rows(1)[0], False)
    assert not f.record


def test_two_arguments_with_packed_leaves_have_different_paths():
    f = quantized(lambda a, b, x: x @ a["w"] + jnp.sum(jnp.sin(b["w"])))
    with pytest.warns(DensifiedWarning, match="argument 1/w"):
        f({"w": packed((16, 16))}, {"w": packed((16, 16))}, rows(1)[0])


# What passes untouched ----------------------------------------------------------------------------------------------


def test_a_function_without_packed_leaves_is_called_as_it_is():
    def f(x, scale):
        return type(x), scale

    assert quantized(f)(np.ones(3), 2) == (np.ndarray, 2)


def test_numbers_strings_and_functions_stay_concrete():
    def f(w, x, times, name, function, *, flag=True):
        assert isinstance(times, int) and name == "tanh" and flag is False
        for _ in range(times):
            x = function(x @ w)
        return {"x": x, "name": name, "times": times, "nothing": None}

    q, x = packed((16, 16)), rows(1)[0]
    out = quantized(f, strict=True)(q, x, 2, "tanh", jnp.tanh, flag=False)
    assert (out["name"], out["times"], out["nothing"]) == ("tanh", 2, None)
    close(out["x"], f(q.dequantize(), x, 2, "tanh", jnp.tanh, flag=False)["x"])


def test_a_weight_that_is_returned_is_still_a_qarray():
    q = packed((16, 12))
    same, turned = jax.jit(quantized(lambda w: (w, w.T), strict=True))(q)
    assert isinstance(same, QArray) and isinstance(turned, QArray)
    np.testing.assert_array_equal(same.codes, q.codes)
    close(turned.dequantize(), q.dequantize().T)


def test_what_meets_no_packed_leaf_lowers_as_it_always_did():
    m = model("linen_stack")

    def f(tree, x):
        del tree["q"]
        return m.function(tree, x)

    text = jax.jit(f).lower({**m.dense, "q": jnp.ones((2, 2))}, m.x).as_text()
    transformed = jax.jit(quantized(f, strict=True)).lower({**m.dense, "q": packed((16, 12))}, m.x).as_text()
    assert [line.split("loc(")[0] for line in text.splitlines()[1:]] == transformed.splitlines()[1:]


def test_prints_and_callbacks_happen(capfd):
    seen = []

    def f(w, x):
        jax.debug.print("sum {s}", s=x.sum())
        token = io_callback(lambda v: seen.append(v) or np.int32(0), jax.ShapeDtypeStruct((), "int32"), x.max())
        return jax.lax.scan(lambda c, _: (c @ w, jax.debug.print("step")), x + token.astype(x.dtype), None, length=2)[0]

    jax.block_until_ready(jax.jit(quantized(f, strict=True))(packed((16, 16)), rows(1)[0]))
    jax.effects_barrier()
    assert len(seen) == 1 and capfd.readouterr().out.count("step") == 2


def test_random_keys_and_closed_over_tracers_pass():
    q, x = packed((16, 16)), rows(1)[0]

    def outer(y, key):
        return quantized(lambda w, x: x @ w * y + jax.random.normal(key, (16,)), strict=True)(q, x).sum()

    def plain(y, key):
        return (x @ q.dequantize() * y + jax.random.normal(key, (16,))).sum()

    with jax.numpy_rank_promotion("allow"):
        close(jax.jit(jax.grad(outer))(2.0, jax.random.key(3)), jax.grad(plain)(2.0, jax.random.key(3)))


def test_named_scopes_reach_the_program():
    def f(w, x):
        with jax.named_scope("my_scope"):
            return jnp.tanh(x @ w)

    text = jax.jit(quantized(f)).lower(packed((16, 16)), rows(1)[0]).as_text(debug_info=True)
    assert "my_scope" in text


def test_a_dead_use_of_a_weight_is_nothing():
    def f(w, x):
        del_me = jnp.sin(w)
        del del_me
        return x @ w

    quantized(f, strict=True)(packed((16, 16)), rows(1)[0])


def test_gradients_by_the_packed_tree_give_float0_for_codes():
    q = packed((16, 12))
    gradient = jax.grad(lambda q, x: jnp.sum(quantized(jnp.matmul)(x, q)), allow_int=True)(q, rows(1)[0])
    assert gradient.codes.dtype == jax.dtypes.float0 and gradient.scale.shape == q.scale.shape


def test_tracing_a_deep_unrolled_model_takes_seconds():
    import time

    tree = {f"layer_{i}": {"kernel": packed((16, 16))} for i in range(32)}

    def f(tree, x):
        for layer in tree.values():
            for _ in range(7):
                x = jax.nn.silu(jnp.einsum("td,df->tf", x, layer["kernel"]))
        return x

    start = time.process_time()
    jax.jit(quantized(f, strict=True)).trace(tree, rows(1)[0])
    assert time.process_time() - start < 10


# Meshes -------------------------------------------------------------------------------------------------------------


def mesh(kind=AxisType.Auto):
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"), axis_types=(kind, kind))


@pytest.mark.parametrize("device_kind", ["cpu", "TPU v6 lite", "NVIDIA H200"])
@pytest.mark.parametrize("spec", [PartitionSpec(None, "model"), PartitionSpec("model"), PartitionSpec()])
def test_a_shard_map_inside_cuts_the_packed_weight(spec, device_kind):
    summed = spec and spec[0] == "model"

    def product(w, x):
        return jax.lax.psum(x @ w, "model") if summed else x @ w

    x_spec = PartitionSpec("data", "model" if summed else None)
    out_spec = PartitionSpec("data", None if summed or not spec else "model")

    def f(w, x):
        mapped = jax.shard_map(product, mesh=mesh(), in_specs=(spec, x_spec), out_specs=out_spec)
        return mapped(w, x)

    q, x = prepare(packed((32, 12)), device_kind), jnp.concatenate([rows(1)[0]] * 2, axis=1)
    g = quantized(f, strict=True)
    close(jax.jit(g)(q, x), x @ q.dequantize())
    assert not g.record.entries


def test_a_shard_without_whole_groups_is_refused_with_its_sizes():
    def f(w, x):
        rows, columns = PartitionSpec("model"), PartitionSpec(None, "model")
        summed = lambda w, x: jax.lax.psum(x @ w, "model")  # noqa: E731
        return jax.shard_map(summed, mesh=mesh(), in_specs=(rows, columns), out_specs=PartitionSpec())(w, x)

    wanted = r"argument 0: axis -2 of shape \(24, 12\).*2 shards over 'model'.*12 rows each.*groups of 8"
    with pytest.raises(JQ4Error, match=wanted):
        quantized(f)(packed((24, 12)), jnp.ones((4, 24)))


def test_explicit_meshes_type_the_stand_ins():
    devices = mesh(AxisType.Explicit)
    with jax.set_mesh(devices):
        q = jax.device_put(packed((16, 12)), NamedSharding(devices, PartitionSpec(None, "model")))
        x = jax.device_put(rows(1)[0], NamedSharding(devices, PartitionSpec("data")))
        seen = []

        def f(w, x):
            seen.append(jax.typeof(w).sharding.spec)
            return x @ w

        out = jax.jit(quantized(f, strict=True))(q, x)
    assert seen == [PartitionSpec(None, "model")] and out.sharding.spec == PartitionSpec("data", "model")


def test_an_inner_jit_keeps_its_shardings():
    column = NamedSharding(mesh(), PartitionSpec(None, "model"))

    def f(w, x):
        return jax.jit(lambda w, x: x @ w, in_shardings=(column, None), out_shardings=column)(w, x)

    q, x = packed((16, 12)), rows(1)[0]
    out = jax.jit(quantized(f, strict=True))(q, x)
    assert out.sharding.is_equivalent_to(column, 2)
    close(out, x @ q.dequantize())


def test_sharding_constraints_on_a_weight_stay_packed():
    column = NamedSharding(mesh(), PartitionSpec("model", None))

    def f(w, x):
        return x @ jax.lax.with_sharding_constraint(w.T, column).T

    q, x = packed((16, 12)), rows(1)[0]
    close(jax.jit(quantized(f, strict=True))(q, x), x @ q.dequantize())


# Memory -------------------------------------------------------------------------------------------------------------


def test_temporaries_of_a_scanned_model_are_within_the_dense_models_own():
    """`memory_analysis` of 12 layers of 1024 x 4096, 64 rows. (A layer smaller than a tile of the product, 4 MB, costs
    the tile.)"""
    module = LinenScanRemat(layers=12, width=1024, hidden=4096)
    x = jax.ShapeDtypeStruct((4, 16, 1024), jnp.float32)
    dense = jax.eval_shape(module.init, jax.random.key(0), x)
    packed_tree = jax.eval_shape(lambda tree: quantize(tree, Rule(targets=("Linear",), group_size=32)), dense)
    of_dense, of_packed = (
        jax.jit(f).lower(tree, x).compile().memory_analysis().temp_size_in_bytes
        for f, tree in ((module.apply, dense), (quantized(module.apply, strict=True), packed_tree))
    )
    assert of_packed <= 1.2 * of_dense, (of_packed, of_dense)


def test_warnings_are_those_of_the_function_alone():
    m = model("linen_stack")
    arrays, rebuild = arrays_of(m.qtree)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(lambda arrays, x: quantized(m.function)(rebuild(arrays), x))(arrays, m.x)
