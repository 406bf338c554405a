"""MXFP4 in the layout of gpt-oss: blocks of 32 with an axis of their own, beside their scales.

    model.layers.0.mlp.experts.gate_up_proj_blocks   u8[E, 2I, H / 32, 16]
    model.layers.0.mlp.experts.gate_up_proj_scales   u8[E, 2I, H / 32]       E8M0, see mx_blocks.py

in OpenAI's own files block.0.mlp.mlp1_weight.blocks and .scales. A weight is named without the suffix, and keeps its
rows as they are (those of gate_up_proj alternate: gate, up, gate, ...); its codes are the blocks' bytes unchanged.
transformers' dense experts are the transpose, [E, H, 2I]. (compressed-tensors has a form of MXFP4 of its own.)

Written: experts that are packed already, and linear layers, a matrix without the axis E. No options but "ignore".
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign import mx_blocks
from jq4.checkpoint.foreign.linears import is_linear, module_of
from jq4.checkpoint.foreign.model_dtype import model_dtype
from jq4.checkpoint.foreign.module_patterns import unsaid_head
from jq4.checkpoint.foreign.mx_blocks import BLOCK, SCALE_DTYPE, SCALE_NAMES
from jq4.checkpoint.foreign.partners import checked, partner, refusal
from jq4.checkpoint.foreign.weights import LazyWeight, abstract_qarray
from jq4.checkpoint.foreign.writing import Planned, as_it_is
from jq4.checkpoint.safetensors_files import StoredTensor
from jq4.errors import JQ4Error
from jq4.qarray import QArray

NAME = "gpt-oss"

_SUFFIXES = {"_blocks": "_scales", ".blocks": ".scales"}


def claims(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> bool:
    return any(
        name.endswith(tuple(_SUFFIXES)) and tensor.dtype == "U8" and tensor.shape[-1:] == (BLOCK // 2,)
        for name, tensor in tensors.items()
    )


def read(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[LazyWeight], list[str]]:
    dtype = model_dtype(config)
    blocks = [tensor for name, tensor in tensors.items() if name.endswith(tuple(_SUFFIXES))]
    return [_weight(tensors, one, dtype) for one in blocks], []


def _weight(tensors: Mapping[str, StoredTensor], blocks: StoredTensor, dtype: Any) -> LazyWeight:
    suffix = next(one for one in _SUFFIXES if blocks.name.endswith(one))
    name = blocks.name.removesuffix(suffix)
    checked(blocks, ("U8",))
    if len(blocks.shape) < 3 or blocks.shape[-1] != BLOCK // 2 or 0 in blocks.shape:
        raise refusal(blocks, f"has shape {list(blocks.shape)}", f"[..., rows, columns / {BLOCK}, {BLOCK // 2}]")
    scales = partner(tensors, blocks, name + _SUFFIXES[suffix], SCALE_NAMES, blocks.shape[:-1])
    abstract = abstract_qarray(
        (*blocks.shape[:-2], blocks.shape[-2] * BLOCK), format=mx_blocks.FORMAT, group_size=BLOCK, dtype=dtype,
        parts={"scale": (scales.shape, SCALE_DTYPE)},
    )  # fmt: skip

    def read_from(blocks: StoredTensor, scales: StoredTensor) -> QArray:
        codes = blocks.read().reshape(*blocks.shape[:-2], -1)
        return dataclasses.replace(abstract, codes=codes, scale=mx_blocks.read_scales(scales))

    return LazyWeight(
        name, abstract, lambda: read_from(blocks, scales), (blocks.name, scales.name),
        lambda rows: read_from(blocks.rows(rows), scales.rows(rows)),
    )  # fmt: skip


def plan(weight: LazyWeight, options: Mapping[str, Any]) -> Planned:
    *outer, width = weight.shape or (1,)
    if not weight.packed and (not is_linear(weight, options) or width % BLOCK):
        return as_it_is(weight)
    if width % BLOCK or not outer:
        raise JQ4Error(
            f"{weight.name}: has shape {list(weight.shape)}, and MXFP4 holds rows of whole blocks of {BLOCK}. "
            "Convert it to another format, or to dense safetensors first."
        )
    name = weight.name.removesuffix(".weight") if len(outer) > 1 else weight.name  # experts are no modules of their own
    kept = weight.packed and mx_blocks.holds_blocks(weight.abstract)
    tensors = {
        f"{name}_blocks": ("U8", (*outer, width // BLOCK, BLOCK // 2)),
        f"{name}_scales": ("U8", (*outer, width // BLOCK)),
    }
    of_groups = f" in groups of {weight.abstract.group_size}" if weight.packed else ""
    loss = "" if kept else f"{weight.format}{of_groups} rounded to MXFP4"
    encode, anew = functools.partial(_encode, name), bool(loss) and weight.packed
    return Planned(weight, tensors, encode, loss, requantized=anew, by_rows=tuple(tensors))


def _encode(name: str, value: Any) -> dict[str, np.ndarray]:
    codes, scales = mx_blocks.packed(name, value)
    return {f"{name}_blocks": codes.reshape(*scales.shape, BLOCK // 2), f"{name}_scales": scales}


def quantization_config(planned: list[Planned], options: Mapping[str, Any]) -> dict[str, Any]:
    dense = [one.weight for one in planned if one.weight.name in one.tensors and one.weight.name.endswith(".weight")]
    kept = [*map(module_of, dense), *unsaid_head(planned)]
    return {"quant_method": "mxfp4", "modules_to_not_convert": kept}
