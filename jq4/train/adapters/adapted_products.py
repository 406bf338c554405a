"""The adapter's share of a product with an adapted weight: x A B where the weight's own is x W.

    x[*B, M, K]  ->  h = scaling * (x A)[*B, M, r]  ->  h B [*B, M, N]

A product of two thin matrices in x's dtype, summed in float32, whatever the weight is packed as; nothing of the
weight's size is made, going forward or back. A weight whose outputs are contracted (W^T) is met by B first.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jq4.packed_leaf import is_packed
from jq4.train.adapters.adapted import Adapted
from jq4.train.adapters.adapter import RANK
from jq4.train.adapters.labelled import product
from pallas_kernels.int4_matmul.xla import accumulator

Values = list[Any]
_ROWS = "rows"


class NotFollowed(Exception):  # noqa: N818  it is caught, and told to the user as the reason
    """This product is none that an adapter has a share in by itself; the message says why."""


def dot_general(eqn: Any, values: Values) -> jax.Array:
    side = 1 if isinstance(values[1], Adapted) else 0
    weight, x = values[side], values[1 - side]
    contract, batch = eqn.params["dimension_numbers"]
    _check_floats(x)
    w_contract, w_batch, x_contract, x_batch = contract[side], batch[side], contract[1 - side], batch[1 - side]
    w_free = [axis for axis in range(len(weight.axes)) if axis not in (*w_contract, *w_batch)]
    x_free = [axis for axis in range(x.ndim) if axis not in (*x_contract, *x_batch)]
    named = lambda axes: [atom for axis in axes for atom in weight.axes[axis]]  # noqa: E731
    stack, summed, free = named(w_batch), named(w_contract), named(w_free)
    sizes = [atom.size for atom in stack], [atom.size for atom in summed]
    rows = lax.transpose(x, (*x_batch, *x_free, *x_contract)).reshape(*sizes[0], -1, *sizes[1])
    names = [*(atom.id for atom in stack), _ROWS, *(atom.id for atom in summed)]
    wanted = [*names[: len(stack) + 1], *(atom.id for atom in free)]
    if weight.drops_by_row:
        _check_rows(weight, [x.shape[axis] for axis in x_free])
    out = _through(weight, rows, names, wanted, eqn.params["precision"])
    of_batch, of_rows = [x.shape[axis] for axis in x_batch], [x.shape[axis] for axis in x_free]
    out = out.reshape(*of_batch, *of_rows, *(weight.shape[axis] for axis in w_free))
    if side == 0:
        b, m = len(of_batch), len(of_rows)
        out = lax.transpose(out, (*range(b), *range(b + m, out.ndim), *range(b, b + m)))
    return out


def ragged_dot(eqn: Any, values: Values) -> jax.Array:
    """Rows x[M, K] sorted by expert, by A[E, K, r] and B[E, r, N] of their experts.

    Sorted, nothing tells a row's key: what is dropped of all rows is drawn by the first one.
    """
    x, weight, group_sizes = values[:3]
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_k, w_k), batch = numbers.dot_dimension_numbers
    groups, ragged = numbers.rhs_group_dimensions, numbers.lhs_ragged_dimensions
    _check_floats(x)
    plain = x.ndim == 2 and not any(batch) and (len(groups), len(x_k)) == (1, 1) and ragged[0] != x_k[0]
    if not isinstance(weight, Adapted) or len(weight.axes) != 3 or not plain or eqn.params["group_offset"] is not None:
        raise NotFollowed("a ragged product other than [M, K] by [E, K, N]")
    columns = next(axis for axis in range(3) if axis not in (groups[0], w_k[0]))
    e, k, n = ([atom.id for atom in weight.axes[axis]] for axis in (groups[0], w_k[0], columns))
    (a, b), of_expert = weight.parts(), weight.shape[groups[0]]
    if {RANK, *e, *k} != set(a.axes) or {RANK, *e, *n} != set(b.axes):
        raise NotFollowed("a ragged product of which the adapter's inputs are not contracted")
    rank = weight.a.shape[weight.a_axes.index(RANK)]
    first = _ordered(a, [*e, *k, RANK]).reshape(of_expert, -1, rank)
    second = _ordered(b, [*e, RANK, *n]).reshape(of_expert, rank, -1)
    rows = x if x_k[0] == 1 else x.T
    rows = _kept(weight, rows, _drawn(weight, weight.keys.reshape(-1)[0], rows.shape)) if weight.drops else rows
    options = {"precision": eqn.params["precision"], "preferred_element_type": accumulator(x.dtype)}
    dot = functools.partial(lax.ragged_dot, **options)
    hidden = dot(rows, first.astype(x.dtype), group_sizes) * weight.scaling
    return dot(hidden.astype(x.dtype), second.astype(x.dtype), group_sizes)


RULES: dict[str, Callable[[Any, Values], jax.Array]] = {
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot,
}


# ---------------------------------------------------------------------------------------------------------------


def _through(weight: Adapted, x: jax.Array, names: list[Any], wanted: list[Any], precision: Any) -> jax.Array:
    """f32[wanted]: x by A and then B, or by B and then A where it is B's axes that are contracted."""
    first, second = weight.parts()
    summed = set(names) - set(wanted)
    if summed & set(second.axes) and not summed & set(first.axes):
        first, second = second, first
    kept = [name for name in names if name not in summed or name in second.axes]
    kept += [name for name in first.axes if name not in kept and (name in second.axes or name in wanted)]
    rows = _dropped(weight, x, names.index(_ROWS))
    hidden = product(rows, names, first.array.astype(x.dtype), first.axes, kept, precision) * weight.scaling
    return product(hidden.astype(x.dtype), kept, second.array.astype(x.dtype), second.axes, wanted, precision)


def _dropped(weight: Adapted, x: jax.Array, axis: int) -> jax.Array:
    """x, whose rows lie along `axis`, with a share of it dropped and the rest scaled up, where there are keys."""
    if not weight.drops:
        return x
    if weight.drops_by_row:
        keys = weight.keys.reshape(-1, weight.keys.shape[-1])[0]  # key[R], of R * T rows
        shape = (*x.shape[:axis], x.shape[axis] // len(keys), *x.shape[axis + 1 :])
        kept = jax.vmap(lambda key: _drawn(weight, key, shape), out_axes=axis)(keys).reshape(x.shape)
    else:
        kept = _drawn(weight, weight.keys.reshape(-1)[0], x.shape)
    return _kept(weight, x, kept)


def _kept(weight: Adapted, x: jax.Array, kept: jax.Array) -> jax.Array:
    return jnp.where(kept, x / (1 - weight.dropout), jnp.zeros_like(x))


def _drawn(weight: Adapted, key: Any, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bernoulli(key, 1 - weight.dropout, shape)


def _check_rows(weight: Adapted, sizes: list[int]) -> None:
    """Raises NotFollowed unless the first axis of the inputs lists the rows that there are keys for."""
    rows = weight.keys.shape[-1]
    if not sizes or sizes[0] != rows:
        raise NotFollowed(f"dropout by the row, with {rows} keys for inputs whose free axes are {sizes}")


def _ordered(part: Any, names: list[Any]) -> jax.Array:
    return lax.transpose(part.array, [part.axes.index(name) for name in names])


def _check_floats(x: Any) -> None:
    if isinstance(x, Adapted) or is_packed(x):
        raise NotFollowed("a product of two weights")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise NotFollowed(f"a product with an array of {x.dtype}")
