"""compressed-tensors' checkpoints (llm-compressor, Kimi K2, Gemma QAT) as QArrays [*E, N, K].

    weight_packed       i32 [*E, N, ceil(K*b/32)]   integers, code = q + 2**(b-1), one bit string along K for each row
                        u8  [*E, N, K/2]            FP4 (fp4_packed.py)
    weight_scale        float [*E, N, G], [*E, N, 1] or [1]
    weight_zero_point   i32 [*E, ceil(N*b/32), G]   z + 2**(b-1), along N; int8, unpacked, where there is one for all
    weight_shape        i64 [2] or [3]              [*E, N, K]; old files lack it, or have it empty
    weight_g_idx        i32 [K]                     act-order of old files (act_order.py)
    weight              i8 [N, K]                   int-quantized and naive-quantized: a byte a code, signed

Words seen as bytes are what a QArray keeps along K, so codes are a view of the file wherever K*b is a multiple of 32.
Up to release 0.17, 3, 5, 6 and 7-bit codes stood floor(32/b) in a word; the width tells, and where it fits both the
release in `version` does. The label gives bits and groups; where shapes contradict it they win, with a note.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign import act_order, fp4_packed, int_quantized
from jq4.checkpoint.foreign.bit_strings import bytes_of_words, trimmed, unpack
from jq4.checkpoint.foreign.compressed_tensors_config import Config, Scheme
from jq4.checkpoint.foreign.notes import Notes
from jq4.checkpoint.foreign.padded_words import padded_width, repacked, unpack_padded
from jq4.checkpoint.foreign.partners import FLOATS, Partners, contradiction, modules_with, read_finite
from jq4.checkpoint.foreign.weights import LazyWeight, abstract_qarray
from jq4.checkpoint.safetensors_files import DTYPES, StoredTensor
from jq4.qarray import QArray

NAME = "compressed-tensors"
_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


@dataclasses.dataclass(frozen=True)
class _Module:
    """One weight, as its tensors' shapes have it."""

    partners: Partners
    bits: int
    shape: tuple[int, ...]
    group_size: int
    padded: bool
    zeros: StoredTensor | None
    act_order: bool

    @property
    def centre(self) -> int:
        return 2 ** (self.bits - 1)


def claims(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> bool:
    labelled = quantization.get("quant_method") == NAME
    return labelled or any(name.endswith(".weight_packed") for name in tensors)


def read(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[LazyWeight], list[str]]:
    settings, notes, weights = Config(quantization), Notes(), []
    for partners in modules_with(tensors, "weight_packed"):
        scheme = settings.scheme_of(partners.prefix)
        if partners.need("weight_packed", "I32", "U8").dtype == "U8":
            weights.append(fp4_packed.weight(partners, config))
        else:
            weights.append(_weight(_module(partners, scheme, settings.version, notes)))
        _note_inputs(partners, scheme, notes)
    for partners in modules_with(tensors, "weight_scale"):
        if "weight_packed" not in partners.held:
            scheme = settings.scheme_of(partners.prefix)
            weights.append(int_quantized.weight(partners, scheme))
            _note_inputs(partners, scheme, notes)
    return [_with_inputs(weight, tensors) for weight in weights], notes.lines()


def _note_inputs(partners: Partners, scheme: Scheme, notes: Notes) -> None:
    if scheme.activations or any(part.startswith("input_") for part in partners.held):
        notes.add(partners.prefix, "was made for quantized inputs; the weight alone is read, and inputs stay floats.")


def _with_inputs(weight: LazyWeight, tensors: Mapping[str, StoredTensor]) -> LazyWeight:
    """Takes the scales of inputs along, which are not weights of the dense model."""
    prefix = weight.name.removesuffix("weight")
    names = (f"{prefix}input_{part}" for part in ("scale", "zero_point", "global_scale"))
    return dataclasses.replace(weight, tensors=(*weight.tensors, *(name for name in names if name in tensors)))


def _module(partners: Partners, scheme: Scheme, version: tuple[int, int] | None, notes: Notes) -> _Module:
    packed, scale = partners.need("weight_packed"), partners.need("weight_scale", *FLOATS)
    if len(packed.shape) not in (2, 3):
        raise contradiction(packed, "[N, words] or [E, N, words]")
    grouped = len(scale.shape) == len(packed.shape) and scale.shape[:-1] == packed.shape[:-1]
    if not grouped and scale.shape not in ((), (1,)):
        raise contradiction(scale, f"{[*packed.shape[:-1], 'groups']} for weight_packed {list(packed.shape)}")
    groups = scale.shape[-1] if grouped else 1
    bits, inputs = _bits_and_inputs(partners, scheme, groups, notes)
    padded = _is_padded(packed.shape[-1], inputs, bits, version)
    shape = (*packed.shape[:-1], inputs)
    g_idx, group_size = partners.get("weight_g_idx"), _group_size(partners, inputs, groups, scheme, notes)
    ordered = g_idx is not None and act_order.permutation_of(g_idx, inputs, group_size) is not None
    module = _Module(partners, bits, shape, group_size, padded, None, ordered)
    return dataclasses.replace(module, zeros=_zeros_kept(module, groups, scheme, notes))


def _bits_and_inputs(partners: Partners, scheme: Scheme, groups: int, notes: Notes) -> tuple[int, int]:
    """(bits, K) that give weight_packed's width: by label and weight_shape, or by what else fits."""
    packed = partners.need("weight_packed")
    width, inputs = packed.shape[-1], _inputs(partners)
    bits = scheme.num_bits if scheme.num_bits in range(2, 9) else None
    if inputs is None and bits is not None:
        grouped = groups * scheme.group_size if scheme.group_size and groups > 1 else None
        inputs = grouped if grouped and _fits(width, grouped, bits) else width * 32 // bits
    if inputs is not None:
        candidates = [bits] if bits is not None and _fits(width, inputs, bits) else []
        candidates = candidates or [b for b in range(2, 9) if width == -(-inputs * b // 32)]
        if len(candidates) == 1:
            if bits is not None and candidates[0] != bits:
                notes.add(partners.prefix, f"labelled {bits} bits, and its shapes say {candidates[0]}; read so.")
            return candidates[0], inputs
    raise contradiction(
        packed,
        f"as many words as {inputs or 'unknown'} inputs of {bits or 'unknown'} bits take",
        "weight_shape or quantization_config does not belong to it; download the checkpoint again.",
    )


def _inputs(partners: Partners) -> int | None:
    """K by weight_shape, unless it is missing, empty, or that of a weight before it was cut for several devices."""
    stored, packed = partners.get("weight_shape"), partners.need("weight_packed")
    if stored is None:
        return None
    if stored.dtype not in ("I64", "I32") or stored.shape not in ((2,), (3,)):
        raise contradiction(stored, "I64[2], the weight's own shape")
    *_, outputs, inputs = (int(one) for one in np.asarray(stored.read()))
    return inputs if outputs == packed.shape[-2] and 0 < inputs <= packed.shape[-1] * 16 else None


def _fits(width: int, inputs: int, bits: int) -> bool:
    return width in (-(-inputs * bits // 32), padded_width(inputs, bits))


def _is_padded(width: int, inputs: int, bits: int, version: tuple[int, int] | None) -> bool:
    """Whether words hold whole codes only, as before 0.18."""
    dense, padded = -(-inputs * bits // 32), padded_width(inputs, bits)
    return 32 % bits != 0 and width == padded and (dense != padded or (version is not None and version < (0, 18)))


def _group_size(partners: Partners, inputs: int, groups: int, scheme: Scheme, notes: Notes) -> int:
    if groups == 1:
        return inputs
    labelled = scheme.group_size
    if labelled is not None and -(-inputs // labelled) == groups:
        return labelled
    if inputs % groups:
        wanted = f"groups of {labelled}" if labelled else "groups that divide the inputs evenly"
        raise contradiction(partners.need("weight_scale"), f"{wanted} for {inputs} inputs")
    if labelled is not None:
        notes.add(
            partners.prefix,
            f"labelled group_size {labelled}, and its scales are of groups of {inputs // groups}; read so.",
        )
    return inputs // groups


def _zeros_kept(module: _Module, groups: int, scheme: Scheme, notes: Notes) -> StoredTensor | None:
    """The tensor of zero points, None where there is none to keep."""
    partners, zeros = module.partners, module.partners.get("weight_zero_point")
    if zeros is None:
        if scheme.symmetric is False:
            notes.add(partners.prefix, "labelled asymmetric, and has no weight_zero_point; read as symmetric.")
        return None
    partners.need("weight_zero_point", "I32", "I8")
    *experts, outputs, _ = module.shape
    whole = (*experts, outputs, groups)
    wanted = [(*experts, width, groups) for width in (_dense_rows(module), padded_width(outputs, module.bits))]
    if zeros.dtype == "I8":
        wanted = [whole, partners.need("weight_scale").shape]
    if zeros.shape not in wanted:
        raise contradiction(zeros, f"{list(wanted[0])} for weight_scale {list(partners.need('weight_scale').shape)}")
    if scheme.symmetric is not False:
        if (_zero_points(module, zeros) == module.centre).all():
            return None
        if scheme.symmetric:
            notes.add(partners.prefix, "labelled symmetric, and has zero points that are not 0; read with them.")
    return zeros


def _dense_rows(module: _Module) -> int:
    return -(-module.shape[-2] * module.bits // 32)


def _zero_points(module: _Module, zeros: StoredTensor) -> np.ndarray:
    """u8[*E, N, G], or 1s for axes that share one."""
    held, outputs = np.asarray(zeros.read()), module.shape[-2]
    if zeros.dtype == "I8":
        shape = held.shape if held.ndim == len(module.shape) else (1,) * len(module.shape)
        return (held.astype(np.int16) + module.centre).astype(np.uint8).reshape(shape)
    along = np.ascontiguousarray(held.swapaxes(-1, -2))  # i32[*E, G, words]
    padded = module.padded if _dense_rows(module) == padded_width(outputs, module.bits) else None
    if padded or (padded is None and held.shape[-2] != _dense_rows(module)):
        codes = unpack_padded(along, module.bits, outputs)
    else:
        codes = unpack(bytes_of_words(along), module.bits, outputs)
    return np.ascontiguousarray(codes.swapaxes(-1, -2))


def _weight(module: _Module) -> LazyWeight:
    partners, scale = module.partners, module.partners.need("weight_scale")
    rank = len(module.shape)
    shape = scale.shape if len(scale.shape) == rank else (1,) * rank
    parts: dict[str, Any] = {"scale": (shape, DTYPES[scale.dtype])}
    if module.zeros is not None:
        whole = (*module.shape[:-1], shape[-1]) if module.zeros.dtype == "I32" else module.zeros.shape
        parts["zero_point"] = (whole if len(whole) == rank else (1,) * rank, np.uint8)
    if module.act_order:
        parts["permutation"] = (module.shape[-1:], np.int32)
    abstract = abstract_qarray(
        module.shape,
        format=f"int{module.bits}",
        group_size=module.group_size,
        dtype=DTYPES[scale.dtype],
        parts=parts,
    )
    names = partners.names(*_PARTS)
    cut = ("weight_packed", *(("weight_scale",) if scale.shape == shape else ()))

    def read_rows(rows: slice) -> QArray:
        return _read(dataclasses.replace(module, partners=partners.rows(rows, *cut)), abstract, rows)

    return LazyWeight(partners.weight_name, abstract, lambda: _read(module, abstract), names, read_rows)


def _read(module: _Module, abstract: QArray, rows: slice = slice(None)) -> QArray:
    """`rows`: those that the partners are cut to; zero points, which are packed along N, are cut here."""
    partners, bits, inputs = module.partners, module.bits, module.shape[-1]
    words = np.asarray(partners.need("weight_packed").read())
    if module.padded:
        codes = repacked(words, bits, inputs)
    elif inputs * bits % 32:
        codes = trimmed(bytes_of_words(words), bits, inputs)
    else:
        codes = bytes_of_words(words)
    parts: dict[str, Any] = {}
    if module.act_order:
        g_idx = partners.need("weight_g_idx")
        codes, parts["permutation"] = act_order.sorted_by_group(codes, bits, g_idx, inputs, module.group_size)
    if module.zeros is not None:
        zeros = _zero_points(module, module.zeros)
        parts["zero_point"] = zeros[rows] if zeros.shape[0] > 1 else zeros
    stored = partners.need("weight_scale")
    scale = read_finite(stored).reshape(-1, *abstract.scale.shape[1:])
    return dataclasses.replace(abstract, codes=codes, scale=scale, **parts)
