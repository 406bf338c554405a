"""The bundled model's text: what every Python installation says about itself.

Three sources, all read from the running interpreter: the documentation topics (`pydoc_data.topics`), the
docstrings of the standard library's modules, classes and functions (by `ast`, from the source files, so that
nothing is imported), and those of the modules written in C (imported: they have no source).

A document is one module or one topic. A module reads like `help()`: a title, its docstring, then a line
`Class.method(arguments)` for each documented name, with the docstring indented below it.

Held-out modules are gathered first and a docstring is taken once only, so a text that stands in a held-out
module and elsewhere is in the held-out part alone. The order is that of sorted paths: the same interpreter
gives the same bytes.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
HELD_OUT_MODULES = (
    "argparse", "bisect", "calendar", "cmd", "configparser", "csv", "difflib", "fnmatch", "fractions", "gettext",
    "graphlib", "heapq", "ipaddress", "plistlib", "pprint", "sched", "shelve", "shutil", "smtplib", "statistics",
    "textwrap", "zipfile",
)  # fmt: skip
# The C halves of held-out modules repeat their docstrings, and belong to neither part.
LEFT_OUT_MODULES = ("_bisect", "_csv", "_heapq", "_statistics")
CALIBRATION_BYTES = 160_000


@dataclass(frozen=True)
class Document:
    """A module or a topic: `title` is its name, `text` what is trained on (no end-of-text mark)."""

    title: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """The two parts, whole modules each; `held_out` is never trained on, nor seen by the tokenizer."""

    training: list[Document]
    held_out: list[Document]

    def calibration(self) -> list[Document]:
        """About CALIBRATION_BYTES of the training part, spread evenly over it."""
        candidates = [document for document in self.training if 400 <= len(document.text) <= 12_000]
        wanted = CALIBRATION_BYTES / (sum(len(document.text) for document in candidates) / len(candidates))
        stride = max(1, int(len(candidates) / wanted))
        return candidates[::stride]


def join_documents(documents: list[Document]) -> str:
    """One text, each document followed by the end-of-text mark (the tokenizer reads it as one token)."""
    return "".join(document.text + END_OF_TEXT + "\n" for document in documents)


def gather_corpus() -> Corpus:
    """Read the running interpreter's documentation, in a fixed order, each docstring once."""
    seen: set[str] = set()
    files = list(_standard_library_files())
    held_out = [_source_document(path, name, seen) for path, name in files if _is_held_out(name)]
    training = _topic_documents()
    training += [_source_document(path, name, seen) for path, name in files if not _is_held_out(name)]
    training += [_compiled_document(name, seen) for name in _compiled_modules()]
    return Corpus([d for d in training if d is not None], [d for d in held_out if d is not None])


def _is_held_out(module: str) -> bool:
    return module.partition(".")[0] in HELD_OUT_MODULES


def _standard_library_files() -> Iterator[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and relative.parts[0] != "pydoc_data":
            parts = relative.with_suffix("").parts
            yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _topic_documents() -> list[Document]:
    topics = importlib.import_module("pydoc_data.topics").topics
    return [Document(name, _tidy(text)) for name, text in sorted(topics.items())]


def _tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.expandtabs().strip("\n").splitlines()) + "\n"


def _entry(heading: str, docstring: str) -> str:
    return f"{heading}\n{textwrap.indent(_tidy(docstring), '    ')}"


def _source_document(path: Path, module: str, seen: set[str]) -> Document | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # lib2to3 and friends keep templates that are not Python
            return None
    entries: list[str] = []
    docstring = _unseen(ast.get_docstring(tree), seen)
    if docstring:
        entries.append(_tidy(docstring))
    _walk(tree, "", entries, seen)
    return _module_document(module, entries)


def _module_document(module: str, entries: list[str]) -> Document | None:
    if not entries:
        return None
    return Document(module, f"Help on module {module}:\n\n" + "\n".join(entries))


def _walk(parent: ast.AST, prefix: str, entries: list[str], seen: set[str]) -> None:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = _unseen(ast.get_docstring(node), seen)
            if docstring:
                entries.append(_entry(_heading(node, prefix), docstring))
            _walk(node, f"{prefix}{node.name}.", entries, seen)
        elif not isinstance(node, ast.expr):
            _walk(node, prefix, entries, seen)


def _heading(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {prefix}{node.name}({bases})" if bases else f"class {prefix}{node.name}"
    return f"{prefix}{node.name}({ast.unparse(node.args)})"


def _unseen(docstring: str | None, seen: set[str]) -> str | None:
    if not docstring or not docstring.strip() or docstring in seen:
        return None
    seen.add(docstring)
    return docstring


def _compiled_modules() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib")) / "lib-dynload"
    names = set(sys.builtin_module_names) | {path.name.partition(".")[0] for path in folder.glob("*.so")}
    unwanted = {*HELD_OUT_MODULES, *LEFT_OUT_MODULES}
    return sorted(name for name in names if "test" not in name and "xx" not in name and name not in unwanted)


def _compiled_document(name: str, seen: set[str]) -> Document | None:
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
    except ImportError:  # built without its C library
        return None
    entries = []
    docstring = _unseen(module.__doc__, seen)
    if docstring:
        entries.append(_tidy(docstring))
    for attribute, value in sorted(vars(module).items()):
        entries += _compiled_entries(attribute, value, seen)
    return _module_document(name, entries)


def _compiled_entries(name: str, value: object, seen: set[str]) -> Iterator[str]:
    if not (isinstance(value, type) or callable(value)):
        return
    docstring = getattr(value, "__doc__", None)
    if isinstance(docstring, str) and _unseen(docstring, seen):
        is_type = isinstance(value, type)
        signature = _signature(value) or ("" if is_type else "(...)")
        yield _entry(f"class {name}" if is_type else name + signature, docstring)
    if isinstance(value, type):
        for attribute, member in sorted(vars(value).items()):
            docstring = getattr(member, "__doc__", None)
            if isinstance(docstring, str) and _unseen(docstring, seen):
                yield _entry(f"{name}.{attribute}{_signature(member)}", docstring)


def _signature(value: object) -> str:
    """A compiled function's arguments, without the interpreter's marks for the bound one; "" if unknown."""
    signature = getattr(value, "__text_signature__", None) or ""
    for mark in ("$module, /, ", "$module, ", "$module"):
        signature = signature.replace(mark, "")
    return signature.replace("$", "")


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2); id 0 ends a text. Nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The text's tokens, i32[T]; end-of-text marks in it become one token each."""
    return np.asarray(tokenizer.encode(text).ids, dtype=np.int32)


def rows_of(tokens: np.ndarray, context: int) -> np.ndarray:
    """Cut tokens into i32[R, context]; the last, incomplete row is dropped."""
    return tokens[: len(tokens) // context * context].reshape(-1, context)
