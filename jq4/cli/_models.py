"""Models as the verbs take them: a folder that `jq4 quantize` made, a Hugging Face folder, a .gguf file."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jq4.errors import JQ4Error

if TYPE_CHECKING:
    from models.language_model import LanguageModel

MANIFEST = "jq4.json"
MODEL = "a Hugging Face folder (dense or packed), a .gguf file, or a folder that jq4 quantize made"


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder is one of jq4's own."""
    return (Path(folder) / MANIFEST).exists()


def existing(path: str | Path) -> Path:
    """The path of a model that is there."""
    if not Path(path).exists():
        raise JQ4Error(f"{path}: there is no such folder or file; give {MODEL}")
    return Path(path)


def existing_adapters(path: str | Path) -> Path:
    """The folder of adapters that is there."""
    if not Path(path).is_dir():
        raise JQ4Error(f"{path}: there is no such folder; give one with adapters, of PEFT or of jq4.save_lora")
    return Path(path)


def open_model(path: str | Path) -> "LanguageModel":
    """The LanguageModel of a folder or file; errors say what is missing, notes go to the terminal."""
    from models.language_model import LanguageModel

    return LanguageModel.from_folder(existing(path), say=_say)


def unread_model(path: str | Path) -> "LanguageModel":
    """The same with its weights unread, to be changed and saved leaf by leaf."""
    from models.language_model import LanguageModel

    return LanguageModel.unread(existing(path), say=_say)


def _say(note: str) -> None:
    from jq4.cli import _terminal

    _terminal.say(note)


def in_the_same_runs(model: "LanguageModel", reference: "LanguageModel") -> tuple["LanguageModel", "LanguageModel"]:
    """Both with their layers cut alike, so that their leaves have the same paths."""
    model = model.in_runs_of(reference)
    return model, reference.in_runs_of(model)


def laid_out(model: "LanguageModel") -> "LanguageModel":
    """The model with its weights laid out for this machine's kernels, where jq4 knows how."""
    try:
        return model.prepared()
    except JQ4Error:  # a device kind without a layout of its own runs the neutral one
        return model


def function_of(model: "LanguageModel") -> Callable[[Any, Any], Any]:
    """The model as a function of its params and tokens i32[B, T], as jq4.observe takes it; its adapters are in it."""

    def function(params: Any, tokens: Any, adapters: Any = model.adapters) -> Any:
        return model.apply({"params": params if adapters is None else (params, adapters)}, tokens)

    return function


def adapters_told(adapters: Any) -> dict[str, Any] | None:
    """What a verb tells of a model's adapters, which are counted apart from its weights; None where it has none."""
    from jq4.train.adapters.adapter_inventory import adapter_inventory

    return None if adapters is None else adapter_inventory(adapters)


def notes_on_adapters(model: "LanguageModel", reference: "LanguageModel | None") -> list[str]:
    """That errors of weights leave adapters out, where there are some."""
    if reference is None:
        return []
    whose = [name for name, each in (("model", model), ("reference", reference)) if each.adapters is not None]
    if not whose:
        return []
    return [
        f"the {' and the '.join(whose)} run with adapters, which the errors of weights leave out: these compare the "
        "weights that adapters stand beside"
    ]


def observe_inputs(
    model: "LanguageModel",
    rows: Any,
    batch_size: int,
    collect: Any,
    description: str = "observing",
    programs: Any = None,
) -> Any:
    """jq4.observe of a dense model over rows of tokens, with a progress bar; `programs` as there."""
    from jq4.cli import _terminal
    from jq4.observe import observe

    if batch_size < 1:
        raise JQ4Error(f"--batch-size is {batch_size}, wanted 1 or more")
    starts = range(0, len(rows), batch_size)
    with _terminal.progress(description) as step:

        def batches() -> Iterator[Any]:
            for done, start in enumerate(starts):
                step(done, len(starts))
                yield rows[start : start + batch_size], model.adapters

        return observe(function_of(model), model.params, batches(), collect=collect, programs=programs)


def evaluated(model: "LanguageModel", reference: "LanguageModel | None", rows: Any, batch_size: int) -> Any:
    """jq4.evaluate of a model against its reference, if there is one, with a progress bar."""
    from jq4.cli import _terminal
    from jq4.evaluate import evaluate

    theirs = None if reference is None else reference.logits
    with _terminal.progress("evaluating") as step:
        return evaluate(model.logits, rows, reference=theirs, batch_size=batch_size, progress=step)


def went_dense(model: "LanguageModel") -> list[dict[str, Any]]:
    """What the last trace of a model could not keep packed; empty is what it should be."""
    return [dataclasses.asdict(entry) for entry in model.record.entries]


def origin(folder: Path) -> dict[str, Any]:
    """What a packed folder's manifest says of its source: the folder's name, and the SHA-256 of its files."""
    if folder.is_file():
        folder, names = folder.parent, [folder.name]
    elif is_checkpoint(folder):
        from models.adapted import ADAPTERS

        adapters = f"{ADAPTERS}/{MANIFEST}"
        names = [MANIFEST, *[adapters] * (folder / adapters).exists()]
    else:
        names = [*sorted(path.name for path in folder.glob("*.safetensors*")), "config.json"]
    return {"folder": folder.resolve().name, "files": {name: sha256(folder / name) for name in names}}


def sha256(file: Path) -> str:
    """The SHA-256 of a file, as "sha256:0f3a..."."""
    with file.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
