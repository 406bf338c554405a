"""The oracle: every row by its own expert's dequantized matrix, the rows after the last group by zero."""

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul.reference import dequantize
from pallas_kernels.int4_matmul.spec import PackedSpec


def grouped_int4_matmul_reference(
    x, codes, scale, zero_point, offset, group_sizes, *, spec: PackedSpec, precision=None
) -> jax.Array:
    """f32[M, N]: row m is x[m] @ W[e] where e is the group that m falls in."""
    weights = dequantize(codes, scale, zero_point, offset, spec)  # f32[E, K, N]
    row, ends = jnp.arange(x.shape[0]), jnp.cumsum(group_sizes)
    expert = jnp.sum(row[:, None] >= ends[None, :], axis=1)  # i32[M], E after the last group
    products = jnp.einsum(
        "mk,ekn->emn", x.astype(jnp.float32), weights, precision=precision or jax.lax.Precision.HIGHEST
    )
    chosen = jax.nn.one_hot(expert, weights.shape[0], dtype=jnp.float32)  # [M, E]
    return jnp.einsum("me,emn->mn", chosen, products, precision=jax.lax.Precision.HIGHEST)
