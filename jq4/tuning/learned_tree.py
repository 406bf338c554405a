"""A tree with packed leaves as a tree with learned ones, leaf by leaf, by path, in either of two forms.

Variables of jq4.tuning.learned round straight through; those of jq4.tuning.rectified have a soft weight as well.
"""

from typing import Any

import jax

from jq4.errors import JQ4Error
from jq4.paths import flatten_with_paths, leaf_path
from jq4.qarray import is_qarray
from jq4.tuning import learned, rectified
from jq4.tuning.learned import Variables, check
from jq4.tuning.rectified import Rectified

TreeVariables = dict[str, Variables]  # by the leaf's path


def begin_tree(
    packed: Any, dense: Any, *, rounding: bool = True, scales: bool = True, soft: bool = False
) -> TreeVariables:
    """The variables of every packed leaf, rectified ones if `soft`; `dense` is a tree of the same paths."""
    begin = rectified.begin if soft else learned.begin
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
    """The tree of dense weights that the variables are stored as; the other leaves are those of `packed`."""
    return _map(lambda mine, *leaves: _form_of(mine).weight_of(mine, *leaves), variables, packed, dense)


def soft_tree(variables: TreeVariables, packed: Any, dense: Any) -> Any:
    """The tree of dense weights between their levels, of rectified variables."""
    return _map(rectified.soft_weight_of, variables, packed, dense)


def harden_tree(variables: TreeVariables, packed: Any, dense: Any) -> Any:
    """The tree of packed leaves that the variables stand for, of the static form of `packed`."""

    def hardened(mine: Variables, *leaves: Any) -> Any:
        return _form_of(mine).harden(mine, *leaves)

    return jax.jit(lambda *trees: _map(hardened, *trees))(variables, packed, dense)


def _form_of(variables: Variables) -> Any:
    return rectified if isinstance(variables, Rectified) else learned


def _map(of_leaf: Any, variables: TreeVariables, packed: Any, dense: Any) -> Any:
    weights = dict(flatten_with_paths(dense))

    def one(keys: Any, leaf: Any) -> Any:
        path = leaf_path(keys)
        return of_leaf(variables[path], leaf, weights[path]) if is_qarray(leaf) else leaf

    return jax.tree_util.tree_map_with_path(one, packed, is_leaf=is_qarray)
