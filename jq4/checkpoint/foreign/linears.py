"""Which dense weights a writer that needs no calibration quantizes: the matrices of linear layers."""

from collections.abc import Mapping
from typing import Any

from jq4.checkpoint.foreign.weights import LazyWeight
from jq4.targets import EMBEDDINGS, HEADS, NORMS, as_patterns, matches

# a router is a small matrix whose rounding changes which experts are asked
ROUTERS = "re:(?i)(^|/)(mlp|block_sparse_moe|feed_forward|moe)/gate/|(^|/)[^/]*router[^/]*/"


def is_linear(weight: LazyWeight, options: Mapping[str, Any]) -> bool:
    """Whether a dense weight is a linear layer's matrix, by its name; not embeddings, heads, norms and routers.

    options: "ignore", patterns of weights that stay dense, as recipes spell them (jq4.targets).
    """
    path = weight.name.replace(".", "/")
    kept = (EMBEDDINGS, HEADS, NORMS, ROUTERS, *as_patterns(options.get("ignore", ()), "--to", "ignore"))
    return len(weight.shape) == 2 and path.endswith("/weight") and not any(matches(one, path) for one in kept)


def module_of(weight: LazyWeight) -> str:
    return weight.name.removesuffix(".weight")
