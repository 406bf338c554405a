"""Names, dtypes and shapes of a folder's safetensors files, without reading a weight.

The safetensors library maps a file and checks that its header is JSON, that the tensors fill the file without gaps or
overlaps, and that the sizes agree; a file that is cut short or lies is refused. The folder's index, where there is
one, must name files inside of the folder, and every tensor it promises must be there.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from jq4.errors import JQ4Error

_INDEX = "model.safetensors.index.json"
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """What a header says of one tensor: safetensors' name of the dtype, the shape, and the file."""

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * _BYTES.get(self.dtype, 1)


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """The tensors of `folder`, by name; empty where it has no safetensors files.

    Raises:
      JQ4Error: naming the file that is missing, damaged, or outside of the folder, or the tensor promised twice or not
      at all.
    """
    index = folder / _INDEX
    promised = _read_index(index) if index.exists() else {}
    files = sorted(set(promised.values())) or sorted(path.name for path in folder.glob("*.safetensors"))
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        for name, tensor in _read_file(folder / file).items():
            if name in tensors:
                raise JQ4Error(f"{folder}: tensor {name} is in both {tensors[name].file} and {file}; remove one file")
            tensors[name] = tensor
    missing = sorted(set(promised) - set(tensors))
    if missing:
        raise JQ4Error(f"{index}: promises {missing[0]} in {promised[missing[0]]}, which does not hold it")
    return tensors


def _read_index(path: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise JQ4Error(f"{path}: not a safetensors index with a weight_map ({error!r}); download it again") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise JQ4Error(f"{path}: names the file {file!r}, wanted a file name inside of the folder")
    return weight_map


def _read_file(path: Path) -> dict[str, TensorHeader]:
    if not path.is_file():
        raise JQ4Error(f"{path}: the file is missing; download the whole model, or remove its {_INDEX}")
    try:
        with safe_open(path, framework="numpy") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {n: TensorHeader(str(p.get_dtype()), tuple(p.get_shape()), path.name) for n, p in parts.items()}
    except (SafetensorError, OSError) as error:
        raise JQ4Error(f"{path}: damaged or not a safetensors file ({error}); download it again") from None
