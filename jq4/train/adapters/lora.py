"""`lora`: adapters for a tree's weights, and where they begin.

    zero       A uniform in +-1/sqrt(K), B zero (Hu et al. 2021; PEFT's range): the function is what it was
    residual   A B the best approximation of what quantizing lost, W - dequantize(Q), W being `reference`: one step of
               LoftQ (Li et al. 2023) that leaves the packed weights as they are. Nothing but the weights is looked at;
               leaves that stayed dense lost nothing, and begin at zero

Alternating between codes and adapters changes the packed weights too, so that it is a function of its own
(jq4.train.adapters.loftq). A's numbers depend on the key and the leaf's path, not on which other leaves have adapters.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jq4.errors import JQ4Error
from jq4.outputs import is_array
from jq4.paths import find_path, flatten_with_paths
from jq4.qarray import is_qarray
from jq4.quantize import role_of
from jq4.targets import EMBEDDINGS, HEADS, NORMS, as_patterns, axis_by_name, matches
from jq4.train.adapters.adapter import Adapter, Adapters
from jq4.train.adapters.low_rank import low_rank

ZERO, RESIDUAL = "zero", "residual"
IGNORE = (NORMS, EMBEDDINGS, HEADS)
Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # stacked, inputs, outputs


def lora(
    params: Any,
    rank: int,
    targets: Sequence[str] | str = ("Linear",),
    *,
    ignore: Sequence[str] | str = IGNORE,
    alpha: float | None = None,
    rslora: bool = False,
    key: Any = None,
    init: str = ZERO,
    reference: Any = None,
    axes: Mapping[str, int] | None = None,
) -> Adapters:
    """Low-rank adapters for the weights of a tree, packed or dense; traces.

    Args:
      params: the tree that the function will be given, QArrays of any format or arrays; shapes alone do for a trace.
      rank: r, columns of A and rows of B.
      targets: patterns of leaves that get adapters, as a recipe's (jq4.targets). By default every linear layer's.
      ignore: patterns of leaves that get none. By default norms, embeddings and the output head.
      alpha: A B is scaled by alpha / rank; None is `rank`, for 1.
      rslora: scale by alpha / sqrt(rank).
      key: a JAX key for A; None is jax.random.key(0).
      init: "zero" or "residual", see the module's text.
      reference: the dense tree that `params` were quantized from, for "residual".
      axes: what `jq4.contraction_axes` gives: which axes of a leaf are contracted, and which are stacked. Without it
        they are told by the axis that a packed leaf is grouped along, or by its name.

    Returns:
      The adapters, in float32: what `jq4.with_lora(f)` takes beside the params.

    Raises:
      JQ4Error: no leaf is meant; a leaf's axes cannot be told; a rank that a leaf is too small for; an alpha that is
        not above 0; a reference that lacks the leaf, or is missing or given in vain.
    """
    check_size(rank, alpha)
    _check(init, reference)
    leaves = targeted(params, targets, ignore, axes)
    key = jax.random.key(0) if key is None else key
    dense = {} if reference is None else dict(flatten_with_paths(reference))
    found = {}
    for path, leaf in leaves.items():
        of_leaf = axes_of(path, leaf, axes)
        options = {"alpha": float(rank if alpha is None else alpha), "rslora": rslora}
        if init == ZERO or not is_qarray(leaf):
            found[path] = begun(path, leaf, rank, of_leaf, key, options)
        else:
            found[path] = of_difference(path, _in_reference(path, leaf, dense), leaf, rank, of_leaf, options)
    return Adapters(found)


def check_size(rank: int, alpha: float | None) -> None:
    """Raises JQ4Error for a rank, or a numerator of the scaling, that adapters cannot have."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise JQ4Error(f"rank is {rank!r}, wanted a whole number of 1 or more")
    if alpha is not None and not 0 < alpha < math.inf:
        raise JQ4Error(f"alpha is {alpha!r}, wanted a number above 0; without one A B is scaled by 1")


def targeted(
    params: Any, targets: Sequence[str] | str, ignore: Sequence[str] | str, axes: Mapping[str, int] | None
) -> dict[str, Any]:
    """Path -> leaf of the float matrices that the patterns mean, in tree order."""
    wanted, left = as_patterns(targets, "jq4.lora", "targets"), as_patterns(ignore, "jq4.lora", "ignore")
    leaves = dict(flatten_with_paths(params))
    found = {path: leaf for path, leaf in leaves.items() if _is_meant(path, leaf, wanted, left, axes)}
    if not found:
        raise JQ4Error(
            f"no leaf is a matrix that targets {list(wanted)} mean, but for those to ignore, {list(left)}: wanted "
            f"patterns that mean some of {', '.join(list(leaves)[:5])}{', ...' if len(leaves) > 5 else ''}"
        )
    return found


def axes_of(path: str, leaf: Any, axes: Mapping[str, int] | None) -> Axes:
    """The leaf's axes that stack matrices, that are contracted, and that the result has; negative, ascending."""
    ndim = len(leaf.shape)
    known = find_path(getattr(axes, "products", {}), path)
    if known is not None:
        stacked, inputs = known.stacked, known.contracted
    else:
        axis = find_path(axes or {}, path)
        axis = leaf.axis if axis is None and is_qarray(leaf) else axis
        axis = axis_by_name(path) if axis is None else axis
        if axis is None or not -ndim <= axis < 0:
            raise JQ4Error(
                f"{path}: which axis of {tuple(leaf.shape)} is contracted is not told by its name (found {axis}): "
                "pass axes=jq4.contraction_axes(f, params, ...)"
            )
        stacked, inputs = tuple(range(-ndim, min(axis, -2))), (axis,)
    outputs = tuple(each for each in range(-ndim, 0) if each not in (*stacked, *inputs))
    if set(stacked) & set(inputs):
        raise JQ4Error(f"{path}: the function contracts axes {inputs} and stacks along {stacked} of {leaf.shape}")
    return stacked, inputs, outputs


def begun(path: str, leaf: Any, rank: int, axes: Axes, key: Any, options: Mapping[str, Any]) -> Adapter:
    """A random, B zero."""
    (stack, inputs, outputs), (rows, _) = _sizes(path, leaf, rank, axes)
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    bound = rows**-0.5
    a = jax.random.uniform(key, (*stack, *inputs, rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*stack, rank, *outputs), jnp.float32)
    return Adapter(a, b, stacked=axes[0], inputs=axes[1], outputs=axes[2], **options)


def of_difference(
    path: str, weight: Any, approximation: Any, rank: int, axes: Axes, options: Mapping[str, Any]
) -> Adapter:
    """The adapter of the best approximation of weight - approximation; arrays or QArrays."""
    (stack, inputs, outputs), (rows, columns) = _sizes(path, weight, rank, axes)
    exact, near = (
        each.dequantize(jnp.float32) if is_qarray(each) else jnp.asarray(each, jnp.float32)
        for each in (weight, approximation)
    )
    order = [axis % exact.ndim for axis in (*axes[0], *axes[1], *axes[2])]
    matrices = lax.transpose(exact - near, order).reshape(*stack, rows, columns)
    a, b = low_rank(matrices, rank)
    found = Adapter(
        a.reshape(*stack, *inputs, rank), b.reshape(*stack, rank, *outputs),
        stacked=axes[0], inputs=axes[1], outputs=axes[2], **options,
    )  # fmt: skip
    unit = found.scaling**-0.5
    return dataclasses.replace(found, a=found.a * unit, b=found.b * unit)


# ---------------------------------------------------------------------------------------------------------------


def _check(init: str, reference: Any) -> None:
    if init not in (ZERO, RESIDUAL):
        loftq = ". LoftQ changes the packed weights as well: jq4.loftq(params, recipe, rank)" if init == "loftq" else ""
        raise JQ4Error(f"init is {init!r}, wanted {ZERO!r} or {RESIDUAL!r}{loftq}")
    if (reference is None) == (init == RESIDUAL):
        told = (
            "wants the dense tree as reference" if reference is None else f"looks at no reference, as {RESIDUAL!r} does"
        )
        raise JQ4Error(f"init {init!r} {told}")


def _is_meant(path: str, leaf: Any, targets: Sequence[str], ignore: Sequence[str], axes: Any) -> bool:
    if not (is_qarray(leaf) or is_array(leaf)) or len(leaf.shape) < 2:
        return False
    role = role_of(path, None, axes)
    if not jnp.issubdtype(jnp.dtype(leaf.dtype), jnp.floating) or any(matches(each, path, role) for each in ignore):
        return False
    return any(matches(each, path, role) for each in targets)


def _sizes(path: str, leaf: Any, rank: int, axes: Axes) -> tuple[list[list[int]], tuple[int, int]]:
    """The sizes of the stacked axes, the inputs and the outputs; (K, N)."""
    sizes = [[leaf.shape[axis] for axis in some] for some in axes]
    rows, columns = math.prod(sizes[1]), math.prod(sizes[2])
    if rank > min(rows, columns):
        raise JQ4Error(
            f"{path}: rank {rank} of matrices {rows} x {columns}, wanted at most {min(rows, columns)}: choose a lower "
            "rank, or leave the leaf out of targets"
        )
    return sizes, (rows, columns)


def _in_reference(path: str, leaf: Any, dense: Mapping[str, Any]) -> Any:
    found = find_path(dense, path)
    if found is None:
        raise JQ4Error(f"{path}: is not in the reference: wanted the dense tree that these params were quantized from")
    if tuple(found.shape) != tuple(leaf.shape):
        raise JQ4Error(f"{path}: the reference's leaf has shape {tuple(found.shape)}, wanted {tuple(leaf.shape)}")
    return found
