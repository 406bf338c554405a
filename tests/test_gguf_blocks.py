"""Oracle: gguf-py's own dequantization, on random bytes of every block type, and on slices of real files."""

import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf_inputs import random_blocks

import jq4
from jq4 import qarray_ops
from jq4.checkpoint.foreign.gguf import qarrays
from jq4.checkpoint.foreign.gguf.block_types import BY_NAME, BY_NUMBER, PACKED
from jq4.checkpoint.foreign.host_dequantize import host_dequantize
from jq4.qarray import validate

TYPES = [kind.name for kind in PACKED]


def _packed(name, rows=6, count=2, seed=0):
    return qarrays.to_qarray(BY_NAME[name], random_blocks(BY_NAME[name], rows, count, seed))


@pytest.mark.parametrize("name", TYPES)
def test_random_blocks_have_the_values_of_gguf_py(name):
    gguf = pytest.importorskip("gguf", reason="gguf is the oracle here and is not installed")
    kind = BY_NAME[name]
    blocks = random_blocks(kind, 6, 3)
    q = validate(qarrays.to_qarray(kind, blocks))
    wanted = gguf.quants.dequantize(blocks.reshape(6, -1), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(host_dequantize(q), wanted)
    assert q.shape == wanted.shape
    assert q.nbytes <= blocks.nbytes + 2 * 3 * kind.length // 16  # the zero points of one row, at most


@pytest.mark.parametrize("name", TYPES)
def test_blocks_come_back_byte_for_byte(name):
    kind = BY_NAME[name]
    blocks = random_blocks(kind, 6, 3, seed=1)
    q = qarrays.to_qarray(kind, blocks)
    assert [other for other in TYPES if qarrays.holds(BY_NAME[other], q)] == [name]
    np.testing.assert_array_equal(qarrays.to_blocks(kind, q), blocks)


@pytest.mark.parametrize("name", TYPES)
def test_a_weight_is_described_as_it_is_read(name):
    kind = BY_NAME[name]
    read, described = _packed(name), qarrays.abstract(kind, (6, 2 * kind.length))
    assert jax.tree.structure(read) == jax.tree.structure(described)
    found, wanted = jax.tree.leaves(read), jax.tree.leaves(described)
    assert [(a.shape, a.dtype) for a in found] == [(a.shape, a.dtype) for a in wanted]


def test_slices_of_real_files_have_the_golden_values(shared_data):
    files = sorted((shared_data / "quant_slices" / "gguf").glob("*.bin"))
    assert files
    for file in files:
        content = file.read_bytes()
        number, elements, raw, golden = struct.unpack("<4I", content[:16])
        kind = BY_NUMBER[number]
        q = qarrays.to_qarray(kind, np.frombuffer(content[16 : 16 + raw], np.uint8).reshape(1, -1, kind.nbytes))
        wanted = np.frombuffer(content[16 + raw : 16 + raw + golden], ml_dtypes.bfloat16)
        found = host_dequantize(q).astype(ml_dtypes.bfloat16)
        assert found.size == elements
        np.testing.assert_array_equal(found.ravel().view(np.uint16), wanted.view(np.uint16), err_msg=file.name)


# zero points beside offsets, packed scales and offsets, packed scales alone, and those of a codebook
FORMS = ("Q4_1", "Q4_K", "Q6_K", "IQ4_XS")


def test_every_form_multiplies_packed_and_transposed_and_is_saved(tmp_path):
    host = {name: _packed(name, 4, 512 // BY_NAME[name].length) for name in FORMS}
    weights = jax.tree.map(jnp.asarray, host)
    x = np.random.default_rng(0).normal(0, 1, (3, 512)).astype(np.float32)
    transposed = {name: validate(qarray_ops.transpose(q, (1, 0))) for name, q in weights.items()}
    for name, q in transposed.items():
        assert q.nbytes == weights[name].nbytes, name  # packed scales stay packed
        np.testing.assert_array_equal(host_dequantize(q), host_dequantize(host[name]).T, err_msg=name)

    @jq4.quantized
    def products(by_rows, by_columns, x):
        return {name: x @ w.T for name, w in by_rows.items()}, {name: x @ w for name, w in by_columns.items()}

    both = jax.jit(products)(weights, transposed, x)
    assert products.record.entries == []
    for name in FORMS:
        wanted = x @ host_dequantize(host[name]).T
        for found in both:
            np.testing.assert_allclose(found[name], wanted, rtol=0, atol=3e-6 * np.abs(wanted).max(), err_msg=name)
    tree = {"n": host, "t": transposed, "m": _packed("MXFP4")}
    jq4.save(tmp_path / "m", tree)
    restored = jq4.restore(tmp_path / "m")
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_stacked_layers_of_packed_scales_go_through_scan():
    host = [_packed("Q4_K", 4, 2, seed) for seed in (0, 1)]
    layers = [qarray_ops.transpose(jax.tree.map(jnp.asarray, q), (1, 0)) for q in host]
    stacked = validate(jax.tree.map(lambda *parts: np.stack(parts), *layers))
    x = np.random.default_rng(0).normal(0, 1, (3, 512)).astype(np.float32)
    scanned = jq4.quantized(lambda w, x: jax.lax.scan(lambda carry, layer: (carry, x @ layer), None, w)[1])
    found = jax.jit(scanned)(stacked, x)
    assert scanned.record.entries == []
    for product, q in zip(found, host, strict=True):
        wanted = x @ host_dequantize(q).T
        np.testing.assert_allclose(product, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())


def test_gathered_rows_keep_their_scales_packed():
    host = _packed("Q6_K", 6, 2)
    rows = jax.jit(lambda q, i: qarray_ops.take_rows(q, i))(jax.tree.map(jnp.asarray, host), jnp.array([[4, 1]]))
    assert rows.scale.format == "int8"
    np.testing.assert_array_equal(host_dequantize(rows)[0], host_dequantize(host)[[4, 1]])


def test_the_scales_of_mxfp4_are_powers_of_two_in_one_byte():
    blocks = np.zeros((1, 3, 17), np.uint8)
    blocks[0, :, 0] = [0, 127, 130]
    blocks[0, :, 1] = 0x2F  # element 0 is -6, element 16 is 1
    q = qarrays.to_qarray(BY_NAME["MXFP4"], blocks)
    assert q.scale.dtype == ml_dtypes.float8_e8m0fnu
    values = host_dequantize(q).reshape(3, 32)
    np.testing.assert_array_equal(values[:, 0], np.float32([-6 * 2.0**-127, -6, -48]))
    np.testing.assert_array_equal(values[:, 16], np.float32([2.0**-127, 1, 8]))
