"""Writes GPTQ's tensors (gptq.py describes them): v1 for symmetric weights, which every reader takes, v2 for others.

Options: checkpoint_format "gptq" or "gptq_v2" for all weights ("gptq" then needs zero points of at least 1: the three
ways to write 0 in v1 contradict each other), and scale_dtype. A permuted weight is written with its unsorted g_idx,
as its file had it; others with the trivial one, which AutoGPTQ's readers insist on.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign import act_order
from jq4.checkpoint.foreign.bit_strings import pack, words_of_bytes
from jq4.checkpoint.foreign.gptq_labels import V1, V2
from jq4.checkpoint.foreign.integer_weights import cast_scales, full, require_integers, scale_dtype, unwritable
from jq4.checkpoint.foreign.linears import module_of
from jq4.checkpoint.foreign.module_patterns import by_setting, dense_modules, regexes
from jq4.checkpoint.foreign.transposing import transposed
from jq4.checkpoint.foreign.weights import LazyWeight
from jq4.checkpoint.foreign.writing import Planned, as_it_is
from jq4.errors import JQ4Error
from jq4.qarray import QArray

NAME = "gptq"
_BITS = (2, 3, 4, 8)


def plan(weight: LazyWeight, options: Mapping[str, Any]) -> Planned:
    if not weight.packed:
        return as_it_is(weight)
    q = require_integers(weight, "GPTQ", bits=_BITS, extras=("permutation",))
    outputs, inputs = q.shape
    if inputs * q.bits % 32 or outputs * q.bits % 32:
        raise unwritable(
            weight, "GPTQ", f"shape {q.shape} in {q.bits} bits", "axes of whole 32-bit words, K and N both"
        )
    version = _version(q, options)
    dtype, loss, doubt = scale_dtype(q, options)
    if version == V1 and q.zero_point is not None:
        doubt = "; ".join(filter(None, (doubt, "zero points must be 1 or more for checkpoint_format gptq")))
    prefix = module_of(weight)
    shapes = {
        f"{prefix}.qweight": ("I32", (inputs * q.bits // 32, outputs)),
        f"{prefix}.qzeros": ("I32", (q.num_groups, outputs * q.bits // 32)),
        f"{prefix}.scales": (dtype, (q.num_groups, outputs)),
        f"{prefix}.g_idx": ("I32", (inputs,)),
    }

    def encode(q: QArray) -> Mapping[str, np.ndarray]:
        scale = cast_scales(full(q.scale, q).T, dtype, weight, exactly=not loss)
        return dict(zip(shapes, (_qweight(q), _qzeros(q, version, weight), scale, _g_idx(q)), strict=True))

    return Planned(weight, shapes, encode, loss, doubt)


def _version(q: QArray, options: Mapping[str, Any]) -> str:
    forced = options.get("checkpoint_format")
    if forced not in (None, V1, V2):
        raise JQ4Error(f"option checkpoint_format is {forced!r}, wanted {V1!r} or {V2!r}")
    return forced or (V1 if q.zero_point is None else V2)


def _qweight(q: QArray) -> np.ndarray:
    codes = np.asarray(q.codes)
    if q.permutation is not None:
        codes = act_order.reordered(codes, q.bits, np.argsort(np.asarray(q.permutation)))
    return transposed(words_of_bytes(codes))


def _qzeros(q: QArray, version: str, weight: LazyWeight) -> np.ndarray:
    outputs, groups = q.shape[0], q.num_groups
    if q.zero_point is None:
        zeros = np.full((groups, outputs), q.number_format.center, np.uint8)
    else:
        zeros = full(q.zero_point, q).T.astype(np.uint8)
    if version == V1:
        if not zeros.all():
            raise JQ4Error(
                f"{weight.name}: {int((zeros == 0).sum())} of {zeros.size} zero points are 0, wanted 1 or more for "
                "checkpoint_format 'gptq', whose readers disagree about 0. Write checkpoint_format 'gptq_v2' "
                "(--checkpoint-format gptq_v2)."
            )
        zeros = zeros - np.uint8(1)
    return words_of_bytes(pack(zeros, q.bits))


def _g_idx(q: QArray) -> np.ndarray:
    permutation = None if q.permutation is None else np.asarray(q.permutation)
    return act_order.group_index(q.shape[1], q.group_size, permutation)


def quantization_config(planned: list[Planned], options: Mapping[str, Any]) -> dict[str, Any]:
    weights = [one.weight for one in planned if one.packed]
    versions = {_version(weight.abstract, options) for weight in weights}
    if len(versions) > 1:
        raise JQ4Error(
            "gptq: some weights are symmetric and some have zero points, and a checkpoint has one checkpoint_format. "
            "Give checkpoint_format 'gptq_v2' for all of them (--checkpoint-format gptq_v2)."
        )
    settings = by_setting(weights, _setting)
    common = next(iter(settings), (4, -1, True))
    packed = [module for modules in settings.values() for module in modules]
    dynamic: dict[str, dict[str, Any]] = {}
    for setting, modules in list(settings.items())[1:]:
        for pattern in regexes(modules, set(packed) - set(modules)):
            dynamic[f"+:{pattern}"] = dict(zip(("bits", "group_size", "sym"), setting, strict=True))
    dynamic |= {f"-:{pattern}": {} for pattern in regexes(dense_modules(planned), packed)}
    return {
        "quant_method": "gptq",
        **dict(zip(("bits", "group_size", "sym"), common, strict=True)),
        "desc_act": any(weight.abstract.permutation is not None for weight in weights),
        "checkpoint_format": next(iter(versions), V1),
        "pack_dtype": "int32",
        "true_sequential": True,
        "lm_head": any(weight.name == "lm_head.weight" for weight in weights),
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _setting(q: QArray) -> tuple[int, int, bool]:
    return q.bits, -1 if q.num_groups == 1 else q.group_size, q.zero_point is None
