"""GGUF's tensor types: their numbers, the sizes of their blocks, and how jq4 holds each.

A row of K elements is K / length blocks of nbytes. A type is dense (a numpy dtype), packed (a QArray of `format` in
groups of `group_size`, see qarrays.py), or known by name only: then a file that holds it is refused with that name.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class BlockType:
    """One tensor type.

    Attributes:
      name, number: what GGUF calls it.
      length, nbytes: elements and bytes of a block; 0 where jq4 does not read it.
      dtype: of the elements, where it is dense.
      format: the number format of its codes, where it is packed.
      group_size: codes that share a scale.
      from_zero: whether a code is its own level (zero points of 0); otherwise the format's levels hold.
      has_offset: whether every group has an offset.
      packed_scales: the number format of scales (and offsets) that are codes themselves, "" where they are floats.
    """

    name: str
    number: int
    length: int = 0
    nbytes: int = 0
    dtype: Any = None
    format: str = ""
    group_size: int = 0
    from_zero: bool = False
    has_offset: bool = False
    packed_scales: str = ""

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return self.length // self.group_size

    @property
    def scale_dtype(self) -> Any:
        return np.dtype(ml_dtypes.float8_e8m0fnu) if self.format == "fp4" else np.dtype(np.float16)

    def row_bytes(self, length: int) -> int:
        return length // self.length * self.nbytes


def _dense(name: str, number: int, dtype: Any) -> BlockType:
    return BlockType(name, number, 1, np.dtype(dtype).itemsize, np.dtype(dtype))


_SUPPORTED = (
    _dense("F32", 0, np.float32),
    _dense("F16", 1, np.float16),
    _dense("BF16", 30, ml_dtypes.bfloat16),
    _dense("F64", 28, np.float64),
    _dense("I8", 24, np.int8),
    _dense("I16", 25, np.int16),
    _dense("I32", 26, np.int32),
    _dense("I64", 27, np.int64),
    BlockType("Q4_0", 2, 32, 18, format="int4", group_size=32),
    BlockType("Q4_1", 3, 32, 20, format="int4", group_size=32, from_zero=True, has_offset=True),
    BlockType("Q5_0", 6, 32, 22, format="int5", group_size=32),
    BlockType("Q5_1", 7, 32, 24, format="int5", group_size=32, from_zero=True, has_offset=True),
    BlockType("Q8_0", 8, 32, 34, format="int8", group_size=32),
    BlockType("IQ4_NL", 20, 32, 18, format="iq4_nl", group_size=32),
    BlockType("MXFP4", 39, 32, 17, format="fp4", group_size=32),
    BlockType("Q4_K", 12, 256, 144, None, "int4", 32, True, True, "int6"),
    BlockType("Q5_K", 13, 256, 176, None, "int5", 32, True, True, "int6"),
    BlockType("Q6_K", 14, 256, 210, format="int6", group_size=16, packed_scales="int8"),
    BlockType("IQ4_XS", 23, 256, 136, format="iq4_nl", group_size=32, packed_scales="int6"),
)

_NAMED_ONLY = {
    "Q8_1": 9, "Q2_K": 10, "Q3_K": 11, "Q8_K": 15, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19,
    "IQ3_S": 21, "IQ2_S": 22, "IQ1_M": 29, "TQ1_0": 34, "TQ2_0": 35, "NVFP4": 40, "Q1_0": 41, "Q2_0": 42,
}  # fmt: skip

BY_NUMBER = {one.number: one for one in (*_SUPPORTED, *(BlockType(*pair) for pair in _NAMED_ONLY.items()))}
BY_NAME = {one.name: one for one in BY_NUMBER.values()}
READABLE = tuple(one.name for one in _SUPPORTED)
PACKED = tuple(one for one in _SUPPORTED if one.format)
