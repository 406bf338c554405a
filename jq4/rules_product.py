"""Packed rules for the products with a weight: dot_general and ragged_dot_general."""

from typing import Any

import jax

from jq4.matmul import dot_general as packed_dot_general
from jq4.matmul import ragged_dot as packed_ragged_dot
from jq4.packed_leaf import PackedLeaf, is_packed
from jq4.partition import Partition
from jq4.qarray import QArray
from jq4.qarray_ops import NoPackedForm

Values = list[Any]


def dot_general(eqn: Any, values: Values) -> Values:
    lhs, rhs = values
    if is_packed(lhs) and is_packed(rhs):
        raise NoPackedForm("a product of two packed weights")
    side = "lhs" if is_packed(lhs) else "rhs"
    leaf, x = (lhs, rhs) if side == "lhs" else (rhs, lhs)
    at = 0 if side == "lhs" else 1
    q, numbers, partition = _through_pending_transpose(leaf, eqn.params["dimension_numbers"], at)
    out = packed_dot_general(
        x, q, numbers, weight_side=side,
        preferred_element_type=eqn.params["preferred_element_type"], precision=eqn.params["precision"],
        partition=partition, path=leaf.path,
    )  # fmt: skip
    sharding = eqn.params.get("out_sharding")
    return [out if sharding is None else jax.sharding.reshard(out, sharding)]


def ragged_dot_general(eqn: Any, values: Values) -> Values:
    """Rows of x in ragged groups, each by its expert's packed matrix: `lax.ragged_dot`, the weight in any order."""
    x, leaf, group_sizes = values
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    (x_k, w_k), group, ragged = contract, numbers.rhs_group_dimensions, numbers.lhs_ragged_dimensions
    if is_packed(x) or any(batch) or (len(group), len(ragged), len(w_k)) != (1, 1, 1) or x.ndim != 2 or leaf.ndim != 3:
        raise NoPackedForm("a ragged product other than [M, K] by [E, K, N]")
    if leaf.grouped_axis != w_k[0]:
        raise NoPackedForm(f"the product contracts axis {w_k[0]} of {leaf.shape}, grouped along {leaf.grouped_axis}")
    if ragged[0] == x_k[0] or eqn.params["group_offset"] is not None:
        raise NoPackedForm("a ragged contraction, or one with a group offset")
    columns = next(axis for axis in range(3) if axis not in (group[0], w_k[0]))
    experts = leaf.transposed((group[0], w_k[0], columns))  # [E, K, N]
    rows = x if x_k[0] == 1 else x.T  # [M, K]
    out = packed_ragged_dot(
        rows, experts.settle(), group_sizes,
        preferred_element_type=eqn.params["preferred_element_type"], precision=eqn.params["precision"],
        partition=experts.partition and experts.partition.permuted(experts.axes), path=leaf.path,
    )  # fmt: skip
    return [out]


def _through_pending_transpose(leaf: PackedLeaf, numbers: Any, side: int) -> tuple[QArray, Any, Partition | None]:
    """The QArray as it lies, the dimension numbers that contract its own axes, and how these are cut."""
    contract, batch = numbers
    named = (*contract[side], *batch[side])
    free = [leaf.axes[axis] for axis in range(leaf.ndim) if axis not in named]
    if free != sorted(free):
        return leaf.settle(), numbers, leaf.partition and leaf.partition.permuted(leaf.axes)

    def renamed(pair: Any) -> Any:
        pair = list(pair)
        pair[side] = tuple(leaf.axes[axis] for axis in pair[side])
        return tuple(pair)

    return leaf.q, (renamed(contract), renamed(batch)), leaf.partition


RULES = {"dot_general": dot_general, "ragged_dot_general": ragged_dot_general}
