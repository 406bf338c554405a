"""What rounding a leaf learns, as a pytree beside the params: one Quantizer a leaf, all of them in a Quantizers.

Shapes are those of a QArray's parts (jq4.qarray), so that a slice along leading axes, under `scan` or `vmap`, is one
again. Every array is float32 and trained; an array that is None is not learned: without a scale, scales and zeros are
found anew from the weights at every call, which is the plain straight-through estimator.
"""

import dataclasses
import functools
from typing import Any

import jax

from jq4.formats import Format
from jq4.rounding import Encoding

MARGIN = 0.5  # see jq4.train.lsq
ARRAYS = ("scale", "zero_point", "offset", "input_step")
_STATIC = ("encoding", "activations", "input_rotation", "margin")


@functools.partial(jax.tree_util.register_dataclass, data_fields=ARRAYS, meta_fields=_STATIC)
@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How one leaf [*B, K, N] is rounded.

    Attributes:
      encoding: format, groups, axis, symmetry, and the dtype that scales are stored in.
      scale: the learned steps f32[*B, G, N]; None for scales found anew from the weights.
      zero_point, offset: learned too, f32[*B, G, N], where the encoding has one.
      input_step: the learned step of the inputs' own codes, f32[*B, 1, 1]; None where they come by the token or dense.
      activations: what products round their inputs to, a name of jq4.activations; "" leaves them as they are.
      input_rotation: the block in which inputs are rotated first, and what is rounded is R^T W; 0: none (see
        jq4.input_rotation). The leaf that is trained is W, whatever is rounded.
      margin: how far beyond the outermost levels, in steps, gradients still reach a weight; 0 as LSQ has it.
    """

    encoding: Encoding
    scale: Any = None
    zero_point: Any = None
    offset: Any = None
    input_step: Any = None
    activations: str = ""
    input_rotation: int = 0
    margin: float = MARGIN

    @property
    def number_format(self) -> Format:
        return self.encoding.number_format

    @property
    def axis(self) -> int:
        return self.encoding.axis

    def group_size(self, length: int) -> int:
        return min(self.encoding.group_size or length, length)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("by_path",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Quantizers:
    """The quantizers of a tree's leaves, by path: what goes beside the params, into the same optimizer."""

    by_path: dict[str, Quantizer]

    def __repr__(self) -> str:
        return f"Quantizers({', '.join(self.by_path)})"


def split_pair(tree: Any) -> tuple[Any, Quantizers | None]:
    """(params, quantizers) of such a pair; (the tree, None) of a tree of params alone."""
    if isinstance(tree, tuple) and len(tree) == 2 and isinstance(tree[1], Quantizers):
        return tree
    return tree, None
