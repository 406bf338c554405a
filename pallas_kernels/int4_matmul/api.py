"""The public function (first form: the reference alone)."""

import jax.numpy as jnp

from pallas_kernels.int4_matmul.reference import int4_matmul_reference
from pallas_kernels.int4_matmul.spec import PackedSpec


def int4_matmul(
    x, codes, scale, zero_point=None, offset=None, *, spec: PackedSpec, implementation=None,
    preferred_element_type=None, precision=None,
):  # fmt: skip
    """x[*B, M, K] @ dequantize(codes, scale, zero_point, offset)[*B, K, N] -> [*B, M, N]."""
    out = int4_matmul_reference(x, codes, scale, zero_point, offset, spec=spec, precision=precision)
    return out.astype(preferred_element_type or jnp.result_type(x))
