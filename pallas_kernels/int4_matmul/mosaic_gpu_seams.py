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


def store(ref: Any, value: jax.Array) -> None:
    """`ref[...] = value`; from JAX 0.12 on without reading what was there."""
    if _STORES:
        plgpu.store(ref, value)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        ref[...] = value
