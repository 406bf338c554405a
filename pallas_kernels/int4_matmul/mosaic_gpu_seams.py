"""Where JAX versions differ in Pallas' Mosaic GPU backend."""

import inspect
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu

_STORES = hasattr(plgpu, "store")
_TAKES_INDEX = inspect.signature(plgpu.load).parameters.get("idx")


def load(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
    """`plgpu.load` of a whole ref; JAX 0.10 wants to be told that it is whole."""
    whole = () if _TAKES_INDEX is None or _TAKES_INDEX.default is not inspect.Parameter.empty else ((),)
    return plgpu.load(ref, *whole, layout=layout, optimized=optimized)


def mma(total: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """total + left @ right by mma.sync, in f32; JAX 0.10 has none."""
    return plgpu.mma(total, left, right)  # pyright: ignore[reportAttributeAccessIssue]


def left_layout(dtype: Any) -> Any:
    """Of the left operand of `mma`."""
    return plgpu.Layout.MMA_LHS(dtype)  # pyright: ignore[reportAttributeAccessIssue]


def right_layout(dtype: Any) -> Any:
    """Of the right operand of `mma`."""
    return plgpu.Layout.MMA_RHS(dtype)  # pyright: ignore[reportAttributeAccessIssue]


def store(ref: Any, value: jax.Array) -> None:
    """`ref[...] = value`; from JAX 0.12 on without reading what was there."""
    if _STORES:
        plgpu.store(ref, value)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        ref[...] = value
