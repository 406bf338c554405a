"""Four layouts share the name `qweight`; dtypes and shapes tell them apart, for labels are not to be trusted.

gptq        i32 [K*b/32, N]   beside scales [G, N]       packed along K
gemm        i32 [K, N/8]      beside scales [G, N]       AWQ: packed along N, interleaved
gemv        i32 [N, K/8]      beside scales [N, 8*Zw]    AWQ: packed along K, groups filled up
gemv_fast   i16 [N/4, K]      beside scales [8*Zw, N]    AWQ and llm-awq: tiles of 4 rows by 64
"""

from jq4.checkpoint.foreign.partners import Partners

AWQ = ("gemm", "gemv", "gemv_fast")


def layout_of(partners: Partners) -> str | None:
    """The layout, None where the shapes fit none of them."""
    qweight, scales = partners.get("qweight"), partners.get("scales")
    if qweight is None or scales is None or len(qweight.shape) != 2 or len(scales.shape) != 2:
        return None
    rows, columns = qweight.shape
    if qweight.dtype == "I16":
        return "gemv_fast" if rows * 4 == scales.shape[1] else None
    if columns == scales.shape[1]:
        return "gptq"
    if columns * 8 == scales.shape[1]:
        return "gemm"
    return "gemv" if rows == scales.shape[0] else None
