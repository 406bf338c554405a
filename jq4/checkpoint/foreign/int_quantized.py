"""compressed-tensors' int-quantized and naive-quantized weights: one signed byte a code, i8 [N, K].

8-bit codes become unsigned by their top bit; fewer bits are packed. Floats of 8 bits under the same names are refused.
"""

import dataclasses
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.compressed_tensors_config import Scheme
from jq4.checkpoint.foreign.partners import FLOATS, Partners, contradiction, read_finite
from jq4.checkpoint.foreign.row_blocks import packed_by_rows
from jq4.checkpoint.foreign.weights import LazyWeight, abstract_qarray
from jq4.checkpoint.safetensors_files import DTYPES
from jq4.errors import JQ4Error
from jq4.qarray import QArray


def weight(partners: Partners, scheme: Scheme) -> LazyWeight:
    """The weight of tensors `weight` and `weight_scale`."""
    stored = partners.need("weight")
    if stored.dtype != "I8":
        raise contradiction(
            stored,
            "I8 beside weight_scale (int-quantized or naive-quantized integers)",
            "Floats of 8 bits are not read: decompress it with compressed-tensors and save it dense, or take the "
            "original checkpoint.",
        )
    if len(stored.shape) != 2:
        raise contradiction(stored, "a matrix")
    scale, zeros = partners.need("weight_scale", *FLOATS), partners.get("weight_zero_point")
    groups = _groups(partners)
    bits = scheme.num_bits if scheme.num_bits in range(2, 9) else 8
    inputs = stored.shape[-1]
    size = scheme.group_size if scheme.group_size and groups > 1 else -(-inputs // groups)
    if -(-inputs // size) != groups:
        raise contradiction(scale, f"groups of {size} for {inputs} inputs")
    parts: dict[str, Any] = {"scale": (_spread(scale.shape, len(stored.shape)), DTYPES[scale.dtype])}
    if zeros is not None and np.asarray(partners.need("weight_zero_point", "I8").read()).any():
        if zeros.shape != scale.shape:
            raise contradiction(zeros, f"shape {list(scale.shape)}, that of weight_scale")
        parts["zero_point"] = (parts["scale"][0], np.uint8)
    abstract = abstract_qarray(
        stored.shape, format=f"int{bits}", group_size=size, dtype=DTYPES[scale.dtype], parts=parts
    )
    names = partners.names("weight", "weight_scale", "weight_zero_point", "weight_shape")
    return LazyWeight(partners.weight_name, abstract, lambda: _read(partners, abstract), names)


def _groups(partners: Partners) -> int:
    stored, scale = partners.need("weight"), partners.need("weight_scale")
    if len(stored.shape) != 2:
        raise contradiction(stored, "[N, K]", "Stacks of experts are read where each is a tensor of its own.")
    if scale.shape in ((), (1,)):
        return 1
    if scale.shape[:-1] != stored.shape[:-1]:
        raise contradiction(
            scale,
            f"[{stored.shape[0]}, groups], [{stored.shape[0]}, 1] or [1]",
            "Scales of blocks of several rows are not read: decompress it with compressed-tensors and save it dense.",
        )
    return scale.shape[-1]


def _spread(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return shape if len(shape) == rank else (1,) * rank


def _read(partners: Partners, abstract: QArray) -> QArray:
    signed, bits, centre = np.asarray(partners.need("weight").read()), abstract.bits, abstract.number_format.center

    def unsigned(rows: slice) -> np.ndarray:
        block = signed[rows].view(np.uint8) + np.uint8(centre)  # modulo 256
        if block.max() > 2 * centre - 1:
            raise JQ4Error(
                f"{partners.need('weight').file}: tensor {partners.weight_name!r} holds values outside "
                f"{-centre}..{centre - 1}, wanted {bits} bits as quantization_config says. "
                "Mend num_bits in config.json."
            )
        return block

    codes = packed_by_rows(signed.shape, bits, unsigned)
    parts: dict[str, Any] = {}
    if abstract.zero_point is not None:
        zeros = np.asarray(partners.need("weight_zero_point").read()).view(np.uint8) + np.uint8(centre)
        parts["zero_point"] = zeros.reshape(abstract.zero_point.shape)
    stored = partners.need("weight_scale")
    scale = read_finite(stored).reshape(abstract.scale.shape)
    return dataclasses.replace(abstract, codes=codes, scale=scale, **parts)
