"""Writes compressed-tensors, for transformers and vLLM: integers as pack-quantized, FP4 with powers of two as MXFP4.

Tensors are as compressed_tensors.py has them, 3, 5, 6 and 7 bits dense (releases from 0.18 read them). Scales keep
their dtype. quantization_config has a group for each setting, by name, but for the most frequent one, which comes last
with the target "Linear" (transformers takes the first group that fits); what is dense is ignored by name.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.bit_strings import pack, words_of_bytes
from jq4.checkpoint.foreign.integer_weights import cast_scales, full, require_integers, unwritable
from jq4.checkpoint.foreign.linears import module_of
from jq4.checkpoint.foreign.module_patterns import by_setting, dense_modules, patterns, unsaid_head
from jq4.checkpoint.foreign.mx_blocks import BLOCK, SCALE_DTYPE
from jq4.checkpoint.foreign.weights import LazyWeight
from jq4.checkpoint.foreign.writing import Planned, as_it_is
from jq4.checkpoint.safetensors_files import DTYPES
from jq4.errors import JQ4Error
from jq4.qarray import NEUTRAL, QArray, is_qarray

NAME = "compressed-tensors"
_INTEGERS, _MXFP4 = "pack-quantized", "mxfp4-pack-quantized"
_ACT_ORDER = "Write gptq, whose g_idx says the order; compressed-tensors has dropped its own."


def plan(weight: LazyWeight, options: Mapping[str, Any]) -> Planned:
    if not weight.packed:
        return as_it_is(weight)
    return plan_mxfp4(weight) if weight.format == "fp4" else _plan_integers(weight)


def _plan_integers(weight: LazyWeight) -> Planned:
    if weight.abstract.permutation is not None:
        raise unwritable(weight, NAME, "its inputs permuted (act-order)", "groups of neighbouring inputs", _ACT_ORDER)
    q = require_integers(weight, NAME, bits=(2, 3, 4, 5, 6, 7, 8), ndim=(2, 3))
    dtype = next(
        (name for name, one in DTYPES.items() if one == q.scale.dtype and name in ("F16", "BF16", "F32")), None
    )
    if dtype is None:
        raise unwritable(weight, NAME, f"scales of {q.scale.dtype}", "scales of float16, bfloat16 or float32")
    *experts, outputs, inputs = q.shape
    if q.num_groups > 1 and inputs % q.group_size:
        found = f"a short last group ({inputs} inputs in groups of {q.group_size})"
        raise unwritable(weight, NAME, found, "whole groups", "Write gptq or orbax, or quantize it in groups that fit.")
    prefix, width = module_of(weight), -(-inputs * q.bits // 32)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{prefix}.weight_packed": ("I32", (*experts, outputs, width)),
        f"{prefix}.weight_scale": (dtype, (*experts, outputs, q.num_groups)),
        f"{prefix}.weight_shape": ("I64", (len(q.shape),)),
    }
    if q.zero_point is not None:
        shapes[f"{prefix}.weight_zero_point"] = ("I32", (*experts, -(-outputs * q.bits // 32), q.num_groups))

    def encode(q: QArray) -> Mapping[str, np.ndarray]:
        made = [
            words_of_bytes(np.asarray(q.codes)[..., : 4 * width]),
            cast_scales(full(q.scale, q), dtype, weight, exactly=True),
            np.array(weight.shape, np.int64),
        ]
        if q.zero_point is not None:
            made.append(_packed_down(full(q.zero_point, q), q.bits))
        return dict(zip(shapes, made, strict=True))

    return Planned(weight, shapes, encode, by_rows=tuple(name for name in shapes if not name.endswith("_shape")))


def _packed_down(zeros: np.ndarray, bits: int) -> np.ndarray:
    """u8[*E, N, G] to words along N, i32[*E, ceil(N*b/32), G]."""
    packed = pack(np.ascontiguousarray(zeros.swapaxes(-1, -2), np.uint8), bits)
    width = -(-zeros.shape[-2] * bits // 32)
    return np.ascontiguousarray(words_of_bytes(packed[..., : 4 * width]).swapaxes(-1, -2))


def plan_mxfp4(weight: LazyWeight) -> Planned:
    """MXFP4 as compressed-tensors has it; scales must be powers of two."""
    q: QArray = weight.abstract
    extras = (q.zero_point, q.offset, q.permutation, q.input_scale, q.activation_scale)
    plain = q.axis == -1 and q.layout == NEUTRAL and not (q.activations or q.input_rotation or is_qarray(q.scale))
    if q.format != "fp4" or q.group_size != BLOCK or q.shape[-1] % BLOCK or len(q.shape) not in (2, 3):
        found = f"format {q.format}, shape {q.shape} and groups of {q.group_size}"
        raise unwritable(weight, "mxfp4", found, f"fp4 codes [N, K] in whole groups of {BLOCK}")
    if not plain or any(part is not None for part in extras):
        raise unwritable(weight, "mxfp4", "more than codes and plain scales along K", "codes and powers of two alone")
    prefix = module_of(weight)
    shapes = {
        f"{prefix}.weight_packed": ("U8", (*q.shape[:-1], q.shape[-1] // 2)),
        f"{prefix}.weight_scale": ("U8", (*q.shape[:-1], q.num_groups)),
    }

    def encode(q: QArray) -> Mapping[str, np.ndarray]:
        return dict(zip(shapes, (np.asarray(q.codes), _exponents(full(q.scale, q), weight)), strict=True))

    doubt = "" if q.scale.dtype == SCALE_DTYPE else "scales must be powers of two"
    return Planned(weight, shapes, encode, doubt=doubt, by_rows=tuple(shapes))


def _exponents(scale: np.ndarray, weight: LazyWeight) -> np.ndarray:
    """e8m0 bytes of scales that are powers of two."""
    if scale.dtype == SCALE_DTYPE:
        return np.ascontiguousarray(scale).view(np.uint8)
    wide = scale.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        bytes_ = np.ascontiguousarray(wide.astype(SCALE_DTYPE))
        wrong = int((bytes_.astype(np.float32) != wide).sum())
    if wrong:
        raise JQ4Error(
            f"{weight.name}: {wrong} of {scale.size} scales are not powers of two from 2**-127 to 2**127, wanted for "
            "mxfp4. Quantize it again to mxfp4, or write orbax, which keeps its scales."
        )
    return bytes_.view(np.uint8)


def quantization_config(planned: list[Planned], options: Mapping[str, Any]) -> dict[str, Any]:
    packed = [one.weight for one in planned if one.packed]
    settings = by_setting(packed, _setting)
    everything = [module_of(weight) for weight in packed]
    groups: dict[str, Any] = {}
    for number, (setting, modules) in enumerate(reversed(settings.items())):
        last = number == len(settings) - 1
        targets = ["Linear"] if last else patterns(modules, set(everything) - set(modules))
        groups[f"group_{number}"] = _group(setting, targets, len(settings) > 1)
    formats = {_form(setting) for setting in settings} or {_INTEGERS}
    dense = dense_modules(planned)
    return {
        "quant_method": NAME,
        "format": next(iter(formats)) if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": patterns(dense, everything) + unsaid_head(planned),
    }


def _setting(q: QArray) -> tuple[str, int, bool, int | None]:
    """(format, bits, symmetric, group size or None for one scale a channel)."""
    grouped = q.group_size if q.num_groups > 1 else None
    if q.format == "fp4":
        return _MXFP4, 4, True, BLOCK
    return _INTEGERS, q.bits, q.zero_point is None, grouped


def _form(setting: tuple[str, int, bool, int | None]) -> str:
    return setting[0]


def _group(setting: tuple[str, int, bool, int | None], targets: list[str], mixed: bool) -> dict[str, Any]:
    form, bits, symmetric, group_size = setting
    weights: dict[str, Any] = {
        "num_bits": bits,
        "type": "float" if form == _MXFP4 else "int",
        "symmetric": symmetric,
        "group_size": group_size,
        "strategy": "channel" if group_size is None else "group",
        "dynamic": False,
    }
    if form == _MXFP4:
        weights |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": form if mixed else None,
    }
