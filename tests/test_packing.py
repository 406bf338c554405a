"""Oracle: numpy's packbits on the bit string, one bit at a time (packed_oracle.py), and examples worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_oracle import pack_bits, unpack_bits

from pallas_kernels import packing

pytestmark = pytest.mark.arithmetic


@st.composite
def arrays_of_codes(draw):
    bits = draw(st.sampled_from(packing.SUPPORTED_BITS))
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    seed = draw(st.integers(0, 2**16))
    return bits, axis, np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)


@settings(max_examples=25, deadline=None)
@given(arrays_of_codes())
def test_pack_is_the_little_endian_bit_string_and_unpack_undoes_it(example):
    bits, axis, codes = example
    length = codes.shape[axis]
    packed, back = jax.jit(lambda c: (p := packing.pack(c, bits, axis), packing.unpack(p, bits, axis, length)))(codes)
    np.testing.assert_array_equal(packed, pack_bits(codes, bits, axis))
    assert packed.shape[axis] == packing.packed_length(length, bits)
    np.testing.assert_array_equal(back, codes)
    np.testing.assert_array_equal(unpack_bits(np.asarray(packed), bits, axis, length), codes)


@settings(max_examples=10, deadline=None)
@given(arrays_of_codes())
def test_fields_are_the_codes_of_each_place_in_a_unit(example):
    bits, axis, codes = example
    unit = packing.codes_per_unit(bits)
    fields = jax.jit(lambda c: packing.unpack_fields(packing.pack(c, bits, axis), bits, axis))(codes)
    assert len(fields) == unit
    moved = np.moveaxis(codes, axis, 0)
    padded = np.concatenate(
        [moved, np.zeros((packing.padding_of(codes.shape[axis], bits), *moved.shape[1:]), np.uint8)]
    )
    for i, field in enumerate(fields):
        np.testing.assert_array_equal(np.moveaxis(np.asarray(field), axis, 0), padded[i::unit])


@pytest.mark.parametrize(
    "bits, codes, bytes_",
    [
        (4, [1, 2, 15], [0x21, 0x0F]),
        (2, [1, 2, 3, 0, 3], [0b00_11_10_01, 0b11]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
        (8, [7, 255], [7, 255]),
    ],
)
def test_bytes_worked_by_hand(bits, codes, bytes_):
    np.testing.assert_array_equal(packing.pack(jnp.asarray(codes, jnp.uint8), bits, 0), np.asarray(bytes_, np.uint8))


def test_pack_works_under_jit_and_eval_shape():
    codes = jnp.arange(14, dtype=jnp.uint8).reshape(7, 2)
    np.testing.assert_array_equal(jax.jit(lambda c: packing.unpack(packing.pack(c, 4, 0), 4, 0, 7))(codes), codes)
    assert jax.eval_shape(lambda c: packing.pack(c, 3, 0), codes).shape == (3, 2)


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match=r"cannot pack 9-bit codes: wanted one of \(2, 3, 4, 5, 6, 7, 8\) bits"):
        packing.packed_length(8, 9)
