"""The public function, by platform at lowering, and its gradient; laid out like int4_matmul/api.py.

    reference       all platforms   the oracle of reference.py: the experts appear dense
    xla             all platforms   xla.py: a form for each platform
    tpu             tpu             tpu.py: a Pallas kernel, for the tpu layout; tpu_transposed.py for its gradient
    tpu_interpret   cpu             the same by Pallas' interpreter, for tests

None takes the kernel on a TPU where it takes the weight, and XLA's form for the platform elsewhere. Under `jax.vmap`
the kernel runs once for each element, as its grid depends on the rows of each.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_int4_matmul import tpu
from pallas_kernels.grouped_int4_matmul.reference import grouped_int4_matmul_reference
from pallas_kernels.grouped_int4_matmul.tpu_transposed import grouped_int4_matmul_tpu_transposed
from pallas_kernels.grouped_int4_matmul.xla import grouped_input_cotangent, grouped_xla, rows_of_expert
from pallas_kernels.int4_matmul import gradients, tiles, xla
from pallas_kernels.int4_matmul.api import no_cotangent
from pallas_kernels.int4_matmul.precision import asks_for_float32, resolved_precision
from pallas_kernels.int4_matmul.registry import UnsupportedError, in_rows
from pallas_kernels.int4_matmul.spec import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.lowering_platform import by_lowering_platform
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.partitioned import alone_or_partitioned

IMPLEMENTATIONS = ("xla", "reference", "tpu", "tpu_interpret")


def grouped_int4_matmul(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    offset: jax.Array | None = None,
    *,
    group_sizes: jax.Array,
    spec: PackedSpec,
    implementation: str | None = None,
    preferred_element_type: Any = None,
    precision: Any = None,
    integers: bool = False,
) -> jax.Array:
    """`lax.ragged_dot(x, W, group_sizes)` with W[E, K, N] packed -> [M, N].

    Args:
      x: float[M, K], its rows sorted by expert.
      codes, scale, zero_point, offset: packed weights with one leading axis E, see int4_matmul/spec.py.
      group_sizes: i32[E], rows of each expert in turn; rows after their sum give zeros.
      spec: how codes and scales are to be read.
      implementation: None, or a name of those above: that one or an error.
      preferred_element_type: dtype of the result; None is x's. Sums are float32 in any case.
      precision: of the products.
      integers: x holds whole numbers of at most 127, which may be multiplied as int8 where that is faster.

    Raises:
      UnsupportedError: no such implementation, or it does not take the weight; while a program is lowered,
        for a platform that it does not run on.
      ValueError: shapes that do not fit the spec.
    """
    w, spec = in_rows(Packed(codes, scale, zero_point, offset), spec)
    codes = w.codes
    if implementation not in (None, *IMPLEMENTATIONS):
        raise UnsupportedError(
            f"unknown implementation {implementation!r} of grouped_int4_matmul: "
            f"wanted one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation in ("tpu", "tpu_interpret") and (reason := tpu.refusal(spec)):
        raise UnsupportedError(f"{implementation} of grouped_int4_matmul does not take {spec}: {reason}")
    _check(x, w, group_sizes, spec)
    dtype = jnp.dtype(preferred_element_type or x.dtype)
    rows, columns = x.shape[0], spec.columns(codes.shape)
    if 0 in (*x.shape, codes.shape[0], columns):
        return jnp.zeros((rows, columns), dtype)
    return _jitted(x, w, group_sizes, spec, implementation, dtype, resolved_precision(precision), integers)


def _check(x: jax.Array, w: Packed, group_sizes: jax.Array, spec: PackedSpec) -> None:
    codes = w.codes
    stored = -(-spec.length // 8) if spec.layout == "tpu" and codes.dtype == jnp.int32 else spec.packed_length
    if codes.ndim != 3 or x.ndim != 2 or x.shape[1] != spec.length or codes.shape[spec.k_axis] != stored:
        raise ValueError(f"x {x.shape} and codes {codes.shape} are not [M, K] and packed [E, K, N] of {spec}")
    if group_sizes.shape != codes.shape[:1]:
        raise ValueError(f"group_sizes has shape {group_sizes.shape}, wanted ({codes.shape[0]},), one for each expert")
    experts, groups, columns = codes.shape[0], spec.num_groups, spec.columns(codes.shape)
    for name, part in zip(("scale", "zero_point", "offset"), w[1:], strict=True):
        if part is None:
            continue
        wanted = [(experts, groups, n) if spec.orientation == "kn" else (experts, n, groups) for n in (columns, 1)]
        if spec.layout == "tpu":
            wanted = [(*shape[:2], 1, shape[2]) for shape in wanted]
        if part.shape not in wanted:
            raise ValueError(f"{name} has shape {part.shape}, wanted {wanted[0]} for codes {codes.shape} of {spec}")


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _jitted(x, w: Packed, group_sizes, spec: PackedSpec, implementation, dtype, precision, integers) -> jax.Array:
    if implementation == "reference":
        return grouped_int4_matmul_reference(x, *w, group_sizes, spec=spec, precision=precision).astype(dtype)
    x, w, group_sizes = vary_alike((x, w, group_sizes))
    return _product(x, w, group_sizes, spec, implementation, precision, integers).astype(dtype)


def _value(x, w: Packed, group_sizes, spec: PackedSpec, implementation, precision, integers) -> Any:
    def by_xla(platform: str):
        run = functools.partial(grouped_xla, spec=spec, platform=platform, precision=precision)
        return lambda x, w, sizes: run(x, tiles.squeezed_scales(w, spec), sizes).astype(xla.accumulator(x.dtype))

    @jax.custom_batching.sequential_vmap
    def by_kernel(x, w, sizes):
        interpret = implementation == "tpu_interpret"
        run = functools.partial(tpu.grouped_int4_matmul_tpu, precision=precision, interpret=interpret)
        return run(x, w, sizes, spec, integers=integers).astype(xla.accumulator(x.dtype))

    forms = _forms(by_kernel, by_xla, spec, implementation)
    return by_lowering_platform(forms, x, w, group_sizes, refusal=functools.partial(_unsupported_on, implementation))


def _forms(by_kernel: Any, by_xla: Any, spec: PackedSpec, implementation: str | None) -> dict[str, Any]:
    """The form for each platform."""
    if implementation in ("tpu", "tpu_interpret"):
        return {"tpu" if implementation == "tpu" else "cpu": by_kernel}
    forms = {platform: by_xla(platform) for platform in ("cpu", "tpu", "gpu")}
    if implementation is None and tpu.refusal(spec) is None:
        forms["tpu"] = alone_or_partitioned(by_kernel, forms["tpu"])
    return forms


def _unsupported_on(implementation: str | None, platforms: Sequence[str]) -> UnsupportedError:
    return UnsupportedError(
        f"{implementation} of grouped_int4_matmul runs on a TPU, and this program is lowered for {', '.join(platforms)}"
    )


_product: Any = jax.custom_vjp(_value, nondiff_argnums=(3, 4, 5, 6))


def _forward(x, w, group_sizes, spec, implementation, precision, integers):
    return _product(x, w, group_sizes, spec, implementation, precision, integers), (x, w, group_sizes)


def _backward(spec, implementation, precision, integers, residuals, dy):
    del integers
    x, own, group_sizes = residuals
    w = tiles.flat_scales(own, spec)

    def to_input(platform: str):
        run = functools.partial(
            grouped_input_cotangent, spec=spec, dtype=x.dtype, platform=platform, precision=precision
        )
        return lambda dy, own, sizes: run(dy, tiles.squeezed_scales(own, spec), sizes).astype(x.dtype)

    @jax.custom_batching.sequential_vmap
    def by_kernel(dy, own, sizes):
        run = functools.partial(grouped_int4_matmul_tpu_transposed, interpret=implementation == "tpu_interpret")
        return run(dy, own, sizes, spec).astype(x.dtype)

    exact = "xla" if asks_for_float32(x.dtype, precision) else implementation
    forms, refusal = _forms(by_kernel, to_input, spec, exact), functools.partial(_unsupported_on, implementation)
    dx = by_lowering_platform(forms, dy, own, group_sizes, refusal=refusal)

    def to_scale(pair):
        expert, weight = pair
        return gradients.scale_cotangent(rows_of_expert(x, group_sizes, expert), dy, weight, spec)

    def to_offset(expert):
        return gradients.offset_cotangent(rows_of_expert(x, group_sizes, expert), dy, spec)

    experts = jnp.arange(w.codes.shape[0])
    dscale = gradients.like(lax.map(to_scale, (experts, w)), own.scale)
    doffset = None if w.offset is None else gradients.like(lax.map(to_offset, experts), own.offset)
    dw = Packed(no_cotangent(own.codes), dscale, no_cotangent(own.zero_point), doffset)
    return dx, dw, no_cotangent(group_sizes)


_product.defvjp(_forward, _backward)
