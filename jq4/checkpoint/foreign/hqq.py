"""HQQ's own files (hqq, and transformers with HqqConfig): codes, scales and zero points that lie between codes.

    P.W_q     codes, packed; W = (code - zero) * scale
    P.scale, P.zero          floats, [R, 1] for axis 1, [1, C] for axis 0
    P.nbits, P.group_size, P.axis, P.shape, P.packing, P.compute_dtype, ...    settings, a tensor each

axis 1  W[N, K] as [R, g], R = N K / g: groups of the flat weight (flat_groups.py), along rows where g divides K
axis 0  W[N, K] as [g, C], C = N K / g: where g divides N a group is every (N / g)-th row of one column. It is held as a
        group along N of rows that are permuted: QArray's axis -2. A product cannot keep that packed.

Packed by slices of the first axis, so that byte r holds codes of rows far apart: with `step` rows in W_q, code row
i * step + r is field i of W_q[r], counted from the top bits (4bit_u8: 2 fields, 2bit_u8: 4, 3bit_32: 10 of an int32's
lower 30 bits, the last slice filled up). 5 and 6 bits take a byte each. A float dtype of W_q is a view of these bytes.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jq4.checkpoint.foreign import bit_strings
from jq4.checkpoint.foreign.flat_groups import by_rows, row_group_size
from jq4.checkpoint.foreign.partners import FLOATS, checked, partner, read_finite, read_scalar, refusal
from jq4.checkpoint.foreign.row_blocks import packed_by_rows, row_blocks
from jq4.checkpoint.foreign.weights import LazyWeight, abstract_qarray
from jq4.checkpoint.safetensors_files import DTYPES, StoredTensor
from jq4.formats import get_format
from jq4.qarray import QArray
from pallas_kernels.packing import packed_length, padding_of

NAME = "hqq"

SETTINGS = (
    "nbits", "group_size", "axis", "shape", "packing", "unpack_view_dtype", "view_as_float", "compute_dtype",
    "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Packing:
    """fields: the lowest bit of each field of a word, in the order of the slices; bits: of a field."""

    word: str
    bits: int
    fields: tuple[int, ...]


_PACKINGS = {
    "8bit_u8": _Packing("u1", 8, (0,)),
    "4bit_u8": _Packing("u1", 4, (4, 0)),
    "2bit_u8": _Packing("u1", 2, (6, 4, 2, 0)),
    "3bit_32": _Packing("<u4", 3, tuple(range(27, -1, -3))),
}
_DEQUANTIZE = "Dequantize it with HQQ and save it dense, or quantize it again with"


@dataclasses.dataclass(frozen=True)
class _Module:
    """One quantized linear layer, checked."""

    codes: StoredTensor
    scale: StoredTensor
    zero: StoredTensor
    packing: _Packing
    nbits: int
    axis: int
    group_size: int
    shape: tuple[int, int]
    dtype: str

    def words(self) -> np.ndarray:
        """The words of W_q [step, columns]."""
        held = self.codes.read()
        return np.ascontiguousarray(held).view(np.uint8).reshape(held.shape[0], -1).view(self.packing.word)


def claims(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> bool:
    return any(name.endswith(".W_q") for name in tensors)


def read(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[LazyWeight], list[str]]:
    names = [name for name in tensors if name.endswith(".W_q")]
    modules = {name: _module(tensors, name.removesuffix(".W_q")) for name in names}
    weights = [_weight(tensors, name.removesuffix(".W_q"), module) for name, module in modules.items()]
    notes = []
    if any(module.axis == 0 for module in modules.values()):
        notes.append(
            "groups run along the outputs (axis 0): weights are held exactly, but a product dequantizes them; "
            "quantize with axis=1 for products that stay packed"
        )
    return weights, notes


def _module(tensors: Mapping[str, StoredTensor], prefix: str) -> _Module:
    owner = tensors[f"{prefix}.W_q"]

    def setting(name: str, dtypes: tuple[str, ...]) -> StoredTensor:
        return partner(tensors, owner, f"{prefix}.{name}", dtypes)

    for name in ("quant_scale", "quant_zero"):
        if f"{prefix}.{name}" in tensors and read_scalar(tensors[f"{prefix}.{name}"]):
            raise refusal(owner, f"has a packed {name[6:]} ({name})", "floats", f"{_DEQUANTIZE} {name}=False.")
    nbits, axis = (int(read_scalar(setting(name, ("I32", "I64")))) for name in ("nbits", "axis"))
    shape = checked(setting("shape", ("I64", "I32")), ("I64", "I32"), (2,)).read().tolist()
    name, dtype = (_text(setting(one, ("U8",))) for one in ("packing", "compute_dtype"))
    if name not in _PACKINGS or nbits not in range(2, 9):
        raise refusal(
            owner, f"has {nbits} bits packed as {name!r}", f"one of {', '.join(_PACKINGS)} for 2 to 8 bits",
            f"{_DEQUANTIZE} nbits of 2, 3, 4 or 8.",
        )  # fmt: skip
    dtype = dtype.removeprefix("torch.")
    if dtype not in ("float16", "bfloat16", "float32") or axis not in (0, 1) or min(shape) < 1:
        raise refusal(
            owner, f"has compute_dtype {dtype!r}, axis {axis}, shape {shape}", "a float, axis 0 or 1, a matrix"
        )
    return _checked_module(tensors, owner, _PACKINGS[name], nbits, axis, (shape[0], shape[1]), dtype)


def _checked_module(
    tensors: Mapping[str, StoredTensor],
    owner: StoredTensor,
    packing: _Packing,
    nbits: int,
    axis: int,
    shape: tuple[int, int],
    dtype: str,
) -> _Module:
    """Compares sizes: scales tell the number of groups, and these the size of W_q."""
    prefix, size = owner.name.removesuffix(".W_q"), math.prod(shape)
    of_groups = (None, 1) if axis == 1 else (1, None)
    scale = partner(tensors, owner, f"{prefix}.scale", FLOATS, of_groups)
    zero = partner(tensors, owner, f"{prefix}.zero", FLOATS, scale.shape)
    groups = max(math.prod(scale.shape), 1)
    group_size = size // groups
    if size % groups:
        raise refusal(scale, f"has {groups} scales", f"a number that divides {size} weights of shape {list(shape)}")
    rows, columns = (groups, group_size) if axis == 1 else (group_size, groups)
    step = -(-rows // len(packing.fields))
    wanted = step * columns * np.dtype(packing.word).itemsize
    whole = packing.bits == 3 or rows % len(packing.fields) == 0
    if not whole or owner.stop - owner.start != wanted or owner.shape[:1] != (step,):
        raise refusal(
            owner, f"is {owner.dtype}{list(owner.shape)}", f"{step} rows of {wanted} bytes in all for {list(shape)}"
        )
    if axis == 0 and shape[0] % group_size:
        raise refusal(
            owner, f"has groups of {group_size} along axis 0 of {list(shape)}", "groups that divide its rows",
            f"{_DEQUANTIZE} axis=1.",
        )  # fmt: skip
    return _Module(owner, scale, zero, packing, nbits, axis, group_size, shape, dtype)


def _text(tensor: StoredTensor) -> str:
    if len(tensor.shape) != 1 or tensor.shape[0] > 64:
        raise refusal(tensor, f"has shape {list(tensor.shape)}", "at most 64 characters")
    return tensor.read().tobytes().decode("ascii", "replace")


def _weight(tensors: Mapping[str, StoredTensor], prefix: str, module: _Module) -> LazyWeight:
    rows, width = module.shape
    format = f"int{module.nbits}"
    dtypes = {"scale": DTYPES[module.scale.dtype], "zero_point": DTYPES[module.zero.dtype]}
    if module.axis == 1:
        group = row_group_size(width, module.group_size)
        parts = {name: ((rows, width // group), dtype) for name, dtype in dtypes.items()}
        abstract = abstract_qarray(module.shape, format=format, group_size=group, dtype=module.dtype, parts=parts)
    else:
        struct = jax.ShapeDtypeStruct
        groups = (rows // module.group_size, width)
        abstract = QArray(
            codes=struct((packed_length(rows, module.nbits), width), np.uint8),
            scale=struct(groups, dtypes["scale"]), zero_point=struct(groups, dtypes["zero_point"]),
            permutation=struct((rows,), np.int32),
            format=format, group_size=module.group_size, axis=-2, padding=padding_of(rows, module.nbits),
            dtype=module.dtype,
        )  # fmt: skip
    read_it = functools.partial(_read_rows if module.axis == 1 else _read_columns, module, abstract)
    settings = [f"{prefix}.{name}" for name in SETTINGS if f"{prefix}.{name}" in tensors]
    named = (module.codes.name, module.scale.name, module.zero.name, *settings)
    return LazyWeight(f"{prefix}.weight", abstract, read_it, named)


def _read_rows(module: _Module, abstract: QArray) -> QArray:
    """Axis 1: rows of W_q are groups of the flat weight."""
    words, size, width = module.words(), module.group_size, module.shape[1]

    def codes(rows: slice) -> np.ndarray:
        start, stop = rows.start * width, rows.stop * width
        unpacked = _rows_of(module, words, np.arange(start // size, -(-stop // size)))
        return unpacked.reshape(-1)[start % size :][: stop - start].reshape(-1, width)

    scale, zero = (by_rows(read_finite(one), module.shape, size) for one in (module.scale, module.zero))
    return dataclasses.replace(
        abstract, codes=packed_by_rows(module.shape, module.nbits, codes), scale=scale, zero_point=zero
    )


def _read_columns(module: _Module, abstract: QArray) -> QArray:
    """Axis 0: row i of W_q's codes holds rows i * groups to (i + 1) * groups of the weight."""
    (rows, width), size = module.shape, module.group_size
    groups = rows // size
    words = module.words().reshape(-1, groups, width)
    packed = np.empty(abstract.codes.shape, np.uint8)
    for columns in row_blocks(width, rows):
        codes = _rows_of(module, words[:, :, columns], np.arange(size))  # [size, groups, columns]
        ordered = codes.transpose(2, 1, 0).reshape(-1, rows)
        packed[:, columns] = bit_strings.pack(ordered, module.nbits).T
    order = np.arange(rows, dtype=np.int32).reshape(size, groups).T.reshape(-1)
    scale, zero = (read_finite(one).reshape(groups, width) for one in (module.scale, module.zero))
    return dataclasses.replace(abstract, codes=packed, scale=scale, zero_point=zero, permutation=order)


def _rows_of(module: _Module, words: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Codes u8[len(rows), ...] of some rows, from words [step, ...]."""
    step = words.shape[0]
    shifts = np.asarray(module.packing.fields, words.dtype)[rows // step]
    fields = words[rows % step] >> shifts.reshape(-1, *(1,) * (words.ndim - 1))
    codes = (fields & (2**module.packing.bits - 1)).astype(np.uint8)
    largest = get_format(f"int{module.nbits}").max_code
    if codes.max(initial=0) > largest:
        raise refusal(module.codes, f"holds the code {codes.max()}", f"at most {largest} for {module.nbits} bits")
    return codes
