"""compressed-tensors' `quantization_config`: which scheme a module has, and what in it cannot be read.

    config_groups   {name: {targets, weights: {num_bits, type, symmetric, strategy, group_size, ...}, ...}}
                    or {preset: targets}, as in {"W4A16": ["Linear"]}
    ignore          modules that stay dense

Targets are a module's exact name, "re:" and a regular expression that matches from the start of the name, or the name
of a class ("Linear"), which a file cannot check: it is taken to match every module. The more exact target wins.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jq4.checkpoint.foreign.file_patterns import matches
from jq4.errors import JQ4Error

UNREADABLE = {
    "marlin-24": "2:4 sparse codes permuted for one GPU kernel",
    "sparse-bitmask": "sparse weights",
    "sparse-24-bitmask": "sparse weights",
    "mxfp6-pack-quantized": "6-bit floats",
    "mxfp8-quantized": "8-bit floats",
    "float-quantized": "8-bit floats",
}
_DENSE_AGAIN = "Decompress it with compressed-tensors and save it dense, or take the original checkpoint."
_ONLINE = ("input", "output", "q_attn", "k_cache")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a group of modules is quantized; None where nothing is said."""

    num_bits: int | None = None
    type: str = "int"
    symmetric: bool | None = None
    group_size: int | None = None
    activations: bool = False


class Config:
    """A quantization_config, asked by modules' names."""

    def __init__(self, quantization: Mapping[str, Any]) -> None:
        _refuse(quantization)
        self._schemes = list(_groups(quantization))
        self.version = _version(quantization)

    def scheme_of(self, module: str) -> Scheme:
        """The scheme of the most exact target that matches; an empty one where none does."""
        for means in (_is_name, _is_pattern, _is_class):
            for targets, scheme in self._schemes:
                if any(means(target, module) for target in targets):
                    return scheme
        return Scheme()


def _is_name(target: str, module: str) -> bool:
    return target == module


def _is_pattern(target: str, module: str) -> bool:
    return target.startswith("re:") and matches(target[3:], module, "quantization_config: a target")


def _is_class(target: str, module: str) -> bool:
    return "." not in target and target[:1].isupper()


def _groups(quantization: Mapping[str, Any]) -> Iterator[tuple[list[str], Scheme]]:
    groups = quantization.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise JQ4Error(
            f"quantization_config: config_groups is {type(groups).__name__}, wanted an object. Mend config.json."
        )
    for name, group in groups.items():
        if isinstance(group, list):
            yield [str(target) for target in group], _preset(name)
        elif isinstance(group, dict):
            targets = group.get("targets") or []
            yield [str(target) for target in targets] if isinstance(targets, list) else [], _scheme(group)


def _scheme(group: Mapping[str, Any]) -> Scheme:
    weights = group.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    bits, size, symmetric = (weights.get(key) for key in ("num_bits", "group_size", "symmetric"))
    return Scheme(
        bits if type(bits) is int else None,
        str(weights.get("type") or "int"),
        symmetric if isinstance(symmetric, bool) else None,
        size if type(size) is int and size > 0 else None,
        bool(group.get("input_activations")),
    )


def _preset(name: str) -> Scheme:
    """What compressed-tensors' presets say: W4A16 is 4 bits, symmetric, in groups of 128."""
    integer = re.fullmatch(r"W([2-8])A(4|8|16|FP8)(_ASYM)?", name.upper())
    if integer and name.upper() != "W8A8":
        return Scheme(int(integer[1]), "int", not integer[3], 128, integer[2] != "16")
    known = {
        "W8A8": Scheme(8, "int", True, None, True),
        "INT8": Scheme(8, "int", True, None, True),
        "NVFP4": Scheme(4, "float", True, 16, True),
        "NVFP4A16": Scheme(4, "float", True, 16),
        "MXFP4": Scheme(4, "float", True, 32, True),
        "MXFP4A16": Scheme(4, "float", True, 32),
    }
    return known.get(name.upper(), Scheme())


def _version(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", str(quantization.get("version") or ""))
    return (int(found[1]), int(found[2])) if found else None


def _refuse(quantization: Mapping[str, Any]) -> None:
    sparsity = quantization.get("sparsity_config")
    for form in (quantization.get("format"), sparsity.get("format") if isinstance(sparsity, dict) else None):
        if isinstance(form, str) and form in UNREADABLE:
            raise JQ4Error(
                f"quantization_config: format is {form!r}, {UNREADABLE[form]}; wanted pack-quantized, int-quantized, "
                f"naive-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized or mixed-precision. {_DENSE_AGAIN}"
            )
    for location in _transform_locations(quantization.get("transform_config")):
        if location in _ONLINE:
            raise JQ4Error(
                f"quantization_config: transform_config rotates {location!r} while the model runs; wanted only "
                f"rotations that are folded into weights. {_DENSE_AGAIN}"
            )


def _transform_locations(transforms: Any) -> Iterator[Any]:
    groups = transforms.get("config_groups") if isinstance(transforms, dict) else None
    for group in groups.values() if isinstance(groups, dict) else ():
        apply = group.get("apply") if isinstance(group, dict) else None
        for one in apply if isinstance(apply, list) else ():
            yield one.get("location") if isinstance(one, dict) else None
