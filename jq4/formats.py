"""What a code means. A format maps an unsigned code of `bits` bits to a level; a weight is level * scale.

Integer formats have the levels `code - 2**(bits-1)`, that is -8..7 at 4 bits; where a weight carries integer zero
points, its levels are `code - zero_point` instead. Codebook formats list their levels, sorted or not, by code:

    iq4_nl  GGUF's non-linear levels, whole numbers denser around zero (llama.cpp)
    nf4   quantiles of a normal distribution, scaled to [-1, 1] (Dettmers et al. 2023, QLoRA; bitsandbytes' table)
    bnb_fp4  bitsandbytes' FP4: a sign, two bits of exponent, one of mantissa, divided by 12 and in its own order
    fp4   e2m1: a sign bit, two bits of exponent, one of mantissa (OCP Microscaling 1.0): 0 .5 1 1.5 2 3 4 6
    dynamic8  a sign, a power of ten down to 1e-6 and a linear fraction of the bits that it leaves: bitsandbytes' signed
          "dynamic" map (Dettmers 2016), for scales that are packed themselves (jq4.double_quant)
    e4m3  8-bit floats: a sign, four bits of exponent, three of mantissa, up to 448, codes 127 and 255 NaN (OCP FP8);
          for NVFP4's scales
"""

import dataclasses

import ml_dtypes
import numpy as np

from jq4.errors import JQ4Error


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format of packed codes.

    Attributes:
      name: what recipes and checkpoints call it.
      bits: bits of a code.
      levels: the level of each code for a codebook format; None for integers.
    """

    name: str
    bits: int
    levels: tuple[float, ...] | None = None

    @property
    def is_integer(self) -> bool:
        return self.levels is None

    @property
    def center(self) -> int:
        """The code whose level is zero where there are no zero points (integer formats)."""
        return 2 ** (self.bits - 1)

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def max_level(self) -> float:
        """The largest magnitude that is representable on both sides: 7 for int4, 1 for nf4, 6 for fp4."""
        return float(self.center - 1) if self.levels is None else float(np.nanmax(self.levels))


_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _dynamic_levels() -> tuple[float, ...]:
    """For i of 0..6 the middles of 2**i equal parts of [.1, 1], times 10**(i - 6), of both signs; 0; 1: in float32."""
    levels = [np.float32(0), np.float32(1)]
    for i in range(7):
        ends = _evenly_spaced(2**i + 1)
        middles = (ends[:-1] + ends[1:]) / np.float32(2)
        levels += [sign * level for level in np.float32(10.0 ** (i - 6)) * middles for sign in (1, -1)]
    return tuple(float(np.float32(level)) for level in sorted(levels))


def _evenly_spaced(count: int) -> np.ndarray:
    """f32[count] from .1 to 1, counted from the nearer end and rounded once, as torch.linspace does it."""
    low, high = np.float32(0.1), np.float32(1)
    step = np.float64((high - low) / np.float32(count - 1))
    from_start = np.arange(count)
    value = np.where(from_start < count // 2, low + step * from_start, high - step * (count - 1 - from_start))
    return value.astype(np.float32)


_IQ4_NL = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip
_BNB_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_E4M3 = tuple(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64).tolist())

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("int2", 2),
        Format("int3", 3),
        Format("int4", 4),
        Format("int5", 5),
        Format("int6", 6),
        Format("int7", 7),
        Format("int8", 8),
        Format("nf4", 4, _NF4),
        Format("iq4_nl", 4, _IQ4_NL),
        Format("fp4", 4, _E2M1 + tuple(-level for level in _E2M1)),
        Format("bnb_fp4", 4, _BNB_FP4 + tuple(-level for level in _BNB_FP4)),
        Format("dynamic8", 8, _dynamic_levels()),
        Format("e4m3", 8, _E4M3),
    )
}


def get_format(name: str) -> Format:
    """The format called `name`; an error that lists the known ones if there is none."""
    if name not in FORMATS:
        raise JQ4Error(f"unknown format {name!r}: wanted one of {', '.join(FORMATS)}")
    return FORMATS[name]
