"""bitsandbytes' quant_state: what a 4-bit weight is, as JSON in a tensor of bytes beside it.

{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [N, K]}
and where the statistics are nested   "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.65
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq4.checkpoint.foreign.partners import refusal
from jq4.checkpoint.safetensors_files import StoredTensor, parse_json
from jq4.errors import JQ4Error

SUFFIX = ".quant_state.bitsandbytes__"
FORMATS = {"nf4": "nf4", "fp4": "bnb_fp4"}  # bitsandbytes' name -> ours
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
_DTYPES = ("bfloat16", "float16", "float32")
_LONGEST = 4096  # bytes of JSON; real ones have about 200


@dataclasses.dataclass(frozen=True)
class QuantState:
    """One weight's. `nested_offset` is None where absmax is held as it is."""

    quant_type: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    nested_offset: float | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.size // self.blocksize)

    def encoded(self, length: int | None = None) -> np.ndarray:
        """The JSON as u8[length], as bitsandbytes writes it; filled with spaces, which JSON allows, up to `length`."""
        fields: dict[str, Any] = {
            "quant_type": self.quant_type, "blocksize": self.blocksize, "dtype": self.dtype, "shape": list(self.shape),
        }  # fmt: skip
        if self.nested_offset is not None:
            fields |= {
                "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": self.nested_offset,
            }  # fmt: skip
        return np.frombuffer(json.dumps(fields).encode().ljust(length or 0), np.uint8)


def read_state(tensors: Mapping[str, StoredTensor], name: str) -> QuantState:
    """Reads and checks the JSON of a few hundred bytes; statistics are nested where there is a nested_absmax."""
    tensor, nested = tensors[name], f"{name.partition(SUFFIX)[0]}.nested_absmax" in tensors
    if tensor.dtype != "U8" or len(tensor.shape) != 1 or tensor.shape[0] > _LONGEST:
        raise refusal(tensor, f"is {tensor.dtype}{list(tensor.shape)}", f"JSON as at most {_LONGEST} bytes of U8")
    where = f"{tensor.file}: tensor {tensor.name!r}"
    fields = parse_json(tensor.read().tobytes(), where)
    if not isinstance(fields, dict):
        raise JQ4Error(f"{where}: holds {type(fields).__name__}, wanted an object of settings. It is damaged.")
    kind = tensor.name.rpartition("__")[2]
    wanted = {
        "quant_type": kind in FORMATS and fields.get("quant_type") == kind,
        "blocksize": type(fields.get("blocksize")) is int and fields["blocksize"] in BLOCK_SIZES,
        "dtype": fields.get("dtype") in _DTYPES,
        "shape": _is_shape(fields.get("shape")),
    }
    if nested:
        wanted |= {
            "nested_blocksize": fields.get("nested_blocksize") == NESTED_BLOCK,
            "nested_dtype": fields.get("nested_dtype") == "float32",
            "nested_offset": _is_finite(fields.get("nested_offset")),
        }
    for name, sound in wanted.items():
        if not sound:
            raise JQ4Error(
                f"{where}: has {name} {fields.get(name)!r}, wanted {_WANTED[name]}. The weight is damaged or was "
                "written by a tool that is not known; quantize it again with bitsandbytes."
            )
    offset = float(fields["nested_offset"]) if nested else None
    return QuantState(kind, fields["blocksize"], fields["dtype"], tuple(fields["shape"]), offset)


_WANTED = {
    "quant_type": "nf4 or fp4, as the tensor's name says",
    "blocksize": f"one of {', '.join(map(str, BLOCK_SIZES))}",
    "dtype": f"one of {', '.join(_DTYPES)}",
    "shape": "two or more whole numbers above 0",
    "nested_blocksize": str(NESTED_BLOCK),
    "nested_dtype": "float32",
    "nested_offset": "a finite number",
}


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 2 and all(type(one) is int and one > 0 for one in value)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**127
