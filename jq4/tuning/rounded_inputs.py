"""A function of dense weights whose products round their inputs as those of the packed weights will (jq4.activations).

What is learned is then what is served: codes and scales make up for what rounding the inputs loses as well. Inputs that
the interpreter does not reach (within a derivative of the user's own, or of a product that splits the axis which they
are scaled or rotated along) are learned from as floats, with a warning.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

from jq4.arguments import Arguments
from jq4.paths import flatten_with_paths
from jq4.qarray import QArray, is_qarray
from jq4.rounded.interpreter import RoundingInterpreter
from jq4.rounded.record import INPUTS, RoundingRecord, UnroundedWarning
from jq4.rounded.value import Rounded


def with_rounded_inputs(function: Callable[..., Any], packed: Any) -> Callable[..., Any]:
    """`function` of (a tree of dense weights, ...), rounding inputs as the leaves of `packed` at the same paths do."""
    rounding = {path: q for path, q in flatten_with_paths(packed) if is_qarray(q) and q.activations}
    if not rounding:
        return function

    def special(path: str, weight: Any) -> Any:
        return _rounded(rounding[path], weight, path) if path in rounding else weight

    def rounded(tree: Any, *args: Any) -> Any:
        return _Learning(RoundingRecord(), strict=False).run(function, Arguments((tree, *args), {}), special)

    return rounded


class _Learning(RoundingInterpreter):
    def tell(self, kind: str, path: str, primitive: str, reason: str, leaf: Any) -> None:
        """Warns where inputs are not rounded."""
        if kind == INPUTS:
            text = f"{path}: is learned from inputs that are not rounded at {primitive}: {reason}"
            warnings.warn(text, UnroundedWarning, stacklevel=2)


def _rounded(q: QArray, weight: Any, path: str) -> Rounded:
    return dataclasses.replace(
        Rounded.whole(weight, path), step=q.activation_scale, activations=q.activations, grouped=q.axis,
        input_scale=q.input_scale, input_rotation=q.input_rotation,
    )  # fmt: skip
