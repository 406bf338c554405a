"""A weight in training, not yet rounded, on its way through a traced function (jq4.rounded).

A scan over layers rounds a layer at a time, where it is used, and a rematerialized layer is rounded again going back.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jq4.rounded.value import Rounded, ToRound
from jq4.train.lsq import rounded
from jq4.train.quantizer import ARRAYS, Quantizer


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight", "quantizer"), meta_fields=("path",))
@dataclasses.dataclass(frozen=True)
class Unrounded(ToRound):
    """A leaf [*B, K, N] and how it will be rounded."""

    weight: Any
    quantizer: Quantizer
    path: str

    def round(self) -> Rounded:
        whole = Rounded.whole(rounded(self.weight, self.quantizer), self.path)
        q = self.quantizer
        return dataclasses.replace(
            whole, step=q.input_step, activations=q.activations, grouped=q.axis, input_rotation=q.input_rotation
        )

    def can_be_sliced(self) -> bool:
        encoding = self.quantizer.encoding
        shared = max(-encoding.axis, 2 if encoding.per_tensor else 1)
        return len(self.shape) > shared

    def with_whole_leading_axis(self) -> "Unrounded":
        length = self.shape[0]
        whole = {
            name: jnp.broadcast_to(part, (length, *part.shape[1:]))
            for name in ARRAYS
            if (part := getattr(self.quantizer, name)) is not None
        }
        return dataclasses.replace(self, quantizer=dataclasses.replace(self.quantizer, **whole))
