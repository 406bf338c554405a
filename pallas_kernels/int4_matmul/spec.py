"""What the static half of a packed weight says: enough to unpack it, hashable, no arrays.

A packed weight W[K, N] is a tuple of arrays and a `PackedSpec`. With G = ceil(K / group_size):

    layout      codes                    scale, zero_point, offset         w = (level + ...) * scale + offset
    neutral kn  u8[bytes(K), N]          [G, N]      pallas_kernels.packing along K
    neutral nk  u8[N, bytes(K)]          [N, G]
    tpu     kn  i32[ceil(K / 8), N]      [G, 1, N]   4-bit integers, code - 8 of row 8r + j in bits 4j.. of word r
            or  int4[K, N] = code - 8                (the dtype of the codes tells; int4 is what words are in a TPU)
            or  int8[K, N] = code - 128              8-bit integers. Codebooks of 16 levels are laid like 4-bit integers
    hopper  kn  i32[N / 64, 2 * bits * ceil128(K)]   4- or 8-bit unsigned codes in the order of gpu_fragments.py, with
                                                     scales [G, N]; 64 divides N
    gpu     nk  int4[N, K] = code - 8    [N, G]      4-bit integers, K a multiple of the group

N may be 1 in scale, zero_point and offset (one value for all columns). level is `code - zero_point` (zero_point u8,
counted in unsigned codes in every layout), else `code - 2**(bits-1)`, or levels[code] for a codebook.
"""

import dataclasses

from pallas_kernels import packing

NEUTRAL, TPU, GPU, HOPPER = "neutral", "tpu", "gpu", "hopper"


@dataclasses.dataclass(frozen=True)
class PackedSpec:
    """How codes and scales are to be read; see the module's text.

    Attributes:
      length: K, rows of the dense weight (padding codes not counted).
      bits: bits of a code: 2 to 8.
      levels: the level of each code for a codebook; None for integers.
      group_size: rows that share a scale; more than K means one group.
      orientation: "kn" or "nk", the order of the axes of codes and scales.
      layout: "neutral", "tpu", "gpu" or "hopper".
    """

    length: int
    bits: int = 4
    levels: tuple[float, ...] | None = None
    group_size: int = 128
    orientation: str = "kn"
    layout: str = NEUTRAL

    @property
    def num_groups(self) -> int:
        return -(-self.length // self.group_size)

    @property
    def center(self) -> int:
        """The code of level zero where there are no zero points."""
        return 2 ** (self.bits - 1)

    @property
    def k_axis(self) -> int:
        """The axis of codes that K lies along."""
        return -2 if self.orientation == "kn" else -1

    @property
    def packed_length(self) -> int:
        """Length of codes along K: bytes, or codes where they are elements, or words of a hopper strip's 64 columns."""
        if self.layout == HOPPER:
            return 2 * self.bits * -(-self.length // 128) * 128
        return packing.packed_length(self.length, self.bits) if self.layout == NEUTRAL else self.length

    def columns(self, codes_shape: tuple[int, ...]) -> int:
        """N."""
        if self.layout == HOPPER:
            return 64 * codes_shape[-2]
        return codes_shape[-1] if self.orientation == "kn" else codes_shape[-2]
