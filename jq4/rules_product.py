"""Packed rules for the products with a weight: dot_general and ragged_dot_general."""

from typing import Any

import jax

from jq4 import matmul
from jq4.packed_leaf import PackedLeaf, is_packed
from jq4.qarray import QArray
from jq4.qarray_ops import NoPackedForm

Values = list[Any]


def dot_general(eqn: Any, values: Values) -> Values:
    lhs, rhs = values
    if is_packed(lhs) and is_packed(rhs):
        lhs = lhs.dequantize()
        raise NoPackedForm("a product of two packed weights")
    side = "lhs" if is_packed(lhs) else "rhs"
    leaf, x = (lhs, rhs) if side == "lhs" else (rhs, lhs)
    at = 0 if side == "lhs" else 1
    q, numbers = _through_pending_transpose(leaf, eqn.params["dimension_numbers"], at)
    out = matmul.dot_general(
        x, q, numbers, weight_side=side,
        preferred_element_type=eqn.params["preferred_element_type"], precision=eqn.params["precision"],
    )  # fmt: skip
    sharding = eqn.params.get("out_sharding")
    return [out if sharding is None else jax.sharding.reshard(out, sharding)]


def _through_pending_transpose(leaf: PackedLeaf, numbers: Any, side: int) -> tuple[QArray, Any]:
    """The QArray as it lies, and the dimension numbers that contract its own axes."""
    contract, batch = numbers
    named = (*contract[side], *batch[side])
    free = [leaf.axes[axis] for axis in range(leaf.ndim) if axis not in named]
    if free != sorted(free):
        return leaf.settle(), numbers

    def renamed(pair: Any) -> Any:
        pair = list(pair)
        pair[side] = tuple(leaf.axes[axis] for axis in pair[side])
        return tuple(pair)

    return leaf.q, (renamed(contract), renamed(batch))
