"""Products with a packed weight: `matmul`, `dot_general` and `ragged_dot`, in terms of the kernels of floor 1.

Every contraction is brought to the one batched form that the kernels have,

    x[*B, M, K] @ W[*B, K, N] -> [*B, M, N]       W as [K, N] or as [N, K], whichever needs no transpose

by moving and merging whole axes of codes and scales (jq4.qarray_ops), never by unpacking. Several contracted axes
merge into one K where groups stay whole (a DenseGeneral's [H, D, O] grouped along D, D a multiple of the group);
where they do not, the outer ones become a batch whose products are summed. A contraction that is not along the
grouped axis has no packed form: `NoPackedForm` says so.

What a weight says of its inputs is done to them first: times `input_scale`, rotated (jq4.input_rotation), and rounded
to few bits (jq4.activations).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jq4 import qarray_ops
from jq4.activations import fits_of, in_steps
from jq4.integer_product import has_integer_product, integer_product
from jq4.partition import Partition, merged_or_noted, sharded_product, sharded_ragged_product
from jq4.product_inputs import expert_of_rows, placed, scaled_and_rotated
from jq4.qarray import NEUTRAL, QArray, is_qarray
from jq4.qarray_ops import NoPackedForm as NoPackedForm
from jq4.record import note_relay, relay_to_note
from pallas_kernels.grouped_int4_matmul import grouped_int4_matmul
from pallas_kernels.int4_matmul import PackedSpec, int4_matmul
from pallas_kernels.int4_matmul.registry import BACKENDS, OF_FRAGMENTS, choose, refusal

DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def matmul(x: jax.Array, q: Any) -> jax.Array:
    """x[..., K] @ q[..., K, N], as jnp.matmul: leading axes of a stacked q are batch axes. A dense q is accepted.

    The result has the dtype that jnp.matmul gives for q's dtype.

    Raises:
      NoPackedForm: q is not grouped along K, its axis -2.
    """
    if not is_qarray(q):
        return jnp.matmul(x, q)
    if q.axis != -2:
        raise NoPackedForm(f"matmul(x, q) contracts axis -2 of q, but {q!r} is grouped along axis {q.axis}")
    wanted = jax.eval_shape(jnp.matmul, x, jax.ShapeDtypeStruct(q.shape, q.dtype))
    rows = jnp.atleast_2d(x).astype(wanted.dtype)  # [*X, M, K]
    batch = q.shape[:-2]
    extra = max(rows.ndim - 2 - len(batch), 0)  # leading axes of x that the weight does not have
    rows = jnp.broadcast_to(rows, (*rows.shape[:extra], *batch, *rows.shape[-2:]))  # [*X, *B, M, K]
    x_batch, w_batch = tuple(range(extra, extra + len(batch))), tuple(range(len(batch)))
    numbers = (((rows.ndim - 1,), (q.ndim - 2,)), (x_batch, w_batch))
    out = dot_general(rows, qarray_ops.astype(q, wanted.dtype), numbers, weight_side="rhs")  # [*B, *X, M, N]
    order = (*(axis + len(batch) for axis in range(extra)), *range(len(batch)), out.ndim - 2, out.ndim - 1)
    return lax.transpose(out, order).reshape(wanted.shape)


def dot_general(
    x: jax.Array,
    q: QArray,
    dimension_numbers: DimensionNumbers,
    *,
    weight_side: str,
    preferred_element_type: Any = None,
    precision: Any = None,
    implementation: Any = None,
    partition: Partition | None = None,
    path: str = "the weight",
) -> jax.Array:
    """`lax.dot_general` with one dense and one packed operand; the weight is never unpacked as a whole.

    Args:
      x: the dense operand.
      q: the packed operand.
      dimension_numbers: as lax.dot_general's, for the operands in their order (lhs, rhs).
      weight_side: "lhs" if q is the left operand, "rhs" if the right one.
      preferred_element_type: as lax.dot_general's.
      precision: as lax.dot_general's.
      implementation: as pallas_kernels.int4_matmul's: None, a name, or several.
      partition: how the weight lies on several devices, each of which then multiplies what it holds.
      path: what an error calls the weight.

    Returns:
      What lax.dot_general would: batch axes, free axes of lhs, free axes of rhs; its dtype for q.dtype.

    Raises:
      NoPackedForm: the grouped axis is not contracted.
    """
    wanted = _result_of(x, q, dimension_numbers, weight_side, preferred_element_type)
    _refuse_other_than_floats(wanted.dtype)
    if 0 in wanted.shape:
        return jnp.zeros(wanted.shape, wanted.dtype)
    contract, batch = dimension_numbers
    if weight_side == "lhs":
        contract, batch = contract[::-1], batch[::-1]
    (x_contract, w_contract), (x_batch, w_batch) = (_positive(contract, x, q), _positive(batch, x, q))
    if q.axis % q.ndim not in w_contract:
        raise NoPackedForm(f"the product contracts axes {w_contract} of {q!r}, which is grouped along axis {q.axis}")
    fits = fits_of(q.activations)
    x, q, step = _prepared_inputs(x, q, (x_contract, w_contract), (x_batch, w_batch))
    x, q = _in_packed_order(x, q, (x_contract, w_contract), (x_batch, w_batch))
    x_contract, w_contract = _grouped_last(x_contract, w_contract, q)
    x_free = [axis for axis in range(x.ndim) if axis not in (*x_contract, *x_batch)]
    w_free = [axis for axis in range(q.ndim) if axis not in (*w_contract, *w_batch)]
    batch_shape, m_shape, n_shape = (
        [x.shape[a] for a in x_batch], [x.shape[a] for a in x_free], [q.shape[a] for a in w_free]
    )  # fmt: skip
    rows = lax.transpose(x, (*x_batch, *x_free, *x_contract))  # [*B, *M, *K]
    weight = _canonical(q, w_batch, w_contract, w_free)  # [*B, *C, K, N] or [*B, *C, N, K]
    summed = weight.ndim - 2 - len(batch_shape)  # contracted axes that did not merge into K
    rows = rows.reshape(*batch_shape, math.prod(m_shape), *weight.shape[len(batch_shape) :][:summed], -1)
    rows = jnp.moveaxis(rows, len(batch_shape), -2)  # [*B, *C, M, K]
    accumulator = _accumulator(wanted.dtype, summed or step is not None)
    if fits == "int8" and implementation is None and has_integer_product(weight):
        out = integer_product(rows, weight)
    else:
        product = functools.partial(
            packed_matmul, dtype=accumulator, precision=precision, implementation=implementation, fits=fits
        )
        contracted = [[a] for a in w_contract] if summed else [w_contract]
        axes = [[a] for a in w_batch] + (
            [*contracted, w_free] if weight.axis == -2 else [*contracted[:-1], w_free, contracted[-1]]
        )
        out = sharded_product(product, rows, weight, merged_or_noted(partition, q, axes), path)
    if summed:
        out = jnp.sum(out, axis=tuple(range(len(batch_shape), len(batch_shape) + summed)))
    if step is not None:
        order = (*x_batch, *x_free, *x_contract)
        out = out * lax.transpose(step, order).reshape(*batch_shape, -1, 1).astype(out.dtype)
    out = out.astype(wanted.dtype).reshape(*batch_shape, *m_shape, *n_shape)
    if weight_side == "lhs":
        b, m = len(batch_shape), len(m_shape)
        out = lax.transpose(out, (*range(b), *range(b + m, out.ndim), *range(b, b + m)))
    return out


def ragged_dot(
    x: jax.Array,
    q: QArray,
    group_sizes: jax.Array,
    *,
    preferred_element_type: Any = None,
    precision: Any = None,
    implementation: Any = None,
    partition: Partition | None = None,
    path: str = "the weight",
) -> jax.Array:
    """`lax.ragged_dot(x[M, K], q[E, K, N], group_sizes[E])` with q packed along K (its axis -2).

    Rows after the last group give zeros. The dtype is that of lax.ragged_dot for q's dtype.

    Raises:
      NoPackedForm: q is not grouped along K, or is activation-ordered.
    """
    operands = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, q, group_sizes))
    wanted = jax.eval_shape(
        lambda x, w, sizes: lax.ragged_dot(x, w, sizes, preferred_element_type=preferred_element_type), *operands
    )
    _refuse_other_than_floats(wanted.dtype)
    if q.axis != -2 or q.ndim != 3:
        raise NoPackedForm(f"ragged_dot contracts axis -2 of [E, K, N], but {q!r} is grouped along axis {q.axis}")
    if q.permutation is not None:
        raise NoPackedForm("a ragged product with activation-ordered experts")
    if 0 in wanted.shape:
        return jnp.zeros(wanted.shape, wanted.dtype)
    q = _with_whole_batch(q)
    _note_unpacked(q, implementation, OF_FRAGMENTS[:1])
    fits = fits_of(q.activations)
    x, step = _ragged_inputs(x, q, group_sizes)
    accumulator = _accumulator(wanted.dtype, step is not None)

    def product(x: jax.Array, q: QArray, group_sizes: jax.Array) -> jax.Array:
        return grouped_int4_matmul(
            x, q.codes, q.scale, q.zero_point, q.offset, group_sizes=group_sizes, spec=spec_of(q),
            preferred_element_type=accumulator, precision=precision, implementation=implementation,
            fits=fits,
        )  # fmt: skip

    out = sharded_ragged_product(product, x, q, group_sizes, partition, path)
    return out if step is None else (out * step.astype(out.dtype)).astype(wanted.dtype)


def packed_matmul(
    x: jax.Array, q: QArray, dtype: Any, precision: Any = None, implementation: Any = None, fits: str = ""
) -> jax.Array:
    """x[*B, M, K] @ W[*B, K, N] for q of logical shape [*B, K, N] (axis -2) or [*B, N, K] (axis -1).

    `fits` is a dtype of 8 bits that holds every number of x, "int8" or "float8_e4m3fn", or "".
    """
    q = _with_whole_batch(q)
    if q.layout == NEUTRAL and q.format == "int4" and jax.default_backend() != "cpu":
        note_relay(q, f"unpacked from neutral bytes at every call on {jax.default_backend()}: jq4.prepare does it once")
    _note_unpacked(q, implementation)
    return int4_matmul(
        _noting_gradients(x, q, implementation), q.codes, q.scale, q.zero_point, q.offset,
        spec=spec_of(q), preferred_element_type=dtype, precision=precision, implementation=implementation,
        fits=fits,
    )  # fmt: skip


def spec_of(q: QArray) -> PackedSpec:
    """The static half of a weight [*B, K, N] or [*B, N, K], as floor 1 wants it."""
    orientation = {"tpu": "kn", "gpu": "nk", "hopper": "kn"}.get(q.layout, "kn" if q.axis == -2 else "nk")
    return PackedSpec(
        length=q.shape[q.axis], bits=q.bits, levels=q.number_format.levels, group_size=q.group_size,
        orientation=orientation, layout=q.layout,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------


def _note_unpacked(q: QArray, implementation: Any, readers: Sequence[str] = OF_FRAGMENTS) -> None:
    """Notes that a weight of the hopper layout is unpacked at every call, where none of `readers` reads it."""
    if q.layout != "hopper" or choose(implementation, "gpu", spec_of(q)) in readers:
        return
    reasons = [refusal(name, "gpu", spec_of(q)) for name in readers]
    reason = "; ".join(filter(None, reasons)) if all(reasons) else f"{implementation} was asked for"
    note_relay(q, f"unpacked from the hopper layout at every call: {reason}")


def _noting_gradients(x: jax.Array, q: QArray, implementation: Any) -> jax.Array:
    """x, whose gradient notes that it unpacks a weight of the hopper layout, where its reader has no transpose."""
    reader = choose(implementation, "gpu", spec_of(q)) if q.layout == "hopper" else None
    if reader not in OF_FRAGMENTS or BACKENDS[reader].transposed is not None:
        return x
    note = relay_to_note(q, f"unpacked from the hopper layout at every gradient by x: {reader} has no transpose")
    if note is None:
        return x

    def backward(_: None, dy: jax.Array) -> tuple[jax.Array]:
        note()
        return (dy,)

    noting = jax.custom_vjp(lambda x: x)
    noting.defvjp(lambda x: (x, None), backward)
    return noting(x)


def _with_whole_batch(q: QArray) -> QArray:
    """Dense scales whose stacked axes are as long as the codes' (they may be 1: one scale for the whole stack)."""
    q = qarray_ops.plain_scales(q)
    batch = q.codes.shape[:-2]

    def whole(part: Any) -> Any:
        if part is None or part.shape[: len(batch)] == batch:
            return part
        return jnp.broadcast_to(part, (*batch, *part.shape[len(batch) :]))

    return dataclasses.replace(q, scale=whole(q.scale), zero_point=whole(q.zero_point), offset=whole(q.offset))


def _refuse_other_than_floats(dtype: Any) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise NoPackedForm(f"a product of dtype {dtype}")


def _result_of(x: jax.Array, q: QArray, numbers: Any, weight_side: str, preferred: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype (and the errors) of lax.dot_general on the dense weight."""
    operands = (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(q.shape, q.dtype))
    if weight_side not in ("lhs", "rhs"):
        raise ValueError(f"weight_side is {weight_side!r}, wanted 'lhs' or 'rhs'")
    operands = operands[::-1] if weight_side == "lhs" else operands
    return jax.eval_shape(
        lambda lhs, rhs: lax.dot_general(lhs, rhs, numbers, preferred_element_type=preferred), *operands
    )


def _positive(pair: Any, x: jax.Array, q: QArray) -> tuple[list[int], list[int]]:
    return [int(a) % x.ndim for a in pair[0]], [int(a) % q.ndim for a in pair[1]]


def _accumulator(dtype: Any, summed: bool | int) -> Any:
    return jnp.float32 if summed and jnp.dtype(dtype).itemsize < 4 else dtype


def _prepared_inputs(
    x: jax.Array, q: QArray, contract: tuple[list[int], list[int]], batch: tuple[list[int], list[int]]
) -> tuple[jax.Array, QArray, jax.Array | None]:
    """(x times its scales, rotated, rounded; the weight without all that; the step f32 that the product is times)."""
    scale = None if q.input_scale is None else _beside_inputs(q.input_scale, "input_scale", x.ndim, contract, batch)
    x = scaled_and_rotated(x, scale, q.input_rotation, contract[0][contract[1].index(q.axis % q.ndim)])
    step = None
    if q.activations:
        fixed = q.activation_scale
        fixed = None if fixed is None else _beside_inputs(fixed, "activation_scale", x.ndim, contract, batch)
        x, step = in_steps(x, q.activations, contract[0], fixed)
        rows = [1 if axis in contract[0] else size for axis, size in enumerate(x.shape)]
        step = jnp.broadcast_to(step, rows)
    plain = dataclasses.replace(q, input_scale=None, activation_scale=None, activations="", input_rotation=0)
    return x, plain, step


def _beside_inputs(
    part: jax.Array, name: str, ndim: int, contract: tuple[list[int], list[int]], batch: tuple[list[int], list[int]]
) -> jax.Array:
    """A part with the weight's axes as one that broadcasts to x: each axis where x has its partner."""
    partner = dict(zip((*contract[1], *batch[1]), (*contract[0], *batch[0]), strict=True))
    places = {axis: partner.get(axis) for axis, size in enumerate(part.shape) if size > 1}
    if None in places.values():
        raise NoPackedForm(f"a product with {name} of shape {part.shape} that varies along an axis of its result")
    return placed(part, {axis: place for axis, place in places.items() if place is not None}, ndim)


def _ragged_inputs(x: jax.Array, q: QArray, group_sizes: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """`_prepared_inputs` for rows x[M, K] sorted by expert."""
    expert = expert_of_rows(group_sizes, x.shape[0])

    def of_rows(part: jax.Array) -> jax.Array:
        whole = part[:, :, 0]  # [E, K] or [1, K]; [E, 1] for a step
        return whole if whole.shape[0] == 1 else jnp.take(whole, expert, axis=0, mode="clip")

    x = scaled_and_rotated(x, None if q.input_scale is None else of_rows(q.input_scale), q.input_rotation, -1)
    if not q.activations:
        return x, None
    fixed = None if q.activation_scale is None else of_rows(q.activation_scale)
    return in_steps(x, q.activations, (1,), fixed)


def _in_packed_order(
    x: jax.Array, q: QArray, contract: tuple[list[int], list[int]], batch: tuple[list[int], list[int]]
) -> tuple[jax.Array, QArray]:
    """x with its columns gathered as an activation-ordered weight holds its rows; such a weight loses its order."""
    if q.permutation is None:
        return x, q
    (x_contract, w_contract), (x_batch, w_batch) = contract, batch
    column = x_contract[w_contract.index(q.axis % q.ndim)]
    stacked = q.permutation.ndim - 1
    if any(axis not in w_batch for axis in range(stacked)):
        raise NoPackedForm("stacked activation-ordered weights whose stack is not a batch of the product")
    places = [*(x_batch[w_batch.index(axis)] for axis in range(stacked)), column]
    shape = [q.permutation.shape[places.index(axis)] if axis in places else 1 for axis in range(x.ndim)]
    order = sorted(range(len(places)), key=lambda at: places[at])
    columns = lax.transpose(q.permutation, order).reshape(shape)
    return jnp.take_along_axis(x, columns, axis=column), dataclasses.replace(q, permutation=None)


def _grouped_last(x_contract: list[int], w_contract: list[int], q: QArray) -> tuple[list[int], list[int]]:
    """Contracted axes in the weight's own order, the grouped one last, so that they can merge into K."""
    grouped = q.axis % q.ndim
    pairs = sorted(zip(w_contract, x_contract, strict=True), key=lambda pair: (pair[0] == grouped, pair[0]))
    return [x for _, x in pairs], [w for w, _ in pairs]


def _canonical(q: QArray, batch: list[int], contract: list[int], free: list[int]) -> QArray:
    """[*B, *C, K, N] or [*B, *C, N, K]: contracted axes merged into K where groups stay whole, else left in C."""
    free_first = bool(free) and free[-1] < contract[-1]
    lead, outer = len(batch), len(contract) - 1
    prepared = q.layout != NEUTRAL
    if prepared and not (outer == 0 and len(free) == 1 and sorted(batch) == list(range(lead)) and lead == q.ndim - 2):
        q = qarray_ops.neutral(q, "dot_general")
        prepared = False
    order = [*batch, *contract[:-1], *free, contract[-1]] if free_first else [*batch, *contract, *free]
    q = qarray_ops.transpose(q, order)
    if prepared:
        return q
    columns = math.prod(q.shape[lead + outer : -1] if free_first else q.shape[lead + outer + 1 :])
    k, batch_shape, outer_shape = q.shape[q.axis], q.shape[:lead], q.shape[lead : lead + outer]
    if outer and not free_first:
        try:
            return qarray_ops.reshape(q, (*batch_shape, math.prod(outer_shape) * k, columns))
        except NoPackedForm:
            pass
    elif outer:
        swapped = qarray_ops.transpose(
            q, [*range(lead), *range(lead + outer, q.ndim - 1), *range(lead, lead + outer), q.ndim - 1]
        )
        try:
            return qarray_ops.reshape(swapped, (*batch_shape, columns, math.prod(outer_shape) * k))
        except NoPackedForm:
            pass
    tail = (columns, k) if free_first else (k, columns)
    return qarray_ops.reshape(q, (*batch_shape, *outer_shape, *tail))
