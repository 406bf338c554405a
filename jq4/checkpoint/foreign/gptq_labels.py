"""What a GPTQ or auto-round `quantization_config` says of each module; its contents may say otherwise (gptq.py).

    bits, group_size, sym, desc_act            for all modules
    checkpoint_format "gptq" | "gptq_v2"       zero points stored less one, or as they are
    dynamic {"+:regex" | "-:regex" | regex: {bits, group_size, sym, ...}}     GPTQModel: the first that matches a
                                               module's name from its start overrides; "-:" leaves the module dense
    extra_config {module: {bits, group_size, sym, ...}}                       auto-round: by exact name, or a regex
    packing_format "auto_round:auto_gptq" | "auto_round", "auto_round:gptqmodel"     auto-round: v1 | v2

Layouts that only one kernel reads are refused here, before their tensors are looked at.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jq4.checkpoint.foreign.file_patterns import matches
from jq4.errors import JQ4Error

V1, V2 = "gptq", "gptq_v2"
_DYNAMIC, _EXTRA = "quantization_config: dynamic", "quantization_config: extra_config"
_PERMUTED = {
    "marlin": "a layout permuted for one GPU kernel",
    "gptq_p": "bit planes (GPTQModel's planar layout)",
}


@dataclasses.dataclass(frozen=True)
class Label:
    """What is said of one module; None where nothing is said."""

    bits: int | None
    group_size: int | None
    sym: bool | None
    version: str


def label_of(quantization: Mapping[str, Any], module: str) -> Label:
    """The label of a module, overrides applied."""
    settings = {**quantization, **_override(quantization, module)}
    return Label(
        _whole(settings.get("bits")), _whole(settings.get("group_size")), _flag(settings.get("sym")), _version(settings)
    )


def refuse_kernel_layouts(quantization: Mapping[str, Any]) -> None:
    """Raises JQ4Error for layouts that are not the exchange format."""
    form = quantization.get("checkpoint_format") or quantization.get("format") or ""
    if quantization.get("is_marlin_format") is True:
        form = "marlin"
    if isinstance(form, str) and form in _PERMUTED:
        raise JQ4Error(
            f"quantization_config: checkpoint_format is {form!r}, {_PERMUTED[form]}; wanted 'gptq' or 'gptq_v2'. "
            "Save it again with GPTQModel in format='gptq', or take the original checkpoint."
        )


def _override(quantization: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    for pattern, settings in _mapping(quantization, "dynamic").items():
        if not pattern.startswith("-:") and matches(pattern.removeprefix("+:"), module, _DYNAMIC):
            return _settings(settings)
    extra = _mapping(quantization, "extra_config")
    if module in extra:
        return _settings(extra[module])
    return next((_settings(extra[pattern]) for pattern in extra if matches(pattern, module, _EXTRA)), {})


def _mapping(quantization: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = quantization.get(key) or {}
    if not isinstance(value, dict):
        raise JQ4Error(
            f"quantization_config: {key} is {type(value).__name__}, wanted an object by module. Mend config.json."
        )
    return value


def _settings(value: Any) -> Mapping[str, Any]:
    return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else {}


def _version(settings: Mapping[str, Any]) -> str:
    if settings.get("quant_method") == "auto-round" or "packing_format" in settings:
        packing = str(settings.get("packing_format") or "auto_round:auto_gptq")
        return V1 if "gptq" in packing and "gptqmodel" not in packing else V2
    return V2 if V2 in (settings.get("checkpoint_format"), settings.get("format")) else V1


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None
