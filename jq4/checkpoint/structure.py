"""Any pytree as nested containers of leaves, so that a checkpoint is read back without the code of the model.

A tree is described by nodes that JSON can hold, and a flat list of its leaves:

    null                          None
    {"leaf": 3}                   the leaf number 3 (a QArray is one leaf)
    {"list": [node, ...]}         a list
    {"tuple": [node, ...]}        a tuple
    {"dict": [[key, node], ...]}  a dict; keys are strings or integers, in the order that JAX flattens them in

Every other kind of node (named tuples, dataclasses, FrozenDict, NNX State, Equinox modules) becomes a dict of its path
keys: what a model's code means by them is for that code to say. A box around a single `value` (an NNX Variable, a
Linen Partitioned) is dropped, and what it holds takes its place.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jq4.errors import CheckpointError
from jq4.qarray import is_qarray

Node = dict[str, Any] | None
Keys = tuple[str | int, ...]


def describe(tree: Any) -> tuple[Node, list[tuple[Keys, Any]]]:
    """The node of `tree` and its leaves as (keys, leaf), in the order that the node numbers them."""
    leaves: list[tuple[Keys, Any]] = []
    return _describe(tree, (), leaves), leaves


def rebuild(node: Node, leaves: list[Any]) -> Any:
    """The tree that `describe` gave `node` for, with these leaves."""
    return map_leaves(lambda index, _: leaves[index], node)


def map_leaves(f: Callable[[int, Keys], Any], node: Node, keys: Keys = ()) -> Any:
    """The tree of `node` with f(number, keys) for each leaf."""
    if node is None:
        return None
    ((kind, content),) = node.items()
    if kind == "leaf":
        return f(content, keys)
    if kind == "dict":
        return {key: map_leaves(f, child, (*keys, key)) for key, child in content}
    children = [map_leaves(f, child, (*keys, i)) for i, child in enumerate(content)]
    return tuple(children) if kind == "tuple" else children


def check_node(node: Any, num_leaves: int, where: str) -> None:
    """Raises CheckpointError unless `node` is well formed and names each of the leaves once."""
    numbers = list(_numbers_of(node, where))
    if sorted(numbers) != list(range(num_leaves)):
        raise CheckpointError(f"{where}: the tree names leaves {numbers[:20]}, wanted each of 0..{num_leaves - 1} once")


def nested(leaves: Mapping[Any, Any]) -> dict[Any, Any]:
    """Dicts within dicts of leaves by their keys, each a tuple of at least one."""
    tree: dict[Any, Any] = {}
    for keys, leaf in leaves.items():
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = leaf
    return tree


def path_of(keys: Keys) -> str:
    """The path that errors, recipes and reports name a leaf by: "params/layers/0/kernel"."""
    return "/".join(str(key) for key in keys)


def _describe(tree: Any, keys: Keys, leaves: list[tuple[Keys, Any]]) -> Node:
    if tree is None:
        return None
    children = None if is_qarray(tree) else _children_of(tree, keys)
    if children is None:
        leaves.append((keys, tree))
        return {"leaf": len(leaves) - 1}
    if type(tree) in (list, tuple):
        nodes = [_describe(child, (*keys, i), leaves) for i, (_, child) in enumerate(children)]
        return {type(tree).__name__: nodes}
    if len(children) == 1 and isinstance(children[0][0], jax.tree_util.GetAttrKey) and children[0][0].name == "value":
        return _describe(children[0][1], keys, leaves)
    named = [(_name_of(key, keys), child) for key, child in children]
    return {"dict": [[name, _describe(child, (*keys, name), leaves)] for name, child in named]}


def _children_of(tree: Any, keys: Keys) -> list[tuple[Any, Any]] | None:
    """The children of a node with their keys, one level down; None if `tree` is a leaf."""
    try:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    except ValueError as error:  # dict keys that cannot be sorted
        raise CheckpointError(f"{path_of(keys) or 'the tree'}: JAX takes no such node as a tree ({error})") from error
    if len(flat) == 1 and not flat[0][0]:
        return None
    return [(keypath[0], child) for keypath, child in flat]


def _name_of(key: Any, parents: Keys) -> str | int:
    for attribute in ("key", "name", "idx"):
        name = getattr(key, attribute, None)
        if isinstance(name, str) or type(name) is int:
            return name
    raise CheckpointError(
        f"{path_of(parents) or 'the tree'}: a dict key is {key!r}, wanted a string or an int; rename it before saving"
    )


def _numbers_of(node: Any, where: str) -> Iterator[int]:
    if node is None:
        return
    if not isinstance(node, dict) or len(node) != 1:
        raise CheckpointError(f"{where}: found the tree node {str(node)[:80]}, wanted null or one of leaf, list, dict")
    ((kind, content),) = node.items()
    if kind == "leaf" and type(content) is int:
        yield content
    elif kind == "dict" and isinstance(content, list) and all(_is_entry(entry) for entry in content):
        for _, child in content:
            yield from _numbers_of(child, where)
    elif kind in ("list", "tuple") and isinstance(content, list):
        for child in content:
            yield from _numbers_of(child, where)
    else:
        raise CheckpointError(f"{where}: found the tree node {str(node)[:80]}, which this version cannot read")


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and (isinstance(entry[0], str) or type(entry[0]) is int)
