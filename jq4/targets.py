"""Which leaves a recipe's patterns mean. A path is "params/layers/mlp/up_proj/kernel", see jq4.paths.

    Linear                   every matrix that a layer multiplies by: a leaf called kernel, weight or w
    Embedding                every table that is looked up: a leaf called embedding, or a weight under *embed*
                             (what jq4.contraction_axes or jq4.observe saw a function do with a leaf goes before names)
    up_proj, mlp/up_proj     whole components of the path that follow one another, anywhere in it
    layers/*/up_proj/**      a glob over the whole path: * within one component, ** over any number of them
    re:mlp.*(up|down)_proj   a regular expression, searched for anywhere in the path

compressed-tensors writes the first two as class names and matches regular expressions from the start of the path; the
rest of its spelling is the same.
"""

import functools
import re
from typing import Any

from jq4.errors import JQ4Error

KERNEL_NAMES = ("kernel", "weight", "w")
_NAME_AXES = {"kernel": -2, "w": -2, "weight": -1, "embedding": -1}

EMBEDDINGS = "re:(?i)(^|/)[^/]*embed[^/]*(/|$)"
NORMS = "re:(?i)norm|(^|/)ln_?[0-9f]*(/|$)"
HEADS = "re:(?i)(^|/)(lm_?head[^/]*|unembed[^/]*)(/|$)|(^|/)(head|output|output_layer|logits[^/]*)/(kernel|weight|w)$"


LINEAR, EMBEDDING = "Linear", "Embedding"


def matches(pattern: str, path: str, role: str | None = None) -> bool:
    """Whether a pattern means the leaf at `path`; its `role`, where the function told it, goes before its name."""
    if pattern == LINEAR:
        return leaf_name(path) in KERNEL_NAMES if role is None else role == LINEAR
    if pattern == EMBEDDING:
        return is_embedding(path) if role is None else role == EMBEDDING
    if pattern.startswith("re:"):
        return re.search(pattern[3:], path) is not None
    if "*" in pattern or "?" in pattern:
        return re.fullmatch(_glob_to_regex(pattern), path) is not None
    return f"/{pattern.strip('/')}/" in f"/{path}/"


def as_patterns(value: Any, source: str, key: str) -> tuple[str, ...]:
    """One pattern or a sequence of them as a tuple; a JQ4Error for anything else, or a bad regular expression."""
    value = (value,) if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or not all(isinstance(pattern, str) and pattern for pattern in value):
        raise JQ4Error(f"{source}: {key} is {value!r}, wanted a list of patterns, such as [Linear] or ['re:mlp.*']")
    for pattern in value:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except (re.error, OverflowError, RecursionError) as error:
                raise JQ4Error(f"{source}: {key} has {pattern!r}, not a regular expression: {error}") from None
    return tuple(value)


def leaf_name(path: str) -> str:
    """The last component that names: "kernel" of "params/dense/kernel"."""
    return path.rsplit("/", 1)[-1]


def is_embedding(path: str) -> bool:
    """Whether the names say that the leaf is a table [V, D] whose rows are looked up."""
    name = leaf_name(path)
    return name == "embedding" or (name in KERNEL_NAMES and re.search(EMBEDDINGS[3:], path) is not None)


def axis_by_name(path: str) -> int | None:
    """The contraction axis that a name implies, or None: Flax's kernel [..., K, N], weight [N, K], tables [V, D]."""
    return -1 if is_embedding(path) else _NAME_AXES.get(leaf_name(path))


@functools.lru_cache(maxsize=256)
def _glob_to_regex(pattern: str) -> str:
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.strip("/"))
    special = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(special.get(piece) or re.escape(piece) for piece in pieces)
