"""x[M, K] in ragged groups of rows, each multiplied by its own packed W[K, N] (mixture of experts)."""

from pallas_kernels.grouped_int4_matmul.api import grouped_int4_matmul as grouped_int4_matmul
