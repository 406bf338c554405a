"""The dtype that config.json gives a model's weights: what packed weights dequantize to whose files do not say it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.safetensors_files import DTYPES
from jq4.errors import JQ4Error

_READ = {DTYPES[name].name: DTYPES[name] for name in ("BF16", "F16", "F32")}


def model_dtype(config: Mapping[str, Any]) -> np.dtype[Any]:
    """Of the model, or of its part that reads text; bfloat16 where neither is given one."""
    text = config.get("text_config")
    for settings in (config, text if isinstance(text, dict) else {}):
        for stated in (settings.get(key) for key in ("dtype", "torch_dtype")):
            if isinstance(stated, str) and stated in _READ:
                return _READ[stated]
            if stated not in (None, "", "auto"):
                raise JQ4Error(f"config.json: has dtype {stated!r}, wanted {', '.join(_READ)}. Mend config.json.")
    return _READ["bfloat16"]
