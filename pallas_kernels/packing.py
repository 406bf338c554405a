"""Codes to bytes and back: the one bit diagram of the project.

Codes are unsigned integers of `bits` bits. Along the packed axis they form one little-endian bit string: code
`k` occupies bits `[bits*k, bits*(k+1))`, and byte `j` holds bits `[8j, 8j+8)`. So

    2 bits   byte j = c[4j] | c[4j+1] << 2 | c[4j+2] << 4 | c[4j+3] << 6
    3 bits   bytes 3j..3j+2 = the 24-bit little-endian word  sum_i c[8j+i] << 3i
    4 bits   byte j = c[2j] | c[2j+1] << 4                       (the lower index in the low nibble)
    5 bits   bytes 5j..5j+4 = the 40-bit little-endian word  sum_i c[8j+i] << 5i
    6 bits   bytes 3j..3j+2 = the 24-bit little-endian word  sum_i c[4j+i] << 6i
    7 bits   bytes 7j..7j+6 = the 56-bit little-endian word  sum_i c[8j+i] << 7i
    8 bits   byte j = c[j]

Packing fills up the last unit (4, 8, 2, 8, 4, 8, 1 codes) with zeros. The same functions serve on the host, under `jit`
and inside a Pallas kernel: they are shifts, masks and reshapes.
"""

import math

import jax
import jax.numpy as jnp

SUPPORTED_BITS = (2, 3, 4, 5, 6, 7, 8)


def codes_per_unit(bits: int) -> int:
    """How many codes make a whole number of bytes: 4, 8, 2, 8, 4, 8, 1 for 2 to 8 bits."""
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"cannot pack {bits}-bit codes: wanted one of {SUPPORTED_BITS} bits")
    return math.lcm(bits, 8) // bits


def packed_length(length: int, bits: int) -> int:
    """Bytes that `length` codes take along the packed axis."""
    unit = codes_per_unit(bits)
    return -(-length // unit) * unit * bits // 8


def padding_of(length: int, bits: int) -> int:
    """How many codes of padding the last unit holds."""
    return -length % codes_per_unit(bits)


def pack(codes: jax.Array, bits: int, axis: int) -> jax.Array:
    """Packs u8[..., K, ...] of values below 2**bits into u8[..., packed_length(K), ...] along `axis`."""
    axis = axis % codes.ndim
    unit = codes_per_unit(bits)
    if unit == 1:
        return codes.astype(jnp.uint8)
    padding = [(0, 0)] * codes.ndim
    padding[axis] = (0, padding_of(codes.shape[axis], bits))
    codes = jnp.pad(codes, padding)
    lanes = _split(codes, axis, unit)  # [..., units, unit, ...]
    fields = [jnp.take(lanes, i, axis + 1) for i in range(unit)]
    bytes_ = [_byte(fields, bits, j) for j in range(bits * unit // 8)]
    return _merge(jnp.stack(bytes_, axis + 1), axis)


def _byte(fields: list[jax.Array], bits: int, j: int) -> jax.Array:
    """Byte j of a unit: the fields that reach into bits 8j to 8j + 7, shifted there. What leaves the byte is lost."""
    byte = jnp.zeros(fields[0].shape, jnp.uint8)
    for i in range(8 * j // bits, -(-8 * (j + 1) // bits)):
        shift = bits * i - 8 * j
        byte = byte | (fields[i] << shift if shift >= 0 else fields[i] >> -shift)
    return byte


def unpack(packed: jax.Array, bits: int, axis: int, length: int | None = None) -> jax.Array:
    """Undoes `pack`: u8[..., bytes, ...] to u8[..., K, ...]; without `length` the padding stays."""
    axis = axis % packed.ndim
    if bits != 8:
        packed = _merge(jnp.stack(unpack_fields(packed, bits, axis), axis + 1), axis)
    if length is None or length == packed.shape[axis]:
        return packed
    return jax.lax.slice_in_dim(packed, 0, length, axis=axis)


def unpack_fields(packed: jax.Array, bits: int, axis: int) -> list[jax.Array]:
    """The codes of each unit position: field i holds codes i, i+unit, i+2*unit, ... (no interleaving done).

    A product needs no interleaved codes: sum_k x[k] w[k] is the sum over fields of x[i::unit] @ field_i.
    """
    mask = 2**bits - 1
    unit = codes_per_unit(bits)
    if unit == 1:
        return [packed]
    if 8 % bits == 0:
        return [(packed >> (bits * i)) & jnp.uint8(mask) for i in range(unit)]
    axis = axis % packed.ndim
    units = _split(packed, axis, bits * unit // 8)  # [..., units, bytes, ...]
    held = [jnp.take(units, j, axis + 1) for j in range(bits * unit // 8)]
    return [_field(held, bits, i) for i in range(unit)]


def _field(held: list[jax.Array], bits: int, i: int) -> jax.Array:
    """Field i of a unit, from the one or two bytes that hold it."""
    first, shift = divmod(bits * i, 8)
    field = held[first] >> shift
    if shift + bits > 8:
        field = field | held[first + 1] << (8 - shift)
    return field & jnp.uint8(2**bits - 1)


def _split(array: jax.Array, axis: int, size: int) -> jax.Array:
    shape = array.shape
    return array.reshape(*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])


def _merge(array: jax.Array, axis: int) -> jax.Array:
    shape = array.shape
    return array.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
