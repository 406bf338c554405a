"""llama.cpp's reference quantizers for super-blocks of 256, in its order of float32 operations.

Q4_K, Q5_K: each sub-block of 32 gets a scale and a minimum by a search. For each of 21 (16) inverse scales around
15 / (max - min) (31), codes are rounded, and the scale and minimum that minimize sum w (scale q + min - x)^2 for these
codes are found in closed form, with w = sqrt(mean x^2) + |x| and min <= 0; the smallest error wins, and the search goes
on from its minimum. Scales and minima are then rounded to six bits against their largest, and the codes are made anew
with the rounded ones.

Q6_K: each sub-block of 16 gets a scale of either sign, by the same kind of search with w = x^2: 19 starts
around -32 / extreme. The scales are rounded to int8 against the one with the largest magnitude.

x is f32[32, m] (f32[16, m]), elements first, with the sub-blocks of a super-block next to each other in m.
"""

import numpy as np

from jq4.checkpoint.foreign.bit_strings import pack
from jq4.checkpoint.foreign.gguf.blocks import Fields
from jq4.checkpoint.foreign.gguf.quantize_blocks import TINY, extreme, inverse, summed


def q4_k(x: np.ndarray) -> Fields:
    return _with_minima(x, 4, first=-1.0, step=0.1, steps=20)


def q5_k(x: np.ndarray) -> Fields:
    return _with_minima(x, 5, first=-0.5, step=0.1, steps=15)


def q6_k(x: np.ndarray) -> Fields:
    scale, codes = _search_scale(x, 32)
    by_block = scale.reshape(-1, 16)
    peak = extreme(by_block.T)  # f32[blocks]
    used = np.abs(peak) >= TINY
    ratio = np.float32(-128) / np.where(used, peak, np.float32(1))
    factor = np.where(used, 1 / ratio, np.float32(0)).astype(np.float16)
    rounded = np.minimum(np.rint(ratio[:, None] * by_block), 127) * used[:, None]  # f32[blocks, 16]
    codes = _recoded(x, codes, factor.astype(np.float32)[:, None] * rounded, None, -32, 31)
    codes = np.where(np.repeat(used, 16), codes, 0)
    scales = (rounded.astype(np.int16) + 128).astype(np.uint8)
    return Fields(pack(_rows(codes, 16), 6), factor, scales=scales)


def _with_minima(x: np.ndarray, bits: int, first: float, step: float, steps: int) -> Fields:
    scale, least, codes = _search_scale_and_minimum(x, 2**bits - 1, first, step, steps)
    factor, scales = _six_bits(scale)
    offset, minima = _six_bits(least)
    step_of = factor.astype(np.float32)[:, None] * scales.astype(np.float32)
    offset_of = offset.astype(np.float32)[:, None] * minima.astype(np.float32)
    codes = _recoded(x, codes, step_of, offset_of, 0, 2**bits - 1)
    return Fields(pack(_rows(codes, 8), bits), factor, -offset, scales, minima)


def _six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values f32[m], none of them negative: their factor f16[blocks] and codes u8[blocks, 8]."""
    by_block = values.reshape(-1, 8)
    peak = np.maximum(by_block.max(axis=1), np.float32(0))
    codes = np.clip(np.rint((np.float32(63) * inverse(peak))[:, None] * by_block), 0, 63)
    return (peak / np.float32(63)).astype(np.float16), codes.astype(np.uint8)


def _recoded(
    x: np.ndarray, codes: np.ndarray, step: np.ndarray, offset: np.ndarray | None, low: int, high: int
) -> np.ndarray:
    """Codes u8, from 0, with the rounded steps [blocks, sub-blocks]; those of a step of zero stay what they were."""
    step = step.reshape(-1)
    moved = x if offset is None else x + offset.reshape(-1)
    anew = np.rint(moved / np.where(step != 0, step, np.float32(1)))
    return np.where(step != 0, np.clip(anew, low, high) - low, codes).astype(np.uint8)


def _rows(codes: np.ndarray, count: int) -> np.ndarray:
    """Codes [elements, m] as [blocks, 256]."""
    return codes.T.reshape(-1, count * codes.shape[0])


def _search_scale_and_minimum(
    x: np.ndarray, top: int, first: float, step: float, steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale, minus the minimum (f32[m]), and codes f32[32, m]."""
    weight = np.sqrt(summed(x * x) / np.float32(x.shape[0])) + np.abs(x)
    total, moment = summed(weight), summed(weight * x)
    least, most = np.minimum(x.min(axis=0), np.float32(0)), x.max(axis=0)
    flat, first_least = least == most, least
    inner = np.float32(top) / np.where(flat, np.float32(1), most - least)
    scale = 1 / inner
    codes = np.clip(np.rint(inner * (x - least)), 0, top)
    best = summed(weight * np.square(scale * codes + least - x))
    for i in range(steps + 1):
        stretched = np.float32(first) + np.float32(step) * np.float32(i) + np.float32(top)
        inner = stretched / np.where(flat, np.float32(1), most - least)
        tried = np.clip(np.rint(inner * (x - least)), 0, top)
        weighted = weight * tried
        ones, squares, products = summed(weighted), summed(weighted * tried), summed(weighted * x)
        determinant = total * squares - ones * ones
        divisor = np.where(determinant > 0, determinant, np.float32(1))
        new_scale = (total * products - moment * ones) / divisor
        new_least = (squares * moment - ones * products) / divisor
        above = new_least > 0
        new_scale = np.where(above, products / np.where(squares > 0, squares, np.float32(1)), new_scale)
        new_least = np.where(above, np.float32(0), new_least)
        error = summed(weight * np.square(new_scale * tried + new_least - x))
        better = (determinant > 0) & (error < best)
        best, scale = np.where(better, error, best), np.where(better, new_scale, scale)
        least = np.where(better, new_least, least)
        np.copyto(codes, tried, where=better)
    codes[:, flat] = 0
    return np.where(flat, np.float32(0), scale), -np.where(flat, first_least, least), codes


def _search_scale(x: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """A scale f32[m] of either sign, and codes from 0, f32[16, m]."""
    weight = x * x
    peak = extreme(x)
    used = np.abs(peak) >= TINY
    peak = np.where(used, peak, np.float32(1))
    codes = np.clip(np.rint((np.float32(-top) / peak) * x), -top, top - 1)
    fit, power = summed(weight * x * codes), summed(weight * codes * codes)
    scale = np.where(power != 0, fit / np.where(power != 0, power, np.float32(1)), np.float32(0))
    best = scale * fit
    for i in range(-9, 10):
        if i == 0:
            continue
        inner = -(np.float32(top) + np.float32(0.1) * np.float32(i)) / peak
        tried = np.clip(np.rint(inner * x), -top, top - 1)
        fit, power = summed(weight * x * tried), summed(weight * tried * tried)
        better = (power > 0) & (fit * fit > best * power)
        ratio = fit / np.where(power > 0, power, np.float32(1))
        scale, best = np.where(better, ratio, scale), np.where(better, ratio * fit, best)
        np.copyto(codes, tried, where=better)
    return np.where(used, scale, np.float32(0)), np.where(used, codes + top, 0)
