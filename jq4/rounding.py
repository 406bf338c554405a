"""From a weight to codes, one group at a time: scales (absmax, minmax, percentile, mse) and rounding to nearest.

A weight w[..., K, ...] is cut along its grouped axis into blocks w[..., G, g, ...]; what follows sees blocks only, and
a short last group is a block of its own. For a group with the values w:

    symmetric          scale = max|w| / max_level                             w ~ level(code) * scale
    integer zero       scale = (max(w, 0) - min(w, 0)) / (2**b - 1)           w ~ (code - zero_point) * scale
                       zero_point = round(-min(w, 0) / scale)
    float offset       the same scale, offset = min(w, 0) + 2**(b-1) * scale  w ~ (code - 2**(b-1)) * scale + offset

The range always includes zero, so that a zero weight stays (nearly) zero and an all-zero group is exact. Instead of the
extremes a range may be taken from percentiles, or searched: `mse` shrinks the range over a grid of factors and keeps
for each group the one with the least sum of |w - dequantized|**norm.

Scales and offsets are rounded to the dtype they will be stored in BEFORE the codes are computed: the codes then make up
for that rounding, and dequantizing what was stored gives what was optimised. What is traded: codes depend on
`scale_dtype`, so two checkpoints that differ in it differ in some codes as well.

Integers round half to even. Codebooks (nf4, fp4) take the nearest level, ties to the lower one, as bitsandbytes does.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error
from jq4.formats import Format, get_format
from jq4.qarray import QArray, levels_of
from pallas_kernels import packing

OBSERVERS = ("absmax", "minmax", "percentile", "mse")
SCALE_DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How the codes of one weight are made; static and hashable, so that it can be an argument of `jit`.

    Attributes:
      format: name of the number format, a key of jq4.formats.FORMATS.
      axis: the grouped axis, negative.
      group_size: weights along `axis` that share a scale; None for one group (per output channel).
      per_tensor: one scale for the grouped axis and the last two axes together; leading axes keep their own.
      symmetric: no zero point and no offset.
      zero_point: "integer" or "float" (an offset); of no meaning where symmetric.
      observer: how the range is found, one of OBSERVERS.
      scale_dtype: dtype that scales and offsets are stored in.
      percentile: of the values (per cent) that the range keeps, for the observer of that name.
      norm, steps, max_shrink: of the mse search: the error's power, how many factors, the last being 1 - max_shrink.
    """

    format: str = "int4"
    axis: int = -2
    group_size: int | None = None
    per_tensor: bool = False
    symmetric: bool = True
    zero_point: str = "integer"
    observer: str = "absmax"
    scale_dtype: str = "bfloat16"
    percentile: float = 99.9
    norm: float = 2.0
    steps: int = 50
    max_shrink: float = 0.5

    @property
    def number_format(self) -> Format:
        return get_format(self.format)

    @property
    def has_offset(self) -> bool:
        return not self.symmetric and self.zero_point == "float"

    @property
    def reduced_axes(self) -> tuple[int, ...]:
        """The axes of a block [..., G, g, ...] that share a scale: g's, and for a whole tensor the last two as well."""
        if not self.per_tensor:
            return (self.axis,)
        last_two = (-1, -2) if self.axis >= -2 else (-1, -2, self.axis)
        # a block has one axis more, G before g: axes before the grouped one shift, those after it do not
        return tuple(a if a >= self.axis else a - 1 for a in last_two)


class Parameters(NamedTuple):
    """What turns codes to weights: f32 values, exactly representable as stored, of shape [..., G, 1, ...] in blocks."""

    scale: jax.Array
    zero_point: jax.Array | None = None
    offset: jax.Array | None = None


def quantize_weight(
    weight: jax.Array,
    format: str = "int4",
    *,
    group_size: int | None = 128,
    axis: int = -2,
    symmetric: bool = True,
    observer: str | None = None,
    scale_dtype: str = "bfloat16",
    per_tensor: bool = False,
    zero_point: str = "integer",
    **options: Any,
) -> QArray:
    """Rounds a float weight [*B, K, N] to the nearest codes; traces.

    Args:
      weight: of any float dtype; computed in float32.
      format: a key of jq4.formats.FORMATS.
      group_size: weights along `axis` that share a scale; None for one scale per output channel.
      axis: the contraction axis, which is grouped; counted from either end.
      symmetric, zero_point, observer, scale_dtype, per_tensor, options: as in `Encoding`; the observer's default is
        "absmax" for symmetric encodings and "minmax" for others.

    Returns:
      a neutral QArray that dequantizes to the weight's shape and dtype.

    Raises:
      JQ4Error: for an axis, a format or an option that cannot be. Values are not checked (see jq4.quantize).
    """
    axis = axis if axis < 0 else axis - weight.ndim
    encoding = Encoding(
        format=format,
        axis=axis,
        group_size=None if per_tensor else group_size,
        per_tensor=per_tensor,
        symmetric=symmetric,
        zero_point=zero_point,
        observer=observer or ("absmax" if symmetric else "minmax"),
        scale_dtype=scale_dtype,
        **options,
    )
    return _round_weight(weight, encoding)


@functools.partial(jax.jit, static_argnames=("encoding",))
def _round_weight(weight: jax.Array, encoding: Encoding) -> QArray:
    return encode_weight(weight, encoding, find_parameters)


def encode_weight(weight: jax.Array, encoding: Encoding, find: Callable[[jax.Array, Encoding], Parameters]) -> QArray:
    """Packs a weight [*B, K, N] with the parameters that `find` finds for its blocks f32[*B, G, g, N]."""
    axis = encoding.axis
    check_encoding(encoding, weight.ndim)
    length = weight.shape[axis]
    group_size = min(encoding.group_size or length, length)

    def encode_blocks(blocks: jax.Array) -> tuple[jax.Array, Parameters]:
        parameters = find(blocks, encoding)
        return codes_of_blocks(blocks, parameters, encoding.number_format), parameters

    codes, parameters = map_groups(encode_blocks, weight.astype(jnp.float32), axis, group_size)
    stored = jnp.dtype(encoding.scale_dtype)
    bits = encoding.number_format.bits
    return QArray(
        codes=packing.pack(codes, bits, axis),  # u8[*B, bytes(K), N]
        scale=parameters.scale.astype(stored),  # [*B, G, N]
        zero_point=None if parameters.zero_point is None else parameters.zero_point.astype(jnp.uint8),
        offset=None if parameters.offset is None else parameters.offset.astype(stored),
        format=encoding.format,
        group_size=group_size,
        axis=axis,
        padding=packing.padding_of(length, bits),
        dtype=jnp.dtype(weight.dtype).name,
    )


def round_trip(weight: jax.Array, encoding: Encoding, find: Callable[[jax.Array, Encoding], Parameters]) -> jax.Array:
    """What a weight f32[*B, K, N] becomes when it is encoded by `find` and dequantized; nothing is packed."""
    length = weight.shape[encoding.axis]

    def through(blocks: jax.Array) -> jax.Array:
        return dequantize_blocks(blocks, find(blocks, encoding), encoding.number_format)

    return map_groups(through, weight, encoding.axis, min(encoding.group_size or length, length))


def check_encoding(encoding: Encoding, ndim: int) -> None:
    """Raises JQ4Error for an encoding that cannot be, or cannot be applied to a weight of `ndim` axes."""
    form = encoding.number_format
    if encoding.axis >= 0 or -encoding.axis > ndim:
        raise JQ4Error(f"axis {encoding.axis} is not a negative axis of a {ndim}-d weight")
    if encoding.per_tensor and ndim < 2:
        raise JQ4Error(f"one scale per tensor wants a weight of two axes or more, found {ndim}")
    if not form.is_integer and not encoding.symmetric:
        raise JQ4Error(f"format {form.name} is a codebook, which is symmetric: wanted symmetric=True")
    for name, wanted in (("zero_point", ("integer", "float")), ("observer", OBSERVERS), ("scale_dtype", SCALE_DTYPES)):
        if getattr(encoding, name) not in wanted:
            raise JQ4Error(f"{name} is {getattr(encoding, name)!r}, wanted one of {', '.join(wanted)}")
    if encoding.observer == "absmax" and not encoding.symmetric:
        raise JQ4Error("observer 'absmax' is for symmetric encodings: wanted minmax, percentile or mse")
    if encoding.group_size is not None and encoding.group_size < 1:
        raise JQ4Error(f"group_size is {encoding.group_size}, wanted 1 or more, or None for one scale per channel")
    if not 50 < encoding.percentile <= 100:
        raise JQ4Error(f"percentile is {encoding.percentile}, wanted above 50 and at most 100")
    if encoding.steps < 1 or not 0 <= encoding.max_shrink < 1 or encoding.norm <= 0:
        raise JQ4Error(
            f"the mse search has steps={encoding.steps}, max_shrink={encoding.max_shrink}, norm={encoding.norm}: "
            "wanted steps >= 1, 0 <= max_shrink < 1, norm > 0"
        )


def find_parameters(blocks: jax.Array, encoding: Encoding) -> Parameters:
    """The parameters of round-to-nearest for blocks f32[..., G, g, ...], by the encoding's observer."""
    low, high = find_range(blocks, encoding)
    if encoding.observer != "mse":
        return parameters_of_range(low, high, encoding)
    return search_range(blocks, low, high, encoding)


def find_range(blocks: jax.Array, encoding: Encoding) -> tuple[jax.Array, jax.Array]:
    """The (low, high) that a group's levels shall span, low <= 0 <= high, f32[..., G, 1, ...].

    Percentiles leave out what is NaN, for callers that fill their groups up with it.
    """
    axes = encoding.reduced_axes
    if encoding.observer == "percentile":
        kept = encoding.percentile / 100
        if encoding.symmetric:
            high = jnp.nanquantile(jnp.abs(blocks), kept, axis=axes, keepdims=True)
            return -high, high
        low, high = (jnp.nanquantile(blocks, q, axis=axes, keepdims=True) for q in (1 - kept, kept))
        return jnp.minimum(low, 0), jnp.maximum(high, 0)
    low = jnp.min(blocks, axis=axes, keepdims=True, initial=0)
    high = jnp.max(blocks, axis=axes, keepdims=True, initial=0)
    if encoding.symmetric:
        high = jnp.maximum(-low, high)
        return -high, high
    return low, high


def parameters_of_range(low: jax.Array, high: jax.Array, encoding: Encoding) -> Parameters:
    """The parameters whose levels span [low, high]; f32, rounded to the encoding's scale dtype."""
    form = encoding.number_format
    if encoding.symmetric:
        return Parameters(storable_scale(_divide(high, form.max_level), encoding.scale_dtype))
    scale = storable_scale(_divide(high - low, form.max_code), encoding.scale_dtype)
    if encoding.zero_point == "integer":
        return Parameters(scale, zero_point=jnp.clip(jnp.round(-low / scale), 0, form.max_code))
    offset = jnp.where(high > low, low + form.center * scale, 0)
    return Parameters(scale, offset=storable(offset, encoding.scale_dtype))


def _divide(values: jax.Array, divisor: float) -> jax.Array:
    """The correctly rounded quotient, so that a weight on the grid gets its own scale back.

    XLA turns a division by a constant into a product with its reciprocal, unless it is kept from seeing it.
    """
    return values / jax.lax.optimization_barrier(jnp.full_like(values, divisor))


def search_range(blocks: jax.Array, low: jax.Array, high: jax.Array, encoding: Encoding) -> Parameters:
    """For each group, of the ranges [low, high] * (1 - shrink), the one with the least sum of |error|**norm."""

    def attempt(shrink: jax.Array) -> tuple[jax.Array, Parameters]:
        parameters = parameters_of_range(low * (1 - shrink), high * (1 - shrink), encoding)
        return group_error(blocks, parameters, encoding), parameters

    shrinks = jnp.linspace(0.0, encoding.max_shrink, encoding.steps + 1, dtype=jnp.float32)

    def step(best: tuple[jax.Array, Parameters], shrink: jax.Array) -> tuple[tuple[jax.Array, Parameters], None]:
        return keep_better(best, attempt(shrink)), None

    return jax.lax.scan(step, attempt(shrinks[0]), shrinks[1:])[0][1]


def keep_better(best: tuple[jax.Array, Parameters], new: tuple[jax.Array, Parameters]) -> tuple[jax.Array, Parameters]:
    """Group by group the pair (error, parameters) of the smaller error; the first of equal ones."""
    better = new[0] < best[0]
    return jax.tree.map(lambda n, b: jnp.where(better, n, b), new, best)


def group_error(blocks: jax.Array, parameters: Parameters, encoding: Encoding) -> jax.Array:
    """The sum of |w - dequantized|**norm over each group, f32[..., G, 1, ...]."""
    error = jnp.abs(blocks - dequantize_blocks(blocks, parameters, encoding.number_format))
    error = jnp.square(error) if encoding.norm == 2 else error**encoding.norm
    return jnp.sum(error, axis=encoding.reduced_axes, keepdims=True)


def dequantize_blocks(blocks: jax.Array, parameters: Parameters, form: Format) -> jax.Array:
    """What blocks f32[..., G, g, ...] become: quantized with the parameters and dequantized again."""
    weight = levels_of_blocks(blocks, parameters, form) * parameters.scale
    return weight if parameters.offset is None else weight + parameters.offset


def levels_of_blocks(blocks: jax.Array, parameters: Parameters, form: Format) -> jax.Array:
    """The levels f32[..., G, g, ...] that a group's scale multiplies."""
    codes = codes_of_blocks(blocks, parameters, form)
    if not form.is_integer:
        return levels_of(codes, form)
    return codes.astype(jnp.float32) - (form.center if parameters.zero_point is None else parameters.zero_point)


def codes_of_blocks(blocks: jax.Array, parameters: Parameters, form: Format) -> jax.Array:
    """The nearest codes u8[..., G, g, ...] for blocks f32[..., G, g, ...]."""
    ratio = (blocks if parameters.offset is None else blocks - parameters.offset) / parameters.scale
    if not form.is_integer:
        return nearest_level(ratio, form)
    zero = form.center if parameters.zero_point is None else parameters.zero_point
    return jnp.clip(jnp.round(ratio) + zero, 0, form.max_code).astype(jnp.uint8)


def nearest_level(values: jax.Array, form: Format) -> jax.Array:
    """The codes u8[...] of a codebook format's levels nearest to the values; a tie goes to the lower level."""
    levels = np.asarray(form.levels, np.float32)
    ordered, code_of_rank = np.unique(levels, return_index=True)  # fp4 has two zeros: the first, code 0, is taken
    midpoints = (ordered[:-1] + ordered[1:]) / 2
    rank = jnp.zeros(values.shape, jnp.int32)
    for middle in midpoints:
        rank = rank + (values > middle).astype(jnp.int32)
    return jnp.take(jnp.asarray(code_of_rank, jnp.uint8), rank, axis=0)


def storable(values: jax.Array, dtype: str) -> jax.Array:
    """f32 values rounded to what `dtype` can hold, clipped to its finite range; f32 again.

    Written with reduce_precision, since XLA may elide a cast to `dtype` and back.
    """
    stored = jnp.finfo(dtype)
    limit = float(stored.max)
    rounded = jax.lax.reduce_precision(jnp.clip(values, -limit, limit), stored.nexp, stored.nmant)
    step = _smallest(dtype)
    subnormal = jnp.round(values / step) * step if step < float(stored.tiny) else jnp.zeros_like(values)
    return jnp.where(jnp.abs(values) < float(stored.tiny), subnormal, jnp.clip(rounded, -limit, limit))


def storable_scale(scale: jax.Array, dtype: str) -> jax.Array:
    """A positive scale that `dtype` can hold: 1 for an all-zero group, and otherwise never zero nor infinite."""
    return jnp.where(scale == 0, jnp.ones_like(scale), jnp.maximum(storable(scale, dtype), _smallest(dtype)))


def _smallest(dtype: str) -> float:
    """The smallest positive value to store: float16 needs its subnormals; those of the others flush to zero."""
    stored = jnp.finfo(dtype)
    return float(stored.smallest_subnormal if dtype == "float16" else stored.tiny)


def map_groups(f: Callable[[jax.Array], Any], weight: jax.Array, axis: int, group_size: int) -> Any:
    """Applies `f` to the blocks of the whole groups and of the short last one, and joins what it returns along `axis`.

    `f` takes [..., G, g, ...] and returns arrays [..., G, g, ...] or [..., G, 1, ...], which become [..., K, ...] and
    [..., G, ...] here.
    """
    length = weight.shape[axis]
    whole = length // group_size * group_size
    parts = []
    if whole:
        parts.append(_apply(f, jax.lax.slice_in_dim(weight, 0, whole, axis=axis % weight.ndim), axis, group_size))
    if whole < length:
        tail = jax.lax.slice_in_dim(weight, whole, length, axis=axis % weight.ndim)
        parts.append(_apply(f, tail, axis, length - whole))
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *p: jnp.concatenate(p, axis), *parts)


def _apply(f: Callable[[jax.Array], Any], weight: jax.Array, axis: int, group_size: int) -> Any:
    at = axis % weight.ndim
    before, after = weight.shape[:at], weight.shape[at + 1 :]

    def merge(y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:at], y.shape[at] * y.shape[at + 1], *y.shape[at + 2 :])

    return jax.tree.map(merge, f(weight.reshape(*before, weight.shape[at] // group_size, group_size, *after)))
