"""Models as the verbs take them: a Hugging Face folder, or a folder that `jq4 quantize` made."""

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jq4.errors import JQ4Error

if TYPE_CHECKING:
    from models.language_model import LanguageModel

MANIFEST = "jq4.json"


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder is one of jq4's own."""
    return (Path(folder) / MANIFEST).exists()


def open_model(folder: str | Path) -> "LanguageModel":
    """The LanguageModel of a folder; errors say what is missing."""
    from models.language_model import LanguageModel

    if not Path(folder).is_dir():
        raise JQ4Error(f"{folder}: there is no such folder; give a Hugging Face folder or one that jq4 quantize made")
    return LanguageModel.from_folder(folder)


def laid_out(model: "LanguageModel") -> "LanguageModel":
    """The model with its weights laid out for this machine's kernels, where jq4 knows how."""
    try:
        return model.prepared()
    except JQ4Error:  # a device kind without a layout of its own runs the neutral one
        return model


def went_dense(model: "LanguageModel") -> list[dict[str, Any]]:
    """What the last trace of a model could not keep packed; empty is what it should be."""
    return [dataclasses.asdict(entry) for entry in model.record.entries]


def origin(folder: Path) -> dict[str, Any]:
    """What a packed folder's manifest says of its source: the folder's name, and the SHA-256 of its files."""
    if is_checkpoint(folder):
        names = [MANIFEST]
    else:
        names = [*sorted(path.name for path in folder.glob("*.safetensors*")), "config.json"]
    return {"folder": folder.resolve().name, "files": {name: _sha256(folder / name) for name in names}}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
