"""A weight in training on its way through a traced function: not yet rounded, then rounded and followed to its product.

An Unrounded passes whole into loops, branches and rematerialized bodies, and is rounded by the first operation that
looks at it: so a scan over layers rounds a layer at a time, and a rematerialized layer is rounded again going back.
From there it is a Watched value (jq4.watched): moving its axes keeps it known, so that the product that it meets can
round its other operand, if the recipe says so, and a leaf that meets none can be told.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jq4.train.lsq import rounded
from jq4.train.quantizer import ARRAYS, Quantizer
from jq4.watched import Watched


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("array", "indices", "step"),
    meta_fields=("path", "axes", "loops", "indexed", "activations", "grouped"),
)
@dataclasses.dataclass(frozen=True)
class Rounded(Watched):
    """A rounded weight, or what moving its axes made of it.

    Attributes:
      step: the learned step of its products' inputs f32[*B, 1, 1], with the leaf's axes; None where there is none.
      activations: what products round their inputs to.
      grouped: the axis of the leaf that its groups lie along, negative.
    """

    step: Any = None
    activations: str = ""
    grouped: int = -2


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight", "quantizer"), meta_fields=("path",))
@dataclasses.dataclass(frozen=True)
class Unrounded:
    """A leaf [*B, K, N] and how it will be rounded."""

    weight: Any
    quantizer: Quantizer
    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def round(self) -> Rounded:
        whole = Rounded.whole(rounded(self.weight, self.quantizer), self.path)
        q = self.quantizer
        return dataclasses.replace(whole, step=q.input_step, activations=q.activations, grouped=q.axis)

    def can_be_sliced(self) -> bool:
        """Whether slices along the leading axis round as the whole does."""
        encoding = self.quantizer.encoding
        shared = max(-encoding.axis, 2 if encoding.per_tensor else 1)
        return len(self.shape) > shared

    def with_whole_leading_axis(self) -> "Unrounded":
        """Every array as long as the weight along its leading axis."""
        length = self.shape[0]
        whole = {
            name: jnp.broadcast_to(part, (length, *part.shape[1:]))
            for name in ARRAYS
            if (part := getattr(self.quantizer, name)) is not None
        }
        return dataclasses.replace(self, quantizer=dataclasses.replace(self.quantizer, **whole))
