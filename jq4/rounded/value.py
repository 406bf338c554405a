"""A weight that is rounded, or will be, on its way through a traced function.

A ToRound passes whole into loops, branches and rematerialized bodies, and is rounded by the first operation that looks
at it. A Rounded is a Watched value (jq4.watched): moving its axes keeps it known, so that the product that it meets can
round its other operand, if the recipe says so, and a leaf that meets none can be told.
"""

import abc
import dataclasses
import functools
from typing import Any, Self

import jax

from jq4.watched import Watched

BESIDE = ("step", "input_scale")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("array", "indices", "step", "input_scale"),
    meta_fields=("path", "axes", "loops", "indexed", "activations", "grouped", "input_rotation"),
)
@dataclasses.dataclass(frozen=True)
class Rounded(Watched):
    """A rounded weight, or what moving its axes made of it.

    Attributes:
      step: the learned step of its products' inputs f32[*B, 1, 1], with the leaf's axes; None where there is none.
      activations: what products round their inputs to.
      grouped: the axis of the leaf that its groups lie along, negative.
      input_scale, input_rotation: what inputs are multiplied and rotated by before they are rounded, as a QArray has
        them; the array has both in it, so that inputs come back from them after they are rounded.
    """

    step: Any = None
    activations: str = ""
    grouped: int = -2
    input_scale: Any = None
    input_rotation: int = 0

    @property
    def beside(self) -> dict[str, Any]:
        """The arrays with the leaf's axes beside the weight, by name."""
        return {name: part for name in BESIDE if (part := getattr(self, name)) is not None}


class ToRound(abc.ABC):
    """A leaf [*B, K, N] that knows how it will be rounded; a dataclass that is a pytree."""

    weight: Any
    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    @abc.abstractmethod
    def round(self) -> Rounded: ...

    @abc.abstractmethod
    def can_be_sliced(self) -> bool:
        """Whether slices along the leading axis round as the whole does."""

    @abc.abstractmethod
    def with_whole_leading_axis(self) -> Self:
        """Every array as long as the weight along its leading axis."""
