"""A weight of any shape as stacked matrices [S, K, N] whose K is what its statistics call features, and back.

    weight   [*B, *F, *O]  with the grouped axis somewhere   ->   f32[S, K, N],  S = prod B, K = prod F, N = prod O

B are the leading axes of the statistics (scanned layers, experts). F are the contracted axes: the grouped one and as
many before it as make up the statistics' K (a kernel [heads, head_dim, O] contracted over both has K = heads *
head_dim, a convolution's [height, width, Cin, Cout] has K = height * width * Cin). Groups lie along the grouped axis
alone, so that the features are R runs of D, and a group never crosses from one run to the next.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jq4.errors import JQ4Error
from jq4.qarray import QArray
from jq4.rounding import Encoding, Parameters
from pallas_kernels import packing


@dataclasses.dataclass(frozen=True)
class Canonical:
    """How one weight's shape becomes [S, K, N].

    Attributes:
      shape: the weight's.
      stacked: how many leading axes are B.
      features: axes F in order, from the front; the last is the grouped one.
      group_size: at most D.
    """

    shape: tuple[int, ...]
    stacked: int
    features: tuple[int, ...]
    group_size: int

    @classmethod
    def of(cls, shape: tuple[int, ...], encoding: Encoding, hessian: tuple[int, ...]) -> "Canonical":
        """For a Hessian of shape [*B, K, K]; an error says which shapes do not fit."""
        stacked, num_features = len(hessian) - 2, hessian[-1]
        last = encoding.axis % len(shape)
        first = last
        while math.prod(shape[first : last + 1]) < num_features and first > stacked:
            first -= 1
        fits = first >= stacked and math.prod(shape[first : last + 1]) == num_features
        if not fits or tuple(shape[:stacked]) != tuple(hessian[:-2]):
            raise JQ4Error(
                f"its statistics are a Hessian of shape {tuple(hessian)}, which the weight of shape {tuple(shape)}, "
                f"contracted along axis {encoding.axis}, does not have: observe the function that this tree belongs to"
            )
        length = shape[last]
        return cls(tuple(shape), stacked, tuple(range(first, last + 1)), min(encoding.group_size or length, length))

    @property
    def length(self) -> int:
        """D, the length of the grouped axis."""
        return self.shape[self.features[-1]]

    @property
    def is_matrix(self) -> bool:
        """Whether the weight is its only matrix [K, N] already."""
        return len(self.shape) == 2 and self.features == (0,)

    @property
    def runs(self) -> int:
        """R, how many runs of D the features are."""
        return math.prod(self.shape[axis] for axis in self.features[:-1])

    @property
    def groups(self) -> int:
        """Groups in a run; the last may be short."""
        return -(-self.length // self.group_size)

    @property
    def _order(self) -> tuple[int, ...]:
        batch = tuple(range(self.stacked))
        others = (axis for axis in range(self.stacked, len(self.shape)) if axis not in self.features)
        return (*batch, *self.features, *others)

    def matrices(self, weight: jax.Array) -> jax.Array:
        """The weight as [S, K, N], in its own dtype."""
        slices = math.prod(self.shape[: self.stacked])
        return jnp.transpose(weight, self._order).reshape(slices, self.runs * self.length, -1)

    def restored(self, values: jax.Array, length: int) -> jax.Array:
        """[S, R * length, N] in the weight's own order of axes, with `length` along the grouped one (or 1 for N)."""
        sizes = [self.shape[axis] for axis in self._order]
        place = self._order.index(self.features[-1])
        sizes[place] = length
        if values.shape[-1] == 1:
            sizes[place + 1 :] = [1] * (len(sizes) - place - 1)
        inverse = sorted(range(len(sizes)), key=lambda i: self._order[i])
        return jnp.transpose(values.reshape(sizes), inverse)

    def packed(self, codes: jax.Array, parameters: Parameters, encoding: Encoding, dtype: str) -> QArray:
        """The QArray of codes u8[S, K, N] and parameters f32[S, R * G, N]."""
        bits, stored = encoding.number_format.bits, jnp.dtype(encoding.scale_dtype)
        scale, zero_point, offset = (None if part is None else self.restored(part, self.groups) for part in parameters)
        assert scale is not None
        return QArray(
            codes=packing.pack(self.restored(codes, self.length), bits, encoding.axis),
            scale=scale.astype(stored),
            zero_point=None if zero_point is None else zero_point.astype(jnp.uint8),
            offset=None if offset is None else offset.astype(stored),
            format=encoding.format,
            group_size=self.group_size,
            axis=encoding.axis,
            padding=packing.padding_of(self.length, bits),
            dtype=dtype,
        )
