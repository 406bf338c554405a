"""How exactly rows of float32 are to be multiplied, and how that is done by a unit that multiplies bf16.

A float32 is the sum of three bf16 numbers, and of two but for its last bits: rows of x are multiplied as one, two or
three rows of bf16 by the same codes, which are exact in bf16. (A dot of float32 does the same to both of its factors.)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def resolved_precision(precision: Any) -> Any:
    """`precision`, hashable; None is what `jax.default_matmul_precision` says, as for lax.dot_general."""
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return tuple(precision) if isinstance(precision, list) else precision


def asks_for_float32(dtype: Any, precision: Any) -> bool:
    """Whether a product of `dtype` by codes is to be more exact than one bf16 pass of the MXU."""
    return dtype != jnp.bfloat16 and _passes(precision) > 1


def bf16_terms(x: jax.Array, precision: Any) -> jax.Array:
    """bf16[T, M, K] that sum to x[M, K]: one term, or as many as the precision asks for."""
    terms = []
    for _ in range(1 if x.dtype == jnp.bfloat16 else _passes(precision)):
        terms.append(x.astype(jnp.bfloat16))
        x = x - terms[-1].astype(x.dtype)
    return jnp.stack(terms)


_ALGORITHMS = {preset.name for preset in lax.DotAlgorithmPreset}


def _passes(precision: Any) -> int:
    precision = resolved_precision(precision)
    wanted = precision if isinstance(precision, tuple) else (precision,)
    if any(isinstance(p, lax.DotAlgorithm | lax.DotAlgorithmPreset) or str(p) in _ALGORITHMS for p in wanted):
        return 3  # an algorithm that another product of floats names: the most exact there is
    named = [lax.Precision(p) if p is not None else lax.Precision.DEFAULT for p in wanted]
    return {lax.Precision.DEFAULT: 1, lax.Precision.HIGH: 2, lax.Precision.HIGHEST: 3}[
        max(named, key=lambda p: p.value)
    ]
