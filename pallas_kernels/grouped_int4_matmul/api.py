"""The public function, by platform at lowering, and its gradient; laid out like int4_matmul/api.py.

    reference       all platforms   the oracle of reference.py: the experts appear dense
    xla             all platforms   xla.py: a form for each platform
    tpu             tpu             tpu.py: a Pallas kernel, for the tpu layout; tpu_transposed.py for its gradient
    tpu_interpret   cpu             the same by Pallas' interpreter, for tests
    mosaic_gpu      gpu             mosaic_gpu.py: a Pallas kernel for Hopper GPUs, for the hopper layout;
                                    mosaic_gpu_transposed.py for its gradient

None takes the platform's kernel where it takes the weight, and XLA's form for the platform elsewhere. Under `jax.vmap`
a kernel runs once for each element, as its grid depends on the rows of each.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_int4_matmul import mosaic_gpu, tpu
from pallas_kernels.grouped_int4_matmul.mosaic_gpu_transposed import grouped_int4_matmul_mosaic_gpu_transposed
from pallas_kernels.grouped_int4_matmul.reference import grouped_int4_matmul_reference
from pallas_kernels.grouped_int4_matmul.tpu_transposed import grouped_int4_matmul_tpu_transposed
from pallas_kernels.grouped_int4_matmul.xla import grouped_input_cotangent, grouped_xla, rows_of_expert
from pallas_kernels.int4_matmul import gradients, tiles
from pallas_kernels.int4_matmul.api import no_cotangent
from pallas_kernels.int4_matmul.precision import asks_for_float32, resolved_precision
from pallas_kernels.int4_matmul.registry import UnsupportedError, check_fits, in_rows
from pallas_kernels.int4_matmul.spec import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.lowering_platform import by_lowering_platform
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.partitioned import alone_or_partitioned


class Kernel(NamedTuple):
    """Where a kernel runs, and why it does not take a weight (None: it does)."""

    platform: str
    refusal: Callable[[PackedSpec], str | None]


KERNELS = {
    "tpu": Kernel("tpu", tpu.refusal),
    "tpu_interpret": Kernel("cpu", tpu.refusal),
    "mosaic_gpu": Kernel("gpu", mosaic_gpu.refusal),
}
PREFERRED = ("tpu", "mosaic_gpu")
IMPLEMENTATIONS = ("xla", "reference", *KERNELS)


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
    fits: str = "",
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
      fits: a dtype of 8 bits that holds every number of x, "int8" or "float8_e4m3fn": x may be multiplied in it where
        that is faster.

    Raises:
      UnsupportedError: no such implementation, or it does not take the weight; while a program is lowered,
        for a platform that it does not run on.
      ValueError: shapes that do not fit the spec, another word for `fits`.
    """
    w = Packed(codes, scale, zero_point, offset)
    check_fits(fits)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise UnsupportedError(
            f"unknown implementation {implementation!r} of grouped_int4_matmul: "
            f"wanted one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation in KERNELS and (reason := KERNELS[implementation].refusal(spec)):
        raise UnsupportedError(f"{implementation} of grouped_int4_matmul does not take {spec}: {reason}")
    _check(x, w, group_sizes, spec)
    dtype = jnp.dtype(preferred_element_type or x.dtype)
    rows, columns = x.shape[0], spec.columns(codes.shape)
    if 0 in (*x.shape, codes.shape[0], columns):
        return jnp.zeros((rows, columns), dtype)
    return _jitted(x, w, group_sizes, spec, implementation, dtype, resolved_precision(precision), fits)


def _check(x: jax.Array, w: Packed, group_sizes: jax.Array, spec: PackedSpec) -> None:
    codes = w.codes
    if codes.ndim != 3 or x.ndim != 2 or x.shape[1] != spec.length or not tiles.holds_all_of_k(codes, spec):
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
def _jitted(x, w: Packed, group_sizes, spec: PackedSpec, implementation, dtype, precision, fits) -> jax.Array:
    if implementation == "reference":
        w, spec = in_rows(w, spec)
        return grouped_int4_matmul_reference(x, *w, group_sizes, spec=spec, precision=precision).astype(dtype)
    x, w, group_sizes = vary_alike((x, w, group_sizes))
    return _product(x, w, group_sizes, spec, implementation, precision, dtype, fits)


def _value(x, w: Packed, group_sizes, spec: PackedSpec, implementation, precision, dtype, fits) -> Any:
    def by_xla(platform: str):
        def run(x, w, sizes):
            rows, inner = in_rows(w, spec)
            rows = tiles.squeezed_scales(rows, inner)
            return grouped_xla(x, rows, sizes, inner, platform=platform, precision=precision).astype(dtype)

        return run

    def by_tpu(x, w, sizes, interpret: bool = False):
        run = functools.partial(tpu.grouped_int4_matmul_tpu, precision=precision, interpret=interpret)
        return run(x, w, sizes, spec, integers=fits == "int8").astype(dtype)

    def by_mosaic_gpu(x, w, sizes):
        run = functools.partial(mosaic_gpu.grouped_int4_matmul_mosaic_gpu, precision=precision, dtype=dtype)
        return run(x, w, sizes, spec, fits=fits).astype(dtype)

    return _on_the_platform(by_tpu, by_mosaic_gpu, by_xla, spec, implementation, x, w, group_sizes)


def _on_the_platform(by_tpu: Any, by_mosaic_gpu: Any, by_xla: Any, spec: PackedSpec, name: str | None, *args) -> Any:
    """The form of the implementation called `name`, or the preferred one, for the platform being lowered for."""
    kernels = {"tpu": by_tpu, "tpu_interpret": functools.partial(by_tpu, interpret=True), "mosaic_gpu": by_mosaic_gpu}
    forms = _forms(kernels, by_xla, spec, name)
    return by_lowering_platform(forms, *args, refusal=functools.partial(_unsupported_on, name))


def _forms(
    kernels: dict[str, Callable[..., Any]], by_xla: Callable[[str], Any], spec: PackedSpec, implementation: str | None
) -> dict[str, Any]:
    """The form for each platform: of the kernels given the one that is asked for or preferred, and XLA's."""

    def of_kernel(name: str) -> Any:
        return jax.custom_batching.sequential_vmap(lambda x, w, sizes: kernels[name](x, w, sizes))

    if implementation in kernels:
        return {KERNELS[implementation].platform: of_kernel(implementation)}
    forms = {platform: by_xla(platform) for platform in ("cpu", "tpu", "gpu")}
    for name in PREFERRED if implementation is None else ():
        platform, refusal = KERNELS[name]
        if name in kernels and refusal(spec) is None:
            forms[platform] = alone_or_partitioned(of_kernel(name), forms[platform])
    return forms


def _unsupported_on(implementation: str | None, platforms: Sequence[str]) -> UnsupportedError:
    wanted = KERNELS[implementation].platform if implementation in KERNELS else "cpu, tpu or gpu"
    return UnsupportedError(
        f"{implementation} of grouped_int4_matmul runs on {wanted}, and this program is lowered for "
        f"{', '.join(platforms)}"
    )


_product: Any = jax.custom_vjp(_value, nondiff_argnums=(3, 4, 5, 6, 7))


def _forward(x, w, group_sizes, spec, implementation, precision, dtype, fits):
    return _product(x, w, group_sizes, spec, implementation, precision, dtype, fits), (x, w, group_sizes)


def _backward(spec, implementation, precision, dtype, fits, residuals, dy):
    del dtype, fits
    x, held, group_sizes = residuals
    own, rows_spec = in_rows(held, spec)
    w = tiles.flat_scales(own, rows_spec)

    def to_input(platform: str):
        def run(dy, held, sizes):
            rows = tiles.squeezed_scales(in_rows(held, spec)[0], rows_spec)
            return grouped_input_cotangent(
                dy, rows, sizes, rows_spec, x.dtype, platform=platform, precision=precision
            ).astype(x.dtype)

        return run

    def by_tpu(dy, held, sizes, interpret: bool = False):
        return grouped_int4_matmul_tpu_transposed(dy, held, sizes, spec, interpret=interpret).astype(x.dtype)

    def by_mosaic_gpu(dy, held, sizes):
        return grouped_int4_matmul_mosaic_gpu_transposed(dy, held, sizes, spec, dtype=x.dtype)

    exact = "xla" if asks_for_float32(x.dtype, precision) else implementation
    dx = _on_the_platform(by_tpu, by_mosaic_gpu, to_input, spec, exact, dy, held, group_sizes)

    def to_scale(pair):
        expert, weight = pair
        return gradients.scale_cotangent(rows_of_expert(x, group_sizes, expert), dy, weight, rows_spec)

    def to_offset(expert):
        return gradients.offset_cotangent(rows_of_expert(x, group_sizes, expert), dy, rows_spec)

    experts = jnp.arange(w.codes.shape[0])
    dscale = gradients.like(lax.map(to_scale, (experts, w)), held.scale)
    doffset = None if w.offset is None else gradients.like(lax.map(to_offset, experts), held.offset)
    dw = Packed(no_cotangent(held.codes), dscale, no_cotangent(held.zero_point), doffset)
    return dx, dw, no_cotangent(group_sizes)


_product.defvjp(_forward, _backward)
