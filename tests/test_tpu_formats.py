"""Oracle: numpy in float64, from the formats' own levels. int8, nf4 and fp4 on a TPU: the kernel by Pallas' interpreter
(memory it never wrote is NaN), XLA's form on a CPU, and (marker aot) both through the TPU compiler."""

import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_oracle import pack_bits

from benchmarks.aot import environment, missing
from benchmarks.provenance import ROOT
from benchmarks.tpu_lab.jobs import Job, run
from jq4.activations import rounding_inputs
from jq4.formats import FORMATS
from jq4.layouts import prepare, to_neutral
from jq4.matmul import dot_general, matmul
from jq4.qarray import QArray
from jq4.qarray_ops import NoPackedForm
from pallas_kernels.int4_matmul import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.int4_matmul.tpu import int4_matmul_tpu
from pallas_kernels.int4_matmul.tpu_chips import chip_named
from pallas_kernels.int4_matmul.tpu_int8 import kernel_pays, matmul_tpu
from pallas_kernels.int4_matmul.tpu_plan import Plan
from pallas_kernels.int4_matmul.tpu_tables import tables_for
from pallas_kernels.int4_matmul.words import int4_to_words

# format, M, K, N, group, zero points, offsets
CASES: dict[str, tuple[Any, ...]] = {
    "nf4": ("nf4", 5, 256, 128, 64, False, False),
    "nf4 with tails of K, N and group": ("nf4", 7, 160, 75, 32, False, True),
    "nf4 with one group": ("nf4", 5, 200, 128, 200, False, False),
    "fp4": ("fp4", 5, 128, 128, 32, False, False),
    "int8": ("int8", 5, 256, 128, 128, False, False),
    "int8 with tails and zero points": ("int8", 20, 300, 75, 64, True, True),
    "int8 with a scale a column": ("int8", 5, 200, 128, 200, True, False),
}


def levels_of(name):
    form = FORMATS[name]
    return np.arange(2**form.bits) - 2 ** (form.bits - 1) if form.levels is None else np.asarray(form.levels)


def in_numpy(array, dtype):
    """A jax.Array that nothing was compiled for."""
    return jax.device_put(array.astype(dtype))


def product(x, w, spec, **options):
    """int4_matmul_tpu of the interpreter, compiled as one program."""
    return jax.jit(functools.partial(int4_matmul_tpu, spec=spec, interpret=True, **options))(x, w)


def weight(name, k, n, group, zero_points, offsets, seed=0):
    """(QArray in the neutral layout, the dense weight f64)."""
    rng, bits = np.random.default_rng(seed), FORMATS[name].bits
    shape = (-(-k // group), n)
    codes = rng.integers(0, 2**bits, (k, n)).astype(np.uint8)
    scale = in_numpy(rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape), jnp.bfloat16)
    zero_point = in_numpy(rng.integers(0, 2**bits, shape), jnp.uint8) if zero_points else None
    offset = in_numpy(rng.normal(size=shape), jnp.bfloat16) if offsets else None

    def rows(part, empty):
        return empty if part is None else np.repeat(np.asarray(part, np.float64), group, 0)[:k]

    center = 0.0 if zero_point is None else rows(zero_point, 0.0) - 2 ** (bits - 1)
    dense = (levels_of(name)[codes] - center) * rows(scale, 0.0) + rows(offset, 0.0)
    packed = pack_bits(codes, bits, 0)
    padding = packed.shape[0] * 8 // bits - k
    q = QArray(
        jnp.asarray(packed), scale, zero_point, offset,
        format=name, group_size=group, padding=padding, dtype="bfloat16",
    )  # fmt: skip
    return q, dense


def prepared(q: QArray) -> QArray:
    return prepare({"w": q}, "TPU v6 lite")["w"]


def arguments(q: QArray) -> tuple[Packed, PackedSpec]:
    spec = PackedSpec(q.shape[0], q.bits, q.number_format.levels, q.group_size, layout="tpu")
    return Packed(q.codes, q.scale, q.zero_point, q.offset), spec


def rows_of_x(m, k, dtype=jnp.bfloat16):
    return in_numpy(np.random.default_rng(1).normal(size=(m, k)), dtype)


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("case", CASES)
def test_prepare_lays_them_for_a_tpu_and_back_bit_by_bit(case):
    name, _, k, n, *rest = CASES[case]
    q, dense = weight(name, k, n, *rest)
    laid = prepared(q)
    assert (laid.layout, laid.shape) == ("tpu", (k, n))
    assert laid.codes.dtype == (jnp.int8 if name == "int8" else jnp.int32)
    for one, other in zip(jax.tree.leaves(to_neutral(laid)), jax.tree.leaves(q), strict=True):
        np.testing.assert_array_equal(one, other)
    assert error(laid.dequantize(jnp.float32), dense) < 1e-6


@pytest.mark.parametrize(("chip", "form"), [("v6e", "direct"), ("v5e", "wscale"), ("v4", "direct")])
@pytest.mark.parametrize("case", CASES)
def test_forms_match_float64(case, chip, form):
    name, m, k, n, *rest = CASES[case]
    q, dense = weight(name, k, n, *rest)
    w, spec = arguments(prepared(q))
    plan = Plan(form, m, 128, n, wide=chip == "v5e" and form == "wscale")
    out = product(rows_of_x(m, k), w, spec, plan=plan, chip=chip_named(chip))
    rounded = form == "wscale" or name == "nf4"  # weights, or levels, to bf16
    assert error(out, np.asarray(rows_of_x(m, k), np.float64) @ dense) < (2.5e-3 if rounded else 1e-6)


def test_float32_asks_for_levels_as_exact_as_rows():
    q, dense = weight("nf4", 128, 128, 64, False, False)
    w, spec = arguments(prepared(q))
    x = rows_of_x(5, 128, jnp.float32)
    out = product(x, w, spec, precision="highest", chip=chip_named("v6e"))
    assert error(out, np.asarray(x, np.float64) @ dense) < 1e-6


@pytest.mark.parametrize("chip", ["v4", "v6e"])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_tables_hold_every_level_where_a_stored_code_finds_it(name, chip):
    (table,) = tables_for(FORMATS[name].levels, chip, 1)
    assert table is not None
    bits = np.asarray(levels_of(name), np.float32).astype(jnp.bfloat16).view(np.uint16)
    for code in range(16):
        stored = code ^ 8
        if chip == "v4":  # 128 pairs to a table: the second code is in the high half
            assert table[0, 0, stored] & 0xFFFF == bits[code]
            assert np.uint32(table[stored >> 3, 5, (stored & 7) << 4]) >> 16 == bits[code]
        else:
            assert table[stored >> 3, stored & 7, 0] == bits[code]
            assert np.uint32(table[2 + (stored >> 3), stored & 7, 99]) >> 16 == bits[code]


@pytest.mark.parametrize("implementation", [None, "xla", "tpu_interpret"])
@pytest.mark.parametrize("case", ["nf4 with tails of K, N and group", "int8 with tails and zero points", "fp4"])
def test_products_and_their_gradients_match_float64(case, implementation):
    name, m, k, n, *rest = CASES[case]
    q, dense = weight(name, k, n, *rest)
    x, numbers = rows_of_x(m, k), (((1,), (0,)), ((), ()))
    cotangent = rows_of_x(m, n)

    @jax.jit
    def with_gradient(q, x, cotangent):
        run = functools.partial(
            dot_general, dimension_numbers=numbers, weight_side="rhs", implementation=implementation
        )
        out, pull = jax.vjp(lambda x: run(x, q), x)
        return out, pull(cotangent)[0]

    out, gradient = with_gradient(prepared(q), x, cotangent)
    assert out.dtype == jnp.bfloat16 and error(out, np.asarray(x, np.float64) @ dense) < 3e-3
    assert error(gradient, np.asarray(cotangent, np.float64) @ dense.T) < 4e-3


def test_whole_numbers_are_summed_exactly_on_an_integer_mxu():
    x = jnp.round(20 * rows_of_x(9, 300, jnp.float32))
    for group in (300, 64):
        q, dense = weight("int8", 300, 128, group, False, False)
        w, spec = arguments(prepared(q))
        out = matmul_tpu(x, w, spec, fits="int8", chip=chip_named("v6e"), interpret=True)
        assert error(out, np.asarray(x, np.float64) @ dense) < 1e-6
        text = str(jax.make_jaxpr(lambda x, w=w, s=spec: matmul_tpu(x, w, s, fits="int8", chip=chip_named("v6e")))(x))
        assert "preferred_element_type=int32" in text


def test_rounded_activations_keep_their_integer_product_when_prepared():
    q, _ = weight("int8", 256, 128, 256, False, False)
    rounding = rounding_inputs(q, "int8-token", None)
    x = rows_of_x(5, 256)
    np.testing.assert_allclose(
        np.asarray(matmul(x, prepared(rounding)), np.float32), np.asarray(matmul(x, rounding), np.float32), rtol=1e-2
    )


def test_the_kernel_of_eight_bits_serves_many_rows_by_groups_alone():
    grouped, column = PackedSpec(4096, 8, group_size=128, layout="tpu"), PackedSpec(4096, 8, None, 4096, layout="tpu")
    assert kernel_pays(512, grouped, chip_named("v6e"), False) and kernel_pays(512, grouped, chip_named("v5e"), True)
    assert not kernel_pays(16, grouped, chip_named("v6e"), False)
    assert not kernel_pays(512, column, chip_named("v6e"), True)
    assert not kernel_pays(512, grouped, chip_named("v5e"), False)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v6e"])
def test_many_rows_by_groups_of_eight_bits_match_float64(chip):
    q, dense = weight("int8", 300, 75, 64, True, True)
    w, spec = arguments(prepared(q))
    x = rows_of_x(40, 300)
    out = matmul_tpu(x, w, spec, chip=chip_named(chip), interpret=True)
    assert error(out, np.asarray(x, np.float64) @ dense) < 2.5e-3
    text = str(jax.make_jaxpr(lambda x: matmul_tpu(x, w, spec, chip=chip_named(chip)))(x))
    assert ("pallas_call" in text) == (chip == "v6e") and text.count("dot_general") >= 1


def test_codebooks_that_the_kernel_does_not_take_stay_neutral():
    q, _ = weight("nf4", 96, 128, 48, False, False)
    assert prepared(q).layout == "neutral"
    with pytest.raises(NoPackedForm):
        dot_general(rows_of_x(3, 128), prepared(q), (((1,), (1,)), ((), ())), weight_side="rhs")


def test_stacked_codebooks_are_prepared_layer_by_layer():
    layers = [weight("nf4", 256, 128, 64, False, False, seed=seed) for seed in range(3)]
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), *(prepared(q) for q, _ in layers))
    x = rows_of_x(4, 256)
    _, outs = jax.lax.scan(lambda carry, q: (carry, matmul(x, q)), 0, stack)
    for out, (_, dense) in zip(outs, layers, strict=True):
        assert error(out, np.asarray(x, np.float64) @ dense) < 3e-3


def test_words_of_a_codebook_are_those_of_its_codes():
    q, _ = weight("nf4", 64, 128, 64, False, False)
    codes = np.asarray(q.codes)
    unpacked = np.stack([codes & 15, codes >> 4], 1).reshape(64, 128)
    np.testing.assert_array_equal(prepared(q).codes, int4_to_words(jnp.asarray(unpacked.astype(np.int8) - 8, jnp.int4)))


@pytest.mark.aot
@pytest.mark.parametrize("chip", ["v4", "v5p"])
def test_xla_makes_the_weights_of_eight_bits_while_it_multiplies(chip):
    """Many rows by groups in one dot: nothing of a dense weight is in memory, nor is a layer copied out of a stack."""
    if reason := missing("v5e:2x2"):
        pytest.skip(reason)
    script = f"""
import jax, jax.numpy as jnp
from benchmarks.tpu_lab.chips import CHIPS
from benchmarks.tpu_lab.compiling import compiled, traced
from pallas_kernels.int4_matmul import PackedSpec, int4_matmul
chip, struct, spec = CHIPS["{chip}"], jax.ShapeDtypeStruct, PackedSpec(4096, 8, group_size=128, layout="tpu")
def product(x, codes, scale):
    return int4_matmul(x, codes, scale, spec=spec)
def scanned(x, codes, scale):
    layer = lambda total, weight: (total + jnp.sum(product(x, *weight).astype(jnp.float32)), None)
    return jax.lax.scan(layer, 0.0, (codes, scale))[0]
def repeated(x, codes, scale):
    return jax.lax.fori_loop(0, 9, lambda _, x: jnp.tanh(product(x, codes, scale)[:, :4096]), x)
for function, stack in ((product, ()), (scanned, (4,)), (repeated, ())):
    args = (struct((512, 4096), jnp.bfloat16), struct((*stack, 4096, 11008), jnp.int8),
            struct((*stack, 32, 1, 11008), jnp.bfloat16))
    print(compiled(chip, traced(chip, function, args)).memory_analysis().temp_size_in_bytes < 2**24)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment("v5e:2x2"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True"] * 3


@pytest.mark.aot
@pytest.mark.parametrize("chip", ["v4", "v6e"])
def test_the_compiler_takes_them_and_keeps_them_packed(chip):
    if reason := missing("v6e:2x2"):
        pytest.skip(reason)
    size = {"k": 1024, "n": 512}
    cases = [
        {"rows": 16, "group_size": 64, "format": "nf4", **size},
        {"rows": 512, "group_size": 64, "format": "nf4", **size},
        {"rows": 512, "group_size": 128, "format": "int8", **size},
    ]
    for row in run([Job(chip, "tpu", case) for case in cases], dump=False):
        assert row["status"] == "ok", row
        assert row["temp_bytes"] < 2 * 1024 * 512
