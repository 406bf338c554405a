"""Recipes by name: METHOD-wBITSgGROUP[-asym], with `gc` for one scale per output channel and `gt` for one per tensor.

    rtn-w4g32   hqq-w4g64-asym   rtn-w8gc   nf4 (groups of 64, as bitsandbytes)   fp4 (of 32, as OCP's)   nf4-g128
    nf4-dq      scales packed as well, as bitsandbytes' double quantization: 4.127 bits a weight

`-a8` after any of them rounds the inputs of products as well, to 8 bits a token as they come (`-a4`: to 4; `-a8-asym`,
`-a4-asym`: from each token's least to its largest; `-afp8`: to floats of 8, e4m3).

    rtn-w4g128-a8           smoothquant-w8a8        8 bits by 8, a scale an output channel, inputs smoothed beforehand
    rotate-rtn-w4g128-a8    smoothquant-w8a8-static the same with a step for each weight's inputs from calibration

    autoround-w4g32         gptq-w4g32, then rounding and scales learned block by block, straight through (jq4.tuning)
    adaround-w4g32          the same with a soft rounding that is annealed
    best-w4g32              gptq-w4g32, then scales and rounding learned end to end: the best at these bits

`rotate-` before any of them is the step of that name (jq4.equalize); with `-a4` it rotates inputs behind a gate too.
Presets leave norms, biases, embeddings and the output head dense, by their names, unless asked.
"""

import dataclasses
import re

from jq4.activations import Activations
from jq4.errors import JQ4Error
from jq4.methods import METHODS
from jq4.recipe import Recipe
from jq4.rule import Rule
from jq4.steps import Step
from jq4.targets import EMBEDDINGS, HEADS, NORMS

_INTEGER = re.compile(r"(?P<method>[a-z]+)-w(?P<bits>[0-9]+)g(?P<group>[0-9]+|c|t)(?P<asym>-asym)?")
_CODEBOOK = re.compile(r"(?:(?P<method>[a-z]+)-)?(?P<type>nf|fp)4(?:-?g(?P<group>[0-9]+|c|t))?(?P<double>-dq)?")
_DEFAULT_GROUP = {"nf": "64", "fp": "32"}
_TYPE = {"nf": "nf", "fp": "float"}


_ACTIVATIONS = re.compile(r"(?P<weights>.+)-a(?P<inputs>8|4|8-asym|4-asym|fp8)")
_INPUTS = {
    "8": Activations(),
    "4": Activations(num_bits=4),
    "8-asym": Activations(symmetric=False),
    "4-asym": Activations(num_bits=4, symmetric=False),
    "fp8": Activations(type="float"),
}
_LEARNED = {"adaround": ("adaround",), "autoround": ("autoround",), "best": ("distill",)}
_LEARNED_FROM = "gptq"
_SMOOTHQUANT = {"smoothquant-w8a8": "", "smoothquant-w8a8-static": "static"}


def preset(name: str, *, embeddings: bool = False, head: bool = False) -> Recipe:
    """See `Recipe.preset`."""
    targets = ("Linear", "Embedding") if embeddings else ("Linear",)
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()
    if name.startswith("rotate-"):
        before = (Step("rotate"),)
    weights = name.removeprefix("rotate-")
    kind, _, form = weights.partition("-")
    if kind in _LEARNED:
        after, weights = tuple(Step(step) for step in _LEARNED[kind]), f"{_LEARNED_FROM}-{form}"
    if before and weights.endswith(("-a4", "-a4-asym")):
        before = (Step("rotate", (("inner", True),)),)
    if weights in _SMOOTHQUANT:
        before = (*before, Step("smoothquant"))
        static = Activations(strategy="tensor", dynamic=False) if _SMOOTHQUANT[weights] else Activations()
        rule = Rule(targets, num_bits=8, input_activations=static)
    elif found := _ACTIVATIONS.fullmatch(weights):
        rule = dataclasses.replace(_rule(found["weights"], targets), input_activations=_INPUTS[found["inputs"]])
    else:
        rule = _rule(weights, targets)
    ignore = [NORMS]
    ignore += [] if embeddings else [EMBEDDINGS]
    ignore += [] if head else [HEADS]
    return Recipe((rule,), tuple(ignore), name, before=before, after=after)


def _rule(name: str, targets: tuple[str, ...]) -> Rule:
    if found := _INTEGER.fullmatch(name):
        return _make(name, targets, found["method"], found["group"], int(found["bits"]), "int", not found["asym"])
    if found := _CODEBOOK.fullmatch(name):
        group = found["group"] or _DEFAULT_GROUP[found["type"]]
        rule = _make(name, targets, found["method"] or "rtn", group, 4, _TYPE[found["type"]], True)
        return dataclasses.replace(rule, double_quant=bool(found["double"]))
    raise JQ4Error(f"unknown preset {name!r}: wanted {_known()}")


def _make(name: str, targets: tuple[str, ...], method: str, group: str, bits: int, type: str, symmetric: bool) -> Rule:
    if method not in METHODS:
        raise JQ4Error(f"preset {name!r} wants the method {method!r}, which jq4 does not have: wanted {_known()}")
    strategy = {"c": "channel", "t": "tensor"}.get(group, "group")
    size = int(group) if strategy == "group" else None
    try:
        return Rule(
            targets,
            num_bits=bits,
            type=type,
            symmetric=symmetric,
            strategy=strategy,
            group_size=size,
            method=method,
        )
    except JQ4Error as error:
        raise JQ4Error(f"preset {name!r}: {str(error).removeprefix('rule: ')}") from None


def _known() -> str:
    return (
        f"METHOD-wBITSgGROUP[-asym] with METHOD one of {', '.join((*METHODS, *_LEARNED))}; BITS 2 to 8; GROUP a "
        "number, c (channel) or t (tensor); or nf4, fp4; with -a8 (activations too; -a4, -a8-asym, -a4-asym, -afp8) "
        "after or rotate- before it; or smoothquant-w8a8"
    )
