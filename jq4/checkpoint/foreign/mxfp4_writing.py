"""Writes MXFP4 alone, in compressed-tensors' form (mxfp4-pack-quantized), which transformers and vLLM load."""

from collections.abc import Mapping
from typing import Any

from jq4.checkpoint.foreign.compressed_tensors_writing import plan_mxfp4
from jq4.checkpoint.foreign.compressed_tensors_writing import quantization_config as quantization_config
from jq4.checkpoint.foreign.weights import LazyWeight
from jq4.checkpoint.foreign.writing import Planned, as_it_is

NAME = "mxfp4"


def plan(weight: LazyWeight, options: Mapping[str, Any]) -> Planned:
    return plan_mxfp4(weight) if weight.packed else as_it_is(weight)
