"""How a leaf of a tree is called, everywhere in jq4: "params/layers/mlp/up_proj/kernel".

The path is JAX's key path, its keys joined with "/". Two frameworks leave their mark in it: Linen's leading "params"
stays, since the user typed it; NNX's trailing `.value`, an attribute of its Variables, is dropped, so that a leaf
has the same path in `nnx.split`'s State as in `nnx.to_pure_dict`'s dict.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jq4.qarray import is_qarray


def leaf_path(keypath: tuple[Any, ...]) -> str:
    """The path of a leaf as one string, from the key path that `jax.tree_util` gives."""
    if keypath and isinstance(keypath[-1], jax.tree_util.GetAttrKey) and keypath[-1].name == "value":
        keypath = keypath[:-1]
    return jax.tree_util.keystr(keypath, simple=True, separator="/")


def flatten_with_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = is_qarray) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths, in tree order; a QArray is one leaf."""
    return [(leaf_path(keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]


def find_path(known: Mapping[str, Any], path: str) -> Any:
    """What is known of the leaf at `path`, or None: the same path, or the only one that ends in it or that it ends in.

    A function is often traced on {"params": params} and the recipe applied to `params` alone, so one path may lack
    the other's first names.
    """
    if path in known:
        return known[path]
    longer = [name for name in known if name.endswith(f"/{path}") or path.endswith(f"/{name}")]
    return known[longer[0]] if len(longer) == 1 else None
