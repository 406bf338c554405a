"""FP4 weights of compressed-tensors, mxfp4-pack-quantized and nvfp4-pack-quantized, as QArrays with packed scales.

    weight_packed         u8 [*E, N, K/2]       e2m1 codes, even k in the low nibble: a QArray's bytes as they are
    mxfp4   weight_scale  u8 [*E, N, K/32]      e8m0, see mx_blocks.py
    nvfp4   weight_scale  e4m3 [*E, N, K/16]    w = level * weight_scale / weight_global_scale
            weight_global_scale   f32 [1]

One byte a scale is kept: e8m0 is a dtype of JAX, and the e4m3 bytes are codes of a QArray of 8 bits, "e4m3", whose own
scale is 1 / global, rounded to float32. So a weight of NVFP4 is exact to that rounding and the product's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.model_dtype import model_dtype
from jq4.checkpoint.foreign.mx_blocks import BLOCK, SCALE_DTYPE, read_scales
from jq4.checkpoint.foreign.partners import Partners, contradiction, refusal
from jq4.checkpoint.foreign.weights import LazyWeight, abstract_qarray
from jq4.checkpoint.safetensors_files import StoredTensor
from jq4.qarray import QArray

NVFP4_GROUP = 16
_PARTS = ("weight_packed", "weight_scale", "weight_global_scale", "weight_shape")


def weight(partners: Partners, config: Mapping[str, Any]) -> LazyWeight:
    """The weight of u8 `weight_packed` and its scales."""
    packed = partners.need("weight_packed", "U8")
    scale = partners.need("weight_scale", "U8", "F8_E8M0", "F8_E4M3")
    nvfp4 = scale.dtype == "F8_E4M3"
    group = NVFP4_GROUP if nvfp4 else BLOCK
    if len(packed.shape) not in (2, 3) or scale.shape[:-1] != packed.shape[:-1]:
        raise contradiction(scale, f"{[*packed.shape[:-1], 'groups']} for weight_packed {list(packed.shape)}")
    inputs = packed.shape[-1] * 2
    if scale.shape[-1] * group != inputs:
        raise contradiction(
            scale,
            f"{inputs / group:g} groups of {group} for {inputs} FP4 inputs",
            "If these are floats of 6 bits, decompress it with compressed-tensors and save it dense.",
        )
    read = _read_nvfp4 if nvfp4 else _read_mxfp4
    abstract = abstract_qarray(
        (*packed.shape[:-1], inputs),
        format="fp4",
        group_size=group,
        dtype=model_dtype(config),
        parts={"scale": (scale.shape, SCALE_DTYPE)},
    )
    if nvfp4:
        abstract = dataclasses.replace(abstract, scale=_abstract_scale(partners, scale))
    names = partners.names(*_PARTS)

    own = nvfp4 and abstract.scale.scale.shape[0] > 1  # a global scale for each expert
    cut = ("weight_packed", "weight_scale", *(("weight_global_scale",) if own else ()))

    def read_rows(rows: slice) -> QArray:
        return read(partners.rows(rows, *cut), abstract)

    return LazyWeight(partners.weight_name, abstract, lambda: read(partners, abstract), names, read_rows)


def _abstract_scale(partners: Partners, scale: StoredTensor) -> QArray:
    whole = partners.need("weight_global_scale", "F32")
    experts = scale.shape[:-2]
    if int(np.prod(whole.shape)) not in (1, int(np.prod(experts))):
        raise contradiction(whole, "F32[1], or one for each expert")
    shape = (*(experts if int(np.prod(whole.shape)) > 1 else (1,) * len(experts)), 1, 1)
    return abstract_qarray(
        scale.shape,
        format="e4m3",
        group_size=scale.shape[-1],
        dtype=np.float32,
        parts={"scale": (shape, np.float32)},
    )


def _read_mxfp4(partners: Partners, abstract: QArray) -> QArray:
    scale = np.asarray(read_scales(partners.need("weight_scale")))
    return dataclasses.replace(abstract, codes=np.asarray(partners.need("weight_packed").read()), scale=scale)


def _read_nvfp4(partners: Partners, abstract: QArray) -> QArray:
    stored, whole = partners.need("weight_scale"), partners.need("weight_global_scale")
    levels, factor = np.asarray(stored.read()).view(np.uint8), np.asarray(whole.read())
    _refuse_nan((levels & 0x7F) == 0x7F, stored)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = (np.float32(1) / factor).reshape(-1, *abstract.scale.scale.shape[1:])
    _refuse_nan(~(np.isfinite(factor) & np.isfinite(inverse.reshape(factor.shape))), whole)
    scale = dataclasses.replace(abstract.scale, codes=levels, scale=inverse)
    return dataclasses.replace(abstract, codes=np.asarray(partners.need("weight_packed").read()), scale=scale)


def _refuse_nan(bad: np.ndarray, tensor: StoredTensor) -> None:
    if bad.any():
        found = f"holds {int(bad.sum())} scales that are NaN, infinite or a zero to divide by"
        raise refusal(tensor, found, "finite ones")
