"""The inner forms of the TPU kernels: one block of x by one block of packed codes, inside a Pallas kernel.

Contract, the same for every form and shared by the dense and the grouped kernel:

    x       bf16[bm, bk]          a ref or a value. Columns after the end of K hold zeros: codes and scales there are
                                  what happened to be in memory, so a form may let them meet a zero and nothing else
    codes   int4[bk, bn]          a ref; level = code
    scale   [bk / group, 1, bn]   a ref, bf16 or f32, of finite numbers; `group` divides bk (a group longer than the
                                  block is one group of bk here: the index map repeats its row of scales)
    returns f32[bm, bn]           sum over the block of x[m, k] * code[k, n] * scale[k // group, n]

direct   for each group  dot(x_g, codes_g) * scale_g.  bf16 by int4 goes into the dot as it is, and the compiler picks
         the chip's unpacking (v6e: one instruction, int4 to bf16; v7x: to fp8, which the MXU takes beside bf16; v5:
         four). Exact in the codes: the only rounding is x's and the f32 sums'. Costs bm * bn scalings a group.
wscale   one dot with bf16(code * scale). Costs bk * bn scalings, whatever bm is, and a rounding of the weights to
         bf16; the MXU sees one deep product instead of bk / group shallow ones, which is what it wants at prefill.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def direct(x: Any, codes: Any, scale: Any, group: int, *, upcast: bool = False) -> jax.Array:
    """f32[bm, bn]; `upcast` unpacks before the dot, for an interpreter that has no product of bf16 by int4."""
    total = None
    for i in range(codes.shape[0] // group):
        piece = codes[i * group : (i + 1) * group, :]  # int4[group, bn]
        partial = product(x[:, i * group : (i + 1) * group], piece.astype(jnp.bfloat16) if upcast else piece)
        partial = partial * scale[i].astype(jnp.float32)
        total = partial if total is None else total + partial
    assert total is not None
    return total


def wscale(x: Any, codes: Any, scale: Any, group: int) -> jax.Array:
    """f32[bm, bn] by one product with the scaled weights, bf16[bk, bn]."""
    rows, columns = codes.shape
    weight = codes[...].astype(jnp.bfloat16).reshape(rows // group, group, columns)
    weight = weight * scale[...].astype(jnp.bfloat16)
    return product(x[...], weight.reshape(rows, columns))


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """f32[bm, bn] = x[bm, k] @ weight[k, bn]."""
    return lax.dot_general(x, weight, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
