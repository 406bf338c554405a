"""What adapters hold, leaf by leaf, as plain data: ranks, parameters, bytes. Arrays or their shapes alike."""

import math
from typing import Any

import numpy as np

from jq4.train.adapters.adapter import Adapter, Adapters


def adapter_inventory(adapters: Adapters) -> dict[str, Any]:
    """{"ranks", "parameters", "bytes", "leaves": a row a leaf that has an adapter}."""
    rows = [_row(path, each) for path, each in adapters.by_path.items()]
    return {
        "ranks": sorted({row["rank"] for row in rows}),
        "parameters": sum(row["parameters"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "leaves": rows,
    }


def _row(path: str, adapter: Adapter) -> dict[str, Any]:
    parts = (adapter.a, adapter.b)
    return {
        "path": path,
        "shape": list(adapter.shape),
        "rank": adapter.rank,
        "scaling": adapter.scaling,
        "parameters": sum(math.prod(part.shape) for part in parts),
        "bytes": sum(math.prod(part.shape) * np.dtype(part.dtype).itemsize for part in parts),
    }
