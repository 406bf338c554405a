"""Oracle: the register fragments of wgmma and mma as NVIDIA's PTX ISA draws them, gathered in numpy by thread."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from packed_oracle import pack_bits

import jq4
from benchmarks.aot import DEVICE_KINDS, traced_for_gpu
from jq4.apply import quantized
from jq4.errors import JQ4Error
from jq4.layouts import prepare, to_neutral
from jq4.matmul import packed_matmul, ragged_dot
from jq4.partition import check_grouped_axis, part_specs
from jq4.qarray import QArray
from pallas_kernels.int4_matmul import (
    PackedSpec,
    UnsupportedError,
    gpu_blocks_mma,
    int4_matmul,
    mosaic_gpu,
    mosaic_gpu_mma,
)
from pallas_kernels.int4_matmul.gpu_blocks import GpuProblem, choose_plan, shared_bytes
from pallas_kernels.int4_matmul.gpu_chips import AMPERE, FIRST_WITH_MMA, HOPPER, gpu_named, refusal_of_jax
from pallas_kernels.int4_matmul.gpu_fragments import in_order_of_bytes, of_fragments, rows_of, to_fragments
from pallas_kernels.int4_matmul.registry import BACKENDS, choose, refusal
from pallas_kernels.int4_matmul.tiles import Packed


def hopper(shape, axis=-2, group_size=128, zero_points=False, offsets=False, seed=0, bits=4) -> QArray:
    rng = np.random.default_rng(seed)
    groups = list(shape)
    groups[axis] = -(-shape[axis] // group_size)
    packed = pack_bits(rng.integers(0, 2**bits, shape).astype(np.uint8), bits, axis)
    return QArray(
        jnp.asarray(packed),
        jnp.asarray(rng.uniform(0.5, 1.5, groups), jnp.bfloat16),
        jnp.asarray(rng.integers(0, 2**bits, groups), jnp.uint8) if zero_points else None,
        jnp.asarray(rng.normal(size=groups), jnp.bfloat16) if offsets else None,
        group_size=group_size,
        axis=axis,
        format=f"int{bits}",
        padding=shape[axis] % 2 if bits == 4 else 0,
    )


def fragment(thread: int, register: int, half: int) -> tuple[int, int]:
    """(row, column) of wgmma's A operand m64k16 that a half of a thread's register holds (PTX ISA, .bf16 fragments)."""
    warp, lane = divmod(thread, 32)
    row = 16 * warp + lane // 4 + (8 if register in (1, 3) else 0)
    column = 2 * (lane % 4) + half + (8 if register >= 2 else 0)
    return row, column


def test_shifted_words_are_the_fragments_of_wgmma():
    codes = np.random.default_rng(0).integers(0, 16, (128, 192)).astype(np.uint8)  # [K, N]
    words = np.asarray(to_fragments(jnp.asarray(codes))).view(np.uint32)
    tiles = words.reshape(3, 2, 128, 4)  # [N / 64, K / 64, thread, step of 16]
    for strip, tile, thread, step, register, half in np.ndindex(3, 2, 128, 4, 4, 2):
        held = (tiles[strip, tile, thread, step] >> (4 * register) & 0x000F000F) >> (16 * half) & 0xFFFF
        row, column = fragment(thread, register, half)
        assert held == codes[64 * tile + 16 * step + column, 64 * strip + row]


def mma_fragment(lane: int, index: int) -> tuple[int, int]:
    """(row, column) of mma.m16n8k16's A operand that a lane has as element `index` of eight (PTX ISA, .bf16)."""
    row = lane // 4 if index < 2 or 4 <= index < 6 else lane // 4 + 8
    return row, 2 * (lane % 4) + index % 2 + (8 if index >= 4 else 0)


def test_lines_of_words_are_the_fragments_of_mma_in_four_warps():
    """A thread's 16 bytes of a tile's lines of 128, dealt out as the kernel's layout says, feed its warp's mma."""
    codes = np.random.default_rng(0).integers(0, 16, (128, 128)).astype(np.uint8)  # [K, N]
    lines = np.asarray(to_fragments(jnp.asarray(codes))).view(np.uint32).reshape(2, 2, 16, 32)  # [N / 64, K / 64, ...]
    for strip, tile, warp, lane, step, index in np.ndindex(2, 2, 4, 32, 4, 8):
        line, chunk = 4 * warp + lane // 8, lane % 8
        word = lines[strip, tile, line, 4 * chunk + step]
        row, column = mma_fragment(lane, index)
        held = word >> (4 * (index // 2)) >> (16 * (index % 2)) & 0xF
        assert held == codes[64 * tile + 16 * step + column, 64 * strip + 16 * warp + row]


def test_shifted_words_of_wide_codes_are_the_fragments_of_wgmma():
    codes = np.random.default_rng(0).integers(0, 256, (128, 128)).astype(np.uint8)  # [K, N]
    words = np.asarray(to_fragments(jnp.asarray(codes), 8)).view(np.uint32)
    tiles = words.reshape(2, 2, 2, 128, 2, 2)  # [N / 64, K / 64, pair of steps, thread, step of the pair, word]
    for strip, tile, pair, thread, step, register, half in np.ndindex(2, 2, 2, 128, 2, 4, 2):
        word = tiles[strip, tile, pair, thread, step, register // 2] >> (8 * (register % 2))
        row, column = fragment(thread, register, half)
        assert word >> (16 * half) & 0xFF == codes[64 * tile + 32 * pair + 16 * step + column, 64 * strip + row]


def byte_fragment(thread: int, register: int, byte: int) -> tuple[int, int]:
    """(row, column) of wgmma's A operand m64k32 that a byte of a thread's register holds (PTX ISA, .s8 fragments)."""
    warp, lane = divmod(thread, 32)
    return 16 * warp + lane // 4 + (8 if register in (1, 3) else 0), 4 * (lane % 4) + byte + (
        16 if register >= 2 else 0
    )


def test_the_same_words_are_fragments_of_int8_once_x_is_in_the_order_of_bytes():
    codes = np.random.default_rng(0).integers(0, 16, (64, 64)).astype(np.uint8)  # [K, N]
    words = np.asarray(to_fragments(jnp.asarray(np.pad(codes, ((0, 64), (0, 0)))))).view(np.uint32)
    tile = words.reshape(2, 128, 4)[0]  # [thread, step of 16]
    row_at = np.asarray(in_order_of_bytes(jnp.arange(64)[None]))[0]
    for thread, step, register, byte in np.ndindex(128, 2, 4, 4):
        word = tile[thread, 2 * step + register // 2] >> (4 * (register % 2))
        row, column = byte_fragment(thread, register, byte)
        assert word >> (8 * byte) & 0xF == codes[row_at[32 * step + column], row]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(128, 64), (2, 200, 128), (3, 2, 5, 64)])
def test_fragments_are_lossless_and_filled_with_level_zero(shape, bits):
    codes = jnp.asarray(np.random.default_rng(1).integers(0, 2**bits, shape), jnp.uint8)
    words = to_fragments(codes, bits)
    assert words.dtype == jnp.int32
    np.testing.assert_array_equal(of_fragments(words, shape[-2], bits), codes)
    filled = of_fragments(words, words.shape[-1] // (2 * bits), bits)
    assert filled.shape[-2] % 128 == 0 and (np.asarray(filled)[..., shape[-2] :, :] == 2 ** (bits - 1)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "shape, axis, group_size", [((256, 128), -2, 128), ((64, 300), -1, 32), ((3, 128, 64), -2, 64)]
)
def test_prepare_for_hopper_is_lossless_and_keeps_products(shape, axis, group_size, bits):
    q = hopper(shape, axis, group_size, zero_points=True, offsets=axis == -1, bits=bits)
    prepared = prepare(q, "NVIDIA H200", layout="hopper")
    assert (prepared.layout, prepared.shape, prepared.num_groups) == ("hopper", q.shape, q.num_groups)
    back = to_neutral(prepared)
    assert jax.tree.structure(back) == jax.tree.structure(q)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(q), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(prepared.dequantize(), q.dequantize())
    if axis == -2:
        x = jnp.asarray(np.random.default_rng(2).normal(size=(*shape[:-2], 5, shape[-2])), jnp.float32)
        wanted = x @ q.dequantize()
        np.testing.assert_allclose(jq4.matmul(x, prepared), wanted, rtol=1e-4, atol=1e-6 * np.abs(wanted).max())


def test_gradients_of_a_hopper_weight_are_those_of_the_dense_one():
    q = hopper((200, 64), group_size=64, zero_points=True)
    prepared = prepare(q, "NVIDIA H200", layout="hopper")
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 200)), jnp.float32)

    def loss(x, scale, q):
        part = q.__class__(**{**q.__dict__, "scale": scale})
        return jnp.sum(jnp.sin(jq4.matmul(x, part).astype(jnp.float32)))

    wanted = jax.grad(loss, (0, 1))(x, q.scale, q)
    for one, other in zip(jax.grad(loss, (0, 1))(x, prepared.scale, prepared), wanted, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("spec", [PartitionSpec(None, "model"), PartitionSpec("model", None)])
def test_a_sharded_hopper_weight_is_multiplied_part_by_part(spec):
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    q = prepare(hopper((512, 256), zero_points=True), "NVIDIA H200", layout="hopper")
    specs = part_specs(q, list(spec))
    placed = jax.tree.map(lambda part, own: jax.device_put(part, NamedSharding(mesh, own)), q, specs)
    held = placed.codes.addressable_shards[1].data
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 512)), jnp.float32)
    product = jax.jit(quantized(jnp.matmul, strict=True, shardings=NamedSharding(mesh, spec)))
    np.testing.assert_allclose(product(x, placed), x @ q.dequantize(), rtol=1e-4, atol=1e-3)
    assert held.size * 4 == q.codes.size


def test_shards_of_k_hold_whole_tiles():
    q = prepare(hopper((384, 64), group_size=32), "NVIDIA H200", layout="hopper")
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    with pytest.raises(JQ4Error, match="4 shards over 'model' leave 96 rows each; wanted whole groups of 32"):
        check_grouped_axis(q, "model", mesh, "w")


def test_what_has_no_fragments_gets_the_gpu_layout():
    uneven = prepare(hopper((128, 72)), "NVIDIA H200", layout="hopper")
    groups = prepare(hopper((128, 64), group_size=16), "NVIDIA H200", layout="hopper")
    assert (uneven.layout, groups.layout) == ("gpu", "gpu")
    assert prepare(hopper((128, 64)), "NVIDIA H200").layout == "gpu"
    assert prepare(hopper((128, 64)), "NVIDIA A100-SXM4-80GB", layout="hopper").layout == "hopper"
    assert prepare(hopper((128, 64)), "NVIDIA A100-SXM4-80GB").layout == "gpu"
    wanted = "layout 'hopper' is not for 'NVIDIA B200': wanted None, 'gpu', or 'hopper' on a Hopper, Ampere or Ada GPU"
    with pytest.raises(JQ4Error, match=wanted):
        prepare(hopper((128, 64)), "NVIDIA B200", layout="hopper")
    with pytest.raises(JQ4Error, match="layout 'gpu' is not for 'cpu'"):
        prepare(hopper((128, 64)), "cpu", layout="gpu")


def traced_for(kind):
    described = jax.sharding.AbstractDevice(kind, 132, "gpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("chip",), auto, abstract_device=described)
    return jax.sharding.use_abstract_mesh(mesh)


OTHER_GPUS = {"NVIDIA B200": "10.0", "NVIDIA A100-SXM4-80GB": "8.0", "NVIDIA L40S": "8.9", "NVIDIA GB300": "10.3"}


def test_the_kernel_is_for_hopper_alone_and_says_so():
    spec = PackedSpec(256, layout="hopper")
    for kind, name in {"NVIDIA H200": "mosaic_gpu", "NVIDIA H100 80GB HBM3": "mosaic_gpu"}.items():
        with traced_for(kind):
            assert choose(None, "gpu", spec) == name
            assert choose(None, "gpu", PackedSpec(256, layout="gpu", orientation="nk")) == "xla"
    for kind, capability in OTHER_GPUS.items():
        with traced_for(kind):
            assert choose(None, "gpu", spec) == "xla"
            wanted = f"traced for {kind!r} ({capability}, which has no wgmma)"
            assert str(refusal("mosaic_gpu", "gpu", spec)).endswith(wanted)
    w = Packed(to_fragments(jnp.zeros((256, 64), jnp.uint8)), jnp.ones((2, 64), jnp.bfloat16))
    with pytest.raises(
        UnsupportedError, match=r"runs on Hopper GPUs \(compute capability 9.0\), and this is traced for"
    ):
        int4_matmul(jnp.ones((1, 256), jnp.bfloat16), *w, spec=spec, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=r"codes of shape \(1, 2048\) hold 2048 along K, wanted 3072"):
        int4_matmul(jnp.ones((1, 300), jnp.bfloat16), *w, spec=PackedSpec(300, layout="hopper"))


def test_the_kernel_of_mma_is_for_ampere_and_ada_and_says_why_not():
    spec, old = PackedSpec(256, layout="hopper"), jax.__version_info__ < FIRST_WITH_MMA
    with traced_for_gpu("a100", 108):
        assert choose(None, "gpu", spec) == ("xla" if old else "mosaic_gpu_mma")
        assert choose(None, "gpu", PackedSpec(256, layout="gpu", orientation="nk")) == "xla"
        reason = "mosaic_gpu_mma takes JAX 0.11.2 or later, whose Mosaic GPU has mma.sync, and this is JAX "
        assert refusal("mosaic_gpu_mma", "gpu", spec) == (reason + jax.__version__ if old else None)
        groups = PackedSpec(256, group_size=16, layout="hopper")
        assert "mosaic_gpu_mma reads groups of" in str(refusal("mosaic_gpu_mma", "gpu", groups))
    with traced_for("NVIDIA B200"):
        assert "traced for 'NVIDIA B200' (10.0)" in str(refusal("mosaic_gpu_mma", "gpu", spec))
    with traced_for("NVIDIA GeForce RTX 4090"):
        assert choose(None, "gpu", spec) == "xla"
        assert str(refusal("mosaic_gpu_mma", "gpu", spec)) == (
            "mosaic_gpu_mma knows, of compute capability 8.0 and 8.9, NVIDIA A100-SXM4-40GB, NVIDIA A100-PCIE-40GB, "
            "NVIDIA A100, NVIDIA A800, NVIDIA A30, NVIDIA L40S, NVIDIA L40, NVIDIA L4, and this is traced for 'NVIDIA "
            "GeForce RTX 4090': XLA's forms serve it, best in another layout than hopper (jq4.prepare without "
            "layout='hopper')"
        )
    with traced_for("NVIDIA L40S"):
        untold = "cannot be compiled here for 'NVIDIA L40S': Mosaic GPU takes a device that does not say"
        assert ("takes JAX 0.11.2" if old else untold) in str(refusal("mosaic_gpu_mma", "gpu", spec))


OF_MMA = pytest.mark.skipif(refusal_of_jax() is not None, reason=f"the kernel of mma {refusal_of_jax()}")
PRODUCTS: dict[str, Callable[..., Any]] = {
    "forward": jq4.matmul,
    "vmap": jax.vmap(jq4.matmul, (0, None)),
    "vmap of weights": jax.vmap(jq4.matmul),
    "gradient": jax.value_and_grad(lambda x, q: jnp.sum(jq4.matmul(x, q).astype(jnp.float32))),
    "by name": lambda x, q: packed_matmul(x, q, jnp.float32, implementation="mosaic_gpu_mma"),
    "many rows": jq4.matmul,
}


@OF_MMA
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_kernel_of_mma_is_traced_and_lowered_for_an_ampere_gpu(name):
    """Up to the compiler of PTX, which tests of the real compilers have."""
    q = dataclasses.replace(hopper((256, 128), zero_points=True), dtype="bfloat16")
    q = prepare(q, "NVIDIA A100-SXM4-80GB", layout="hopper")
    rows = {"many rows": (600, 256), "vmap": (2, 3, 256), "vmap of weights": (2, 3, 256)}.get(name, (3, 256))
    if name == "vmap of weights":
        q = jax.tree.map(lambda part: jnp.stack([part, part]), q)
    with traced_for_gpu("a100", 108):
        program = jax.jit(PRODUCTS[name]).trace(jax.ShapeDtypeStruct(rows, jnp.bfloat16), q)
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert ("custom_call @mosaic_gpu" in text) == (name != "many rows")


def test_whole_numbers_are_one_term_of_mma_and_floats_two(monkeypatch):
    """Rows that the kernel is given, of 300: whole numbers are few enough for it, the two terms of floats are not."""
    given, backend = [], BACKENDS["mosaic_gpu_mma"]

    def product(rows: jax.Array, _: Any, **__: Any) -> jax.Array:
        given.append((rows.shape, rows.dtype))
        return jnp.zeros((len(rows), 64), jnp.float32)

    monkeypatch.setattr(mosaic_gpu_mma, "_product", product)
    w = Packed(to_fragments(jnp.zeros((256, 64), jnp.uint8)), jnp.ones((2, 64), jnp.bfloat16))
    x, spec = jax.ShapeDtypeStruct((300, 256), jnp.float32), PackedSpec(256, layout="hopper")
    assert set(backend.fits) == {"int8", "float8_e4m3fn"}
    for fits in (*backend.fits, ""):
        jax.eval_shape(lambda x, fits=fits: backend.run(x, w, spec, platform="gpu", fits=fits), x)
    assert given == [((300, 256), jnp.bfloat16)] * 2


@pytest.mark.parametrize(
    "bits, group, wanted",
    [(4, 128, "float8_e4m3fn"), (4, 64, "float8_e4m3fn"), (4, 32, "bfloat16"), (8, 128, "bfloat16")],
)
def test_rows_that_fit_e4m3_are_multiplied_in_it_where_codes_and_groups_do(monkeypatch, bits, group, wanted):
    given = []

    def product(rows: jax.Array, *_: Any) -> jax.Array:
        given.append((rows.shape, rows.dtype.name))
        return jnp.zeros((len(rows), 64), jnp.float32)

    monkeypatch.setattr(mosaic_gpu, "product", product)
    w = Packed(to_fragments(jnp.zeros((256, 64), jnp.uint8), bits), jnp.ones((256 // group, 64), jnp.bfloat16))
    spec = PackedSpec(256, bits, group_size=group, layout="hopper")
    run = BACKENDS["mosaic_gpu"].run
    x = jax.ShapeDtypeStruct((5, 256), jnp.float32)
    jax.eval_shape(lambda x: run(x, w, spec, platform="gpu", fits="float8_e4m3fn", gpu=HOPPER[0]), x)
    assert given == [((5, 256), wanted)]


def test_a_recipe_with_inputs_of_e4m3_reaches_the_kernel_of_hopper():
    """From the preset to the text that is given to Mosaic GPU's compiler, dense, of experts, and backwards."""
    recipe = jq4.Recipe.preset("rtn-w4g128-afp8")
    tree = {"kernel": jnp.ones((256, 128), jnp.bfloat16), "experts": jnp.ones((2, 256, 128), jnp.bfloat16)}
    rules = [dataclasses.replace(recipe.rules[0], targets=("kernel", "experts"), axis=-2)]
    packed = prepare(jq4.quantize(tree, jq4.Recipe(tuple(rules))), "NVIDIA H200", layout="hopper")
    x = jax.ShapeDtypeStruct((3, 256), jnp.bfloat16)
    programs = {
        "dense": lambda x, tree: jq4.matmul(x, tree["kernel"]),
        "experts": lambda x, tree: ragged_dot(x, tree["experts"], jnp.asarray([1, 2])),
        "gradient": jax.grad(lambda x, tree: jnp.sum(jq4.matmul(x, tree["kernel"]).astype(jnp.float32))),
    }
    for name, program in programs.items():
        with traced_for("NVIDIA H200"):
            text = jax.jit(program).trace(x, packed).lower(lowering_platforms=("cuda",)).as_text()
        assert "custom_call @mosaic_gpu" in text
        assert ("tensor<8x256xf8E4M3FN>" in text) == (name != "gradient"), name


def test_a_hopper_weight_elsewhere_is_reported_as_unpacked_at_every_call():
    product = quantized(lambda x, w: x @ w["layer"])
    tree = {"layer": prepare(hopper((128, 64)), "NVIDIA H200", layout="hopper")}
    jax.eval_shape(product, jax.ShapeDtypeStruct((2, 128), jnp.float32), tree)
    assert [entry.path for entry in product.record.relaid] == ["layer"]
    assert "this is traced for 'cpu'" in product.record.relaid[0].reason
    with traced_for("NVIDIA L40S"):
        jax.eval_shape(product, jax.ShapeDtypeStruct((4, 128), jnp.float32), tree)
    assert "'NVIDIA L40S' (8.9, which has no wgmma); mosaic_gpu_mma " in product.record.relaid[0].reason
    with traced_for("NVIDIA H200"):
        jax.eval_shape(product, jax.ShapeDtypeStruct((3, 128), jnp.float32), tree)
    assert not product.record.relaid


@OF_MMA
@pytest.mark.parametrize("layers", [0, 3])
def test_gradients_that_unpack_a_hopper_weight_are_reported(layers):
    def loss(x, w):
        step = jax.checkpoint(lambda x, w: (x @ w, None))
        return jnp.sum(jax.lax.scan(step, x, w)[0] if layers else x @ w)

    q = hopper((*[layers] * (layers > 0), 128, 128))
    product, x = quantized(loss, strict=True), jax.ShapeDtypeStruct((2, 128), jnp.float32)
    found = {}
    for kind in ("a100", "h200"):
        weight = prepare(q, DEVICE_KINDS[kind], layout="hopper")
        for name, function in {"product": product, "gradient": jax.grad(product)}.items():
            with traced_for_gpu(kind, 108):
                jax.eval_shape(function, x, weight)
            found[kind, name] = [(entry.path, entry.times, entry.reason) for entry in product.record.relaid]
    reason = "unpacked from the hopper layout at every gradient by x: mosaic_gpu_mma has no transpose"
    assert found.pop(("a100", "gradient")) == [("argument 1", 1, reason)]
    assert not any(found.values())


def test_rows_of_a_hopper_weight_are_int4():
    codes = np.random.default_rng(0).integers(0, 16, (130, 64)).astype(np.uint8)
    w = Packed(to_fragments(jnp.asarray(codes)), jnp.ones((2, 64), jnp.bfloat16))
    rows, spec = rows_of(w, PackedSpec(130, layout="hopper"))
    np.testing.assert_array_equal(np.asarray(rows.codes, np.int32), codes.astype(np.int32) - 8)
    assert (rows.scale.shape, spec.layout) == ((2, 1, 64), "tpu")


def test_experts_in_the_hopper_layout_are_multiplied_elsewhere_too():
    q = hopper((3, 200, 64), group_size=64, zero_points=True)
    prepared, sizes = prepare(q, "NVIDIA H200", layout="hopper"), jnp.asarray([5, 0, 7])
    x = jnp.asarray(np.random.default_rng(4).normal(size=(14, 200)), jnp.float32)

    def loss(x, scale, q):
        product = ragged_dot(x, dataclasses.replace(q, scale=scale), sizes, preferred_element_type=jnp.float32)
        return jnp.sum(jnp.sin(product)), product

    grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
    ((_, got), own), ((_, wanted), neutral) = (grad(x, each.scale, each) for each in (prepared, q))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    for one, other in zip(own, neutral, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=2e-2, atol=2e-2)


KINDS: list[dict[str, Any]] = [
    {},
    {"bits": 8},
    {"fits": "int8"},
    {"fits": "float8_e4m3fn"},
    {"experts": 64},
    {"transposed": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("gpu", HOPPER, ids=lambda gpu: gpu.kind)
def test_every_plan_fits_its_gpu(gpu, kind):
    sizes = [(1, 4096, 4096, 128), (16, 8192, 28672, 128), (64, 28672, 8192, 64), (700, 4096, 14336, 32)]
    for m, k, n, group in [*sizes, (20, 4608, 4096, 384)]:
        for size in (max(group, 64) if kind.get("fits") else group, k):
            problem = GpuProblem(m, k, n, -(-k // size), size, **kind)
            plan = choose_plan(problem, gpu)
            assert shared_bytes(problem, plan) <= gpu.shared_memory
            assert plan.tile_m % 8 == 0 and plan.tile_m <= 256 and plan.tile_k % 64 == 0
            assert kind.get("transposed") or plan.tile_k % size == 0 or size % plan.tile_k == 0 or size == k


@pytest.mark.parametrize("gpu", AMPERE, ids=lambda gpu: gpu.kind)
def test_every_plan_of_mma_fits_its_gpu_twice_and_divides_the_product(gpu):
    sizes = [(4096, 4096, 128), (28672, 8192, 64), (4608, 4096, 384), (384, 64, 32), (4000, 192, 4000)]
    for (k, n, group), m, bits, out_bytes in itertools.product(sizes, (1, 16, 60, 300), (4, 8), (2, 4)):
        problem = GpuProblem(m, k, n, -(-k // group), group, bits=bits, out_bytes=out_bytes)
        plan = gpu_blocks_mma.choose_plan(problem, gpu)
        assert 2 * gpu_blocks_mma.shared_bytes(problem, plan) <= gpu.shared_memory
        assert plan.tile_k % group == 0 or group % plan.tile_k == 0 or group >= k
        assert n % plan.columns == 0 and -(-k // 128) * 128 % (plan.tile_k * plan.splits) == 0
        assert (plan.tile_m // 8) * (plan.tile_k // 64) % 4 == 0  # tiles of x, of which each warp copies some


def test_experts_take_tiles_of_their_share_of_the_rows():
    h200 = gpu_named("NVIDIA H200")
    assert h200 is not None
    plans = [choose_plan(GpuProblem(m, 2048, 768, 16, 128, experts=128), h200) for m in (8, 1024, 4096)]
    assert [plan.tile_m for plan in plans] == [8, 8, 32] and {plan.form for plan in plans} == {"sums"}
    assert choose_plan(GpuProblem(4096, 4096, 14336, 32, 128, experts=8), h200).form == "weights"


def test_few_columns_are_split_along_k():
    h200 = gpu_named("NVIDIA H200")
    assert h200 is not None
    assert choose_plan(GpuProblem(1, 14336, 4096, 112, 128), h200).splits > 1
    assert choose_plan(GpuProblem(16, 8192, 28672, 64, 128), h200).splits == 1
