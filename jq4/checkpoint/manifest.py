"""jq4.json, the manifest: everything that must be known to read a checkpoint back, and a checksum of every byte.

FORMAT.md specifies it. The text is one JSON object whose last member is the SHA-256 of all the bytes before it, so a
flipped byte in the manifest is found like one in any other file. Whatever is read here is checked here: paths that
leave the folder, shapes that contradict each other or the format, and a version that this code does not know.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.activations import check_name
from jq4.checkpoint.structure import Node, check_node
from jq4.errors import CheckpointError, JQ4Error
from jq4.qarray import PARTS, QArray, validate

MANIFEST = "jq4.json"
NAME = "jq4-checkpoint"
VERSION = 1
DATA_NAME = re.compile(r"data-[0-9a-f]{16}")
DTYPES = (
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
    "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
    "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3b11fnuz",
)  # fmt: skip
_SCALARS = {"bool": bool, "int": int, "float": float, "str": str}
_TAIL = ',\n"checksum": "sha256:%s"\n}\n'
_MAX_BYTES = 2**50


@dataclasses.dataclass(frozen=True)
class FileInfo:
    """One file of the data folder: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ArrayInfo:
    """One dense array: `array` is the folder of its zarr array, None if it has no elements."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    array: str | None
    kind: str = "dense"

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class QArrayInfo:
    """One packed weight: the static fields of its QArray, and its parts (a part may itself be packed)."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    format: str
    group_size: int
    axis: int
    padding: int
    parts: Mapping[str, "ArrayInfo | QArrayInfo"]
    activations: str = ""
    input_rotation: int = 0
    kind: str = "qarray"

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / int(np.prod(self.shape, dtype=object))


@dataclasses.dataclass(frozen=True)
class ScalarInfo:
    """One Python scalar or string, kept in the manifest itself."""

    path: str
    value: bool | int | float | str
    kind: str = "scalar"
    shape: tuple[int, ...] = ()
    nbytes: int = 0


LeafInfo = ArrayInfo | QArrayInfo | ScalarInfo


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What jq4.json says.

    Attributes:
      data: the sub-folder that holds the arrays (`arrays-*`) and the extra files (`files`).
      tree: the containers of the tree, see jq4.checkpoint.structure.
      leaves: the leaves in the order that `tree` numbers them.
      files: every file of the data folder, by its path in it.
      recipe: the recipe that made the weights, as plain JSON, or None.
      source: what the weights were made from (names, hashes), as plain JSON, or None.
      versions: of jq4, jax, orbax-checkpoint and Python when it was written.
      version: of the format.
    """

    data: str
    tree: Node
    leaves: tuple[LeafInfo, ...]
    files: Mapping[str, FileInfo]
    recipe: Any = None
    source: Any = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    version: int = VERSION

    @property
    def extra_files(self) -> tuple[str, ...]:
        """The names of the files that travel along (config.json, tokenizer.json, ...)."""
        return tuple(name.removeprefix("files/") for name in self.files if name.startswith("files/"))

    @property
    def nbytes(self) -> int:
        """Bytes of the leaves in memory."""
        return sum(leaf.nbytes for leaf in self.leaves)


def arrays_of(leaf: LeafInfo) -> Iterator[ArrayInfo]:
    """The dense arrays that a leaf is made of: itself, or the parts of a packed one, nested ones too."""
    if isinstance(leaf, ArrayInfo):
        yield leaf
    elif isinstance(leaf, QArrayInfo):
        for part in leaf.parts.values():
            yield from arrays_of(part)


def assemble(leaf: ArrayInfo | QArrayInfo, arrays: Mapping[str, Any]) -> Any:
    """The array or QArray of a leaf, from what stands in `arrays` under the path of each of its arrays."""
    if isinstance(leaf, ArrayInfo):
        return arrays[leaf.path]
    parts = {name: assemble(part, arrays) for name, part in leaf.parts.items()}
    return QArray(
        **parts, format=leaf.format, group_size=leaf.group_size, axis=leaf.axis, padding=leaf.padding, dtype=leaf.dtype,
        activations=leaf.activations, input_rotation=leaf.input_rotation,
    )  # fmt: skip


def abstract(leaf: ArrayInfo | QArrayInfo) -> Any:
    """The leaf with a ShapeDtypeStruct for every array."""
    return assemble(leaf, {a.path: jax.ShapeDtypeStruct(a.shape, jnp.dtype(a.dtype)) for a in arrays_of(leaf)})


def to_bytes(manifest: Manifest) -> bytes:
    """The text of jq4.json."""
    members = {
        "format": NAME,
        "version": manifest.version,
        "versions": dict(manifest.versions),
        "data": manifest.data,
        "recipe": manifest.recipe,
        "source": manifest.source,
        "tree": manifest.tree,
        "leaves": [_leaf_to_json(leaf) for leaf in manifest.leaves],
        "files": {name: dataclasses.asdict(info) for name, info in sorted(manifest.files.items())},
    }
    lines = ",\n".join(f"{json.dumps(name)}: {_lines_of(value)}" for name, value in members.items())
    body = ("{\n" + lines).encode()
    return body + (_TAIL % hashlib.sha256(body).hexdigest()).encode()


def from_bytes(raw: bytes, where: str) -> Manifest:
    """Reads and checks the text of jq4.json; `where` names it in errors (CheckpointError)."""
    found = _json_or_none(raw)
    version = found.get("version") if isinstance(found, dict) and found.get("format") == NAME else None
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"{where}: found format version {version}, this jq4 reads up to {VERSION}; upgrade jq4 to open it"
        )
    tail_length = len(_TAIL % ("0" * 64))
    body = raw[:-tail_length]
    if found is None or raw[-tail_length:] != (_TAIL % hashlib.sha256(body).hexdigest()).encode():
        raise CheckpointError(
            f"{where}: damaged or truncated, its {len(raw)} bytes do not match its own checksum; "
            "restore this file from a copy or save the checkpoint again"
        )
    try:
        return _manifest_from_json(found, where)
    except CheckpointError:
        raise
    except (JQ4Error, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: not a manifest that this jq4 can read ({type(error).__name__}: {error})"
        ) from error


def check_relative(name: str, where: str) -> str:
    """`name` itself if it is a plain relative path with forward slashes, that stays in its folder."""
    plain = isinstance(name, str) and name and str(PurePosixPath(name)) == name and not name.startswith("/")
    if not plain or ".." in name.split("/") or name == "." or re.search(r"[\\:\x00-\x1f]", name):
        raise CheckpointError(
            f"{where}: found the file name {name!r}, wanted a relative path with forward slashes that stays inside the "
            "folder"
        )
    return name


def plain_json(value: Any, what: str) -> Any:
    """`value` (or what its to_dict gives) as JSON gives it back; CheckpointError if JSON cannot hold it."""
    value = value.to_dict() if hasattr(value, "to_dict") else value
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{what}: cannot be written as JSON ({error}); give dicts, lists, strings, numbers"
        ) from error


def _lines_of(value: Any) -> str:
    """JSON with one line for each member of the outer list or dict, so that manifests can be read and compared."""
    if isinstance(value, list) and value:
        return "[\n  " + ",\n  ".join(json.dumps(item, allow_nan=False) for item in value) + "\n]"
    if isinstance(value, dict) and value:
        items = (f"{json.dumps(name)}: {json.dumps(item, allow_nan=False)}" for name, item in value.items())
        return "{\n  " + ",\n  ".join(items) + "\n}"
    return json.dumps(value, allow_nan=False)


def _json_or_none(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode())
    except (ValueError, RecursionError):
        return None


def _leaf_to_json(leaf: LeafInfo) -> dict[str, Any]:
    if isinstance(leaf, ScalarInfo):
        value = repr(leaf.value) if isinstance(leaf.value, float) else leaf.value
        return {"path": leaf.path, "kind": "scalar", "type": type(leaf.value).__name__, "value": value}
    common = {"path": leaf.path, "kind": leaf.kind, "shape": list(leaf.shape), "dtype": leaf.dtype}
    if isinstance(leaf, ArrayInfo):
        return {**common, "array": leaf.array}
    static = {name: getattr(leaf, name) for name in ("format", "group_size", "axis", "padding")}
    static |= {"activations": leaf.activations} if leaf.activations else {}
    static |= {"input_rotation": leaf.input_rotation} if leaf.input_rotation else {}
    return {**common, **static, "parts": {name: _leaf_to_json(part) for name, part in leaf.parts.items()}}


def _manifest_from_json(found: dict[str, Any], where: str) -> Manifest:
    if found["format"] != NAME or type(found["version"]) is not int or found["version"] < 1:
        raise CheckpointError(
            f"{where}: found format {found['format']!r} version {found['version']!r}, wanted {NAME!r}"
        )
    if not DATA_NAME.fullmatch(found["data"]):
        raise CheckpointError(f"{where}: found the data folder {found['data']!r}, wanted data-<16 hexadecimal digits>")
    files = {
        check_relative(name, where): FileInfo(_size(info["size"], where), str(info["sha256"]))
        for name, info in found["files"].items()
    }
    leaves = tuple(_leaf_from_json(leaf, where) for leaf in found["leaves"])
    check_node(found["tree"], len(leaves), where)
    manifest = Manifest(
        data=found["data"],
        tree=found["tree"],
        leaves=leaves,
        files=files,
        recipe=found["recipe"],
        source=found["source"],
        versions=found["versions"],
        version=found["version"],
    )
    _check_arrays_are_listed(manifest, where)
    return manifest


def _leaf_from_json(found: dict[str, Any], where: str) -> LeafInfo:
    path = str(found["path"])
    if found["kind"] == "scalar":
        return ScalarInfo(path, _SCALARS[found["type"]](found["value"]))
    shape = tuple(_size(dim, f"{where}: leaf {path}") for dim in found["shape"])
    if found["kind"] == "dense":
        return _array_from_json(found, path, shape, where)
    if found["kind"] != "qarray":
        raise CheckpointError(f"{where}: leaf {path} is of kind {found['kind']!r}, which this version cannot read")
    parts: dict[str, Any] = {name: _leaf_from_json(part, where) for name, part in found["parts"].items()}
    if not {"codes", "scale"} <= set(parts) <= set(PARTS):
        raise CheckpointError(f"{where}: leaf {path} has the parts {sorted(parts)}, wanted codes and scale at least")
    static = {name: found[name] for name in ("format", "group_size", "axis", "padding")}
    static["input_rotation"] = found.get("input_rotation", 0)
    numbers = ("group_size", "axis", "padding", "input_rotation")
    if not all(type(static[name]) is int for name in numbers) or static["group_size"] < 1:
        raise CheckpointError(f"{where}: leaf {path} has {static}, wanted integers and a group_size of at least 1")
    activations = check_name(found.get("activations", ""), f"{where}: leaf {path}")
    leaf = QArrayInfo(path, shape, str(jnp.dtype(found["dtype"])), parts=parts, activations=activations, **static)
    weight = abstract(leaf)
    if validate(weight, f"{where}: leaf {path}").shape != shape:
        raise CheckpointError(f"{where}: leaf {path} has shape {shape}, but its codes hold a weight of {weight.shape}")
    return leaf


def _array_from_json(found: dict[str, Any], path: str, shape: tuple[int, ...], where: str) -> ArrayInfo:
    if found["dtype"] not in DTYPES:
        raise CheckpointError(f"{where}: leaf {path} has dtype {found['dtype']!r}, wanted one of {sorted(DTYPES)}")
    leaf = ArrayInfo(path, shape, found["dtype"], found["array"])
    if leaf.nbytes > _MAX_BYTES or (leaf.array is None) != (leaf.nbytes == 0):
        raise CheckpointError(
            f"{where}: leaf {path} of shape {shape} takes {leaf.nbytes} bytes in {leaf.array!r}: absurd"
        )
    return leaf


def _check_arrays_are_listed(manifest: Manifest, where: str) -> None:
    names = [a.array for leaf in manifest.leaves for a in arrays_of(leaf) if a.array is not None]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{where}: two leaves share one array")
    for name in names:
        if check_relative(name, where).count("/") != 1 or f"{name}/.zarray" not in manifest.files:
            raise CheckpointError(f"{where}: names the array {name!r}, but lists no file {name}/.zarray")


def _size(value: Any, where: str) -> int:
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{where}: found {value!r}, wanted a size: an integer of at least 0")
    return value
