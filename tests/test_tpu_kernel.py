"""Oracle: numpy in float64. The kernel runs in Pallas' interpreter of TPU kernels (memory it never wrote is NaN)."""

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import jq4
from pallas_kernels.grouped_int4_matmul import grouped_int4_matmul
from pallas_kernels.grouped_int4_matmul.tpu import grouped_int4_matmul_tpu
from pallas_kernels.grouped_int4_matmul.tpu_transposed import grouped_int4_matmul_tpu_transposed
from pallas_kernels.int4_matmul import PackedSpec, UnsupportedError, int4_matmul, tpu_tuned
from pallas_kernels.int4_matmul.registry import BACKENDS, choose
from pallas_kernels.int4_matmul.shapes import SHAPES
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.int4_matmul.tpu import int4_matmul_tpu
from pallas_kernels.int4_matmul.tpu_blocks import Plan, Problem, find_plan, ranked, vmem_of
from pallas_kernels.int4_matmul.tpu_chips import CHIPS, UNKNOWN, chip_named, traced_chip
from pallas_kernels.int4_matmul.tpu_int8 import matmul_tpu
from pallas_kernels.int4_matmul.tpu_order import magic_order
from pallas_kernels.int4_matmul.tpu_transposed import int4_matmul_tpu_transposed
from pallas_kernels.int4_matmul.tpu_tuned import entry_of, key_of, plan_of, table, tuned_plan
from pallas_kernels.int4_matmul.words import int4_to_words, words_to_int4
from pallas_kernels.int4_matmul.xla import int4_matmul_xla

ROUNDED = ("wscale", "shifted")  # the weights, as dense bf16 ones are
FORMS = ("direct", "magic", *ROUNDED)

# M, K, N, group, zero points, offsets, block_m, block_k, block_n, x resident
CASES: dict[str, tuple[Any, ...]] = {
    "whole blocks": (5, 512, 256, 64, False, False, 5, 256, 128, False),
    "one row": (1, 256, 128, 128, True, False, 1, 256, 128, True),
    "tails of M, K, N and group": (20, 500, 200, 64, True, True, 8, 256, 128, True),
    "groups that do not fill the blocks": (16, 320, 128, 32, True, False, 16, 256, 128, False),
    "short groups in whole registers": (3, 600, 128, 32, True, True, 3, 256, 128, False),
    "groups longer than a block": (5, 700, 128, 256, True, True, 5, 128, 128, True),
    "per channel": (64, 300, 128, 300, True, False, 64, 128, 128, True),
    "few columns": (5, 256, 75, 128, False, True, 5, 256, 75, False),
    "many rows": (300, 256, 128, 128, True, False, 128, 256, 128, False),
}
# Blocks of M and N are cut alike for all forms, which meet the tails of both together: these cases are for two each.
MET_BY = {
    "whole blocks": ("direct", "magic"),
    "one row": ("magic", "wscale"),
    "few columns": ("direct", "shifted"),
    "many rows": ("wscale", "shifted"),
}


def in_numpy(array, dtype):
    """A jax.Array that nothing was compiled for."""
    return jax.device_put(array.astype(dtype))


def product(x, w, spec, **options):
    """int4_matmul_tpu of the interpreter, compiled as one program."""
    return jax.jit(functools.partial(int4_matmul_tpu, spec=spec, interpret=True, **options))(x, w)


def grouped_product(x, experts, sizes, spec):
    return jax.jit(functools.partial(grouped_int4_matmul_tpu, spec=spec, interpret=True))(x, experts, sizes)


def weight(k, n, group, zero_points=False, offsets=False, scales=jnp.bfloat16, batch=(), columns=None, seed=0):
    """(Packed in the tpu layout, its spec, the dense weight f64)."""
    rng = np.random.default_rng(seed)
    groups, columns = -(-k // group), columns or n
    codes = rng.integers(-8, 8, (*batch, k, n))
    shape = (*batch, groups, 1, columns)
    scale = in_numpy(rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape), scales)
    zero_point = in_numpy(rng.integers(0, 16, shape), jnp.uint8) if zero_points else None
    offset = in_numpy(rng.normal(size=shape), scales) if offsets else None

    def rows(part, empty):
        if part is None:
            return empty
        return np.repeat(np.asarray(part, np.float64)[..., 0, :], group, -2)[..., :k, :]

    dense = (codes - rows(zero_point, 8.0) + 8.0) * rows(scale, 0.0) + rows(offset, 0.0)
    spec = PackedSpec(k, group_size=group, layout="tpu")
    return Packed(jnp.asarray(words_of(codes)), scale, zero_point, offset), spec, dense


def words_of(codes):
    """i32[*B, ceil(K / 8), N]: row 8r + j in bits 4j to 4j + 3 of word r; the rows after the last are not zeros."""
    rest = np.full((*codes.shape[:-2], -codes.shape[-2] % 8, codes.shape[-1]), 5)
    rows = np.concatenate([codes, rest], -2).reshape(*codes.shape[:-2], -1, 8, codes.shape[-1]) & 15
    return (
        (rows.astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32)[:, None])).sum(-2, dtype=np.uint32).view(np.int32)
    )


def rows_of_x(m, k, dtype=jnp.bfloat16, seed=1):
    return in_numpy(np.random.default_rng(seed).normal(size=(m, k)), dtype)


def relative_error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def rounded_or_exact(out, x64, dense, turned=lambda w: w):
    """The error against the product of the dense weight in bf16; a CPU's compiler may leave the rounding out."""
    return min(relative_error(out, x64 @ turned(w)) for w in (as_bf16(dense), dense))


def as_bf16(dense):
    return dense.astype(np.float32).astype(jnp.bfloat16).astype(np.float64)


@pytest.mark.parametrize(("case", "form"), [(case, form) for case in CASES for form in MET_BY.get(case, FORMS)])
def test_forms_match_float64(case, form):
    m, k, n, group, zero_points, offsets, *blocks = CASES[case]
    w, spec, dense = weight(k, n, group, zero_points, offsets)
    x = rows_of_x(m, k)
    out = product(x, w, spec, plan=Plan(form, *blocks))
    x64 = np.asarray(x, np.float64)
    assert out.dtype == jnp.float32
    if form in ROUNDED:
        assert rounded_or_exact(out, x64, dense) < 1e-6
        assert relative_error(out, x64 @ dense) < 2.5e-3
    else:
        assert relative_error(out, x64 @ dense) < (1e-6 if form == "direct" else 1e-5)


@pytest.mark.parametrize("chunk", [256, 128])
def test_rows_may_be_held_once_and_a_block_unpacked_in_chunks(chunk):
    w, spec, dense = weight(500, 200, 64, True, True)
    x = rows_of_x(40, 500)
    out = product(x, w, spec, plan=Plan("shifted", 16, 256, 128, True, chunk, once=True))
    assert rounded_or_exact(out, np.asarray(x, np.float64), dense) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_codes_may_be_int4_as_well(form):
    w, spec, _ = weight(300, 128, 64, zero_points=True)
    int4 = w._replace(codes=words_to_int4(w.codes, 300))
    assert int4.codes.dtype == jnp.int4
    np.testing.assert_array_equal(int4_to_words(int4.codes)[:-1], w.codes[:-1])
    x = jnp.round(4 * rows_of_x(5, 300))  # whole numbers: their products are exact, fused with a sum or not
    plan = Plan(form, 5, 256, 128)
    out = product(x, int4, spec, plan=plan)
    np.testing.assert_array_equal(out, product(x, w, spec, plan=plan))


@pytest.mark.parametrize("form", FORMS)
def test_rounding_to_bf16_is_within_two_thousandths(form):
    w, spec, dense = weight(512, 256, 128, zero_points=True)
    x = rows_of_x(64, 512)
    out = product(x, w, spec, plan=Plan(form, 64, 256, 256), dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ (as_bf16(dense) if form in ROUNDED else dense)
    assert relative_error(out, exact) < 2e-3


@pytest.mark.parametrize(("precision", "allowed"), [(None, 2.5e-3), ("high", 1e-5), ("highest", 1e-6)])
def test_float32_goes_by_precision(precision, allowed):
    w, spec, dense = weight(256, 128, 64, True, True, scales=jnp.float32)
    x = rows_of_x(5, 256, jnp.float32)
    out = product(x, w, spec, precision=precision, chip=chip_named("v6e"))
    assert relative_error(out, np.asarray(x, np.float64) @ dense) < allowed


@pytest.mark.parametrize("m", [16, 300])
@pytest.mark.parametrize("chip", ["v4", "v5e", "v6e", "tpu7x"])
def test_the_plan_of_each_chip_matches_float64(chip, m):
    w, spec, dense = weight(384, 256, 64, True)
    x = rows_of_x(m, 384)
    out = product(x, w, spec, chip=chip_named(chip))
    assert relative_error(out, np.asarray(x, np.float64) @ as_bf16(dense)) < 2.5e-3


@pytest.mark.parametrize(
    "case", ["tails of M, K, N and group", "groups longer than a block", "per channel", "few columns"]
)
def test_transposed_product_matches_float64(case):
    m, k, n, group, zero_points, offsets, *_ = CASES[case]
    w, spec, dense = weight(k, n, group, zero_points, offsets)
    dy = rows_of_x(m, n)
    out = int4_matmul_tpu_transposed(dy, w, spec, block=128, interpret=True)
    assert rounded_or_exact(out, np.asarray(dy, np.float64), dense, lambda w: w.T) < 1e-6
    assert relative_error(out, np.asarray(dy, np.float64) @ dense.T) < 2.5e-3


@pytest.mark.parametrize("case", ["tails of M, K, N and group", "groups longer than a block", "many rows"])
def test_whole_numbers_go_as_int8_and_are_summed_exactly(case):
    m, k, n, group, zero_points, offsets, *blocks = CASES[case]
    w, spec, dense = weight(k, n, group, zero_points, offsets, scales=jnp.float32)
    x = in_numpy(np.round(20 * np.asarray(rows_of_x(m, k, jnp.float32))), jnp.float32)
    plan = Plan("integer", *blocks, chunk=128)
    out = product(x, w, spec, plan=plan, integers=True)
    assert relative_error(out, np.asarray(x, np.float64) @ dense) < 1e-6


def test_whole_numbers_go_by_the_integer_mxu_where_there_is_one():
    problem = Problem(128, 4096, 4096, 32, 128)
    forms = {chip.name: find_plan(problem, chip, integers=True).form for chip in CHIPS}
    assert forms["v5e"] == forms["v5p"] == "integer"
    assert "integer" not in (forms["v4"], forms["tpu7x"], find_plan(problem, UNKNOWN, integers=True).form)
    assert all(find_plan(problem, chip).form != "integer" for chip in CHIPS)


def test_one_value_for_all_columns():
    w, spec, dense = weight(256, 128, 128, True, True, columns=1)
    x = rows_of_x(5, 256)
    out = product(x, w, spec, plan=Plan("direct", 5, 256, 128))
    assert relative_error(out, np.asarray(x, np.float64) @ np.broadcast_to(dense, (256, 128))) < 1e-6


def test_public_function_takes_it_stacked_scanned_and_differentiated():
    w, spec, dense = weight(128, 128, 32, batch=(2,))
    x = jnp.stack([rows_of_x(3, 128, seed=seed) for seed in (1, 2)])

    def product(x, w):
        return int4_matmul(x, *w, spec=spec, implementation="tpu_interpret", preferred_element_type=jnp.float32)

    def scanned(x, w):
        return jax.lax.scan(lambda _, layer: (None, product(*layer)), None, (x, w))[1]

    want = np.asarray(x, np.float64) @ dense
    assert relative_error(product(x, w), want) < 1e-6  # one call with batch axes: vmapped
    assert relative_error(jax.jit(scanned)(x, w), want) < 1e-6
    whole = jnp.round(20 * x)
    out = int4_matmul(whole, *w, spec=spec, implementation="tpu_interpret", fits="int8")
    assert relative_error(out, np.asarray(whole, np.float64) @ dense) < 2e-3
    gradient = jax.grad(lambda x: jnp.sum(product(x, w)))(x)
    assert relative_error(gradient, np.ones((2, 3, 128)) @ np.swapaxes(dense, -1, -2)) < 5e-3


@pytest.mark.parametrize("group", [32, 64, 96, 128, 256])
def test_magic_order_is_what_words_hold(group):
    columns = 768
    x = jnp.arange(columns, dtype=jnp.float32) % 256
    order = np.asarray(magic_order(jnp.asarray(x[None], jnp.bfloat16), group)[0], np.int64)
    chunk = np.gcd(group, 128)
    want = [
        start + 8 * r + 4 * h + j
        for start in range(0, columns, chunk)
        for j, r, h in itertools.product(range(4), range(chunk // 8), range(2))
    ]
    assert order.tolist() == [place % 256 for place in want]


def test_what_it_does_not_take_is_said_and_left_to_xla():
    neutral, odd = PackedSpec(128), PackedSpec(128, group_size=24, layout="tpu")
    assert choose(None, "tpu", PackedSpec(128, layout="tpu")) == "tpu"
    assert choose(None, "tpu", neutral) == choose(None, "tpu", odd) == "xla"
    assert choose(None, "cpu", PackedSpec(128, layout="tpu")) == "xla"
    assert choose(None, "tpu", PackedSpec(8192, group_size=1056, layout="tpu")) == "xla"
    w, _, _ = weight(128, 128, 24)
    with pytest.raises(UnsupportedError, match="groups of a multiple of 32 rows, not of 24"):
        int4_matmul(rows_of_x(2, 128), *w, spec=odd, implementation="tpu")
    with pytest.raises(UnsupportedError, match=r"reads the tpu layout, not the neutral one \(jq4.prepare"):
        int4_matmul(
            rows_of_x(2, 128), jnp.zeros((64, 4), jnp.uint8), w.scale[:1, 0, :4], spec=neutral, implementation="tpu"
        )


@pytest.mark.parametrize("chip", [*CHIPS, UNKNOWN], ids=lambda chip: chip.name)
def test_plans_fit_the_chip_and_read_enough_at_a_time(chip):
    sizes = [SHAPES["llama-3-70b/gate_up"], SHAPES["llama-3.2-1b/o_proj"], (11008, 4096), (4001, 4099), (4096, 75)]
    for (k, n), m, group, zero in itertools.product(sizes, (1, 16, 128, 2048), (32, 96, 128, 10**9), (False, True)):
        groups = -(-k // group)
        problem = Problem(m, k, n, groups, min(group, k), zero)
        plan = find_plan(problem, chip)
        where = (chip.name, problem, plan)
        assert vmem_of(problem, plan, chip) <= chip.vmem, where
        assert plan.block_k % 128 == 0 and (plan.block_n % 128 == 0 or plan.block_n == n), where
        assert groups == 1 or plan.block_k % group == 0 or group % plan.block_k == 0, where
        assert plan.block_m == m or plan.block_m % 16 == 0, where
        if m <= 16 and k * n >= 2**24 and n % 128 == 0 and group != 96:
            assert plan.block_k * plan.block_n >= 2**21, where  # a MiB
            assert not plan.loops, where  # a layer of a stack is read in place


def test_the_chip_is_that_of_the_trace():
    assert traced_chip() is UNKNOWN  # this process has CPUs
    for chip, cores in (("TPU v4", 2), ("TPU v5 lite", 1), ("TPU v5", 2), ("TPU v6 lite", 1), ("TPU7x", 1)):
        device = jax.sharding.AbstractDevice(chip, cores, "tpu")
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
            assert chip in traced_chip().kinds


def test_float16_is_computed_in_float32():
    packed, spec, dense = weight(256, 128, 64, True, True, scales=jnp.float16)
    x = rows_of_x(5, 256, jnp.float16)
    out = int4_matmul(x, *packed, spec=spec, implementation="tpu_interpret")
    assert out.dtype == jnp.float16
    assert relative_error(out, np.asarray(x, np.float64) @ dense) < 3e-3


def test_products_of_whole_numbers_say_so_to_the_kernel(monkeypatch):
    """jq4.matmul with rounded inputs, traced for a TPU with an integer MXU."""
    seen = []
    run = BACKENDS["tpu"].run
    spy = dataclasses.replace(BACKENDS["tpu"], run=lambda *args, **words: seen.append(words) or run(*args, **words))
    monkeypatch.setitem(BACKENDS, "tpu", spy)
    rule = jq4.Rule(("w",), group_size=64, axis=-2, input_activations={"num_bits": 8})
    tree = jq4.prepare(jq4.quantize({"w": jnp.ones((192, 128), jnp.bfloat16)}, rule), "TPU v5 lite")
    jax.eval_shape(jq4.matmul, jnp.ones((7, 192), jnp.bfloat16), tree["w"])
    assert seen and all(words.get("fits") == "int8" for words in seen)


def test_second_derivatives_and_named_algorithms_have_a_form():
    packed, spec, dense = weight(128, 128, 64)
    x = rows_of_x(4, 128, jnp.float32)

    def loss(x):
        return jnp.sum(int4_matmul(x, *packed, spec=spec, precision="F32_F32_F32") ** 2)

    found = jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), x))(x)
    wanted = 4 * (np.asarray(x, np.float64) @ dense) @ dense.T
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("shape", [(0, 64, 128), (3, 0, 128), (3, 64, 0)], ids=["rows", "depth", "columns"])
@pytest.mark.parametrize("implementation", [None, "tpu_interpret"])
def test_of_nothing_come_zeros(shape, implementation):
    m, k, n = shape
    spec, groups = PackedSpec(k, group_size=32, layout="tpu"), -(-k // 32)
    codes, scale = jnp.zeros((k // 8, n), jnp.int32), jnp.ones((groups, 1, n), jnp.bfloat16)
    out = int4_matmul(jnp.ones((m, k), jnp.bfloat16), codes, scale, spec=spec, implementation=implementation)
    assert (out.shape, out.dtype) == ((m, n), jnp.bfloat16) and not out.any()


@pytest.mark.parametrize("shape", [(0, 64, 128), (3, 0, 128), (3, 64, 0)], ids=["rows", "depth", "columns"])
def test_every_form_gives_zeros_of_nothing(shape):
    m, k, n = shape
    spec, groups = PackedSpec(k, group_size=32, layout="tpu"), -(-k // 32)
    w = Packed(jnp.zeros((k // 8, n), jnp.int32), jnp.ones((groups, 1, n), jnp.bfloat16))
    x, dy = jnp.ones((m, k), jnp.bfloat16), jnp.ones((m, n), jnp.bfloat16)
    outs = [int4_matmul_xla(x, w, spec, platform=platform) for platform in ("cpu", "tpu", "gpu")]
    outs += [product(x, w, spec), matmul_tpu(x, w, spec, interpret=True)]
    experts, sizes = jax.tree.map(lambda part: part[None], w), jnp.asarray([m])
    outs += [grouped_product(x, experts, sizes, spec)]
    outs += [
        grouped_int4_matmul(x, *experts, group_sizes=sizes, spec=spec, implementation=name)
        for name in (None, "xla", "reference", "tpu_interpret")
    ]
    assert [out.shape for out in outs] == [(m, n)] * len(outs) and not any(jnp.any(out) for out in outs)
    back = [int4_matmul_tpu_transposed(dy, w, spec, interpret=True)]
    back += [grouped_int4_matmul_tpu_transposed(dy, experts, sizes, spec, interpret=True)]
    assert [out.shape for out in back] == [(m, k)] * len(back) and not any(jnp.any(out) for out in back)


def test_kernels_called_by_themselves_hold_to_the_default_precision():
    w, spec, dense = weight(256, 128, 64, scales=jnp.float32)
    x, experts = rows_of_x(5, 256, jnp.float32), jax.tree.map(lambda part: part[None], w)
    for precision, allowed in (("float32", 1e-6), ("bfloat16", 2.5e-3)):
        with jax.default_matmul_precision(precision):
            outs = [product(x, w, spec)]
            outs += [grouped_product(x, experts, jnp.asarray([5]), spec)]
        for out in outs:
            error = relative_error(out, np.asarray(x, np.float64) @ dense)
            assert error < allowed and (precision == "float32" or error > 1e-4)


def test_what_fits_no_memory_is_left_to_xla():
    tiny = dataclasses.replace(chip_named("v6e"), vmem=2**20)
    w, spec, dense = weight(256, 128, 128, True)
    x = rows_of_x(5, 256, jnp.float32)
    assert find_plan(Problem(5, 256, 128, 2, 128, True), tiny) is None
    out = product(x, w, spec, chip=tiny)
    assert relative_error(out, np.asarray(x, np.float64) @ dense) < 1e-6


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_every_tuned_plan_is_legal_fits_and_is_taken(chip):
    for key, entry in table().get(chip.name, {}).items():
        rows, k, n, group = (int(number) for number in re.findall(r"\d+", key))
        problem = Problem(rows, k, n, k // group if group else 1, group or k, key.endswith("z"), out_bytes=2)
        plan = plan_of(entry, rows, chip)
        where = (chip.name, key, plan)
        assert find_plan(problem, chip) == plan and key_of(problem) == key, where
        assert plan in ranked(problem, chip, False, False, False) and entry_of(plan) == entry, where
        fewer = dataclasses.replace(problem, m=rows - 7)  # of the same bucket
        assert find_plan(fewer, chip) == dataclasses.replace(plan, block_m=min(plan.block_m, rows - 7)), where
        assert tuned_plan(dataclasses.replace(problem, m=2 * rows + 1), chip, False) is None, where


def test_a_plan_of_the_table_goes_before_the_models(monkeypatch):
    chip, problem = chip_named("v5e"), Problem(16, 1024, 1024, 8, 128, out_bytes=2)
    entry = ["wscale", 16, 256, 512, True, 256]
    assert find_plan(problem, chip) != plan_of(entry, 16, chip)
    monkeypatch.setattr(tpu_tuned, "table", lambda: {"v5e": {"16 x 1024 x 1024 g 128": entry}})
    find_plan.cache_clear()
    assert find_plan(problem, chip) == Plan("wscale", 16, 256, 512, True, 256, wide=True)
    assert find_plan(problem, chip, True) != Plan("wscale", 16, 256, 512, True, 256, wide=True)  # it rounds weights
    find_plan.cache_clear()


def test_forms_that_round_weights_err_as_dense_bf16_weights_do():
    """Roundings of 2^-9 at most, of weights (1.4e-3) and of the result (1.7e-3): 2.2e-3 together; `direct` has one."""
    w, spec, dense = weight(1024, 128, 128)
    x = rows_of_x(16, 1024)
    exact = np.asarray(x, np.float64) @ dense
    product = jnp.asarray(np.asarray(x, np.float64) @ as_bf16(dense), jnp.float32).astype(jnp.bfloat16)
    of_dense = relative_error(product, exact)

    def error(form, dtype):
        plan = Plan(form, 16, 1024, 128)
        return relative_error(int4_matmul_tpu(x, w, spec, plan=plan, dtype=dtype, interpret=True), exact)

    assert 1.3e-3 < error("wscale", jnp.float32) < 1.6e-3
    assert 2e-3 < of_dense < 2.4e-3
    for form in ROUNDED:
        assert error(form, jnp.bfloat16) == pytest.approx(of_dense, rel=1e-3)
    for form in ("direct", "magic"):
        assert error(form, jnp.bfloat16) < 1.8e-3


@pytest.mark.parametrize(("group", "dtype"), [(512, jnp.int32), (544, jnp.int4), (40, jnp.int4)])
def test_words_are_made_for_groups_that_the_kernel_takes(group, dtype):
    leaf = jq4.quantize({"w": jnp.ones((1632, 128), jnp.bfloat16)}, jq4.Rule(("w",), group_size=group, axis=-2))["w"]
    prepared = jq4.prepare({"w": leaf}, "TPU v6 lite")["w"]
    assert prepared.codes.dtype == dtype
    assert choose(None, "tpu", PackedSpec(1632, group_size=group, layout="tpu")) == (
        "tpu" if dtype == jnp.int32 else "xla"
    )
    np.testing.assert_array_equal(prepared.dequantize(), leaf.dequantize())
