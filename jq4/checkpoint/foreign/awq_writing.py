"""Writes AWQ's gemm tensors (awq.py): 4 bits, whole groups, N and K multiples of 8; a symmetric weight has the zeros 8.

Option: scale_dtype. A checkpoint has one group size, and names the modules that are dense by parts of their names.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.awq import CENTRE
from jq4.checkpoint.foreign.awq_layouts import gemm_of_codes, gemm_of_zeros
from jq4.checkpoint.foreign.integer_weights import cast_scales, full, require_integers, scale_dtype, unwritable
from jq4.checkpoint.foreign.linears import module_of
from jq4.checkpoint.foreign.module_patterns import by_setting, dense_modules
from jq4.checkpoint.foreign.weights import LazyWeight
from jq4.checkpoint.foreign.writing import Planned, as_it_is
from jq4.errors import JQ4Error
from jq4.qarray import QArray

NAME = "awq"


def plan(weight: LazyWeight, options: Mapping[str, Any]) -> Planned:
    if not weight.packed:
        return as_it_is(weight)
    q = require_integers(weight, "AWQ", bits=(4,))
    outputs, inputs = q.shape
    if outputs % 8 or inputs % 8 or (inputs % q.group_size and q.num_groups > 1):
        raise unwritable(
            weight,
            "AWQ",
            f"shape {q.shape} in groups of {q.group_size}",
            "multiples of 8 inputs and outputs, and whole groups",
        )
    dtype, loss, doubt = scale_dtype(q, options)
    prefix = module_of(weight)
    shapes = {
        f"{prefix}.qweight": ("I32", (inputs, outputs // 8)),
        f"{prefix}.qzeros": ("I32", (q.num_groups, outputs // 8)),
        f"{prefix}.scales": (dtype, (q.num_groups, outputs)),
    }

    def encode(q: QArray) -> Mapping[str, np.ndarray]:
        scale = cast_scales(full(q.scale, q).T, dtype, weight, exactly=not loss)
        zeros = full(np.full((1, 1), CENTRE, np.uint8) if q.zero_point is None else q.zero_point, q)
        made = gemm_of_codes(np.asarray(q.codes)), gemm_of_zeros(zeros.T.astype(np.uint8)), scale
        return dict(zip(shapes, made, strict=True))

    return Planned(weight, shapes, encode, loss, doubt)


def quantization_config(planned: list[Planned], options: Mapping[str, Any]) -> dict[str, Any]:
    packed = [one.weight for one in planned if one.packed]
    sizes = by_setting(packed, lambda q: -1 if q.num_groups == 1 else q.group_size)
    if len(sizes) > 1:
        found = ", ".join(f"{size} ({len(modules)} weights, {modules[0]} first)" for size, modules in sizes.items())
        raise JQ4Error(f"awq: found the group sizes {found}; an AWQ checkpoint has one. Write compressed-tensors.")
    dense = dense_modules(planned)
    for module in dense:
        hidden = next((one.name for one in packed if module in module_of(one)), None)
        if hidden is not None:
            raise JQ4Error(
                f"awq: the dense {module} is part of the name of the packed {hidden}, and AWQ's modules_to_not_convert "
                "would leave that dense too. Write compressed-tensors or gptq."
            )
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": next(iter(sizes), -1),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": dense or None,
    }
