"""Writes dense safetensors: packed weights dequantized a few rows at a time, dense ones as they are or cast.

Rows are dequantized in float32 (host_dequantize.py) and rounded once to the dtype that is written: the file's
own dtype of the weight, or what is asked for. Float32 holds what every integer format and codebook dequantizes to; of
a narrower dtype the table says that it rounds.

options: "dtype": a name of safetensors' or numpy's ("BF16", "bfloat16"), or None for each weight's own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jq4.checkpoint.foreign.host_dequantize import dense_rows
from jq4.checkpoint.foreign.weights import LazyWeight
from jq4.checkpoint.foreign.writing import Planned, as_it_is, flat_pieces
from jq4.checkpoint.safetensors_files import DTYPES
from jq4.errors import JQ4Error

NAME = "safetensors"
_FLOATS = {name: DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}


def plan(weight: LazyWeight, options: Mapping[str, Any]) -> Planned:
    own = np.dtype(weight.abstract.dtype)
    wanted = own if options.get("dtype") is None else dtype_named(options["dtype"])
    if not weight.packed and (own == wanted or own not in _FLOATS.values()):
        return as_it_is(weight)
    name = next(name for name, dtype in DTYPES.items() if dtype == wanted)

    def pieces(value: Any) -> Iterator[np.ndarray]:
        parts = (block for _, block in dense_rows(value)) if weight.packed else flat_pieces(value)
        return (part.astype(wanted) for part in parts)

    def encode(value: Any) -> dict[str, np.ndarray]:
        return {weight.name: np.concatenate([part.reshape(-1) for part in pieces(value)]).reshape(weight.shape)}

    return Planned(weight, {weight.name: (name, weight.shape)}, encode, loss=_loss(weight, own, wanted), pieces=pieces)


def quantization_config(planned: list[Planned], options: Mapping[str, Any]) -> dict[str, Any]:
    """None: the weights are dense."""
    del planned, options
    return {}


def dtype_named(given: str) -> np.dtype[Any]:
    """Of a name of option "dtype"."""
    for name, dtype in _FLOATS.items():
        if given.lower() in (name.lower(), dtype.name):
            return dtype
    known = ", ".join(dtype.name for dtype in _FLOATS.values())
    raise JQ4Error(f"--dtype {given}: is not a dtype of dense weights, wanted one of {known}")


def _loss(weight: LazyWeight, own: np.dtype[Any], wanted: np.dtype[Any]) -> str:
    if not weight.packed:
        return "" if _holds(wanted, own) else f"{own.name} rounded to {wanted.name}"
    return "" if _holds(wanted, np.dtype(np.float32)) else f"dequantized and rounded to {wanted.name}"


def _holds(wide: np.dtype[Any], narrow: np.dtype[Any]) -> bool:
    """Whether every number of `narrow` is one of `wide`."""
    wide_info, narrow_info = ml_dtypes.finfo(wide), ml_dtypes.finfo(narrow)
    return bool(wide_info.nmant >= narrow_info.nmant and wide_info.maxexp >= narrow_info.maxexp)
