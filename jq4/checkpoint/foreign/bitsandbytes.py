"""bitsandbytes' 4-bit weights (NF4, FP4; plain and nested statistics) and LLM.int8, as transformers saves them.

    P.weight                 u8[ceil(NK / 2), 1], or the same bytes as bf16, f16, f32 (bnb_4bit_quant_storage)
    P.weight.absmax          f32[B], or u8[B] nested; B = ceil(NK / blocksize)
    P.weight.quant_map       f32[16], the levels
    P.weight.nested_absmax   f32[ceil(B / 256)]            nested only: absmax = nested_quant_map[code]
    P.weight.nested_quant_map  f32[256]                                          * nested_absmax + nested_offset
    P.weight.quant_state.bitsandbytes__nf4 (or __fp4)      see bnb_state.py

The flat row-major weight is cut into blocks, which may cross the ends of rows (flat_groups.py); element 2i is the HIGH
nibble of byte i. So a row of even length becomes ours by swapping nibbles. Nested statistics stay packed where blocks
of 256 of them are groups of jq4.double_quant (one size divides the other), else they are read as float32.

LLM.int8 has P.weight i8[N, K] with P.SCB f32[N]: w = code * SCB / 127. Its outliers are found in activations at run
time and are no part of a file.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jq4.checkpoint.foreign.bnb_state import FORMATS, NESTED_BLOCK, SUFFIX, QuantState, read_state
from jq4.checkpoint.foreign.flat_groups import by_rows, row_group_size
from jq4.checkpoint.foreign.partners import checked, partner, read_finite, read_scalar, refusal
from jq4.checkpoint.foreign.row_blocks import packed_by_rows
from jq4.checkpoint.foreign.weights import LazyWeight, abstract_qarray
from jq4.checkpoint.safetensors_files import StoredTensor
from jq4.double_quant import FORMAT as NESTED_FORMAT
from jq4.formats import get_format
from jq4.qarray import QArray

NAME = "bitsandbytes"

_STORAGE = ("U8", "I8", "BF16", "F16", "F32")
_OF_127 = np.float32(0.007874015718698502)  # 1 / 127 as bitsandbytes rounds it
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def claims(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> bool:
    return any(SUFFIX in name or name.endswith(".SCB") for name in tensors)


def read(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[LazyWeight], list[str]]:
    weights = [_four_bit(tensors, name) for name in tensors if SUFFIX in name]
    weights += [_int8(tensors, name) for name in tensors if name.endswith(".SCB")]
    return weights, _notes(tensors)


def _notes(tensors: Mapping[str, StoredTensor]) -> list[str]:
    states = [(name, read_state(tensors, name)) for name in tensors if SUFFIX in name]
    crossing = [name.partition(SUFFIX)[0] for name, state in states if state.shape[-1] % state.blocksize]
    expanded = [
        name.partition(SUFFIX)[0]
        for name, state in states
        if state.nested_offset is not None and nested_axis(state) is None
    ]
    notes = []
    if crossing:
        notes.append(
            f"{len(crossing)} weights ({crossing[0]}, ...) have blocks that cross the ends of rows: held exactly, in "
            "smaller groups with repeated scales"
        )
    if expanded:
        notes.append(
            f"{len(expanded)} weights ({expanded[0]}, ...) have nested statistics in blocks that are no groups of "
            "theirs: their scales are held as float32, with the same values"
        )
    return notes


def nested_axis(state: QuantState) -> int | None:
    """The axis of absmax [N, G] along which nested blocks of 256 are groups; None where they are not."""
    groups = state.shape[-1] // state.blocksize
    if state.shape[-1] % state.blocksize or len(state.shape) != 2:
        return None
    if NESTED_BLOCK % groups == 0:
        return -2
    return -1 if groups % NESTED_BLOCK == 0 else None


def _four_bit(tensors: Mapping[str, StoredTensor], state_name: str) -> LazyWeight:
    """Finds, checks and describes the tensors of the weight that a quant_state describes."""
    name = state_name.partition(SUFFIX)[0]
    state, owner = read_state(tensors, state_name), tensors[state_name]
    weight = partner(tensors, owner, name, _STORAGE)
    if weight.stop - weight.start != -(-state.size // 2):
        raise refusal(weight, f"has {weight.stop - weight.start} bytes", f"{-(-state.size // 2)} for {state.shape}")
    nested = state.nested_offset is not None
    parts = {
        "absmax": partner(
            tensors, owner, f"{name}.absmax", ("U8",) if nested else ("F32", "F16", "BF16"), (state.blocks,)
        ),
        "quant_map": partner(tensors, owner, f"{name}.quant_map", ("F32",), (16,)),
    }
    if nested:
        blocks = -(-state.blocks // NESTED_BLOCK)
        parts["nested_absmax"] = partner(tensors, owner, f"{name}.nested_absmax", ("F32",), (blocks,))
        parts["nested_quant_map"] = partner(tensors, owner, f"{name}.nested_quant_map", ("F32",), (256,))
    _check_levels(parts["quant_map"], FORMATS[state.quant_type])
    packed = nested and nested_axis(state) is not None and _has_levels(parts["nested_quant_map"], NESTED_FORMAT)
    group = row_group_size(state.shape[-1], state.blocksize)
    abstract = abstract_qarray(
        state.shape,
        format=FORMATS[state.quant_type],
        group_size=group,
        dtype=state.dtype,
        parts={"scale": ((*state.shape[:-1], state.shape[-1] // group), np.float32)},
    )
    if packed:
        abstract = dataclasses.replace(abstract, scale=_nested_scale(state, None, None))
    read_it = functools.partial(_read_four_bit, state, weight, parts, packed)
    taken = (name, *(part.name for part in parts.values()), state_name)
    return LazyWeight(name, abstract, read_it, taken, peek=functools.partial(_peek, state))


def _peek(state: QuantState, path: str) -> np.ndarray | None:
    """The one number of nested statistics, which the JSON has told."""
    told = path == "scale/offset" and state.nested_offset is not None
    return np.full((1, 1), state.nested_offset, np.float32) if told else None


def _read_four_bit(state: QuantState, weight: StoredTensor, parts: Mapping[str, StoredTensor], packed: bool) -> QArray:
    if packed:
        scale = _nested_scale(state, parts["absmax"].read(), read_finite(parts["nested_absmax"]))
    else:
        scale = by_rows(_absmax(state, parts), state.shape, state.blocksize)
    return QArray(
        codes=_codes(weight.read().reshape(-1).view(np.uint8), state.shape),
        scale=scale,
        format=FORMATS[state.quant_type],
        group_size=row_group_size(state.shape[-1], state.blocksize),
        axis=-1,
        padding=state.shape[-1] % 2,
        dtype=state.dtype,
    )


def _codes(flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """bitsandbytes' bytes u8[ceil(NK / 2)] as u8[*B, N, ceil(K / 2)]."""
    width = shape[-1]
    if width % 2 == 0:
        return ((flat << 4) | (flat >> 4)).reshape(*shape[:-1], width // 2)

    def codes(rows: slice) -> np.ndarray:
        start, stop = rows.start * width, rows.stop * width
        held = flat[start // 2 : -(-stop // 2)]
        return np.stack([held >> 4, held & 15], axis=-1).reshape(-1)[start % 2 :][: stop - start].reshape(-1, width)

    return packed_by_rows(shape, 4, codes)


def _absmax(state: QuantState, parts: Mapping[str, StoredTensor]) -> np.ndarray:
    """f32[B], nested or not."""
    if state.nested_offset is None:
        return read_finite(parts["absmax"]).astype(np.float32)
    levels = read_finite(parts["nested_quant_map"])[parts["absmax"].read()]
    of_blocks = np.repeat(read_finite(parts["nested_absmax"]), NESTED_BLOCK)[: state.blocks]
    return levels * of_blocks + np.float32(state.nested_offset)


def _nested_scale(state: QuantState, codes: np.ndarray | None, absmax: np.ndarray | None) -> QArray:
    """The scales as a QArray of 8-bit codes; of shapes alone where `codes` is None."""
    rows, groups = state.shape[0], state.shape[1] // state.blocksize
    axis = nested_axis(state)
    size = NESTED_BLOCK // groups if axis == -2 else NESTED_BLOCK
    blocks = (-(-rows // size), 1) if axis == -2 else (rows, groups // size)
    arrays: dict[str, Any]
    if codes is None or absmax is None:
        arrays = {
            "codes": jax.ShapeDtypeStruct((rows, groups), np.uint8),
            "scale": jax.ShapeDtypeStruct(blocks, np.float32),
            "offset": jax.ShapeDtypeStruct((1, 1), np.float32),
        }
    else:
        arrays = {
            "codes": codes.reshape(rows, groups),
            "scale": absmax.reshape(blocks),
            "offset": np.full((1, 1), state.nested_offset, np.float32),
        }
    size = min(size, rows if axis == -2 else groups)
    return QArray(**arrays, format=NESTED_FORMAT, group_size=size, axis=axis or -1, dtype="float32")


def _has_levels(tensor: StoredTensor, format: str) -> bool:
    return np.array_equal(tensor.read(), np.asarray(get_format(format).levels, np.float32))


def _check_levels(tensor: StoredTensor, format: str) -> None:
    if not _has_levels(tensor, format):
        raise refusal(
            tensor,
            "holds other levels than bitsandbytes' table",
            f"those of {format}",
            "jq4 holds no weights with a table of their own; dequantize it with bitsandbytes and save it dense.",
        )


def _int8(tensors: Mapping[str, StoredTensor], scale_name: str) -> LazyWeight:
    """LLM.int8: one scale a row."""
    prefix = scale_name.removesuffix(".SCB")
    owner = tensors[scale_name]
    weight = partner(tensors, owner, f"{prefix}.weight", ("I8",), (None, None))
    scale = checked(owner, ("F32", "F16", "BF16"), (weight.shape[0],))
    layout = tensors.get(f"{prefix}.weight_format")
    if layout is not None and read_scalar(layout) != 0:
        raise refusal(
            layout, f"says {read_scalar(layout)}, a layout for one kind of GPU", "0, rows",
            "Save the model again with a bitsandbytes of version 0.45 or later.",
        )  # fmt: skip
    rows, width = weight.shape
    abstract = abstract_qarray(
        weight.shape, format="int8", group_size=width, dtype=np.float16, parts={"scale": ((rows, 1), np.float32)}
    )

    def read_it() -> QArray:
        codes = weight.read().view(np.uint8) ^ np.uint8(128)
        values = read_finite(scale).astype(np.float32) * _OF_127
        return dataclasses.replace(abstract, codes=codes, scale=values.reshape(rows, 1))

    named = (weight.name, scale_name, *([layout.name] if layout is not None else ()))
    return LazyWeight(weight.name, abstract, read_it, named)
