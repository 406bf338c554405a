"""Activations in few bits: what a product rounds its inputs to before it multiplies them by a packed weight.

    int8-token     each token by its own largest value, as it comes:  step = max|x| / 127,  over all that is contracted
    int8-tensor    all tokens by one step, fixed by calibration; what lies beyond is clipped
    int4-...       the same with 7 for 127
    float8-...     the same with 448 for 127, and for round the nearest number of e4m3 (formats.py), ties to even
    ...-token-asym of integers: a token's range need not lie around 0, as it does not behind a gate or a GELU.
                   step = (max x - min x) / 255 (of 4 bits: 15), where 0 counts as one of the values

    x W  ~  step * (round(x / step) W)

The numbers round(x / step) are what is multiplied. A token's zero point z = round(-min x / step) does not enter: of its
codes c from 0 to 255 the numbers are c - z, those from -z to 255 - z, which bfloat16 and float16 hold. Where they fit
int8 and the weight's codes are integers, with one scale for each output channel and no zero point, the product is one
of int8 by int8 into int32 (XLA has it on CPU, GPU and TPU: sums are exact) and the scales follow. Weights in groups
would need a sum of their own for each group; there the numbers, which every float dtype holds exactly, go through the
same kernels as ever, and only the order of the float sums differs. Kernels that multiply bytes are told what dtype
holds them (`fits`). Gradients go straight through the rounding, and not past the clipping.

Integers have equal steps up to a token's largest value. Those of e4m3 are a sixteenth to an eighth of each value: finer
where that is less than an eighth to a sixteenth of the largest, coarser above. On the TinyStories Llama integers lose
less: KLD against the dense model is 0.0017 with int8-token and 0.0056 with float8-token beside weights of 8 bits by the
channel, 0.1232 and 0.1269 beside 4 bits in groups of 128, where neither is 0.1219
(benchmarks/results/activations-fp8-tinystories-656k.json).

In a `shard_map` over the contracted axis a token's largest value is that of the shard, a finer step than the whole
token's; under `jit` with shardings it is the token's.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jq4.errors import JQ4Error
from jq4.qarray import QArray

NAMES = (
    "",
    *("int8-token", "int8-token-asym", "int8-tensor"),
    *("int4-token", "int4-token-asym", "int4-tensor"),
    *("float8-token", "float8-tensor"),
)
_NOTHING = 1e-30  # a token no larger than this is zeros: a 448th of it is near where float32 ends
_STRATEGIES = (["token", True], ["tensor", False])
_KINDS = (("int", 8), ("int", 4), ("float", 8))
_ASYMMETRIC = "-asym"
_MOST_OF_E4M3, _LEAST_NORMAL, _LEAST = 448, 2**-6, 2**-9


@dataclasses.dataclass(frozen=True)
class Activations:
    """A rule's `input_activations`, in compressed-tensors' words; one of NAMES in short.

    Attributes:
      num_bits: 8, or 4 of integers.
      type: "int", or "float" for e4m3.
      symmetric: false for integers by the token whose range has ends of its own.
      strategy, dynamic: "token" and true, or "tensor" and false (one step from calibration's max |x|).
    """

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str = "token"
    dynamic: bool = True

    def __post_init__(self) -> None:
        known = (self.type, self.num_bits) in _KINDS and type(self.num_bits) is int and type(self.symmetric) is bool
        if not known or [self.strategy, self.dynamic] not in _STRATEGIES or self.name not in NAMES:
            found = ", ".join(f"{name} {value!r}" for name, value in dataclasses.asdict(self).items())
            raise JQ4Error(
                f"rule: input_activations is {found}; wanted num_bits 8 or 4, type int (or 8, float), and strategy "
                "token with dynamic true or tensor with dynamic false; symmetric true, or false for integers by token"
            )

    @property
    def name(self) -> str:
        return f"{self.type}{self.num_bits}-{self.strategy}{'' if self.symmetric else _ASYMMETRIC}"

    @classmethod
    def of(cls, value: Any) -> "Activations | None":
        """From the mapping of a recipe, or from an Activations, or None."""
        if value is None or isinstance(value, Activations):
            return value
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, Mapping) or not set(value) <= set(names):
            raise JQ4Error(f"rule: input_activations is {value!r}, wanted a mapping with some of {', '.join(names)}")
        return cls(**value)


def check_name(name: Any, where: str) -> str:
    if name not in NAMES:
        raise JQ4Error(f"{where}: activations are {name!r}, wanted one of {', '.join(filter(None, NAMES))}, or none")
    return name


def is_fixed(name: str) -> bool:
    """Whether the step is one that calibration or training found."""
    return name.endswith("tensor")


def most_of(name: str) -> int:
    """The largest number that is multiplied: 127, 7 or 448; 255 or 15 where ranges have ends of their own."""
    if name.startswith("float"):
        return _MOST_OF_E4M3
    return 2 ** int(name[3]) - 1 if name.endswith(_ASYMMETRIC) else 2 ** (int(name[3]) - 1) - 1


def fits_of(name: str) -> str:
    """The dtype of 8 bits that holds what is multiplied; "" where none does, and for inputs that are not rounded."""
    if not name or name.startswith("float"):
        return name and "float8_e4m3fn"
    return "int8" if most_of(name) <= 127 else ""


def in_steps(x: jax.Array, name: str, axes: Sequence[int], fixed: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The numbers round(x / step), in x's dtype, and the step f32 that broadcasts to x.

    Args:
      name: of NAMES.
      axes: those that are contracted, over which a token's values lie.
      fixed: the step f32 of a "tensor" strategy, broadcasting to x.
    """
    wide = x.astype(jnp.float32)
    least, most = jnp.float32(-most_of(name)), jnp.float32(most_of(name))
    if fixed is not None:
        step = fixed.astype(jnp.float32)
    elif name.endswith(_ASYMMETRIC):
        lowest = jnp.min(wide, axis=tuple(axes), keepdims=True, initial=0)
        highest = jnp.max(wide, axis=tuple(axes), keepdims=True, initial=0)
        step = 2 * _step_of(highest / 2 - lowest / 2, name)  # by halves, whose difference float32 always holds
        least = jax.lax.stop_gradient(jnp.round(lowest / step))
        most = least + most
    else:
        step = _step_of(jnp.max(jnp.abs(wide), axis=tuple(axes), keepdims=True, initial=0), name)
    poisoned = jnp.any(jnp.isnan(wide), axis=tuple(axes), keepdims=True)  # no integer says so: the step does
    step = jnp.where(poisoned, jnp.nan, step)
    return _nearest(wide / step, least, most, name).astype(x.dtype), step


def _step_of(largest: jax.Array, name: str) -> jax.Array:
    most = most_of(name)
    return jax.lax.stop_gradient(jnp.where(largest > _NOTHING, largest, most) / most)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _nearest(x: jax.Array, least: jax.Array, most: jax.Array, name: str) -> jax.Array:
    return _nearest_e4m3(jnp.clip(x, least, most)) if name.startswith("float") else jnp.clip(jnp.round(x), least, most)


@_nearest.defjvp
def _straight_through(name: str, primals: Sequence[jax.Array], tangents: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    x, least, most = primals
    inside = (x >= least - 0.5) & (x <= most + 0.5)
    return _nearest(x, least, most, name), jnp.where(inside, tangents[0], 0.0)


def _nearest_e4m3(x: jax.Array) -> jax.Array:
    """f32; not by a conversion there and back, which XLA may leave out (xla_allow_excess_precision)."""
    subnormal = jnp.round(x / _LEAST) * _LEAST
    return jnp.where(jnp.abs(x) < _LEAST_NORMAL, subnormal, jax.lax.reduce_precision(x, 8, 3))


def rounding_inputs(q: QArray, name: str, absmax: Any) -> QArray:
    """The weight, whose products round their inputs from now on.

    Args:
      name: of NAMES; "" for products that do not.
      absmax: for a "tensor" strategy, max |x| f32[*S, K] of the inputs of each stacked slice; else not looked at.
    """
    if not is_fixed(check_name(name, "rounding_inputs")):
        return dataclasses.replace(q, activations=name, activation_scale=None)
    stacked = absmax.shape[:-1]
    rows = jnp.asarray(absmax, jnp.float32)
    if q.input_scale is not None:
        scales = jnp.moveaxis(q.input_scale, q.axis, -1)  # [*S or 1, 1.., K]
        scales = scales.reshape(*scales.shape[: len(stacked)], -1)
        if scales.shape[-1] != rows.shape[-1]:
            raise JQ4Error("a fixed step for inputs over several contracted axes that have scales of their own")
        rows = rows * jnp.abs(scales.astype(jnp.float32))
    step = fixed_step(rows, name).reshape(*stacked, *(1,) * (q.ndim - len(stacked)))
    return dataclasses.replace(q, activations=name, activation_scale=step)


def fixed_step(absmax: jax.Array, name: str) -> jax.Array:
    """The step f32[*B] of a "tensor" strategy for inputs of which max |x| is known, f32[*B, K].

    Of stacked slices, one that calibration has not seen (an expert) takes the largest step of those beside it.
    """
    largest, most = jnp.max(absmax, axis=-1), most_of(name)
    if largest.ndim:
        largest = jnp.where(largest > 0, largest, jnp.max(largest, axis=-1, keepdims=True))
    return jnp.where(largest > 0, largest, most) / most
