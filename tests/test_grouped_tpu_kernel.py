"""Oracle: numpy in float64, expert by expert. The kernel runs in Pallas' interpreter of TPU kernels, and (marker aot)
goes through the TPU compiler; memory that it never wrote is NaN."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.aot import environment, missing
from benchmarks.provenance import ROOT
from jq4.formats import FORMATS
from jq4.matmul import ragged_dot
from jq4.qarray import QArray
from pallas_kernels.grouped_int4_matmul import grouped_int4_matmul
from pallas_kernels.grouped_int4_matmul.tpu import grouped_int4_matmul_tpu
from pallas_kernels.grouped_int4_matmul.tpu_transposed import grouped_int4_matmul_tpu_transposed
from pallas_kernels.grouped_int4_matmul.work_items import place_of_rows, work_items
from pallas_kernels.grouped_int4_matmul.xla import grouped_input_cotangent, grouped_xla
from pallas_kernels.int4_matmul import PackedSpec, UnsupportedError
from pallas_kernels.int4_matmul.tiles import Packed, squeezed_scales
from pallas_kernels.int4_matmul.tpu_chips import chip_named
from pallas_kernels.int4_matmul.words import int4_to_words, words_to_int4

# rows of each expert, K, N, group, zero points, offsets
CASES = {
    "even": ((16, 16, 16, 16), 256, 128, 64, False, False),
    "empty ones": ((0, 7, 0, 0, 33, 0), 256, 128, 128, True, False),
    "one huge expert": ((0, 150, 0, 1), 128, 128, 32, False, False),
    "rows left over": ((3, 0, 5), 128, 128, 64, False, True),
    "tails of M, N, K and group": ((9, 2, 31), 200, 75, 64, True, True),
    "one scale a column": ((1, 0, 20), 300, 128, 300, True, False),
    "no rows at all": ((0, 0), 128, 128, 128, False, False),
}


def in_numpy(array, dtype):
    """A jax.Array that nothing was compiled for."""
    return jax.device_put(array.astype(dtype))


def product(x, w, sizes, spec, **options):
    """grouped_int4_matmul_tpu of the interpreter, compiled as one program."""
    run = functools.partial(grouped_int4_matmul_tpu, spec=spec, interpret=True, **options)
    return jax.jit(run)(x, w, jnp.asarray(sizes))


def experts(sizes, k, n, group, zero_points, offsets, seed=0):
    """(Packed in the tpu layout, its spec, the dense experts f64)."""
    rng = np.random.default_rng(seed)
    shape = (len(sizes), -(-k // group), 1, n)
    codes = rng.integers(-8, 8, (len(sizes), k, n))
    scale = in_numpy(rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape), jnp.bfloat16)
    zero_point = in_numpy(rng.integers(0, 16, shape), jnp.uint8) if zero_points else None
    offset = in_numpy(rng.normal(size=shape), jnp.bfloat16) if offsets else None

    def rows(part, empty):
        return empty if part is None else np.repeat(np.asarray(part, np.float64)[:, :, 0], group, 1)[:, :k]

    dense = (codes - rows(zero_point, 8.0) + 8.0) * rows(scale, 0.0) + rows(offset, 0.0)
    spec = PackedSpec(k, group_size=group, layout="tpu")
    return Packed(int4_to_words(jnp.asarray(codes, jnp.int4)), scale, zero_point, offset), spec, dense


def in_turn(x, dense, sizes):
    """f64[M, N]: each row by its expert, rows left over zero."""
    out, start = np.zeros((x.shape[0], dense.shape[2])), 0
    for expert, size in enumerate(sizes):
        out[start : start + size] = np.asarray(x[start : start + size], np.float64) @ dense[expert]
        start += size
    return out


def rows_of_x(m, k, dtype=jnp.bfloat16):
    return in_numpy(np.random.default_rng(1).normal(size=(m, k)), dtype)


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / max(np.linalg.norm(want), 1e-30)


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_matches_float64(case, chip):
    sizes, *rest = CASES[case]
    w, spec, dense = experts(sizes, *rest)
    x = rows_of_x(sum(sizes) + 5, spec.length)
    out = product(x, w, sizes, spec, chip=chip_named(chip), tile_rows=16)
    assert out.shape == (x.shape[0], dense.shape[2]) and bool(jnp.all(jnp.isfinite(out)))
    assert error(out, in_turn(x, dense, sizes)) < 2.5e-3  # weights rounded to bf16 at worst; others are near 1e-7


def test_float32_rows_are_multiplied_as_exactly_as_they_ask():
    sizes = (5, 0, 12)
    w, spec, dense = experts(sizes, 128, 128, 64, True, False)
    x = rows_of_x(17, 128, jnp.float32)
    out = product(x, w, sizes, spec, precision="highest")
    assert error(out, in_turn(x, dense, sizes)) < 1e-6


def test_codes_may_be_int4_instead_of_words():
    sizes = (5, 0, 12)
    w, spec, dense = experts(sizes, 128, 128, 64, True, False)
    x, int4 = rows_of_x(17, 128), w._replace(codes=words_to_int4(w.codes, 128))
    out = product(x, int4, sizes, spec)
    assert error(out, in_turn(x, dense, sizes)) < 2.5e-3


def test_items_cover_every_row_once_and_no_empty_expert():
    rng, (rows, bm) = np.random.default_rng(2), (300, 16)
    found = jax.jit(lambda sizes: (work_items(sizes, rows, bm), place_of_rows(sizes, rows, bm)))
    for _ in range(50):
        sizes = rng.integers(0, 40, 7) * rng.integers(0, 2, 7)
        items, place_of = jax.tree.map(np.asarray, found(jnp.asarray(sizes)))
        owner = np.full(rows, -1)
        for item in range(items.used[0]):
            place = items.tile[item] * bm + np.arange(items.first[item], items.end[item])
            assert len(place) and np.all(owner[place] == -1)
            owner[place] = items.expert[item]
        total = sizes.sum()
        assert np.array_equal(owner[:total], np.repeat(np.arange(7), sizes)) and np.all(owner[total:] == -1)
        written = np.concatenate([items.tile[i] * bm + np.arange(bm) for i in range(items.used[0])] or [np.zeros(0)])
        place = place_of[:total]
        assert np.array_equal(written[place], np.arange(total)) and np.all(np.diff(place) > 0)
        assert np.array_equal(items.expert[place // bm], owner[:total])


def test_the_public_function_and_its_gradient_take_it_by_name():
    sizes = jnp.asarray((9, 0, 4))
    w, spec, dense = experts((9, 0, 4), 128, 128, 32, True, False)
    x = rows_of_x(13, 128, jnp.float32)

    weights = jnp.asarray(np.random.default_rng(3).normal(size=(13, 128)), jnp.float32)

    def total(x):
        out = grouped_int4_matmul(x, *w, group_sizes=sizes, spec=spec, implementation="tpu_interpret")
        return jnp.sum(out * weights), out

    (_, out), dx = jax.value_and_grad(total, has_aux=True)(x)
    assert error(out, in_turn(x, dense, (9, 0, 4))) < 3e-3
    assert error(dx, in_turn(weights, dense.transpose(0, 2, 1), (9, 0, 4))) < 3e-3


WORDS = {  # K, N, group: blocks of K of one group, of parts of one that are no whole words, of one scale a column
    "a group a block": (300, 75, 64),
    "blocks cut from groups": (600, 40, 288),
    "a column": (1004, 24, 2048),
    "groups of other than whole words": (700, 16, 108),
}


@pytest.mark.parametrize("case", WORDS)
def test_xlas_form_for_tpus_unpacks_words_block_by_block(case):
    sizes = (5, 0, 9)
    w, spec, dense = experts(sizes, *WORDS[case], True, True)
    w, x = squeezed_scales(w, spec), rows_of_x(17, spec.length, jnp.float32)
    out = jax.jit(lambda x: grouped_xla(x, w, jnp.asarray(sizes), spec, platform="tpu", precision="highest"))(x)
    assert error(out, in_turn(x, dense, sizes)) < 1e-6
    dy, back = rows_of_x(17, dense.shape[2], jnp.float32), functools.partial(grouped_input_cotangent, spec=spec)
    back = functools.partial(back, dtype=jnp.float32, platform="tpu", precision="highest")
    dx = jax.jit(lambda dy: back(dy, w, jnp.asarray(sizes)))(dy)
    assert error(dx, in_turn(dy, dense.transpose(0, 2, 1), sizes)) < 1e-6


def test_where_no_block_fits_the_memory_it_is_xlas_form():
    sizes = (5, 0, 9)
    w, spec, dense = experts(sizes, 256, 128, 128, True, True)
    chip = dataclasses.replace(chip_named("v5e"), vmem=2**20)
    out = product(rows_of_x(17, 256), w, sizes, spec, chip=chip)
    assert error(out, in_turn(rows_of_x(17, 256), dense, sizes)) < 2.5e-3


def test_a_weight_it_does_not_read_is_refused_by_name():
    spec = PackedSpec(128, group_size=32)
    x, codes = jnp.zeros((4, 128)), jnp.zeros((2, 64, 128), jnp.uint8)
    with pytest.raises(UnsupportedError, match=r"tpu of grouped_int4_matmul does not take .* reads the tpu layout"):
        grouped_int4_matmul(
            x, codes, jnp.zeros((2, 4, 128)), group_sizes=jnp.asarray((2, 2)), spec=spec, implementation="tpu"
        )


def test_a_ragged_product_of_packed_experts_reaches_it():
    w, spec, dense = experts((6, 3), 128, 128, 64, False, False)
    q = QArray(w.codes, w.scale, group_size=64, dtype="bfloat16", layout="tpu")
    out = ragged_dot(rows_of_x(9, 128), q, jnp.asarray((6, 3)), implementation="tpu_interpret")
    assert out.dtype == jnp.bfloat16 and error(out, in_turn(rows_of_x(9, 128), dense, (6, 3))) < 5e-3
    assert spec.num_groups == 2


@pytest.mark.parametrize("case", CASES)
def test_the_transposed_kernel_matches_float64(case):
    sizes, *rest = CASES[case]
    w, spec, dense = experts(sizes, *rest)
    dy = rows_of_x(sum(sizes) + 5, dense.shape[2])
    run = functools.partial(grouped_int4_matmul_tpu_transposed, tile_rows=16, block=128, interpret=True)
    out = jax.jit(functools.partial(run, spec=spec))(dy, w, jnp.asarray(sizes))
    assert out.shape == (dy.shape[0], spec.length) and bool(jnp.all(jnp.isfinite(out)))
    assert error(out, in_turn(dy, dense.transpose(0, 2, 1), sizes)) < 2.5e-3


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_experts_of_other_formats_match_float64_with_their_gradient(name):
    sizes = jnp.asarray((9, 0, 4))
    rng, form = np.random.default_rng(5), FORMATS[name]
    codes = rng.integers(0, 2**form.bits, (3, 200, 128))
    levels = codes - 128.0 if form.levels is None else np.asarray(form.levels)[codes]
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (3, 4, 1, 128)), jnp.bfloat16)
    dense = levels * np.repeat(np.asarray(scale, np.float64)[:, :, 0], 64, 1)[:, :200]
    stored = jnp.asarray(codes - 128, jnp.int8) if name == "int8" else int4_to_words(jnp.asarray(codes - 8, jnp.int4))
    spec = PackedSpec(200, form.bits, form.levels, 64, layout="tpu")
    x, dy = rows_of_x(15, 200), rows_of_x(15, 128)

    def product(x, implementation):
        return grouped_int4_matmul(x, stored, scale, group_sizes=sizes, spec=spec, implementation=implementation)

    for implementation in ("tpu_interpret", "xla"):
        out, pull = jax.vjp(functools.partial(product, implementation=implementation), x)
        assert error(out, in_turn(x, dense, (9, 0, 4))) < 3e-3
        assert error(pull(dy)[0], in_turn(dy, dense.transpose(0, 2, 1), (9, 0, 4))) < 4e-3


def test_whole_numbers_go_as_int8_and_are_summed_exactly():
    sizes = (9, 0, 23)
    w, spec, dense = experts(sizes, 256, 128, 128, True, True)
    x = in_numpy(np.round(20 * np.asarray(rows_of_x(34, 256, jnp.float32))), jnp.float32)
    whole = {"integers": True, "chip": chip_named("v5e")}
    assert error(product(x, w, sizes, spec, **whole), in_turn(x, dense, sizes)) < 1e-6
    run = functools.partial(grouped_int4_matmul_tpu, **whole)
    struct, wide = jax.ShapeDtypeStruct, PackedSpec(4096, layout="tpu")
    scale = struct((4, 32, 1, 4096), jnp.bfloat16)
    many = (struct((4096, 4096), jnp.bfloat16), Packed(struct((4, 512, 4096), jnp.int32), scale))
    traced = jax.make_jaxpr(lambda x, w, sizes: run(x, w, sizes, wide))(*many, struct((4,), jnp.int32))
    assert "preferred_element_type=int32" in str(traced)


def test_a_batch_of_ragged_products_and_their_gradients_is_one_after_the_other():
    sizes = [(5, 0, 8), (0, 13, 0)]
    made = [experts((0, 0, 0), 128, 128, 64, False, False, seed=seed) for seed in range(2)]
    w, spec = jax.tree.map(lambda *parts: jnp.stack(parts), *(one[0] for one in made)), made[0][1]
    x = jnp.stack([rows_of_x(13, 128, jnp.float32), -rows_of_x(13, 128, jnp.float32)])

    def total(x, w, sizes):
        out = grouped_int4_matmul(x, *w, group_sizes=sizes, spec=spec, implementation="tpu_interpret")
        return jnp.sum(out), out

    batch = (x, w, jnp.asarray(sizes))
    (_, outs), gradients = jax.vmap(jax.value_and_grad(total, has_aux=True))(*batch)
    summed = jax.grad(lambda x: jnp.sum(jax.vmap(total)(x, *batch[1:])[0]))(x)
    np.testing.assert_allclose(summed, gradients, rtol=1e-6)
    for i, (_, _, dense) in enumerate(made):
        assert error(outs[i], in_turn(x[i], dense, sizes[i])) < 4e-3
        ones = in_turn(np.ones((13, 128)), dense.transpose(0, 2, 1), sizes[i])
        assert error(gradients[i], ones) < 4e-3


def test_scales_of_another_shape_are_refused_and_no_rows_give_none():
    w, spec, _ = experts((3, 3), 128, 128, 64, True, False)
    sizes = jnp.asarray((3, 3))
    for name in ("scale", "zero_point"):
        short = w._replace(**{name: getattr(w, name)[:, :1]})
        with pytest.raises(ValueError, match=rf"{name} has shape \(2, 1, 1, 128\), wanted \(2, 2, 1, 128\) for codes"):
            grouped_int4_matmul(rows_of_x(6, 128), *short, group_sizes=sizes, spec=spec)
    out = grouped_int4_matmul(rows_of_x(0, 128), *w, group_sizes=0 * sizes, spec=spec, implementation="tpu_interpret")
    assert out.shape == (0, 128) and out.dtype == jnp.bfloat16


@pytest.mark.aot
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_it_compiles_for_experts_of_a_real_model(chip):
    """Qwen3-30B-A3B's experts: 128 of 2048 x 768, eight to a token; decoding 16 and prefilling 1024 tokens."""
    if reason := missing("v5e:2x2"):
        pytest.skip(reason)
    script = f"""
import jax, jax.numpy as jnp
from benchmarks.tpu_lab.chips import CHIPS
from benchmarks.tpu_lab.compiling import compiled, traced
from benchmarks.tpu_lab.hlo import Program
from pallas_kernels.grouped_int4_matmul import grouped_int4_matmul
from pallas_kernels.int4_matmul import PackedSpec
chip, struct = CHIPS["{chip}"], jax.ShapeDtypeStruct
for rows in (128, 8192):
    f = lambda x, c, s, sizes: grouped_int4_matmul(
        x, c, s, group_sizes=sizes, spec=PackedSpec(2048, group_size=128, layout="tpu"))
    args = (struct((rows, 2048), jnp.bfloat16), struct((128, 256, 768), jnp.int32),
            struct((128, 16, 1, 768), jnp.bfloat16), struct((128,), jnp.int32))
    made = compiled(chip, traced(chip, f, args))
    print(Program(made.as_text()).custom_calls(), made.memory_analysis().temp_size_in_bytes < 2 * 128 * 2048 * 768 / 8)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment("v5e:2x2"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["1", "True", "1", "True"]


@pytest.mark.aot
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_a_scan_over_layers_of_experts_reads_them_in_place(chip):
    """128 experts of 4096 x 1536: 384 MiB of codes in a layer, which no memory but HBM could hold a copy of."""
    if reason := missing("v5e:2x2"):
        pytest.skip(reason)
    script = f"""
import jax, jax.numpy as jnp
from benchmarks.tpu_lab.chips import CHIPS
from benchmarks.tpu_lab.compiling import compiled, traced
from pallas_kernels.grouped_int4_matmul import grouped_int4_matmul
from pallas_kernels.int4_matmul import PackedSpec
chip, struct, spec = CHIPS["{chip}"], jax.ShapeDtypeStruct, PackedSpec(4096, group_size=128, layout="tpu")
def scanned(x, codes, scale, sizes):
    def layer(total, weight):
        out = grouped_int4_matmul(x, *weight, group_sizes=sizes, spec=spec)
        return total + jnp.sum(out.astype(jnp.float32)), None
    return jax.lax.scan(layer, 0.0, (codes, scale))[0]
args = (struct((128, 4096), jnp.bfloat16), struct((4, 128, 512, 1536), jnp.int32),
        struct((4, 128, 32, 1, 1536), jnp.bfloat16), struct((128,), jnp.int32))
for function, kernel in ((scanned, "grouped_int4_matmul"), (jax.grad(scanned), "grouped_int4_matmul_transposed")):
    made = compiled(chip, traced(chip, function, args))
    print(kernel in made.as_text(), made.memory_analysis().temp_size_in_bytes < 2**25)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment("v5e:2x2"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True"] * 4
