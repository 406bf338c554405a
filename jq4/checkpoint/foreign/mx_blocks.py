"""MXFP4 (OCP Microscaling 1.0): blocks of 32 codes of e2m1 that share a power of two, as every file holds them.

    code    sign, two bits of exponent, one of mantissa: 0 .5 1 1.5 2 3 4 6 and the negatives; our format "fp4"
    scale   E8M0, one byte e: 2**(e - 127); 255 is NaN. A scale of dtype float8_e8m0fnu is that byte
    bytes   element 2j in the LOW nibble of byte j, so that they are what a QArray keeps (GGUF alone orders otherwise)

Quantizing follows the specification: e = floor(log2 max|x|) - 2, elements rounded to the nearest level, ties to even,
what lies beyond 6 becomes 6.
"""

from typing import Any

import ml_dtypes
import numpy as np

from jq4.checkpoint.foreign import bit_strings
from jq4.checkpoint.foreign.host_dequantize import finite_rows
from jq4.checkpoint.foreign.partners import refusal
from jq4.checkpoint.safetensors_files import StoredTensor
from jq4.qarray import QArray

FORMAT = "fp4"
BLOCK = 32
SCALE_DTYPE = np.dtype(ml_dtypes.float8_e8m0fnu)
SCALE_NAMES = ("U8", "F8_E8M0")  # what safetensors files call a byte of E8M0
_BIAS, _NAN, _EMAX = 127, 255, 2


def read_scales(tensor: StoredTensor) -> np.ndarray:
    """The bytes of a tensor as float8_e8m0fnu; a JQ4Error where one is NaN."""
    held = tensor.read().view(np.uint8)
    if (held == _NAN).any():
        raise refusal(tensor, f"holds {int((held == _NAN).sum())} scales of 255, NaN", "finite scales")
    return held.view(SCALE_DTYPE)


def holds_blocks(q: QArray) -> bool:
    """Whether the codes and scales of a QArray are blocks of MXFP4 along its last axis as they are."""
    plain = all(part is None for part in (q.zero_point, q.offset, q.permutation, q.input_scale))
    return (
        q.format == FORMAT
        and (q.axis, q.group_size) == (-1, BLOCK)
        and q.shape[-1] % BLOCK == 0
        and plain
        and not q.input_rotation
        and getattr(q.scale, "dtype", None) == SCALE_DTYPE
    )


def quantized(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32[rows, K], K a multiple of 32, as codes u8[rows, K] and scales u8[rows, K / 32]."""
    blocks = values.reshape(values.shape[0], -1, BLOCK)
    _, exponent = np.frexp(np.abs(blocks).max(axis=-1))  # amax = m * 2**exponent, m in [.5, 1); 0 for zeros
    shared = np.clip(exponent - 1 - _EMAX, -_BIAS, _BIAS)
    shared = np.where(blocks.any(axis=-1), shared, -_BIAS)
    codes = nearest_code(blocks * np.ldexp(np.float32(1), -shared)[..., None])  # exact: by a power of two
    return codes.reshape(values.shape), (shared + _BIAS).astype(np.uint8)


def nearest_code(scaled: np.ndarray) -> np.ndarray:
    """The codes u8[...] of e2m1 nearest to finite values; ties to the even code, beyond 6 to 6, -0 keeps its sign."""
    magnitude = np.abs(scaled)
    codes = np.signbit(scaled).view(np.uint8) << 3
    for code, middle in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        codes += magnitude >= middle if code % 2 else magnitude > middle
    return codes


def packed(name: str, weight: Any) -> tuple[np.ndarray, np.ndarray]:
    """Bytes u8[*B, N, K / 2] and scales u8[*B, N, K / 32] of a weight: as they are held, or quantized (again)."""
    *outer, width = weight.shape
    if isinstance(weight, QArray) and holds_blocks(weight):
        scale = np.broadcast_to(np.asarray(weight.scale).view(np.uint8), (*outer, width // BLOCK))
        return np.asarray(weight.codes), scale
    codes = np.empty((*outer, width // 2), np.uint8)
    scales = np.empty((*outer, width // BLOCK), np.uint8)
    for at, dense in finite_rows(weight, name):
        unpacked, scales[at] = quantized(dense)
        codes[at] = bit_strings.pack(unpacked, 4)
    return codes, scales
