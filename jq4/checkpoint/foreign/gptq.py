"""GPTQ's checkpoints (AutoGPTQ, GPTQModel, auto-round) as QArrays [N, K]; vLLM and transformers read the same files.

    qweight  i32 [K*b/32, N]   codes, one little-endian bit string down K for each output
    qzeros   i32 [G, N*b/32]   zero points likewise along N; v1 keeps z - 1, v2 keeps z
    scales   f16 [G, N]        may be negative (auto-round)
    g_idx    i32 [K]           the group of each input, optional (act_order.py)

Read by contents: the number of bits is what qzeros' width says, the groups are what scales say, and a symmetric weight
is one whose zero points all are the centre, 2**(b-1), which also says whether they are stored less one: files of
symmetric weights are labelled v1 and are v2 often enough. Symmetric weights get no zero points. Where the file calls
itself symmetric and a zero point is another, the weight keeps its zero points, and a note says so. Where it calls
itself asymmetric the label says which version it is, as nothing else could.

z = 0 in v1 is -1 in b bits, for which there are three conventions. GPTQModel subtracts from whole words of 2, 4 or 8
bit fields (a field of -1 borrows from its neighbour), which adding to whole words undoes exactly; that is done here.
Words of 3, 5, 6 and 7 bit fields wrap field by field.

qzeros and g_idx are looked at when the file is opened: they are a hundredth of it, and decide what the weights will be.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign import act_order
from jq4.checkpoint.foreign.bit_strings import bytes_of_words, pack, unpack
from jq4.checkpoint.foreign.gptq_labels import V1, V2, Label, label_of, refuse_kernel_layouts
from jq4.checkpoint.foreign.notes import Notes
from jq4.checkpoint.foreign.partners import FLOATS, Partners, contradiction, modules_with, read_finite
from jq4.checkpoint.foreign.qweight_layouts import AWQ, layout_of
from jq4.checkpoint.foreign.transposing import transposed
from jq4.checkpoint.foreign.weights import LazyWeight, abstract_qarray
from jq4.checkpoint.safetensors_files import DTYPES, StoredTensor
from jq4.freed_pages import give_back_mapped_pages
from jq4.qarray import QArray
from pallas_kernels.packing import SUPPORTED_BITS

NAME = "gptq"


@dataclasses.dataclass(frozen=True)
class _Module:
    """One weight, as its tensors' shapes have it: [N, K] in `bits`, K in groups."""

    partners: Partners
    bits: int
    shape: tuple[int, int]
    group_size: int
    version: str
    symmetric: bool
    act_order: bool


def claims(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> bool:
    first = next(modules_with(tensors, "qweight"), None)
    if first is None:
        return False
    layout = layout_of(first)
    return layout == NAME or (layout not in AWQ and quantization.get("quant_method") != "awq")


def read(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[LazyWeight], list[str]]:
    refuse_kernel_layouts(quantization)
    notes = Notes()
    modules = [_module(partners, quantization, notes) for partners in modules_with(tensors, "qweight")]
    return [_weight(module) for module in modules], notes.lines()


def _module(partners: Partners, quantization: Mapping[str, Any], notes: Notes) -> _Module:
    label = label_of(quantization, partners.prefix)
    bits, shape = _bits_and_shape(partners)
    group_size = _group_size(partners, shape[1], label.group_size, notes)
    if label.bits not in (None, bits):
        notes.add(partners.prefix, f"labelled {label.bits} bits, and its tensors' shapes say {bits}; read with {bits}.")
    version, symmetric = _zeros_seen(partners, bits, label, notes)
    g_idx = partners.get("g_idx")
    ordered = g_idx is not None and act_order.permutation_of(g_idx, shape[1], group_size) is not None
    if ordered and quantization.get("desc_act") is False:
        notes.add(partners.prefix, "labelled desc_act false, and its g_idx is not sorted; read with a permutation.")
    return _Module(partners, bits, shape, group_size, version, symmetric, ordered)


def _bits_and_shape(partners: Partners) -> tuple[int, tuple[int, int]]:
    qweight, qzeros = partners.need("qweight", "I32"), partners.need("qzeros", "I32")
    scales = partners.need("scales", *FLOATS)
    for tensor in (qweight, qzeros, scales):
        if len(tensor.shape) != 2:
            raise contradiction(tensor, "two axes")
    if scales.shape[1] != qweight.shape[1]:
        raise contradiction(scales, f"[groups, {qweight.shape[1]}], for qweight {list(qweight.shape)}")
    groups, outputs = scales.shape
    bits, rest = divmod(qzeros.shape[-1] * 32, outputs)
    if rest or bits not in SUPPORTED_BITS or qzeros.shape != (groups, outputs * bits // 32):
        raise contradiction(
            qzeros,
            f"[{groups}, {outputs} * bits / 32] for scales {list(scales.shape)} and 2 to 8 bits, "
            f"which gives {qzeros.shape[-1] * 32 / outputs:g} bits here",
        )
    inputs, rest = divmod(qweight.shape[0] * 32, bits)
    if rest:
        raise contradiction(qweight, f"a whole number of {bits}-bit codes (as qzeros say) down its axis 0")
    return bits, (outputs, inputs)


def _group_size(partners: Partners, inputs: int, labelled: int | None, notes: Notes) -> int:
    scales = partners.need("scales")
    groups = scales.shape[0]
    group_size = inputs if labelled is None or labelled <= 0 else min(labelled, inputs)
    if -(-inputs // group_size) == groups:
        return group_size
    if inputs % groups:
        raise contradiction(scales, f"{-(-inputs // group_size)} groups of {group_size} for {inputs} inputs")
    found = inputs // groups
    if labelled is not None:
        notes.add(partners.prefix, f"labelled group_size {labelled}, and its scales are of groups of {found}; read so.")
    return found


def _zeros_seen(partners: Partners, bits: int, label: Label, notes: Notes) -> tuple[str, bool]:
    """(the version, whether the weight is symmetric) from what qzeros hold."""
    words = np.asarray(partners.need("qzeros").read())
    centre, fields = 2 ** (bits - 1), words.shape[1] * 32 // bits
    if label.sym is not False:
        for version, stored in ((V1, centre - 1), (V2, centre)):
            if (words == pack(np.full(fields, stored, np.uint8), bits).view(np.int32)).all():
                if version != label.version:
                    notes.add(
                        partners.prefix,
                        f"labelled {label.version!r} and symmetric, and all zero points are stored as {stored}, which "
                        f"is {version!r}; read as {version!r}.",
                    )
                return version, True
    if label.sym:
        notes.add(partners.prefix, f"labelled symmetric, and not all zero points are {centre}; read with zero points.")
    if label.version == V1 and (unpack(bytes_of_words(words), bits, fields) == 2**bits - 1).any():
        notes.add(
            partners.prefix,
            f"holds zero points stored as {2**bits - 1} in v1, which is how 0 is written in one of three ways; read "
            "as GPTQModel writes it. A file of AutoGPTQ would be wrong there already.",
        )
    return label.version, False


def _weight(module: _Module) -> LazyWeight:
    (outputs, inputs), partners = module.shape, module.partners
    scales = partners.need("scales")
    parts: dict[str, Any] = {"scale": ((outputs, scales.shape[0]), DTYPES[scales.dtype])}
    if not module.symmetric:
        parts["zero_point"] = (parts["scale"][0], np.uint8)
    if module.act_order:
        parts["permutation"] = ((inputs,), np.int32)
    abstract = abstract_qarray(
        module.shape,
        format=f"int{module.bits}",
        group_size=module.group_size,
        dtype=DTYPES[scales.dtype],
        parts=parts,
    )
    names = partners.names("qweight", "qzeros", "scales", "g_idx")

    def read_rows(rows: slice) -> QArray:
        return _read(module, abstract, rows)

    return LazyWeight(partners.weight_name, abstract, lambda: _read(module, abstract), names, read_rows)


def _read(module: _Module, abstract: QArray, rows: slice = slice(None)) -> QArray:
    partners, bits, inputs = module.partners, module.bits, module.shape[1]
    stored = partners.need("qweight").read()
    codes = bytes_of_words(transposed(np.asarray(stored)[:, rows]))  # u8[N, K*b/8]
    give_back_mapped_pages(stored)
    parts: dict[str, Any] = {}
    if module.act_order:
        g_idx = partners.need("g_idx")
        codes, parts["permutation"] = act_order.sorted_by_group(codes, bits, g_idx, inputs, module.group_size)
    if not module.symmetric:
        words = np.asarray(partners.need("qzeros").read())
        parts["zero_point"] = np.ascontiguousarray(zero_points(words, bits, module.version)[:, rows].T)
    scales = partners.need("scales")
    scale = np.ascontiguousarray(read_finite(scales)[:, rows].T)
    return dataclasses.replace(abstract, codes=codes, scale=scale, **parts)


def zero_points(words: np.ndarray, bits: int, version: str) -> np.ndarray:
    """qzeros i32[G, N*b/32] to zero points u8[G, N]."""
    fields = words.shape[1] * 32 // bits
    if version == V1 and 32 % bits == 0:
        words = words.view(np.uint32) + ones(bits)
    zeros = unpack(bytes_of_words(words), bits, fields)
    if version == V1 and 32 % bits:
        zeros = (zeros + np.uint8(1)) & np.uint8(2**bits - 1)
    return zeros


def ones(bits: int) -> np.uint32:
    """The word whose fields are all 1, for 2, 4 and 8 bits."""
    return np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
