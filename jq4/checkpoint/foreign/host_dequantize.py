"""The dense weight of a QArray on the host, in numpy: each product and each sum rounded by itself.

XLA may fuse the last product and the sum, which is one rounding less; the formats' own software does not. Where a
conversion is checked against it, or a weight is quantized anew, this is what is compared and rounded.
"""

from typing import Any

import numpy as np

from jq4.checkpoint.foreign.bit_strings import unpack
from jq4.errors import JQ4Error
from jq4.qarray import NEUTRAL, QArray, is_qarray


def host_dequantize(q: QArray) -> np.ndarray:
    """A neutral QArray of host arrays as f32[*B, ..., K, ...]."""
    if q.layout != NEUTRAL or q.input_rotation:
        raise JQ4Error(f"{q!r}: dequantized on the host are neutral weights without a rotation; use jq4.dequantize.")
    codes = unpack(_last(q, q.codes), q.bits, q.shape[q.axis])
    if q.zero_point is not None:
        levels = codes.astype(np.float32) - _spread(q, q.zero_point)
    elif q.number_format.levels is not None:
        levels = np.asarray(q.number_format.levels, np.float32)[codes]
    else:
        levels = codes.astype(np.float32) - np.float32(q.number_format.center)
    weight = levels * _spread(q, q.scale)
    if q.offset is not None:
        weight += _spread(q, q.offset)
    if q.permutation is not None:
        order = np.argsort(np.asarray(q.permutation), axis=-1)
        order = order.reshape(*order.shape[:-1], *(1,) * (weight.ndim - order.ndim), order.shape[-1])
        weight = np.take_along_axis(weight, order, -1)
    if q.input_scale is not None:
        weight = weight * _last(q, q.input_scale).astype(np.float32)
    return np.moveaxis(weight, -1, q.axis)


def _last(q: QArray, part: Any) -> np.ndarray:
    """A part with the grouped axis last."""
    return np.moveaxis(np.asarray(part), q.axis, -1)


def _spread(q: QArray, part: Any) -> np.ndarray:
    """One value a group as one a code, f32."""
    values = _last(q, host_dequantize(part) if is_qarray(part) else part).astype(np.float32)
    if values.shape[-1] == 1:
        return values
    return np.repeat(values, q.group_size, -1)[..., : q.shape[q.axis]]
