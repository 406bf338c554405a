"""Oracle: numpy in float64, expert by expert. The kernel runs in Pallas' interpreter of TPU kernels, and (marker aot)
goes through the TPU compiler; memory that it never wrote is NaN."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.aot import environment, missing
from benchmarks.provenance import ROOT
from jq4.matmul import ragged_dot
from jq4.qarray import QArray
from pallas_kernels.grouped_int4_matmul import grouped_int4_matmul
from pallas_kernels.grouped_int4_matmul.tpu import grouped_int4_matmul_tpu, work_items
from pallas_kernels.int4_matmul import PackedSpec, UnsupportedError
from pallas_kernels.int4_matmul.tiles import Packed
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


def experts(sizes, k, n, group, zero_points, offsets, seed=0):
    """(Packed in the tpu layout, its spec, the dense experts f64)."""
    rng = np.random.default_rng(seed)
    shape = (len(sizes), -(-k // group), 1, n)
    codes = rng.integers(-8, 8, (len(sizes), k, n))
    scale = jnp.asarray(rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape), jnp.bfloat16)
    zero_point = jnp.asarray(rng.integers(0, 16, shape), jnp.uint8) if zero_points else None
    offset = jnp.asarray(rng.normal(size=shape), jnp.bfloat16) if offsets else None

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
    return jnp.asarray(np.random.default_rng(1).normal(size=(m, k)), dtype)


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / max(np.linalg.norm(want), 1e-30)


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_matches_float64(case, chip):
    sizes, *rest = CASES[case]
    w, spec, dense = experts(sizes, *rest)
    x = rows_of_x(sum(sizes) + 5, spec.length)
    out = grouped_int4_matmul_tpu(x, w, jnp.asarray(sizes), spec, chip=chip_named(chip), tile_rows=16, interpret=True)
    assert out.shape == (x.shape[0], dense.shape[2]) and bool(jnp.all(jnp.isfinite(out)))
    assert error(out, in_turn(x, dense, sizes)) < 2.5e-3  # weights rounded to bf16 at worst; others are near 1e-7


def test_float32_rows_are_multiplied_as_exactly_as_they_ask():
    sizes = (5, 0, 12)
    w, spec, dense = experts(sizes, 128, 128, 64, True, False)
    x = rows_of_x(17, 128, jnp.float32)
    out = grouped_int4_matmul_tpu(x, w, jnp.asarray(sizes), spec, precision="highest", interpret=True)
    assert error(out, in_turn(x, dense, sizes)) < 1e-6


def test_codes_may_be_int4_instead_of_words():
    sizes = (5, 0, 12)
    w, spec, dense = experts(sizes, 128, 128, 64, True, False)
    x, int4 = rows_of_x(17, 128), w._replace(codes=words_to_int4(w.codes, 128))
    out = grouped_int4_matmul_tpu(x, int4, jnp.asarray(sizes), spec, interpret=True)
    assert error(out, in_turn(x, dense, sizes)) < 2.5e-3


def test_items_cover_every_row_once_and_no_empty_expert():
    rng = np.random.default_rng(2)
    for _ in range(50):
        sizes = rng.integers(0, 40, 7) * rng.integers(0, 2, 7)
        rows, bm = 300, 16
        items = jax.tree.map(np.asarray, jax.jit(work_items, static_argnums=(1, 2))(jnp.asarray(sizes), rows, bm))
        owner = np.full(rows, -1)
        for item in range(items.used[0]):
            place = items.tile[item] * bm + np.arange(items.first[item], items.end[item])
            assert len(place) and np.all(owner[place] == -1)
            owner[place] = items.expert[item]
        assert np.array_equal(owner[: sizes.sum()], np.repeat(np.arange(7), sizes)) and np.all(
            owner[sizes.sum() :] == -1
        )


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
