"""llama.cpp's reference quantizers for blocks of 32, in its order of float32 operations, so that bytes are equal.

    Q4_0, Q5_0   d = the extreme with the largest magnitude, its sign kept, / -8 (-16); q = trunc(x / d + 8.5) (16.5)
    Q4_1, Q5_1   d = (max - min) / 15 (31), m = min; q = trunc((x - m) / d + .5)
    Q8_0         d = max |x| / 127; q = x / d, rounded half away from zero
    IQ4_NL       the table's level for each x / d, where d minimizes sum x^2 (x - d T[q])^2 for the q of one of 16
                 starts: the extreme on the table's first level, and on 7 steps to either side of it

Everything works on x f32[32, n], elements first, so that a sum over a block's elements is made one after another.
"""

import numpy as np

from jq4.checkpoint.foreign.bit_strings import pack
from jq4.checkpoint.foreign.gguf.blocks import Fields
from jq4.formats import get_format

TINY = np.float32(1e-15)  # a block below this is zero
_IQ4_NL = np.asarray(get_format("iq4_nl").levels, np.float32)
# the middles between levels are halves, so floor(2 x) tells which level is nearest; a tie goes to the upper one
_HALVES = np.arange(-256, 256, dtype=np.float32) / 2
_NEAREST = np.searchsorted((_IQ4_NL[:-1] + _IQ4_NL[1:]) / 2, _HALVES, side="right").astype(np.uint8)
_TRIES = 7


def q4_0(x: np.ndarray) -> Fields:
    return _around_zero(x, 4)


def q5_0(x: np.ndarray) -> Fields:
    return _around_zero(x, 5)


def q4_1(x: np.ndarray) -> Fields:
    return _from_minimum(x, 4)


def q5_1(x: np.ndarray) -> Fields:
    return _from_minimum(x, 5)


def q8_0(x: np.ndarray) -> Fields:
    step = np.abs(x).max(axis=0) / np.float32(127)
    scaled = x * inverse(step)
    whole = np.trunc(scaled)
    whole += np.sign(scaled) * (np.abs(scaled - whole) >= 0.5)
    return Fields((whole.astype(np.int16) + 128).astype(np.uint8).T, step.astype(np.float16))


def iq4_nl(x: np.ndarray) -> Fields:
    weight = x * x
    peak = extreme(x)
    used = np.abs(peak) >= TINY
    peak = np.where(used, peak, np.float32(1))
    scale, best = _fitted(x, weight, 1 / (-peak / _IQ4_NL[0]))
    best = scale * best
    for step in range(-_TRIES, _TRIES + 1):
        ratio, fit, power = _fit(x, weight, (step + _IQ4_NL[0]) / peak)
        better = (power > 0) & (fit * fit > best * power)
        scale = np.where(better, ratio, scale)
        best = np.where(better, ratio * fit, best)
    scale = np.where(used, scale, np.float32(0))
    return Fields(pack(_nearest_level(x * inverse(scale)).T, 4), scale.astype(np.float16))


def extreme(x: np.ndarray) -> np.ndarray:
    """f32[n]: the first element with the largest magnitude, its sign kept."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]


def inverse(step: np.ndarray) -> np.ndarray:
    """1 / step, and 0 for 0."""
    return np.where(step != 0, 1 / np.where(step != 0, step, np.float32(1)), np.float32(0))


def summed(terms: np.ndarray) -> np.ndarray:
    """f32[m, n] to f32[n], one term after another."""
    total = terms[0].copy()
    for term in terms[1:]:
        total += term
    return total


def _around_zero(x: np.ndarray, bits: int) -> Fields:
    center = 2 ** (bits - 1)
    step = extreme(x) / np.float32(-center)
    codes = np.minimum(np.trunc(x * inverse(step) + np.float32(center + 0.5)), 2 * center - 1)
    return Fields(pack(codes.astype(np.uint8).T, bits), step.astype(np.float16))


def _from_minimum(x: np.ndarray, bits: int) -> Fields:
    least, top = x.min(axis=0), np.float32(2**bits - 1)
    step = (x.max(axis=0) - least) / top
    codes = np.minimum(np.trunc((x - least) * inverse(step) + np.float32(0.5)), top)
    return Fields(pack(codes.astype(np.uint8).T, bits), step.astype(np.float16), least.astype(np.float16))


def _fitted(x: np.ndarray, weight: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ratio, fit, _ = _fit(x, weight, start)
    return ratio, fit


def _fit(x: np.ndarray, weight: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best scale f32[n] for the levels nearest to x * start, with the two sums that it is the ratio of."""
    levels = _IQ4_NL[_nearest_level(x * start)]
    weighted = weight * levels
    fit, power = summed(weighted * x), summed(weighted * levels)
    return fit / np.where(power != 0, power, np.float32(1)), fit, power


def _nearest_level(x: np.ndarray) -> np.ndarray:
    """The codes u8 of the nearest levels of iq4_nl."""
    return _NEAREST[np.clip(np.floor(x * 2), -256, 255).astype(np.int16) + np.int16(256)]
