"""Dense weights to blocks of any type that is written, a few thousand blocks at a time."""

from collections.abc import Callable

import numpy as np

from jq4.checkpoint.foreign.gguf import blocks, quantize_blocks, quantize_super_blocks, super_blocks
from jq4.checkpoint.foreign.gguf.block_types import BlockType
from jq4.checkpoint.foreign.gguf.blocks import Fields
from jq4.errors import JQ4Error

# what makes the fields of blocks from x f32[elements, m], and the elements of one of its columns
QUANTIZERS: dict[str, tuple[Callable[[np.ndarray], Fields], int]] = {
    "Q4_0": (quantize_blocks.q4_0, 32),
    "Q4_1": (quantize_blocks.q4_1, 32),
    "Q5_0": (quantize_blocks.q5_0, 32),
    "Q5_1": (quantize_blocks.q5_1, 32),
    "Q8_0": (quantize_blocks.q8_0, 32),
    "IQ4_NL": (quantize_blocks.iq4_nl, 32),
    "Q4_K": (quantize_super_blocks.q4_k, 32),
    "Q5_K": (quantize_super_blocks.q5_k, 32),
    "Q6_K": (quantize_super_blocks.q6_k, 16),
}
_ELEMENTS = 2**17  # at a time, which the cache holds


def quantized_blocks(kind: BlockType, weight: np.ndarray, name: str) -> np.ndarray:
    """A dense weight [..., K] as u8[..., B, nbytes]. Raises JQ4Error, naming it, where it has no finite scales."""
    quantize, column = QUANTIZERS[kind.name]
    flat = weight.reshape(-1)
    out = np.empty((flat.size // kind.length, kind.nbytes), np.uint8)
    for start in range(0, flat.size, _ELEMENTS):
        part = flat[start : start + _ELEMENTS].astype(np.float32)
        if not np.isfinite(part).all():
            raise JQ4Error(f"{name}: holds a value that is not finite, wanted numbers. The weights are damaged.")
        with np.errstate(over="ignore", under="ignore"):
            fields = quantize(np.ascontiguousarray(part.reshape(-1, column).T))
        if not np.isfinite(fields.scale).all() or not np.isfinite(0 if fields.offset is None else fields.offset).all():
            raise JQ4Error(
                f"{name}: a scale of {kind.name} is beyond float16 (the weights reach {np.abs(part).max():.3g}). "
                "Write it with --type bf16 or f32."
            )
        joined = (super_blocks if kind.packed_scales else blocks).join(kind, fields)
        out[start // kind.length : start // kind.length + len(joined)] = joined
    return out.reshape(*weight.shape[:-1], weight.shape[-1] // kind.length, kind.nbytes)
