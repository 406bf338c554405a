"""AWQ's checkpoints (AutoAWQ, llm-awq, GPTQModel) as QArrays [N, K], 4 bits: awq_layouts.py has the bits.

           qweight          zeros                                    scales
    gemm   i32 [K, N/8]     qzeros i32 [G, N/8]                      f16 [G, N]
    gemv   i32 [N, K/8]     qzeros i32 [N, Zw], 8 groups a word      f16 [N, 8 Zw], filled with zeros behind G
    fast   i16 [N/4, K]     qzeros or scaled_zeros f16 [8 Zw, N]     f16 [8 Zw, N]

gemm and gemv keep whole zero points. fast keeps -scale * zero, rounded, and adds it: its weights are q * scale + third,
which a QArray says exactly with a zero point of 0 and an offset. Where every zero point of a checkpoint is 8 it is
symmetric (GPTQModel writes such files), and its weights get no zero points.

What made them activation-aware is in the neighbouring layers already, but for a few activations that are divided by a
stored vector, "*.act.scales": such a model is refused, as the dense model has no place for it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.awq_layouts import codes_of_fast, codes_of_gemm, zeros_of_gemm
from jq4.checkpoint.foreign.bit_strings import bytes_of_words, unpack
from jq4.checkpoint.foreign.notes import Notes
from jq4.checkpoint.foreign.partners import FLOATS, Partners, contradiction, finite, modules_with
from jq4.checkpoint.foreign.qweight_layouts import AWQ, layout_of
from jq4.checkpoint.foreign.weights import LazyWeight, abstract_qarray
from jq4.checkpoint.safetensors_files import DTYPES, StoredTensor
from jq4.errors import JQ4Error
from jq4.qarray import QArray

NAME = "awq"
CENTRE = 8


@dataclasses.dataclass(frozen=True)
class _Module:
    """One weight, as its tensors' shapes have it."""

    partners: Partners
    layout: str
    shape: tuple[int, int]
    group_size: int
    zeros: StoredTensor

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.group_size)


def claims(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> bool:
    first = next(modules_with(tensors, "qweight"), None)
    if first is None:
        return False
    layout = layout_of(first)
    return layout in AWQ or (layout is None and quantization.get("quant_method") == "awq")


def read(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[LazyWeight], list[str]]:
    _refuse_scaled_activations(tensors)
    notes = Notes()
    modules = [_module(partners, quantization, notes) for partners in modules_with(tensors, "qweight")]
    symmetric = all(_all_eights(module) for module in modules)
    return [_weight(module, symmetric) for module in modules], notes.lines()


def _refuse_scaled_activations(tensors: Mapping[str, StoredTensor]) -> None:
    for partners in modules_with(tensors, "scales"):
        if "qweight" not in partners.held:
            tensor = partners.held["scales"]
            raise JQ4Error(
                f"{tensor.file}: tensor {tensor.name!r} divides an activation (AutoAWQ's ScaledActivation), wanted "
                "scales beside a qweight. Fold it into the rows of the next linear's weight first."
            )


def _module(partners: Partners, quantization: Mapping[str, Any], notes: Notes) -> _Module:
    layout, bits = layout_of(partners), quantization.get("bits", quantization.get("w_bit", 4))
    if bits != 4:
        raise JQ4Error(f"quantization_config: bits is {bits!r}; AWQ's layouts hold 4. Mend config.json.")
    if layout not in AWQ:
        scales = partners.need("scales", *FLOATS)
        raise contradiction(
            partners.need("qweight"), f"a layout of AWQ (gemm [K, N/8], gemv [N, K/8]) for scales {list(scales.shape)}"
        )
    labelled = quantization.get("version")
    if labelled in AWQ and labelled != layout:
        notes.add(partners.prefix, f"labelled version {labelled!r}, and its shapes are those of {layout!r}; read so.")
    group_size = quantization.get("group_size", quantization.get("q_group_size"))
    return _LAYOUTS[layout](partners, group_size if type(group_size) is int else None, notes)


def _gemm(partners: Partners, labelled: int | None, notes: Notes) -> _Module:
    qweight, scales = partners.need("qweight", "I32"), partners.need("scales", *FLOATS)
    qzeros = partners.need("qzeros", "I32")
    (inputs, eighths), (groups, outputs) = qweight.shape, scales.shape
    if qzeros.shape != (groups, eighths):
        raise contradiction(qzeros, f"[{groups}, {eighths}] for scales {list(scales.shape)}")
    if inputs % 8 or inputs % groups:
        raise contradiction(scales, f"a number of groups that divides {inputs} inputs (a multiple of 8) evenly")
    found = inputs // groups
    if labelled is not None and found != (labelled if labelled > 0 else inputs):
        notes.add(partners.prefix, f"labelled group_size {labelled}, and its scales are of groups of {found}; read so.")
    return _Module(partners, "gemm", (outputs, inputs), found, qzeros)


def _gemv(partners: Partners, labelled: int | None, notes: Notes) -> _Module:
    qweight, scales = partners.need("qweight", "I32"), partners.need("scales", *FLOATS)
    qzeros = partners.need("qzeros", "I32")
    outputs, inputs = qweight.shape[0], qweight.shape[1] * 8
    group_size = _filled_groups(partners, labelled, inputs, scales.shape[1])
    if scales.shape[0] != outputs or qzeros.shape != (outputs, scales.shape[1] // 8) or scales.shape[1] % 8:
        raise contradiction(qzeros, f"[{outputs}, {scales.shape[1]} / 8] for scales {list(scales.shape)}")
    return _Module(partners, "gemv", (outputs, inputs), group_size, qzeros)


def _fast(partners: Partners, labelled: int | None, notes: Notes) -> _Module:
    qweight, scales = partners.need("qweight", "I16"), partners.need("scales", *FLOATS)
    zeros = partners.need("scaled_zeros" if "scaled_zeros" in partners.held else "qzeros", *FLOATS)
    outputs, inputs = qweight.shape[0] * 4, qweight.shape[1]
    group_size = _filled_groups(partners, labelled, inputs, scales.shape[0])
    if inputs % 64:
        raise contradiction(qweight, "a multiple of 64 inputs")
    if zeros.shape != scales.shape:
        raise contradiction(zeros, f"shape {list(scales.shape)}, that of scales")
    return _Module(partners, "gemv_fast", (outputs, inputs), group_size, zeros)


_LAYOUTS = {"gemm": _gemm, "gemv": _gemv, "gemv_fast": _fast}


def _filled_groups(partners: Partners, labelled: int | None, inputs: int, held: int) -> int:
    """The group size, which only the label tells where scales are filled up behind the last group."""
    group_size = inputs if labelled is None or labelled <= 0 else labelled
    fill = {64: 16, 32: 32}.get(group_size, 8)
    groups = -(-inputs // group_size)
    if inputs % group_size or held != -(-groups // fill) * fill:
        raise contradiction(
            partners.need("scales"),
            f"{groups} groups of {group_size} (as quantization_config says) filled up to a multiple of {fill}",
            "Mend group_size in config.json (or quant_config.json).",
        )
    return group_size


def _all_eights(module: _Module) -> bool:
    if module.layout == "gemv_fast":
        return False
    words = np.asarray(module.zeros.read()).view(np.uint32)
    if module.layout == "gemm":
        return bool((words == 0x88888888).all())
    return bool((unpack(bytes_of_words(words), 4, module.groups) == CENTRE).all())


def _weight(module: _Module, symmetric: bool) -> LazyWeight:
    outputs, inputs = module.shape
    partners, scales = module.partners, module.partners.need("scales")
    shape = (outputs, module.groups)
    parts: dict[str, Any] = {"scale": (shape, DTYPES[scales.dtype])}
    if module.layout == "gemv_fast":
        parts |= {"zero_point": ((1, module.groups), np.uint8), "offset": (shape, DTYPES[module.zeros.dtype])}
    elif not symmetric:
        parts["zero_point"] = (shape, np.uint8)
    abstract = abstract_qarray(
        (outputs, inputs), format="int4", group_size=module.group_size, dtype=DTYPES[scales.dtype], parts=parts
    )
    names = partners.names("qweight", "qzeros", "scales", "scaled_zeros", "g_idx")
    return LazyWeight(partners.weight_name, abstract, lambda: _read(module, abstract), names)


def _read(module: _Module, abstract: QArray) -> QArray:
    words = np.asarray(module.partners.need("qweight").read())
    stored, groups = module.partners.need("scales"), module.groups
    scales, zeros = np.asarray(stored.read()), np.asarray(module.zeros.read())
    parts: dict[str, Any] = {}
    if module.layout == "gemm":
        codes, scale = codes_of_gemm(words), scales.T
        if abstract.zero_point is not None:
            parts["zero_point"] = np.ascontiguousarray(zeros_of_gemm(zeros).T)
    elif module.layout == "gemv":
        codes, scale = bytes_of_words(words), scales[:, :groups]
        if abstract.zero_point is not None:
            parts["zero_point"] = np.ascontiguousarray(unpack(bytes_of_words(zeros), 4, groups))
    else:
        codes, scale = codes_of_fast(words), scales[:groups].T
        parts["zero_point"] = np.zeros((1, groups), np.uint8)
        parts["offset"] = np.ascontiguousarray(finite(zeros[:groups].T, module.zeros))
    return dataclasses.replace(abstract, codes=codes, scale=np.ascontiguousarray(finite(scale, stored)), **parts)
