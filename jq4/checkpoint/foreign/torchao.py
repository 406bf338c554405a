"""torchao's quantized tensors in safetensors (torchao.prototype.safetensors; transformers with TorchAoConfig).

The header's metadata names every tensor of the model, and says what it is made of:

    tensor_names            JSON: ["model.layers.0.mlp.up_proj.weight", ...]
    the tensor's name       JSON: {"_type": "Int4Tensor", "_data": {"block_size": [1, 128], "shape": [N, K], ...},
                                   "_tensor_data_names": ["qdata", "scale", "zero_point"]}
    its arrays              "model.layers.0.mlp.up_proj._weight_qdata", "..._weight_scale", ...

    Int4Tensor              qdata i8[*B, N, K / 2], even element low, two's complement; scale and zero_point
                            [*B, K / g, N]; w = q * scale + zero_point
    IntxUnpackedToInt8Tensor  qdata i8[N, K] of target_dtype's range; scale and zero_point [N, K / g];
                            w = (q - zero_point) * scale
    Int8Tensor              the same of int8
    Int4TilePackedTo4dTensor  qdata i32[N / 8, K / 128, 32, 4], N and K filled up; scale_and_zero bf16[K / g, N, 2];
                            w = (q - 8) * scale + zero. With k = 128 t + 32 i + 16 h + 8 f + 2 p + c, element (n, k) is
                            nibble 4 c + 2 h + f of the word [n // 8, t, 4 (n % 8) + p, i]: tensor cores' own order

act_pre_scale multiplies the inputs of a product: it is our input_scale. Rounding of activations is told, not applied.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.partners import FLOATS, partner, read_finite, refusal
from jq4.checkpoint.foreign.row_blocks import packed_by_rows
from jq4.checkpoint.foreign.weights import LazyWeight, abstract_qarray
from jq4.checkpoint.safetensors_files import DTYPES, StoredTensor, parse_json, read_metadata
from jq4.errors import JQ4Error
from jq4.formats import get_format
from jq4.qarray import QArray

NAME = "torchao"

_TEXT = ("utf-8", "surrogatepass")  # JSON can say what UTF-8 cannot
_OF_INPUTS = ("activation_quantization", "act_quant_kwargs")
_REMEDY = "Load it with torchao, dequantize it and save it dense."


@dataclasses.dataclass(frozen=True)
class _Described:
    """One tensor of the metadata."""

    tensors: Mapping[str, StoredTensor]
    name: str
    data: Mapping[str, Any]

    def array(self, part: str) -> str:
        module, _, leaf = self.name.rpartition(".")
        return f"{module}{'.' if module else ''}_{leaf}_{part}"

    @property
    def codes(self) -> StoredTensor:
        if self.array("qdata") not in self.tensors:
            raise JQ4Error(f"{self.name}: the file comes without {self.array('qdata')!r}. {_REMEDY}")
        return self.tensors[self.array("qdata")]

    def part(self, part: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> StoredTensor:
        return partner(self.tensors, self.codes, self.array(part), dtypes, shape)

    def sizes(self, field: str, length: int) -> tuple[int, ...]:
        found = self.data.get(field)
        if not isinstance(found, list) or len(found) != length or not all(type(n) is int and n > 0 for n in found):
            raise refusal(self.codes, f"has {field} {found!r}", f"{length} whole numbers above 0")
        return tuple(found)

    def group_size(self, shape: tuple[int, ...]) -> int:
        *outer, group = self.sizes("block_size", len(shape))
        if any(one != 1 for one in outer):
            raise refusal(self.codes, f"has block_size {[*outer, group]}", "groups along rows", _REMEDY)
        return group

    def dtype_of(self, field: str) -> str:
        found = self.data.get(field)
        return str(found.get("_data")) if isinstance(found, dict) else ""


def claims(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> bool:
    return any(_is_codes(name) for name in tensors)


def _is_codes(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf.startswith("_") and leaf.endswith("_qdata")


def read(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[LazyWeight], list[str]]:
    weights, rounded = [], []
    for name, entry in _described(tensors).items():
        described = _Described(tensors, name, entry["_data"])
        if entry["_type"] not in _READERS:
            raise refusal(described.codes, f"is a {entry['_type']}", " or ".join(_READERS), _REMEDY)
        weights.append(_READERS[entry["_type"]](described))
        if any(described.data.get(key) for key in _OF_INPUTS) or "float8" in described.dtype_of("activation_dtype"):
            rounded.append(name)
    taken = {name for weight in weights for name in weight.tensors}
    for name in tensors:
        if _is_codes(name) and name not in taken:
            raise refusal(tensors[name], "is not told of in the header's metadata", "what kind of tensor it is")
    note = f"{len(rounded)} weights ({', '.join(rounded[:1])}, ...) round their inputs in torchao; that is not applied"
    return weights, [note] if rounded else []


def _described(tensors: Mapping[str, StoredTensor]) -> dict[str, Mapping[str, Any]]:
    """The entries of all files' metadata that are not plain tensors, by the tensor's name."""
    entries: dict[str, Mapping[str, Any]] = {}
    for file in dict.fromkeys(tensor.file for tensor in tensors.values()):
        metadata = read_metadata(file)
        names = parse_json(metadata.get("tensor_names", "[]").encode(*_TEXT), f"{file}: tensor_names of its metadata")
        for name in names if isinstance(names, list) else ():
            if not isinstance(name, str) or name not in metadata:
                raise JQ4Error(f"{file}: its metadata names {name!r} and does not describe it. {_REMEDY}")
            entry = parse_json(metadata[name].encode(*_TEXT), f"{file}: metadata of {name!r}")
            kind = entry.get("_type") if isinstance(entry, dict) else None
            if kind in ("Tensor", "torch.Tensor"):
                continue
            if not isinstance(kind, str) or not isinstance(entry.get("_data"), dict):
                raise JQ4Error(f"{file}: its metadata describes {name!r} as {str(entry)[:80]}, wanted _type and _data.")
            entries[name] = entry
    return entries


def _int4(described: _Described) -> LazyWeight:
    codes = described.codes
    if codes.dtype not in ("I8", "U8") or len(codes.shape) < 2:
        raise refusal(codes, f"is {codes.dtype}{list(codes.shape)}", "I8[..., N, K / 2]")
    shape = described.sizes("shape", len(codes.shape))
    group = described.group_size(shape)
    *outer, rows, width = shape
    if codes.shape != (*outer, rows, width // 2) or width % group or width % 2:
        raise refusal(codes, f"has shape {list(codes.shape)}", f"two codes a byte of {list(shape)}, in whole groups")
    held = (*outer, width // group, rows)
    scale, offset = described.part("scale", FLOATS, held), described.part("zero_point", FLOATS, held)

    def read_codes() -> np.ndarray:
        return codes.read().view(np.uint8) ^ np.uint8(0x88)  # two's complement to code - 8

    def transposed(part: StoredTensor) -> Callable[[], np.ndarray]:
        return lambda: np.swapaxes(read_finite(part), -1, -2)

    parts = {"scale": (scale, transposed(scale)), "offset": (offset, transposed(offset))}
    return _lazy(described, shape, "int4", group, _name_of(scale), read_codes, parts)


def _int8(described: _Described) -> LazyWeight:
    return _of_bytes(described, "int8")


def _unpacked(described: _Described) -> LazyWeight:
    return _of_bytes(described, described.dtype_of("target_dtype"))


def _of_bytes(described: _Described, target: str) -> LazyWeight:
    codes = described.codes
    if codes.dtype != "I8" or len(codes.shape) != 2 or target not in [f"int{bits}" for bits in range(2, 9)]:
        raise refusal(codes, f"is {codes.dtype}{list(codes.shape)} of {target!r}", "I8[N, K] of int2 to int8", _REMEDY)
    shape, form = codes.shape, get_format(target)
    group = described.group_size(shape)
    if shape[1] % group:
        raise refusal(codes, f"has {shape[1]} columns", f"whole groups of {group}")
    scale = described.part("scale", FLOATS, (shape[0], shape[1] // group))
    zero = described.part("zero_point", ("I8", *FLOATS), scale.shape)

    def read_codes() -> np.ndarray:
        held = codes.read()

        def of_rows(rows: slice) -> np.ndarray:
            values = held[rows]
            if max(-int(values.min(initial=0)) - 1, int(values.max(initial=0))) >= form.center:
                raise refusal(codes, f"holds codes beyond {target}", f"{-form.center} to {form.center - 1}")
            return (values.view(np.uint8) + np.uint8(form.center)) & np.uint8(form.max_code)

        return packed_by_rows(shape, form.bits, of_rows)

    def read_zero() -> np.ndarray:
        values = read_finite(zero).astype(np.float32) + form.center  # ours counts from the lowest code
        whole = zero.dtype == "I8" and values.min() >= 0 and values.max() <= form.max_code
        if zero.dtype == "I8" and not whole:
            raise refusal(zero, f"holds zero points beyond {target}", f"{-form.center} to {form.center - 1}")
        return values.astype(np.uint8 if whole else np.float32)

    dtype = described.dtype_of("dtype")
    parts = {"scale": (scale, lambda: read_finite(scale)), "zero_point": (zero, read_zero)}
    dtype = dtype if dtype in ("bfloat16", "float16", "float32") else _name_of(scale)
    zero_dtype = np.uint8 if zero.dtype == "I8" else np.float32
    return _lazy(described, shape, target, group, dtype, read_codes, parts, {"zero_point": zero_dtype})


def _tiled(described: _Described) -> LazyWeight:
    codes = described.codes
    shape = described.sizes("shape", 2)
    group, (rows, width) = described.group_size(shape), shape
    tiles = codes.shape
    fits = codes.dtype == "I32" and len(tiles) == 4 and tiles[2:] == (32, 4)
    if not fits or tiles[0] * 8 < rows or tiles[1] * 128 < width or tiles[1] * 128 % group:
        raise refusal(
            codes, f"is {codes.dtype}{list(tiles)}", f"I32[N / 8, K / 128, 32, 4] of {list(shape)} filled up", _REMEDY
        )
    both = described.part("scale_and_zero", ("BF16",), (tiles[1] * 128 // group, tiles[0] * 8, 2))

    def read_codes() -> np.ndarray:
        words = codes.read().view(np.uint32)

        def of_rows(block: slice) -> np.ndarray:
            first = block.start // 8
            return untiled(words[first : -(-block.stop // 8)])[block.start - 8 * first :][
                : block.stop - block.start, :width
            ]

        return packed_by_rows(shape, 4, of_rows)

    def one(index: int) -> Callable[[], np.ndarray]:
        return lambda: np.ascontiguousarray(read_finite(both)[: -(-width // group), :rows, index].T)

    parts = {"scale": (both, one(0)), "offset": (both, one(1))}
    return _lazy(described, shape, "int4", group, "bfloat16", read_codes, parts)


def untiled(words: np.ndarray) -> np.ndarray:
    """u32[N / 8, K / 128, 32, 4] as the codes u8[N, K]; see the module's text."""
    n, t = words.shape[:2]
    nibbles = (words.reshape(n, t, 8, 4, 4, 1) >> np.arange(0, 32, 4, dtype=np.uint32) & 15).astype(np.uint8)
    of_bits = nibbles.reshape(n, t, 8, 4, 4, 2, 2, 2)  # n // 8, t, n % 8, p, i, c, h, f
    return of_bits.transpose(0, 2, 1, 4, 6, 7, 3, 5).reshape(8 * n, 128 * t)


def _lazy(
    described: _Described,
    shape: tuple[int, ...],
    format: str,
    group: int,
    dtype: str,
    read_codes: Callable[[], np.ndarray],
    parts: Mapping[str, tuple[StoredTensor, Callable[[], np.ndarray]]],
    dtypes: Mapping[str, Any] | None = None,
) -> LazyWeight:
    """parts: name in QArray -> (the tensor it is made of, what reads it as [*B, N, G])."""
    groups = (*shape[:-1], -(-shape[-1] // group))
    forms = {name: (groups, (dtypes or {}).get(name, DTYPES[one.dtype])) for name, (one, _) in parts.items()}
    reads = {name: read_it for name, (_, read_it) in parts.items()}
    named = {one.name: one for one, _ in parts.values()}
    pre_scale = described.tensors.get(described.array("act_pre_scale"))
    if pre_scale is not None:
        if pre_scale.dtype not in FLOATS or math.prod(pre_scale.shape) != shape[-1]:
            raise refusal(pre_scale, f"is {pre_scale.dtype}{list(pre_scale.shape)}", f"{shape[-1]} floats", _REMEDY)
        whole = (*(1 for _ in shape[:-1]), shape[-1])
        forms["input_scale"] = (whole, DTYPES[pre_scale.dtype])
        reads["input_scale"] = lambda: read_finite(pre_scale).reshape(whole)
        named[pre_scale.name] = pre_scale
    abstract = abstract_qarray(shape, format=format, group_size=group, dtype=dtype, parts=forms)
    read_it = functools.partial(_read, abstract, read_codes, reads)
    return LazyWeight(described.name, abstract, read_it, (described.codes.name, *named))


def _read(abstract: QArray, read_codes: Callable[[], np.ndarray], reads: Mapping[str, Callable[[], Any]]) -> QArray:
    arrays = {name: read_it() for name, read_it in reads.items()}
    return dataclasses.replace(abstract, codes=read_codes(), **arrays)


def _name_of(tensor: StoredTensor) -> str:
    return np.dtype(DTYPES[tensor.dtype]).name


_READERS: dict[str, Callable[[_Described], LazyWeight]] = {
    "Int4Tensor": _int4,
    "IntxUnpackedToInt8Tensor": _unpacked,
    "Int8Tensor": _int8,
    "Int4TilePackedTo4dTensor": _tiled,
}
