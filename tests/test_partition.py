"""Oracle: the dense product, on eight CPU devices; and the compiled programs' own lists of operations.

What a partition must not change is the product; what it is for is that no device ever sees another's codes.
"""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from zoo import packed

from benchmarks.aot import environment, missing
from benchmarks.provenance import ROOT
from jq4.apply import quantized
from jq4.errors import JQ4Error
from jq4.layouts import prepare
from jq4.partition import part_specs
from jq4.quantize import quantize
from jq4.recipe import Recipe
from jq4.shardings import shardings_of
from pallas_kernels.partitioned import alone_or_partitioned

close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
MESH = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))
COLUMNS, ROWS = PartitionSpec(None, "model"), PartitionSpec("model", None)


multiply, ragged = jax.jit(jnp.matmul), jax.jit(jax.lax.ragged_dot)


def placed(q, spec):
    entries = [*spec, *[None] * (q.ndim - len(spec))]
    return jax.tree.map(lambda part, own: jax.device_put(part, NamedSharding(MESH, own)), q, part_specs(q, entries))


def inputs(rows, length):
    return jax.device_put(np.random.default_rng(1).normal(size=(rows, length)).astype(np.float32))


def compiled(function, *operands):
    """What the program gives, and the kinds of collectives in it."""
    program = jax.jit(function)
    text = program.lower(*operands).compile().as_text()
    kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    return program(*operands), {kind for kind in kinds if f" {kind}(" in text or f" {kind}-start(" in text}


@pytest.mark.parametrize("device_kind", ["cpu", "TPU v6 lite", "NVIDIA H200"])
@pytest.mark.parametrize("spec, collectives", [(COLUMNS, set()), (ROWS, {"all-reduce"})])
@pytest.mark.parametrize("rows", [6, 5])
def test_each_device_multiplies_its_own_part(device_kind, spec, collectives, rows):
    q, x = prepare(packed((64, 24)), device_kind), inputs(rows, 64)  # groups of 8
    product = quantized(jnp.matmul, strict=True, shardings=NamedSharding(MESH, spec))
    out, kinds = compiled(product, x, placed(q, spec))
    close(out, multiply(x, q.dequantize()))
    assert kinds == collectives


def test_scales_that_are_packed_themselves_are_cut_as_plain_ones():
    q, x = (
        jax.jit(lambda w: quantize({"kernel": w}, Recipe.preset("nf4-dq"))["kernel"])(inputs(256, 64)),
        inputs(4, 256),
    )
    wanted = multiply(x, jax.jit(lambda q: q.dequantize())(q))
    for spec in (COLUMNS, ROWS):
        out = jax.jit(quantized(jnp.matmul, strict=True, shardings=NamedSharding(MESH, spec)))(x, q)
        np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-4)


def test_a_weight_taken_from_the_other_side_is_cut_along_its_own_axes():
    q, x = packed((64, 24)), inputs(4, 64)

    def product(w, x):
        return w.T @ x.T

    out = jax.jit(quantized(product, strict=True, shardings=NamedSharding(MESH, COLUMNS)))(placed(q, COLUMNS), x)
    close(out, multiply(x, q.dequantize()).T)


def test_layers_of_a_scan_keep_their_partition_and_gradients_reach_inputs_and_scales():
    spec = PartitionSpec(None, None, "model")
    stacked, x = packed((3, 16, 16)), inputs(4, 16)

    def loss(w, x):
        out, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
        return jnp.sum(out**2)

    shardings = NamedSharding(MESH, spec)
    g = jax.jit(jax.grad(quantized(loss, strict=True, shardings={"": shardings}), argnums=1))
    close(g(placed(stacked, spec), x), jax.jit(jax.grad(loss, argnums=1))(stacked.dequantize(), x))


def test_shardings_are_found_by_path_like_restores():
    seen = {}

    def choose(path, shape):
        seen[path] = shape
        return NamedSharding(MESH, COLUMNS)

    tree = {"mlp": {"kernel": packed((16, 8))}, "norm": jnp.ones(16)}
    x = inputs(2, 16)
    found = jax.jit(quantized(lambda tree, x: x @ tree["mlp"]["kernel"], shardings=choose))(tree, x)
    close(found, multiply(x, tree["mlp"]["kernel"].dequantize()))
    assert seen == {"mlp/kernel": (16, 8)}
    by_tree = quantized(lambda tree, x: x @ tree["mlp"]["kernel"], shardings={"mlp": NamedSharding(MESH, ROWS)})
    with pytest.raises(
        JQ4Error, match=r"mlp/kernel: axis -2 of shape \(16, 8\).*4 shards over.*4 rows each.*groups of 8"
    ):
        by_tree(tree, x)


@pytest.mark.parametrize("device_kind", ["cpu", "TPU v6 lite", "NVIDIA H200"])
@pytest.mark.parametrize("axis, spec", [(-2, ROWS), (-1, COLUMNS), (-2, COLUMNS)])
def test_weights_tell_where_they_lie(device_kind, axis, spec):
    q = placed(prepare(packed((64, 64), axis), device_kind), spec)
    sharding = shardings_of({"a": {"kernel": q}, "b": jnp.ones(3)})("params/a/kernel", q.shape)
    assert sharding is not None and sharding.is_equivalent_to(NamedSharding(MESH, spec), 2)
    product = quantized(
        lambda tree, x: x @ (tree["w"] if axis == -2 else tree["w"].T), shardings=shardings_of({"w": q})
    )
    x, dense = inputs(4, 64), np.asarray(q.dequantize())
    close(jax.jit(product)({"w": q}, x), np.asarray(x) @ (dense if axis == -2 else dense.T))


@pytest.mark.parametrize("device_kind", ["cpu", "TPU v6 lite", "NVIDIA H200"])
@pytest.mark.parametrize(
    "spec, collectives",
    [
        (PartitionSpec("model"), {"all-reduce"}),
        (PartitionSpec(None, "model"), {"all-reduce"}),
        (PartitionSpec(None, None, "model"), set()),
        (PartitionSpec("model", "data"), {"all-reduce"}),
    ],
)
def test_experts_are_cut_by_number_by_rows_and_by_columns(device_kind, spec, collectives):
    q, x = prepare(packed((8, 64, 16)), device_kind), inputs(20, 64)
    sizes = np.array([3, 0, 5, 1, 0, 0, 7, 2], np.int32)  # and two rows of no expert
    product = quantized(jax.lax.ragged_dot, strict=True, shardings=NamedSharding(MESH, spec))
    out, kinds = compiled(product, x, placed(q, spec), sizes)
    close(out, ragged(x, q.dequantize(), sizes))
    assert kinds == collectives


@pytest.mark.parametrize("device_kind", ["cpu", "TPU v6 lite"])
@pytest.mark.parametrize(
    "equation, shape, axis, spec, uncut",
    [
        ("mk,khd->mhd", (64, 8, 6), -3, PartitionSpec(None, "model"), False),  # queries, by heads
        ("mhd,hdk->mk", (8, 16, 24), -2, PartitionSpec("model"), False),  # attention's output, by heads
        ("mhd,hdk->mk", (8, 16, 24), -2, PartitionSpec(None, None, "model"), False),
        ("bmk,bkn->bmn", (4, 64, 24), -2, PartitionSpec("model", None, "data"), False),  # a batch of weights
        ("mk,khd->mhd", (64, 6, 8), -3, PartitionSpec(None, None, "model"), True),  # every head on every device
    ],
)
def test_weights_of_three_axes_are_cut_where_their_axes_merge_whole(device_kind, equation, shape, axis, spec, uncut):
    q = prepare(packed(shape, axis), device_kind)
    lengths = dict(zip(equation.split(",")[1].split("->")[0], shape, strict=True)) | {"m": 6}
    x = np.random.default_rng(1).normal(size=[lengths[name] for name in equation.split(",")[0]]).astype(np.float32)
    product = quantized(functools.partial(jnp.einsum, equation), strict=True, shardings=NamedSharding(MESH, spec))
    close(jax.jit(product)(x, placed(q, spec)), np.einsum(equation, x, q.dequantize()))
    assert [entry.reason[:12] for entry in product.record.uncut] == ["merging axes"] * uncut


@pytest.mark.parametrize(
    "shardings, message",
    [
        ({"mlp": COLUMNS}, r"at 'mlp' found a PartitionSpec, wanted a Sharding \(NamedSharding\(mesh, spec\)\)"),
        (lambda path, shape: COLUMNS, "at 'mlp/kernel' found a PartitionSpec"),
        ({"mpl": NamedSharding(MESH, COLUMNS)}, "'mpl' is no path of the arguments, whose leaves are mlp/kernel"),
        (NamedSharding(MESH, PartitionSpec("data", None, "model")), "mlp/kernel: found the partition"),
        (NamedSharding(MESH, PartitionSpec(None, "model")), r"axis 1 of shape \(16, 10\).* 4 shards .*do not divide"),
    ],
)
def test_shardings_that_mean_nothing_are_refused(shardings, message):
    with pytest.raises(JQ4Error, match=message):
        quantized(lambda tree: jnp.ones((2, 16)) @ tree["mlp"]["kernel"], shardings=shardings)(
            {"mlp": {"kernel": packed((16, 10))}}
        )


def test_a_shard_of_words_holds_whole_ones():
    q = prepare(packed((40, 16), group_size=40), "TPU v6 lite")  # one group: its rows may be cut, its words may not
    with pytest.raises(JQ4Error, match=r"4 shards over .*leave 10 rows each; wanted .*whole units of 8 codes"):
        quantized(jnp.matmul, shardings=NamedSharding(MESH, ROWS))(inputs(4, 40), q)


# A kernel, or what XLA can cut ----------------------------------------------------------------------------------------


def either(x):
    return alone_or_partitioned(lambda x: {"alone": x}, lambda x: {"alone": -x})(x)["alone"]


def test_a_program_that_xla_cuts_gets_the_form_that_it_can_cut():
    x = jnp.ones((8, 4))
    sharded = jax.device_put(x, NamedSharding(MESH, PartitionSpec("model")))
    assert np.all(either(x) == x) and np.all(jax.jit(either)(x) == x)
    assert np.all(jax.jit(either)(sharded) == -x)
    assert np.all(jax.jit(jax.vmap(either, in_axes=1, out_axes=1))(sharded) == -x)
    assert np.all(jax.jit(lambda x: jax.lax.scan(lambda c, y: (c, either(y)), 0, x)[1])(sharded) == -x)
    assert np.all(jax.export.export(jax.jit(either))(x).call(x) == x)


def test_the_body_of_a_shard_map_is_left_alone_and_explicit_types_are_not():
    x = jnp.ones((8, 4))
    whole = PartitionSpec(("data", "model"))
    assert np.all(jax.jit(jax.shard_map(either, mesh=MESH, in_specs=whole, out_specs=whole))(x) == x)
    part = jax.shard_map(
        either, mesh=MESH, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"), axis_names={"data"}
    )
    assert np.all(jax.jit(part)(x) == -x)  # along "model" it is still XLA's to cut
    with jax.set_mesh(jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))):
        assert np.all(np.asarray(jax.jit(either)(jax.device_put(x, PartitionSpec("model")))) == -np.asarray(x))


def printed_by(script):
    """The lines that a script prints in a process that compiles for TPUs."""
    if reason := missing("v5e:2x2"):
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment("v5e:2x2"), cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.aot
def test_many_rows_of_a_weight_that_nothing_tells_of_gather_none_of_it_on_tpus():
    script = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from benchmarks.tpu_lab.chips import CHIPS
from benchmarks.tpu_lab.compiling import devices
from benchmarks.tpu_lab.hlo import Program
from pallas_kernels.int4_matmul import PackedSpec, int4_matmul
mesh = Mesh(np.array(devices(CHIPS["v5e"])), ("model",))
struct = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))
for codes, bits in (("int32", 4), ("int8", 8), ("int4", 4)):
    rows, spec = 4096 // (8 if codes == "int32" else 1), PackedSpec(4096, bits, group_size=128, layout="tpu")
    args = (struct((512, 4096), jnp.bfloat16), struct((rows, 8192), jnp.dtype(codes), None, "model"),
            struct((32, 1, 8192), jnp.bfloat16, None, None, "model"))
    traced = jax.jit(lambda *args: int4_matmul(*args, spec=spec)).trace(*args)
    made = traced.lower(lowering_platforms=("tpu",)).compile()
    program = Program(made.as_text())
    moved = sum(one.times * one.nbytes for one in program.operations())
    print(codes, program.collectives(), moved < 2**25, made.memory_analysis().temp_size_in_bytes < 2**22)
"""
    assert printed_by(script) == [f"{codes} {{}} True True" for codes in ("int32", "int8", "int4")]


@pytest.mark.aot
def test_on_tpus_the_kernel_runs_where_it_is_told_of_the_shards_and_xla_does_elsewhere():
    script = """
import jax, jax.numpy as jnp, numpy as np, jq4
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from benchmarks.tpu_lab.chips import CHIPS
from benchmarks.tpu_lab.compiling import devices
from benchmarks.tpu_lab.hlo import Program
from jq4.partition import part_specs
from jq4.qarray import QArray
mesh = Mesh(np.array(devices(CHIPS["v5e"])), ("model",))
place = lambda part, spec: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=NamedSharding(mesh, spec))
columns, experts = PartitionSpec(None, "model"), PartitionSpec("model", None, None)
for case, batch, spec, told in (
    ("told", (), columns, True), ("untold", (), columns, False), ("experts", (8,), experts, True)
):
    codes, scale = ((*batch, 512, 2048), jnp.uint8), ((*batch, 8, 2048), jnp.bfloat16)
    make = lambda: jq4.prepare(QArray(jnp.zeros(*codes), jnp.ones(*scale), dtype="bfloat16"), "TPU v5 lite")
    weight = jax.eval_shape(make)
    weight = jax.tree.map(place, weight, part_specs(weight, spec))
    x = place(jax.ShapeDtypeStruct((16, 1024), jnp.bfloat16), PartitionSpec())
    sizes = [place(jax.ShapeDtypeStruct(batch, jnp.int32), PartitionSpec())] if batch else []
    f = jq4.quantized(jax.lax.ragged_dot if batch else jnp.matmul, strict=True,
                      shardings=NamedSharding(mesh, spec) if told else None)
    text = jax.jit(f).trace(x, weight, *sizes).lower(lowering_platforms=("tpu",)).compile().as_text()
    print(case, Program(text).custom_calls(), Program(text).collectives())
"""
    assert printed_by(script) == ["told 1 {}", "untold 0 {}", "experts 1 {'all-reduce': 1}"]


def test_a_tree_names_a_weight_within_its_argument_or_with_the_arguments_name():
    q, x, columns = packed((64, 24)), inputs(5, 64), NamedSharding(MESH, COLUMNS)

    def shards(function, shardings, *args, **kwargs):
        traced = jax.make_jaxpr(quantized(function, strict=True, shardings=shardings))(*args, **kwargs)
        return str(traced).count("shard_map[")

    def two(a, b, x):
        return x @ a["first"] + x @ b["second"]

    both = ({"first": q}, {"second": q})
    assert shards(two, {"first": columns, "second": columns}, *both, x) == 2
    assert shards(two, {"argument 1": columns}, *both, x) == 1
    assert shards(lambda *, params, x: x @ params["w"], {"params": {"w": columns}}, params={"w": q}, x=x) == 1
    assert shards(lambda params, x: x @ params["w"], {"argument 0": columns}, {"w": q}, x) == 1


def test_a_module_of_shardings_is_a_tree_though_it_can_be_called():
    @jax.tree_util.register_pytree_with_keys_class
    class Module(list):
        def __call__(self, x):
            return x @ self[0]

        def tree_flatten_with_keys(self):
            return [(jax.tree_util.SequenceKey(i), leaf) for i, leaf in enumerate(self)], None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            return cls(leaves)

    q, x = packed((64, 24)), inputs(5, 64)
    product = quantized(lambda w, x: w(x), shardings=Module([NamedSharding(MESH, COLUMNS)]))
    assert "shard_map[" in str(jax.make_jaxpr(product)(Module([q]), x))


@pytest.mark.parametrize("spec", [COLUMNS, ROWS])
@pytest.mark.parametrize("of_x", [PartitionSpec(), PartitionSpec("data"), None])
def test_a_mesh_of_explicit_axes_takes_told_weights(spec, of_x):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    q, x = packed((64, 24)), inputs(6, 64)
    rows = x if of_x is None else jax.device_put(x, NamedSharding(mesh, of_x))
    out = jax.jit(quantized(jnp.matmul, strict=True, shardings=NamedSharding(mesh, spec)))(rows, q)
    close(out, multiply(x, q.dequantize()))
    columns = "model" if spec == COLUMNS else None
    assert out.sharding.spec == PartitionSpec("data" if of_x == PartitionSpec("data") else None, columns)
    experts, sizes = packed((8, 64, 16)), np.asarray([1, 0, 2, 0, 0, 1, 1, 0], np.int32)
    told = quantized(jax.lax.ragged_dot, strict=True, shardings=NamedSharding(mesh, PartitionSpec("model")))
    close(jax.jit(told)(x, experts, sizes), ragged(x, experts.dequantize(), sizes))
