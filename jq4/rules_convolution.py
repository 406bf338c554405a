"""A convolution with a packed kernel: a sum over kernel positions of shifted inputs times packed matrices.

    out[b, *o, n] = sum over positions p of  x[b, *(o * stride + p * rhs_dilation), :] @ W[*p, :, n]

Each W[*p] is a packed [Cin, Cout] matrix grouped along Cin, so nothing is unpacked; x is padded (and dilated) once,
and each position's input is a strided slice of it. Kernels grouped along another axis, and convolutions in feature or
batch groups (depthwise ones have one input channel: nothing to contract), have no packed form.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jq4 import qarray_ops
from jq4.matmul import dot_general as packed_dot_general
from jq4.packed_leaf import is_packed
from jq4.qarray import QArray
from jq4.qarray_ops import NoPackedForm

Values = list[Any]


def conv_general_dilated(eqn: Any, values: Values) -> Values:
    x, leaf = values
    params = eqn.params
    _refuse_what_does_not_contract(x, leaf, params)
    numbers = params["dimension_numbers"]
    if 0 in eqn.outvars[0].aval.shape:
        return [jnp.zeros(eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype)]
    x = lax.transpose(x, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))  # [B, *S, Cin]
    _, _, *kernel_axes = numbers.rhs_spec
    kernel = leaf.transposed((*kernel_axes, numbers.rhs_spec[1], numbers.rhs_spec[0])).settle()  # [*P, Cin, Cout]
    wanted = eqn.outvars[0].aval
    accumulator = jnp.float32 if wanted.dtype.itemsize < 4 else wanted.dtype  # one sum over all positions
    out_shape = [wanted.shape[axis] for axis in numbers.out_spec[2:]]
    x = _padded(x, params["padding"], params["lhs_dilation"])
    out = None
    for position in itertools.product(*map(range, kernel.shape[:-2])):
        rows = _window(x, position, out_shape, params["window_strides"], params["rhs_dilation"])  # [B, *O, Cin]
        contract = (((rows.ndim - 1,), (0,)), ((), ()))
        term = packed_dot_general(
            rows, _matrix_at(kernel, position), contract, weight_side="rhs",
            preferred_element_type=accumulator, precision=params["precision"],
        )  # fmt: skip
        out = term if out is None else out + term
    if out is None:
        raise NoPackedForm("a convolution with an empty kernel")
    batch, channel, *space = numbers.out_spec
    order = [0] * out.ndim  # axis `to` of the result is axis `at` of [B, *O, Cout]
    for at, to in enumerate((batch, *space, channel)):
        order[to] = at
    return [lax.transpose(out.astype(wanted.dtype), order)]


def _refuse_what_does_not_contract(x: Any, leaf: Any, params: dict[str, Any]) -> None:
    if is_packed(x) or not is_packed(leaf):
        raise NoPackedForm("a convolution of a packed array")
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        raise NoPackedForm("a convolution in feature or batch groups")
    if leaf.grouped_axis != params["dimension_numbers"].rhs_spec[1]:
        raise NoPackedForm(
            f"the kernel of shape {leaf.shape} is grouped along its axis {leaf.grouped_axis}, the convolution "
            f"contracts its input channels, axis {params['dimension_numbers'].rhs_spec[1]}"
        )


def _padded(x: jax.Array, padding: Any, dilation: Any) -> jax.Array:
    """x[B, *S, Cin] with its spatial axes dilated, then padded (or, where negative, cropped)."""
    config = [
        (0, 0, 0),
        *((low, high, step - 1) for (low, high), step in zip(padding, dilation, strict=True)),
        (0, 0, 0),
    ]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _window(x: jax.Array, position: Any, out_shape: Any, strides: Any, dilation: Any) -> jax.Array:
    """The input that meets the kernel at `position`, for every place of the output: [B, *O, Cin]."""
    starts = [0, *(p * d for p, d in zip(position, dilation, strict=True)), 0]
    steps = [1, *strides, 1]
    counts = [x.shape[0], *out_shape, x.shape[-1]]
    limits = [start + (count - 1) * step + 1 for start, count, step in zip(starts, counts, steps, strict=True)]
    return lax.slice(x, starts, limits, steps)


def _matrix_at(kernel: QArray, position: Any) -> QArray:
    """W[*position] as a packed [Cin, Cout]."""
    for place in position:
        kernel = qarray_ops.index(kernel, place, axis=0)
    return kernel


RULES = {"conv_general_dilated": conv_general_dilated}
