"""Inside `jax.shard_map`: operands of one custom derivative rule must vary over the same mesh axes.

JAX makes the operands of its own primitives vary alike, and so sums a cotangent over the axes that its operand does
not vary over. A `custom_vjp` is left alone: without this, its rule would owe x a cotangent that is summed already.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def vary_alike(tree: Any) -> Any:
    """The tree with every float array cast to vary over all manual mesh axes that any leaf varies over."""
    varying = [_varying(leaf) for leaf in jax.tree.leaves(tree)]
    union = frozenset().union(*varying)
    if not union:
        return tree

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(union - _varying(leaf)))
        return (
            jax.lax.pcast(leaf, missing, to="varying") if missing and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        )

    return jax.tree.map(cast, tree)


def varying_as(out: jax.Array, operands: Any) -> jax.Array:
    """A result that says of itself that it varies over all manual mesh axes that any of its operands varies over."""
    union = frozenset().union(*map(_varying, jax.tree.leaves(operands)))
    missing = tuple(sorted(union - _varying(out)))
    return jax.lax.pcast(out, missing, to="varying") if missing else out


def _varying(leaf: Any) -> frozenset[str]:
    aval = jax.typeof(leaf)
    manual = getattr(aval, "manual_axis_type", None) or getattr(aval, "mat", None)  # JAX 0.10 on; `vma` between
    return frozenset(manual.varying if manual is not None else getattr(aval, "vma", ()))


def shape_varying_as(shape: tuple[int, ...], dtype: Any, operands: Sequence[jax.Array]) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result, which varies over all manual mesh axes that any of its operands varies over."""
    union = frozenset().union(*map(_varying, operands))
    if not union:
        return jax.ShapeDtypeStruct(shape, dtype)
    kind = getattr(jax.typeof(operands[0]), "manual_axis_type", None)
    if kind is None:
        return jax.ShapeDtypeStruct(shape, dtype, vma=union)  # pyright: ignore[reportCallIssue]
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=type(kind)(varying=union))
