"""x[*, M, K] @ W[K, N] with W held as packed codes and scales."""

from pallas_kernels.int4_matmul.api import int4_matmul as int4_matmul
from pallas_kernels.int4_matmul.registry import UnsupportedError as UnsupportedError
from pallas_kernels.int4_matmul.spec import PackedSpec as PackedSpec
