"""JSON that every reader takes: it has no infinities and no NaN, which become null."""

import json
import math
from typing import Any


def dumps(value: Any, indent: int | None = None) -> str:
    """The text of dicts, lists, strings and numbers."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
