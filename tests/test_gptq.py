"""Oracle: GPTQ as its paper has it, in numpy and float64: a row at a time, from the Cholesky factor of the inverse."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jq4
from jq4.leaf_errors import error_of
from jq4.methods import gptq, gptq_solver, hessian, rtn
from jq4.methods.canonical import Canonical
from jq4.methods.gptq_options import Options
from jq4.qarray import codes_of
from jq4.rounding import Encoding, codes_of_blocks, find_parameters
from jq4.statistics import WeightStatistics, statistics_of

pytestmark = pytest.mark.arithmetic

PAPER = {"refinements": 0, "actorder": "none"}
QUICK = {"xla_backend_optimization_level": 0}  # tests spend their time in compiling


@functools.partial(jax.jit, static_argnames=("encoding", "options"), compiler_options=QUICK)
def _quantized(weight, statistics, encoding, options):
    return gptq.diagnosed(weight, statistics, encoding, **dict(options))


def diagnosed(weight, statistics, encoding, **options):
    return _quantized(weight, statistics, encoding, tuple(options.items()))


def quantize(weight, statistics, encoding, **options):
    return diagnosed(weight, statistics, encoding, **options)[0]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(rows, features, seed=1):
    """Rows whose features depend on each other, as those of a network do."""
    return normal(rows, features, seed=seed) @ normal(features, features, seed=seed + 1) + 0.3


@functools.partial(jax.jit, compiler_options=QUICK)
def statistics(x):
    return statistics_of(x, frozenset({"hessian"}))


@functools.partial(jax.jit, static_argnums=1, compiler_options=QUICK)
def rounded(weight, encoding):
    return rtn.quantize(weight, None, encoding)


parameters = jax.jit(find_parameters, static_argnums=1, compiler_options=QUICK)
codes_by = jax.jit(codes_of_blocks, static_argnums=2, compiler_options=QUICK)


def gptq_of_the_paper(weight, x, encoding, damping=0.01):
    """Codes u8[K, N], and the scales f32[G, N] that a group gets from its updated weights."""
    weight = weight.astype(np.float64)
    hessian = x.astype(np.float64).T @ x.astype(np.float64) / len(x)
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[dead] = 0
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    size = encoding.group_size or len(weight)
    codes, groups = np.zeros(weight.shape, np.uint8), []
    for row in range(len(weight)):
        if row % size == 0:
            groups.append(parameters(weight[row : row + size].astype(np.float32), encoding))
        parts: Any = (None if part is None else np.asarray(part, np.float64)[0] for part in groups[-1])
        scale, zero, offset = parts
        form, now = encoding.number_format, weight[row : row + 1].astype(np.float32)
        codes[row] = np.asarray(codes_by(now, groups[-1], form))[0]
        levels = np.asarray(form.levels)[codes[row]] if form.levels else codes[row] - (8.0 if zero is None else zero)
        error = (weight[row] - levels * scale - (0 if offset is None else offset)) / upper[row, row]
        weight[row:] -= np.outer(upper[row, row:], error)
    return codes, np.concatenate([np.asarray(group.scale) for group in groups])


@pytest.mark.parametrize(
    "encoding",
    [
        Encoding(group_size=32),
        Encoding(group_size=24, symmetric=False, observer="minmax"),
        Encoding(group_size=None, symmetric=False, observer="minmax", zero_point="float"),
        Encoding(group_size=100),
        Encoding(format="nf4", group_size=64),
    ],
    ids=str,
)
def test_its_own_sweep_is_the_papers(encoding):
    weight, x = normal(151, 40), inputs(400, 151)
    q = quantize(weight, statistics(x), encoding, **PAPER)
    codes, scales = gptq_of_the_paper(weight, x, encoding)
    assert np.mean(codes_of(q) != codes) < 0.001  # a tie in f32 changes the codes after it as well
    np.testing.assert_allclose(np.asarray(q.scale, np.float32), scales, rtol=0.02)


@pytest.mark.parametrize("symmetric", [True, False])
def test_percentiles_of_a_short_group_are_those_of_its_own_rows(symmetric):
    """Inputs that know nothing of each other: what is left of GPTQ is rounding to nearest."""
    encoding = Encoding(group_size=32, observer="percentile", percentile=80.0, symmetric=symmetric)
    weight = normal(17 * 32 + 3, 24)
    known = WeightStatistics(jnp.int32(100), outer_total=jax.device_put(100 * np.eye(len(weight), dtype=np.float32)))
    found = quantize(weight, known, encoding, refinements=0)
    wanted = rounded(weight, encoding)
    np.testing.assert_array_equal(found.scale, wanted.scale)
    np.testing.assert_array_equal(codes_of(found), codes_of(wanted))


def hessian_error(q, weight, x):
    """E|x^T Q - x^T W|^2 over rows x, in float64."""
    missed = np.asarray(x, np.float64) @ (
        np.asarray(q.dequantize(jnp.float32), np.float64) - np.asarray(weight, np.float64)
    )
    return np.square(missed).sum() / len(x)


def rule(**options: Any):
    return jq4.Rule(("w",), group_size=32, method="gptq", axis=-2, options=tuple(options.items()))


@pytest.mark.parametrize(
    "encoding",
    [
        Encoding(group_size=32, observer="mse"),
        Encoding(format="int3", group_size=None, observer="mse", symmetric=False),
        Encoding(format="int2", group_size=16, observer="mse", symmetric=False, zero_point="float"),
        Encoding(format="fp4", per_tensor=True, observer="mse"),
    ],
    ids=lambda encoding: f"{encoding.format}-{encoding.group_size}-{encoding.symmetric}",
)
def test_it_beats_rounding_and_refinements_lower_the_error(encoding):
    weight, x = normal(99, 24), inputs(300, 99)
    errors = [
        hessian_error(quantize(weight, statistics(x), encoding, refinements=rounds), weight, x) for rounds in (0, 2)
    ]
    assert errors[0] < 0.7 * hessian_error(rounded(weight, encoding), weight, x)
    assert errors[1] < errors[0]


def test_the_error_that_it_reports_is_the_error():
    weight, x = normal(70, 24), inputs(300, 70)
    q, found = diagnosed(weight, statistics(x), Encoding(group_size=32, observer="mse"))
    assert float(found.error) == pytest.approx(
        hessian_error(q, weight, x) / np.square(x @ weight).sum() * len(x), rel=1e-3
    )
    y = x + 0.1 * inputs(300, 70, seed=7)
    pair = WeightStatistics(jnp.int32(300), outer_total=jnp.asarray(y.T @ y), cross_total=jnp.asarray(x.T @ y))
    q, found = diagnosed(weight, pair, Encoding(group_size=32, observer="mse"))
    lost = np.square(y @ (weight - np.asarray(q.dequantize()))).sum() / np.square(y @ weight).sum()
    assert float(found.output_error) == pytest.approx(lost, rel=1e-3) and found.error < 0.9 * found.output_error


def test_any_axis_and_any_stack_is_the_matrix_alone():
    encoding, weight, x = (
        Encoding(group_size=32, observer="mse"),
        normal(3, 2, 70, 24),
        inputs(6 * 300, 70).reshape(3, 2, 300, 70),
    )
    found = quantize(weight, statistics(x), encoding)
    alone = quantize(weight[2, 1], statistics(x[2, 1]), encoding)
    assert np.mean(codes_of(found)[2, 1] != codes_of(alone)) < 0.001
    turned = quantize(weight[2, 1].T, statistics(x[2, 1]), Encoding(group_size=32, observer="mse", axis=-1))
    np.testing.assert_array_equal(codes_of(turned).T, codes_of(alone))


def test_a_weight_contracted_over_two_axes_has_groups_within_the_last():
    weight, x = normal(3, 20, 24), inputs(400, 60)  # [heads, head_dim, O]
    q = quantize(weight, statistics(x), Encoding(group_size=16, observer="mse"))
    assert q.scale.shape == (3, 2, 24)
    flat = np.asarray(q.dequantize()).reshape(60, 24) - weight.reshape(60, 24)
    nearest = np.asarray(rounded(weight, Encoding(group_size=16)).dequantize()).reshape(60, 24) - weight.reshape(60, 24)
    assert np.square(x @ flat).sum() < 0.5 * np.square(x @ nearest).sum()


def test_sharded_over_columns_it_gives_the_same_codes():
    weight, x = normal(96, 64), inputs(300, 96)
    encoding = Encoding(group_size=32, observer="mse")
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("columns",))
    sharded = jax.device_put(jnp.asarray(weight), NamedSharding(mesh, P(None, "columns")))
    here, there = (quantize(w, statistics(x), encoding) for w in (weight, sharded))
    assert len(there.codes.sharding.device_set) == 8
    assert np.mean(codes_of(here) != codes_of(there)) < 1e-4


def test_statistics_of_a_pair_undo_what_the_prefix_did():
    weight, x = normal(48, 24), inputs(500, 48)
    y = x + 0.3 * inputs(500, 48, seed=7)
    pair = statistics(y)
    crossed = WeightStatistics(pair.count, outer_total=pair.outer_total, cross_total=jnp.asarray(x.T @ y))
    fine = Encoding(format="int8", group_size=16, observer="mse")
    best = np.linalg.lstsq(y.astype(np.float64), (x @ weight).astype(np.float64), rcond=None)[0]
    found = quantize(weight, crossed, fine, damping=1e-6).dequantize()
    np.testing.assert_allclose(found, best, atol=0.05)
    way = jnp.asarray(y.T @ (x - y) @ weight)
    alone = WeightStatistics(pair.count, outer_total=pair.outer_total, way_total=way)
    np.testing.assert_allclose(quantize(weight, alone, fine, damping=1e-6).dequantize(), found, atol=0.01)
    kept = quantize(weight, alone, fine, correction=0.0).dequantize()
    np.testing.assert_allclose(kept, weight, atol=0.1)
    kept = quantize(weight, crossed, fine, correction=0.0).dequantize()
    np.testing.assert_allclose(kept, weight, atol=0.1)


def test_sums_are_deleted_when_their_last_leaf_has_used_them():
    x = inputs(300, 64)
    known = statistics(x)
    pair = WeightStatistics(known.count, outer_total=known.outer_total, cross_total=known.outer_total + 0)
    stats = {"a": pair, "b": pair, "c": known}
    params = {name: jnp.asarray(normal(64, 24, seed=seed)) for seed, name in enumerate("abc")}
    every = jq4.Rule(("a", "b", "c"), group_size=32, method="gptq", axis=-2)
    kept = jq4.quantize(params, every, stats)
    seen = []

    def progress(entry):
        jax.block_until_ready(entry.findings)
        seen.append((pair.cross_total.is_deleted(), pair.outer_total.is_deleted()))

    freed = jq4.quantize(params, every, stats, progress=progress, donate_stats=True)
    assert seen == [(False, False), (True, False), (True, True)]
    for name in params:
        np.testing.assert_array_equal(codes_of(freed[name]), codes_of(kept[name]))
    known = statistics(x)
    one_array = WeightStatistics(known.count, outer_total=known.outer_total, cross_total=known.outer_total)
    few = WeightStatistics(jnp.int32(3), outer_total=known.outer_total, cross_total=known.outer_total + 0)
    with pytest.warns(jq4.CalibrationWarning, match="b: 1 of 1 slices saw fewer"):
        jq4.quantize({"a": params["a"], "b": params["b"]}, every, {"a": one_array, "b": few}, donate_stats=True)
    assert not known.outer_total.is_deleted() and few.cross_total.is_deleted()  # `few` looks at no data


@pytest.mark.parametrize("size", [1e-12, 1e9])
def test_the_unit_of_the_inputs_does_not_matter(size):
    encoding = Encoding(format="int3", group_size=None, observer="mse", symmetric=False, zero_point="float")
    weight, x = normal(96, 24), inputs(300, 96)
    plain = hessian_error(quantize(weight, statistics(x), encoding), weight, x)
    scaled = hessian_error(quantize(weight, statistics(np.float32(size) * x), encoding), weight, x)
    assert scaled == pytest.approx(plain, rel=0.01)


def test_dead_inputs_get_weights_of_zero_and_are_counted():
    weight, x = normal(64, 24), inputs(300, 64)
    x[:, [3, 40]] = 0
    report = jq4.QuantizeReport()
    q = jq4.quantize({"w": jnp.asarray(weight)}, rule(), {"w": statistics(x)}, report=report)["w"]
    np.testing.assert_array_equal(q.dequantize()[jnp.asarray([3, 40])], 0)
    assert report.notes == {"w": "2 inputs that were never anything but zero, whose weights are now zero"}


def test_a_dead_input_does_not_damp_small_ones():
    weight, x = normal(64, 24), inputs(300, 64)
    x[:, 3] = 0
    encoding = Encoding(group_size=32, observer="mse")
    codes, small = (codes_of(quantize(weight, statistics(size * x), encoding)) for size in (1, 2.0**-12))
    np.testing.assert_array_equal(small, codes)


def test_a_hessian_without_a_factor_raises_its_damping_and_says_so():
    x = inputs(40, 64)  # fewer rows than inputs
    x[:, 1] = x[:, 0]
    stats, params = {"w": statistics(x)}, {"w": jnp.asarray(normal(64, 24))}
    with pytest.warns(jq4.CalibrationWarning, match="w: damping raised from 0 to .* in 1 of 1 slices"):
        q = jq4.quantize(params, rule(damping=0.0), stats)["w"]
    assert np.isfinite(q.dequantize()).all()
    report = jq4.QuantizeReport()
    jq4.quantize(params, rule(), stats, report=report)
    assert report.notes == {}  # the default's damping suffices


def mixture(tree, x):
    expert = jnp.argmax(x @ tree["router"], axis=-1)
    order = jnp.argsort(expert)
    return jax.lax.ragged_dot(x[order], tree["w"], jnp.bincount(expert, length=4).astype(jnp.int32))


def test_starved_experts_fall_back_are_counted_and_never_nan():
    router, x = np.zeros((32, 4), np.float32), inputs(400, 32)
    router[:2] = [2.0, 1.0, 0.0, -1e3], [0.0, 3.0, 0.0, -1e3]
    tree = jax.device_put({"router": router, "w": normal(4, 32, 24)})
    x[:, 0] = 1.0  # expert 3 is sent nothing, expert 2 hardly anything
    x[:5, 0], x[:5, 1] = -1.0, 0.0
    stats = jq4.observe(mixture, tree, [jax.device_put(x)], collect=("hessian",))
    counts = np.asarray(stats["w"].count)
    starved = int((counts < 32).sum())
    assert counts.min() == 0 and 1 <= starved < 4
    report = jq4.QuantizeReport()
    q = jq4.quantize({"w": tree["w"]}, rule(fallback="rtn"), stats, report=report)["w"]
    (leaf,) = report.packed
    assert (leaf.starved, leaf.slices) == (starved, 4)
    assert leaf.note.startswith(f"{starved} of 4 slices saw fewer than 32 rows: rtn without data")
    assert np.isfinite(q.dequantize()).all()
    nearest = codes_of(rounded(tree["w"], rule().encoding(-2)))
    for expert in np.flatnonzero(counts < 32):
        np.testing.assert_array_equal(codes_of(q)[expert], nearest[expert])
    with pytest.warns(jq4.CalibrationWarning, match=f"{starved} of 4 slices saw fewer"):
        jq4.quantize({"w": tree["w"]}, rule(), stats)
    unseen = WeightStatistics(jnp.int32(0), outer_total=jnp.zeros((32, 32)))
    with pytest.warns(jq4.CalibrationWarning, match="1 of 1 slices saw fewer than 1 rows: rtn"):
        alone = jq4.quantize({"w": tree["w"][0]}, rule(fallback="rtn", min_rows=0), {"w": unseen})["w"]
    np.testing.assert_array_equal(codes_of(alone), nearest[0])


def test_bad_statistics_are_refused():
    params, x = {"w": jnp.asarray(normal(64, 24))}, inputs(300, 64)
    poisoned = statistics(np.where(np.arange(300)[:, None] == 7, np.nan, x))
    with pytest.raises(
        jq4.JQ4Error, match=r"w: its statistics are not finite \(outer_total\): calibration fed it a NaN"
    ):
        jq4.quantize(params, rule(), {"w": poisoned})
    with pytest.raises(jq4.JQ4Error, match=r"w: gptq needs a Hessian: call jq4.observe\(..., collect=\('hessian',\)\)"):
        jq4.quantize(params, rule(), {"w": statistics_of(jnp.asarray(x), frozenset({"mean"}))})
    with pytest.raises(jq4.JQ4Error, match="w: method gptq needs statistics"):
        jq4.quantize(params, rule())
    with pytest.raises(
        jq4.JQ4Error, match=r"w: its statistics are a Hessian of shape \(60, 60\), which the weight of shape"
    ):
        jq4.quantize(params, rule(), {"w": statistics(x[:, :60])})
    with pytest.raises(jq4.JQ4Error, match="rule: option actorder is 'group', wanted one of static, none"):
        rule(actorder="group")
    with pytest.raises(jq4.JQ4Error, match="wanted damping >= 0"):
        jq4.quantize(params, rule(damping=-1.0), {"w": statistics(x)})


def test_it_traces():
    params = {"w": jax.ShapeDtypeStruct((2, 64, 24), jnp.bfloat16)}
    stats = {
        "w": WeightStatistics(
            jax.ShapeDtypeStruct((2,), jnp.int32), outer_total=jax.ShapeDtypeStruct((2, 64, 64), jnp.float32)
        )
    }
    q = jax.eval_shape(lambda p, s: jq4.quantize(p, rule(), s), params, stats)["w"]
    assert q.shape == (2, 64, 24) and q.dtype == "bfloat16"


def test_no_program_holds_a_second_matrix_of_its_inputs_size():
    """Compiled, not run: beside arguments and results, less than half a float32[K, K]."""
    features = 8192
    weight, square = (jax.ShapeDtypeStruct((features, size), jnp.float32) for size in (64, features))
    encoding = Encoding(group_size=128, observer="mse", axis=-2)
    canonical = Canonical.of(weight.shape, encoding, square.shape)
    solver = gptq_solver.Solver(canonical, encoding, Options())
    factor = jax.eval_shape(lambda outer: gptq_solver._factored(outer, solver), square)
    placed = jax.eval_shape(lambda *a: gptq_solver._placed(*a, solver=solver), weight, weight, factor)
    first = jax.eval_shape(lambda *a: gptq_solver._first(*a, solver=solver), placed, factor)
    programs = [
        gptq_solver._towards.lower(weight, square, square),
        hessian._attempted.lower(square, factor.slots, factor.diagonal, jax.ShapeDtypeStruct((), jnp.float32)),
        gptq_solver._placed.lower(weight, weight, factor, solver=solver),
        gptq_solver._first.lower(placed, factor, solver=solver),
        gptq_solver._refined.lower(placed, factor, first, solver=solver),
        gptq_solver._finished.lower(weight, placed, factor, first),
    ]
    for program in programs:
        assert program.compile(QUICK).memory_analysis().temp_size_in_bytes < 0.5 * 4 * features**2


def test_inputs_along_axes_that_are_not_beside_each_other_are_refused():
    """Of equal axes, so that shapes do not tell; axes of one between them do no harm."""
    tree, x = {"w": jnp.asarray(normal(6, 6, 6))}, jnp.asarray(normal(9, 6, 6, seed=1))
    found = jq4.observe(lambda tree, x: jnp.einsum("bij,ikj->bk", x, tree["w"]), tree, [x], collect=("hessian",))
    assert found["w"].leaf_axes == ((), (-3, -1))
    rule = jq4.Rule(("w",), num_bits=4, group_size=6, method="gptq", options=(("min_rows", 0),))
    with pytest.raises(jq4.JQ4Error, match=r"w: shape \(6, 6, 6\), observed contracted along axes \[-3, -1\]"):
        jq4.quantize(tree, rule, found)
    known = error_of("w", tree["w"], tree["w"] + 0.1, found["w"], axis=-1)
    assert known.output_error is None  # rather than a wrong one
    thin = {"w": jnp.asarray(normal(6, 1, 6))}
    found = jq4.observe(lambda tree, x: jnp.einsum("bij,ikj->bk", x, tree["w"]), thin, [x], collect=("hessian",))
    assert jq4.quantize(thin, rule, found)["w"].shape == (6, 1, 6)


def test_statistics_that_were_given_up_are_told():
    tree = {"w": jnp.asarray(normal(16, 8))}
    found = jq4.observe(lambda tree, x: x @ tree["w"], tree, [jnp.asarray(inputs(64, 16))], collect=("hessian",))
    jq4.quantize(tree, "gptq-w4g16", found, donate_stats=True)
    for again in (lambda: jq4.quantize(tree, "gptq-w4g16", found), lambda: found["w"].hessian):
        with pytest.raises(jq4.JQ4Error, match=r"of these statistics was given up by a call with donate_stats=True"):
            again()
