"""Oracle: numpy in float64 on a bit string read bit by bit (packed_oracle.py); of gradients, JAX on a dense weight."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from packed_oracle import BITS, CODEBOOKS, dequantize64, pack_bits

from pallas_kernels.int4_matmul import PackedSpec, UnsupportedError, int4_matmul
from pallas_kernels.int4_matmul import tiles as tiling
from pallas_kernels.int4_matmul.reference import int4_matmul_reference
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.int4_matmul.words import int4_to_words
from pallas_kernels.int4_matmul.xla import (
    as_int4,
    by_column_tiles,
    by_one_dot,
    by_row_blocks,
    has_int4_form,
    int4_matmul_xla,
)

pytestmark = pytest.mark.arithmetic

# format, K, N, group_size, orientation, zero points, offsets, one scale for all columns
CASES = {
    "plain": ("int4", 128, 75, 32, "kn", False, False, False),
    "plain nk": ("int4", 128, 75, 32, "nk", False, False, False),
    "odd K, short last group": ("int4", 101, 40, 16, "kn", True, False, False),
    "odd K, short last group nk": ("int4", 101, 40, 16, "nk", True, True, False),
    "odd group": ("int4", 95, 33, 7, "kn", True, True, False),
    "odd group nk": ("int4", 95, 33, 7, "nk", False, False, False),
    "one group, larger than K": ("int4", 70, 40, 128, "kn", True, False, False),
    "per tensor": ("int4", 64, 40, 64, "nk", False, True, True),
    "int8": ("int8", 77, 40, 16, "kn", False, False, False),
    "int8 asymmetric": ("int8", 64, 40, 16, "nk", True, False, True),
    "int3": ("int3", 83, 40, 16, "kn", True, False, False),
    "int3 odd group": ("int3", 83, 40, 12, "nk", False, True, False),
    "int2": ("int2", 67, 40, 8, "kn", True, False, False),
    "nf4": ("nf4", 99, 40, 32, "kn", False, False, False),
    "fp4": ("fp4", 64, 40, 32, "nk", False, True, False),
}


@dataclasses.dataclass
class Weight:
    packed: Packed
    spec: PackedSpec
    dense: np.ndarray  # f64[*B, K, N]


def make(format, k, n, group, orientation, zero_points, offsets, one_scale, batch=(), seed=0, garbage=0) -> Weight:
    rng = np.random.default_rng(seed)
    axis, groups = (-2 if orientation == "kn" else -1), -(-k // group)
    codes = rng.integers(0, 2 ** BITS[format], (*batch, k, n) if orientation == "kn" else (*batch, n, k)).astype(
        np.uint8
    )
    columns = 1 if one_scale else n
    shape = (*batch, groups, columns) if orientation == "kn" else (*batch, columns, groups)
    scale = (rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)).astype(np.float32)
    zero_point = rng.integers(0, 2 ** BITS[format], shape).astype(np.uint8) if zero_points else None
    offset = rng.normal(size=shape).astype(np.float32) if offsets else None
    dense = dequantize64(codes, scale, zero_point, offset, format, group, axis)
    levels = tuple(float(level) for level in CODEBOOKS[format]) if format in CODEBOOKS else None
    spec = PackedSpec(k, BITS[format], levels, group, orientation)
    arrays = (pack_bits(codes, BITS[format], axis, garbage), scale, zero_point, offset)
    packed = Packed(*(None if a is None else jax.device_put(a) for a in arrays))
    return Weight(packed, spec, dense if orientation == "kn" else np.swapaxes(dense, -1, -2))


def rows(m, k, batch=(), seed=1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*batch, m, k)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def product(x, packed, spec, implementation=None):
    """int4_matmul, compiled as one program."""
    return int4_matmul(x, *packed, spec=spec, implementation=implementation)


def assert_close(got, x, dense, unit=2.0**-22):
    """Within a few float32 roundings of the sum of magnitudes, which is what any order of summing may cost."""
    x = np.asarray(x, np.float64)
    bound = unit * (np.abs(x) @ np.abs(dense)) + 1e-30
    error = np.abs(np.asarray(got, np.float64) - x @ dense)
    assert (error <= bound).all(), f"off by {np.max(error / bound):.1f} times the allowed rounding"


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 32 rows or columns, so that loops and their remainders run at test sizes."""
    monkeypatch.setattr(tiling, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(tiling, "TILE_ELEMENTS_OF_ONE_ROW", 1)
    jax.clear_caches()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["reference", None])
def test_public_function_matches_float64(case, implementation):
    w = make(*CASES[case])
    x = rows(3, w.spec.length)
    assert_close(product(x, w.packed, w.spec, implementation), x, w.dense)


@pytest.mark.parametrize("case", CASES)
def test_every_form_in_small_tiles_matches_float64(case, small_tiles):
    w = make(*CASES[case])
    few, many = rows(2, w.spec.length), rows(40, w.spec.length)

    @jax.jit
    def run(few, many, packed):
        out = [(by_column_tiles(x, packed, w.spec), x) for x in (few, few[:1])]
        if w.spec.orientation == "kn":
            out += [(by_row_blocks(x, packed, w.spec), x) for x in (few, few[:1])]
        if has_int4_form(w.spec):
            for platform in ("tpu", "gpu"):  # re-laid inside at every call, and once before
                out += [(int4_matmul_xla(few, packed, w.spec, platform=platform), few)]
                prepared, spec = as_int4(packed, w.spec, platform)
                out += [(int4_matmul_xla(x, prepared, spec, platform=platform), x) for x in (few, many)]
                out += [(int4_matmul_xla(few, prepared, spec, platform="cpu"), few)]
                if platform == "tpu":
                    out += [(by_one_dot(many, prepared, spec), many)]
                    words = prepared._replace(codes=int4_to_words(prepared.codes))
                    out += [(int4_matmul_xla(x, words, spec, platform=platform), x) for x in (few, many)]
                    out += [(by_one_dot(many, words, spec), many)]
        return out

    for got, x in run(few, many, w.packed):
        assert_close(got, x, w.dense, unit=2.0**-20)


@pytest.mark.parametrize("case", ["odd K, short last group", "int3", "nf4", "int2"])
def test_padding_codes_do_not_leak(case):
    clean, dirty = make(*CASES[case]), make(*CASES[case], garbage=2 ** BITS[CASES[case][0]] - 1)
    assert (np.asarray(clean.packed.codes) != np.asarray(dirty.packed.codes)).any()
    x = rows(3, clean.spec.length)
    np.testing.assert_array_equal(product(x, clean.packed, clean.spec), product(x, dirty.packed, dirty.spec))


def test_nan_in_x_stays_in_its_row():
    w = make(*CASES["odd K, short last group"])
    x = rows(3, w.spec.length)
    x[1, 7] = np.nan
    out = np.asarray(product(x, w.packed, w.spec))
    assert np.isnan(out[1]).all()
    assert_close(out[[0, 2]], x[[0, 2]], w.dense)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rows_give_half_precision_or_what_is_preferred(dtype):
    w = make(*CASES["plain"])
    x = jax.device_put(rows(5, 128).astype(jnp.dtype(dtype)))
    exact = np.asarray(x, np.float64) @ w.dense
    call = functools.partial(int4_matmul, spec=w.spec)
    half = jax.jit(call)(x, *w.packed)
    assert half.dtype == dtype
    wide = jax.jit(functools.partial(call, preferred_element_type=jnp.float32))(x, *w.packed)
    assert wide.dtype == jnp.float32
    assert_close(wide, x, w.dense)  # sums and weights are float32: only x was rounded
    np.testing.assert_allclose(np.asarray(half, np.float64), exact, rtol=1e-2, atol=0.5)


@pytest.mark.parametrize("orientation", ["kn", "nk"])
@pytest.mark.parametrize("batch", [(3,), (2, 2)])
def test_batched_weights(batch, orientation):
    w = make("int4", 30, 20, 8, orientation, True, False, False, batch=batch)
    x = rows(4, 30, batch)
    out = np.asarray(product(x, w.packed, w.spec))
    assert out.shape == (*batch, 4, 20)
    for at in np.ndindex(batch):
        assert_close(out[at], x[at], w.dense[at])


def test_leading_axes_of_x_are_rows_of_an_unbatched_weight():
    w = make(*CASES["plain"])
    x = rows(4, 128, (2, 3))
    out = product(x, w.packed, w.spec)
    assert out.shape == (2, 3, 4, 75)
    assert_close(out, x, w.dense)
    assert_close(product(x[0, 0, 0], w.packed, w.spec), x[0, 0, 0], w.dense)


@pytest.mark.parametrize(
    "case, layout",
    [("int3 odd group", "neutral"), ("nf4", "neutral")]
    + [
        (case, layout)
        for case in ("odd K, short last group", "odd group", "per tensor")
        for layout in ("neutral", "tpu", "gpu")
    ],
)
def test_gradients_match_those_of_the_dense_product(case, layout, small_tiles):
    w = make(*CASES[case])
    packed, spec = w.packed, w.spec
    if layout != "neutral":
        packed, spec = as_int4(packed, spec, layout)
    x, dy = rows(3, spec.length), rows(3, w.dense.shape[1], seed=2)
    floats = (x, packed.scale) if packed.offset is None else (x, packed.scale, packed.offset)

    def through(kernel):
        def loss(x, scale, offset=None):
            arrays = (packed.codes, scale, packed.zero_point, offset)
            return jnp.sum(kernel(x, *arrays, spec=spec) * dy)

        return jax.jit(jax.grad(loss, argnums=tuple(range(len(floats)))))(*floats)

    for got, want in zip(through(int4_matmul), through(int4_matmul_reference), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * float(jnp.max(jnp.abs(want))))


def test_gradient_of_batched_weights_and_bfloat16_rows():
    w = make("int4", 30, 20, 8, "kn", True, False, False, batch=(3,))
    x, dy = jnp.asarray(rows(4, 30, (3,)), jnp.bfloat16), jnp.asarray(rows(4, 20, (3,)), jnp.bfloat16)

    @jax.jit
    def with_gradient(x, packed, dy):
        out, pull = jax.vjp(lambda x: int4_matmul(x, *packed, spec=w.spec), x)
        return out, pull(dy)[0]

    out, dx = with_gradient(x, w.packed, dy)
    assert out.dtype == dx.dtype == jnp.bfloat16
    want = np.asarray(dy, np.float64) @ np.swapaxes(w.dense, -1, -2)
    np.testing.assert_allclose(np.asarray(dx, np.float64), want, rtol=1e-2, atol=0.5)


@pytest.mark.parametrize("case", ["plain", "odd K, short last group nk"])
def test_vmap_and_scan(case):
    w = make(*CASES[case], batch=(3,))
    call = functools.partial(int4_matmul, spec=w.spec)
    x = rows(4, w.spec.length, (3,))

    @jax.jit
    def run(x, packed):
        one = jax.tree.map(lambda part: part[0], packed)
        of_rows = jax.vmap(lambda x: call(x, *one))(x)
        of_both = jax.vmap(lambda x, w: call(x, *w))(x, packed)
        of_weights = jax.vmap(lambda w: call(x[0], *w))(packed)
        _, scanned = jax.lax.scan(lambda _, xw: (None, call(xw[0], *xw[1])), None, (x, packed))
        grads = jax.vmap(jax.grad(lambda x, w: jnp.sum(call(x, *w))))(x, packed)
        return of_rows, of_both, of_weights, scanned, grads

    of_rows, of_both, of_weights, scanned, grads = run(x, w.packed)
    assert_close(of_rows, x, w.dense[0])
    assert_close(of_both, x, w.dense)
    assert_close(of_weights, x[:1], w.dense)
    assert_close(scanned, x, w.dense)
    np.testing.assert_allclose(grads, np.broadcast_to(w.dense.sum(-1)[:, None], x.shape), rtol=1e-4, atol=1e-4)


def test_export_for_several_platforms_runs_here():
    w = make(*CASES["plain"])
    x = rows(4, 128)
    call = jax.jit(lambda x, packed: int4_matmul(x, *packed, spec=w.spec))
    exported = jax.export.export(call, platforms=("cpu", "tpu", "cuda"))(x, w.packed)
    assert exported.platforms == ("cpu", "tpu", "cuda")
    assert_close(exported.call(x, w.packed), x, w.dense)


@pytest.mark.parametrize("orientation", ["kn", "nk"])
def test_shards_of_columns_and_rows(orientation):
    w = make("int4", 64, 80, 16, orientation, True, False, False)
    x = rows(8, 64)
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "model"))
    of_w = P(None, "model") if orientation == "kn" else P("model", None)
    weights = jax.tree.map(lambda _: of_w, w.packed)

    def body(x, packed):
        return int4_matmul(x, *packed, spec=w.spec)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P("data", None), weights), out_specs=P("data", "model"))
    assert_close(jax.jit(mapped)(x, w.packed), x, w.dense)
    placed = jax.device_put(w.packed, jax.tree.map(lambda _: NamedSharding(mesh, of_w), w.packed))
    assert_close(jax.jit(body)(jax.device_put(x, NamedSharding(mesh, P("data"))), placed), x, w.dense)
    pulled = jax.jit(jax.grad(lambda x, w_: jnp.sum(mapped(x, w_))))(x, w.packed)
    np.testing.assert_allclose(pulled, np.broadcast_to(w.dense.sum(-1), x.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format, orientation", [("int4", "kn"), ("int4", "nk"), ("int3", "kn"), ("nf4", "nk")])
def test_the_dense_weight_never_appears(format, orientation):
    k, n = 2050, 4096  # not whole groups
    spec = PackedSpec(k, BITS[format], tuple(CODEBOOKS.get(format, ())) or None, 128, orientation)
    groups = spec.num_groups
    codes, scales = (
        ((spec.packed_length, n), (groups, n)) if orientation == "kn" else ((n, spec.packed_length), (n, groups))
    )
    args = (
        jax.ShapeDtypeStruct((1, k), jnp.float32),
        Packed(jax.ShapeDtypeStruct(codes, jnp.uint8), jax.ShapeDtypeStruct(scales, jnp.float32)),
    )

    def call(x, w):
        return int4_matmul(x, *w, spec=spec)

    for function in (call, jax.grad(lambda x, w: jnp.sum(call(x, w)))):
        temporaries = jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes
        assert temporaries < k * n * 4 / 3


def test_unasked_cotangents_are_not_computed():
    w = make(*CASES["plain"])
    x = rows(4, 128)

    def loss(x, scale):
        return jnp.sum(int4_matmul(x, w.packed.codes, scale, spec=w.spec) ** 2)

    def products(argnums):
        program = jax.jit(jax.grad(loss, argnums)).lower(x, w.packed.scale).compile().as_text()
        return len(re.findall(r" dot\(|custom-call\(", program))

    assert products(0) == 3  # one forwards, two fields backwards
    assert products((0, 1)) == 5  # and x^T dy of two fields


def test_errors_name_what_was_found_and_wanted():
    w = make(*CASES["plain"])
    x = rows(2, 128)
    with pytest.raises(
        UnsupportedError, match=r"unknown implementation 'cutlass' of int4_matmul: wanted one of reference, xla"
    ):
        int4_matmul(x, *w.packed, spec=w.spec, implementation="cutlass")
    with pytest.raises(ValueError, match=r"x has shape \(2, 100\), wanted \[\.\.\., 128\]"):
        int4_matmul(x[:, :100], *w.packed, spec=w.spec)
    with pytest.raises(ValueError, match=r"codes of shape \(64, 75\) hold 64 along K, wanted 65"):
        int4_matmul(x, *w.packed, spec=dataclasses.replace(w.spec, length=130))
    with pytest.raises(ValueError, match=r"scale has shape \(4, 75\), wanted \[\.\.\., 8, 75\]"):
        int4_matmul(x, *w.packed, spec=dataclasses.replace(w.spec, group_size=16))
    with pytest.raises(ValueError, match="fits is True, wanted one of '', 'int8', 'float8_e4m3fn'"):
        int4_matmul(x, *w.packed, spec=w.spec, fits=True)
    assert int4_matmul(x, *w.packed, spec=w.spec, implementation=("xla", "reference")).shape == (2, 75)


@pytest.mark.parametrize(("precision", "allowed"), [("bfloat16", 2.5e-3), ("float32", 1e-6)])
def test_without_a_precision_the_default_of_jax_holds(precision, allowed):
    w = make(*CASES["plain"])
    prepared, spec = as_int4(w.packed, w.spec, "tpu")
    x = rows(3, spec.length)
    with jax.default_matmul_precision(precision):
        out = product(x, prepared, spec, "tpu_interpret")
    exact = np.asarray(x, np.float64) @ w.dense
    error = np.linalg.norm(out - exact) / np.linalg.norm(exact)
    assert error < allowed and (precision == "float32" or error > 1e-4)
