"""Weights that a target cannot hold, rounded again to the nearest that it can: what --requantize asks for.

A float zero point (HQQ), a codebook (NF4) or a scale of several levels (K-quants) has no exact form on a grid of
integers, and nothing but MXFP4 has one in MXFP4. The dense values are then rounded to nearest on the target's own grid,
each group between its extremes (jq4.rounding; mx_blocks.py for MXFP4, where the linear layers of a dense source are
taken too), a few rows at a time, and what that costs is measured against them:

    max       the largest |w' - w|
    relative  |w' - w| / |w|, Frobenius norms
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.checkpoint.conversion.difference import Difference
from jq4.checkpoint.foreign import mx_blocks
from jq4.checkpoint.foreign.bit_strings import pack
from jq4.checkpoint.foreign.host_dequantize import finite_rows, host_dequantize
from jq4.checkpoint.foreign.linears import is_linear
from jq4.checkpoint.foreign.weights import LazyWeight, abstract_qarray
from jq4.checkpoint.foreign.writing import Planned, Writer
from jq4.errors import JQ4Error
from jq4.formats import get_format
from jq4.qarray import PARTS, QArray
from jq4.rounding import quantize_weight

_GRIDS: dict[str, tuple[int, ...]] = {"gptq": (2, 3, 4, 8), "awq": (4,), "compressed-tensors": (2, 3, 4, 5, 6, 7, 8)}
_GROUP = 128
MXFP4 = "mxfp4"


class Requantizer:
    """Rounds weights again for one target, and keeps what that cost by name."""

    def __init__(self, target: str) -> None:
        self._target = target
        self.errors: dict[str, dict[str, float]] = {}

    def takes(self, weight: LazyWeight) -> bool:
        """Whether it has a form for a packed weight that the target refuses."""
        return weight.packed and self._target in (*_GRIDS, MXFP4)

    def packs(self, weight: LazyWeight, options: Mapping[str, Any]) -> bool:
        """Whether it packs a dense weight, which the target would keep as it is."""
        whole = not weight.packed and weight.shape[-1:] and weight.shape[-1] % mx_blocks.BLOCK == 0
        return bool(whole) and self._target == MXFP4 and is_linear(weight, options)

    def plan(self, weight: LazyWeight, writer: Writer, options: Mapping[str, Any], why: str) -> Planned:
        """The weight's nearest form, as the writer holds it; `why` it could not hold the weight itself."""
        if self._target == MXFP4:
            rounding, abstract = _rounded_to_mxfp4, _abstract_mxfp4(weight)
        else:
            rounding = _rounding_for(weight, _GRIDS[self._target])
            abstract = jax.eval_shape(rounding, jax.ShapeDtypeStruct(weight.shape, jnp.float32))
        abstract = dataclasses.replace(abstract, dtype=np.dtype(weight.abstract.dtype).name)
        rounded = functools.partial(self._rounded, weight.name, abstract, rounding)
        nearest = dataclasses.replace(
            weight,
            abstract=abstract,
            read=lambda: rounded(weight.read(), Difference()),
            read_rows=None if weight.read_rows is None else _summed_up(weight.read_rows, rounded),
        )
        try:
            planned = writer.plan(nearest, options)
        except JQ4Error as error:
            raise JQ4Error(f"{why}; rounded again, neither: {error}") from error
        again = "rounded again, to" if weight.packed else f"{weight.format} rounded to"
        again = f"{again} {abstract.format} in groups of {abstract.group_size}"
        return dataclasses.replace(planned, loss="; ".join([again, *([planned.loss] if planned.loss else [])]))

    def _rounded(self, name: str, abstract: Any, rounding: Any, value: Any, difference: Difference) -> Any:
        """`value`: the weight, or some of its rows; what rounding them costs is added to `difference`."""
        kept = {part: one for part in PARTS if (one := getattr(abstract, part)) is not None}
        held = {part: np.empty((value.shape[0], *one.shape[1:]), one.dtype) for part, one in kept.items()}
        for at, dense in finite_rows(value, name):
            made = rounding(dense)
            for part, array in held.items():
                array[at] = np.asarray(getattr(made, part))
            difference.add(host_dequantize(jax.tree.map(np.asarray, made)), dense)
        self.errors[name] = difference.as_dict()
        return dataclasses.replace(abstract, **held)


def _summed_up(read_rows: Callable[[slice], Any], rounded: Callable[[Any, Difference], Any]) -> Callable[[slice], Any]:
    """`read_rows` of the rounded weight; what it costs is summed up from the first rows on."""
    difference = Difference()

    def read_some(rows: slice) -> Any:
        nonlocal difference
        difference = Difference() if rows.start == 0 else difference
        return rounded(read_rows(rows), difference)

    return read_some


def _rounding_for(weight: LazyWeight, bits: tuple[int, ...]) -> Any:
    """jq4.rounding's, in the weight's own bits and groups where the target has them."""
    q, length = weight.abstract, weight.shape[-1]
    own = get_format(q.format)
    width = own.bits if own.bits in bits and own.is_integer else 4
    group = q.group_size if q.group_size % 32 == 0 or q.group_size >= length else _GROUP
    return functools.partial(
        quantize_weight, format=f"int{width}", group_size=group, axis=-1, symmetric=False, scale_dtype="float16"
    )


def _abstract_mxfp4(weight: LazyWeight) -> QArray:
    scales = (*weight.shape[:-1], weight.shape[-1] // mx_blocks.BLOCK)
    return abstract_qarray(
        weight.shape, format=mx_blocks.FORMAT, group_size=mx_blocks.BLOCK, dtype=np.float32,
        parts={"scale": (scales, mx_blocks.SCALE_DTYPE)},
    )  # fmt: skip


def _rounded_to_mxfp4(dense: np.ndarray) -> QArray:
    """Of f32[rows, K]."""
    codes, scales = mx_blocks.quantized(dense)
    return QArray(
        codes=pack(codes, 4), scale=scales.view(mx_blocks.SCALE_DTYPE), format=mx_blocks.FORMAT,
        group_size=mx_blocks.BLOCK, axis=-1,
    )  # fmt: skip
