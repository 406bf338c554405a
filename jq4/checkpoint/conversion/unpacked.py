"""Packed weights that a target's loaders want dense: tables that are looked up, and heads.

The software that loads these formats replaces linear layers alone. A packed embedding would not be found by its name,
and initialized with random numbers instead, so it is written dense, in the weight's own dtype. A tied head is the
embedding. An untied one is a linear layer, and stays packed where the loaders are told of it:

    compressed-tensors, mxfp4    by the targets, which include it
    gptq                         by "lm_head": true
    bnb-nf4                      by its state beside it, and its absence from llm_int8_skip_modules
    awq, gpt-oss                 by nothing
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jq4.checkpoint.conversion import dense
from jq4.checkpoint.foreign.weights import LazyWeight
from jq4.checkpoint.foreign.writing import Planned
from jq4.targets import HEADS, is_embedding

_PACKED_HEADS = {
    "compressed-tensors": True,
    "mxfp4": True,
    "gptq": True,
    "bnb-nf4": True,
    "awq": False,
    "gpt-oss": False,
}


def wants_dense(weight: LazyWeight, target: str, config: Mapping[str, Any] | None) -> bool:
    """Whether the loaders of `target` take this packed weight of a model dense alone."""
    if not weight.packed or target not in _PACKED_HEADS:
        return False
    path = weight.name.replace(".", "/")
    if re.search(HEADS[3:], path):
        return bool((config or {}).get("tie_word_embeddings")) or not _PACKED_HEADS[target]
    return is_embedding(path)


def plan_dense(weight: LazyWeight, target: str) -> Planned:
    """A packed weight as the dense one that it stands for."""
    why = f"unpacked: what loads {target} takes packed linear layers alone"
    return dataclasses.replace(dense.plan(weight, {}), unpacked=why)
