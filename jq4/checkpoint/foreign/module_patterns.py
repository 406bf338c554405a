"""Names of modules for a `quantization_config`: which are dense, which share a setting, and how to say it briefly.

A setting that holds for "model.layers.0.mlp.gate" mostly holds for that module of every layer. So names that differ in
their numbers alone are said as one pattern, "model\\.layers\\.\\d+\\.mlp\\.gate", wherever no module of another setting
matches it, and one by one where one does.
"""

import re
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

from jq4.checkpoint.foreign.linears import module_of
from jq4.checkpoint.foreign.weights import LazyWeight
from jq4.checkpoint.foreign.writing import Planned

Setting = TypeVar("Setting", bound=Hashable)
_HEAD = "lm_head"


def dense_modules(planned: Iterable[Planned]) -> list[str]:
    """The modules with a dense matrix that a loader might take for a quantized one."""
    weights = [one.weight for one in planned if not one.packed]
    return [module_of(one) for one in weights if len(one.shape) == 2 and _is_module(one)]


def unsaid_head(planned: Iterable[Planned]) -> list[str]:
    """The head, where it is the embedding: a linear layer of the model, dense, that has no tensor to tell."""
    return [] if any(one.weight.name == f"{_HEAD}.weight" for one in planned) else [_HEAD]


def _is_module(weight: LazyWeight) -> bool:
    return weight.name.endswith(".weight")


def by_setting(weights: Iterable[LazyWeight], setting: Callable[[Any], Setting]) -> dict[Setting, list[str]]:
    """The modules of each setting, the most frequent setting first."""
    found: dict[Setting, list[str]] = {}
    for weight in weights:
        found.setdefault(setting(weight.abstract), []).append(module_of(weight))
    return dict(sorted(found.items(), key=lambda one: -len(one[1])))


def patterns(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """compressed-tensors' targets, names or "re:" patterns, that match all `modules` and none of `others`."""
    return [f"re:{regex}" if many else name for many, name, regex in _families(modules, others)]


def regexes(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """Regular expressions that match all `modules` and none of `others`."""
    return [regex for _, _, regex in _families(modules, others)]


def _families(modules: Iterable[str], others: Iterable[str]) -> list[tuple[bool, str, str]]:
    """(whether it stands for many, a module's name, a regular expression) for each entry of a list."""
    taken = {_open(other) for other in others}
    families: dict[str, list[str]] = {}
    for module in modules:
        families.setdefault(_open(module), []).append(module)
    entries: list[tuple[bool, str, str]] = []
    for family, members in families.items():
        if len(members) > 1 and family not in taken:
            entries.append((True, members[0], f"^{family}$"))
        else:
            entries += [(False, member, f"^{re.escape(member)}$") for member in members]
    return entries


def _open(module: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in module.split("."))
