"""Writes weights as bitsandbytes' NF4, which transformers loads: the layout is told in bitsandbytes.py.

    dense linear layers     quantized in blocks of 64, byte for byte as bitsandbytes does it
    nf4 and bnb_fp4         in blocks of 32, 64, ... 4096 along whole rows: the same codes and scales
    other packed weights    dequantized and quantized again, which is told as a loss

options: "group_size" (64) of what is quantized; "double_quant": True packs statistics, False writes them as float32,
None keeps them as they are; "ignore": patterns of weights that stay dense.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign import bit_strings
from jq4.checkpoint.foreign.bitsandbytes import nested_axis
from jq4.checkpoint.foreign.bnb_quantize import nested, quantized
from jq4.checkpoint.foreign.bnb_state import BLOCK_SIZES, FORMATS, NESTED_BLOCK, SUFFIX, QuantState
from jq4.checkpoint.foreign.flat_groups import by_rows, row_group_size
from jq4.checkpoint.foreign.host_dequantize import finite_rows, host_dequantize
from jq4.checkpoint.foreign.linears import is_linear, module_of
from jq4.checkpoint.foreign.module_patterns import unsaid_head
from jq4.checkpoint.foreign.row_blocks import row_blocks
from jq4.checkpoint.foreign.weights import LazyWeight
from jq4.checkpoint.foreign.writing import Planned, as_it_is
from jq4.double_quant import FORMAT as NESTED_FORMAT
from jq4.errors import JQ4Error
from jq4.formats import get_format
from jq4.qarray import QArray, is_qarray

NAME = "bnb-nf4"
_GROUP = 64
_LONGEST_STATE = 256  # bytes, where nested_offset is not known before the weight is quantized
_KEPT_DTYPES = ("bfloat16", "float16", "float32")


def plan(weight: LazyWeight, options: Mapping[str, Any]) -> Planned:
    if not weight.packed and not is_linear(weight, options):
        return as_it_is(weight)
    dtype = np.dtype(weight.abstract.dtype).name
    if weight.packed and len(weight.shape) != 2:
        raise JQ4Error(
            f"{weight.name}: has shape {list(weight.shape)}, and bitsandbytes holds matrices [N, K] alone. "
            "Convert it to another format, or to dense safetensors first."
        )
    kept = _kept_block(weight.abstract) if weight.packed else None
    size = kept or int(options.get("group_size", _GROUP))
    if size not in BLOCK_SIZES:
        raise JQ4Error(f"--to {NAME}: group_size is {size}, wanted one of {', '.join(map(str, BLOCK_SIZES))}")
    kind = "fp4" if kept and weight.format == FORMATS["fp4"] else "nf4"
    state = QuantState(kind, size, dtype if dtype in _KEPT_DTYPES else "float32", weight.shape)
    double = options.get("double_quant")
    if double is None:
        double = bool(kept) and is_qarray(weight.abstract.scale)
    as_held = bool(kept) and _holds_nested(weight.abstract, state)
    length = _length_of_state(weight, state, double, as_held)
    encode = functools.partial(
        _encode, weight.name, state, length=length, kept=bool(kept), double=double, as_held=as_held and double
    )
    return Planned(
        weight,
        _tensors(weight.name, state, double, length),
        encode,
        loss=_loss(weight, kept, double, as_held),
        requantized=weight.packed and not kept,
        doubt="" if not kept or kept == weight.abstract.group_size else f"groups must make whole blocks of {kept}",
    )


def quantization_config(planned: list[Planned], options: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers reads; modules that stayed dense are listed."""
    packed = [one for one in planned if any(SUFFIX in name for name in one.tensors)]
    kinds = {name.partition(SUFFIX)[2] for one in packed for name in one.tensors if SUFFIX in name}
    dtypes = {np.dtype(one.weight.abstract.dtype).name for one in packed}
    dense = [one.weight for one in planned if one not in packed and len(one.weight.shape) == 2]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "fp4" if kinds == {"fp4"} else "nf4",
        "bnb_4bit_use_double_quant": any(name.endswith(".nested_absmax") for one in packed for name in one.tensors),
        "bnb_4bit_compute_dtype": dtypes.pop() if len(dtypes) == 1 and dtypes <= set(_KEPT_DTYPES) else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [module_of(weight) for weight in dense if weight.name.endswith(".weight")]
        + unsaid_head(planned),
    }


def _kept_block(q: QArray) -> int | None:
    """The size of bitsandbytes' blocks that hold these codes and scales as they are; None where none does."""
    plain = (
        q.format in FORMATS.values()
        and q.axis == -1
        and not q.input_rotation
        and not q.activations
        and all(part is None for part in (q.zero_point, q.offset, q.permutation, q.input_scale))
    )
    if not plain:
        return None
    if q.group_size in BLOCK_SIZES and q.shape[-1] % q.group_size == 0:
        return q.group_size
    crossing = q.shape[-1] % _GROUP and row_group_size(q.shape[-1], _GROUP) == q.group_size
    return _GROUP if crossing else None


def _holds_nested(q: QArray, state: QuantState) -> bool:
    """Whether the scales are packed as bitsandbytes packs them: blocks of 256 through [N, G], one offset."""
    scale, axis = q.scale, nested_axis(state)
    if not is_qarray(scale) or axis is None or scale.format != NESTED_FORMAT or scale.offset is None:
        return False
    size = NESTED_BLOCK // (state.shape[1] // state.blocksize) if axis == -2 else NESTED_BLOCK
    whole = scale.shape == (state.shape[0], state.shape[1] // state.blocksize)
    one = math.prod(scale.offset.shape) == 1
    return whole and one and scale.axis == axis and scale.group_size == min(size, scale.shape[axis])


def _loss(weight: LazyWeight, kept: int | None, double: bool, as_held: bool) -> str:
    if not weight.packed:
        return f"{weight.format} rounded to NF4"
    if not kept:
        return f"{weight.format} in groups of {weight.abstract.group_size} rounded again, to NF4"
    return "scales rounded to 8 bits" if double and not as_held else ""


def _length_of_state(weight: LazyWeight, state: QuantState, double: bool, as_held: bool) -> int:
    """Bytes of the JSON: bitsandbytes' own number, where the offset of nested statistics is known beforehand."""
    if not double:
        return state.encoded().size
    offset = weight.peek("scale/offset") if as_held else None
    return _LONGEST_STATE if offset is None else dataclasses.replace(state, nested_offset=_only(offset)).encoded().size


def _only(offset: Any) -> float:
    return float(np.asarray(offset).reshape(()))


def _tensors(name: str, state: QuantState, double: bool, length: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    blocks = -(-state.blocks // NESTED_BLOCK)
    held = {name: ("U8", (-(-state.size // 2), 1)), f"{name}.absmax": ("U8" if double else "F32", (state.blocks,))}
    if double:
        held |= {f"{name}.nested_absmax": ("F32", (blocks,)), f"{name}.nested_quant_map": ("F32", (256,))}
    held |= {f"{name}.quant_map": ("F32", (16,)), f"{name}{SUFFIX}{state.quant_type}": ("U8", (length,))}
    return held


def _encode(
    name: str, state: QuantState, value: Any, *, length: int, kept: bool, double: bool, as_held: bool
) -> dict[str, np.ndarray]:
    flat, absmax = (_flat_bytes(value), None) if kept else _quantized(value, state, name)
    statistics: Any
    if as_held:
        statistics, offset = (value.scale.codes, value.scale.scale), _only(value.scale.offset)
    else:
        absmax = _flat_scales(value, state, name) if absmax is None else absmax
        *statistics, offset = nested(absmax) if double else (absmax, None)
    state = dataclasses.replace(state, nested_offset=offset)
    names = (f"{name}.absmax", f"{name}.nested_absmax")
    held = {name: flat[:, None]} | {
        key: np.asarray(one).reshape(-1) for key, one in zip(names, statistics, strict=False)
    }
    if double:
        held[f"{name}.nested_quant_map"] = np.asarray(get_format(NESTED_FORMAT).levels, np.float32)
    levels = np.asarray(get_format(FORMATS[state.quant_type]).levels, np.float32)
    held[f"{name}.quant_map"] = levels + np.float32(0)  # bitsandbytes' FP4 has no -0.0
    held[f"{name}{SUFFIX}{state.quant_type}"] = state.encoded(length)
    return held


def _quantized(value: Any, state: QuantState, name: str) -> tuple[np.ndarray, np.ndarray]:
    """bitsandbytes' bytes u8[ceil(NK / 2)] and absmax f32[B] of a weight that is quantized (again)."""
    rows, width = state.shape
    flat, absmax = np.empty(-(-rows * width // 2), np.uint8), np.empty(state.blocks, np.float32)
    multiple = state.blocksize // row_group_size(width, state.blocksize)  # rows that are whole blocks
    for (block,), dense in finite_rows(value, name, multiple):
        codes, peaks = quantized(dense.reshape(-1), state.blocksize)
        start = block.start * width
        flat[start // 2 :][: -(-codes.size // 2)] = _high_first(codes, _zero("nf4"))
        absmax[start // state.blocksize :][: peaks.size] = peaks
    return flat, absmax


def _high_first(codes: np.ndarray, zero: int) -> np.ndarray:
    """Flat codes u8[n] as bytes u8[ceil(n / 2)]; `zero`, the code of 0, fills the last nibble of an odd number."""
    even = np.append(codes, np.uint8(zero)) if codes.size % 2 else codes
    return (even[::2] << 4) | even[1::2]


def _flat_bytes(q: QArray) -> np.ndarray:
    """The codes of [N, K] as bitsandbytes' bytes u8[ceil(NK / 2)]."""
    codes, (rows, width) = np.asarray(q.codes), q.shape
    if width % 2 == 0:
        return ((codes << 4) | (codes >> 4)).reshape(-1)
    flat = np.empty(-(-rows * width // 2), np.uint8)
    for block in row_blocks(rows, width, 2):
        held = _high_first(bit_strings.unpack(codes[block], 4, width).reshape(-1), _zero(q.format))
        flat[block.start * width // 2 :][: held.size] = held
    return flat


def _flat_scales(q: QArray, state: QuantState, name: str) -> np.ndarray:
    """f32[B] of the blocks of the flat weight; a JQ4Error where a block has more than one scale."""
    scale = host_dequantize(q.scale) if is_qarray(q.scale) else np.asarray(q.scale)
    of_groups = np.broadcast_to(scale.astype(np.float32), (*q.shape[:-1], q.num_groups)).reshape(-1)
    starts = -(-np.arange(state.blocks) * state.blocksize // q.group_size)
    flat = of_groups[starts]
    if not np.array_equal(by_rows(flat, q.shape, state.blocksize).reshape(-1), of_groups):
        raise JQ4Error(
            f"{name}: groups of {q.group_size} in rows of {q.shape[-1]} do not share scales in blocks of "
            f"{state.blocksize}, which bitsandbytes wants. Convert it to dense safetensors first."
        )
    return flat


def _zero(format: str) -> int:
    levels = get_format(format).levels
    assert levels is not None
    return levels.index(0.0)
