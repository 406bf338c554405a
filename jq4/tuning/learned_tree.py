"""A tree with packed leaves as a tree with learned ones: jq4.tuning.learned, leaf by leaf, by path."""

from typing import Any

import jax

from jq4.errors import JQ4Error
from jq4.paths import flatten_with_paths, leaf_path
from jq4.qarray import is_qarray
from jq4.tuning.learned import Variables, begin, check, harden, weight_of

TreeVariables = dict[str, Variables]  # by the leaf's path


def begin_tree(packed: Any, dense: Any, *, rounding: bool = True, scales: bool = True) -> TreeVariables:
    """The variables of every packed leaf; `dense` is a tree of the same paths."""
    weights = dict(flatten_with_paths(dense))
    found = {}
    for path, q in flatten_with_paths(packed):
        if not is_qarray(q):
            continue
        check(q, path)
        if path not in weights or weights[path].shape != q.shape:
            shape = weights[path].shape if path in weights else "none"
            raise JQ4Error(
                f"{path}: the dense weight has shape {shape}, wanted {q.shape}: the model it was packed from"
            )
        found[path] = begin(q, weights[path], rounding=rounding, scales=scales)
    if not found:
        raise JQ4Error("there is no packed leaf in the tree: wanted one that jq4.quantize made")
    return found


def learned_tree(variables: TreeVariables, packed: Any, dense: Any) -> Any:
    """The tree of dense weights that the variables stand for; the other leaves are those of `packed`."""
    return _map(weight_of, variables, packed, dense)


def harden_tree(variables: TreeVariables, packed: Any, dense: Any) -> Any:
    """The tree of packed leaves that the variables stand for, of the static form of `packed`."""
    return jax.jit(lambda *trees: _map(harden, *trees))(variables, packed, dense)


def _map(of_leaf: Any, variables: TreeVariables, packed: Any, dense: Any) -> Any:
    weights = dict(flatten_with_paths(dense))

    def one(keys: Any, leaf: Any) -> Any:
        path = leaf_path(keys)
        return of_leaf(variables[path], leaf, weights[path]) if is_qarray(leaf) else leaf

    return jax.tree_util.tree_map_with_path(one, packed, is_leaf=is_qarray)
