"""Dense values to NF4 as bitsandbytes rounds them, bit by bit, in numpy.

    absmax   f32, the largest magnitude of a block of the flat weight
    code     of x * (1 / absmax), both rounded to f32, against the midpoints of neighbouring levels; a tie goes down
    the last block, where it is not full, is divided by its absmax, which is at least 1e-38

Nested statistics: absmax less its mean, in blocks of 256, divided by the block's own absmax, to the nearest of the 256
levels of the "dynamic" map; a tie goes down, as bitsandbytes' GPU kernel has it (its CPU kernel looks values up in a
table that moves about one code in 700 to the level beyond a midpoint). The mean is summed in float64 here: torch's
depends on the machine in its last bit, and the codes hardly ever on that.
"""

import numpy as np

from jq4.checkpoint.foreign.bnb_state import NESTED_BLOCK
from jq4.double_quant import FORMAT as NESTED_FORMAT
from jq4.formats import get_format

_LEAST = np.float32(1e-38)


def quantized(values: np.ndarray, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat f32[n] that starts at a block: NF4 codes u8[n] and absmax f32[ceil(n / blocksize)]."""
    levels = np.asarray(get_format("nf4").levels, np.float32)
    full = values.size // blocksize * blocksize
    blocks = values[:full].reshape(-1, blocksize)
    absmax = np.abs(blocks).max(axis=1)
    scaled = (blocks * (1 / np.maximum(absmax, _LEAST))[:, None]).reshape(-1)
    if full < values.size:
        last = np.maximum(np.abs(values[full:]).max(), _LEAST)
        absmax = np.append(absmax, last)
        scaled = np.append(scaled, values[full:] / last)
    codes = np.zeros(scaled.shape, np.uint8)
    for middle in (levels[:-1] + levels[1:]) / 2:  # faster than a search
        codes += scaled > middle
    return codes, absmax


def nested(absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Codes u8[B], the blocks' own absmax f32[ceil(B / 256)], and the offset, of absmax f32[B]."""
    levels = np.asarray(get_format(NESTED_FORMAT).levels, np.float32)
    offset = absmax.mean(dtype=np.float64).astype(np.float32)
    centred = absmax - offset
    starts = np.arange(0, absmax.size, NESTED_BLOCK)
    peaks = np.maximum.reduceat(np.abs(centred), starts)
    scaled = centred / np.repeat(np.where(peaks > 0, peaks, np.float32(1)), NESTED_BLOCK)[: absmax.size]
    codes = np.searchsorted((levels[:-1] + levels[1:]) / 2, scaled).astype(np.uint8)
    return codes, peaks, float(offset)
