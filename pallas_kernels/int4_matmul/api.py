"""The public function: shapes to the one form the backends have, the backend for the platform, and the gradient.

The platform is that of the lowering (`jax.lax.platform_dependent`), not of the process: a program exported or compiled
for a TPU on a CPU machine holds the TPU's form. Everything is under one `jax.jit`, so that a model with hundreds of
equal layers traces each distinct product once and an eager call compiles once.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.int4_matmul import gradients, tiles, xla
from pallas_kernels.int4_matmul.precision import asks_for_float32, resolved_precision
from pallas_kernels.int4_matmul.registry import (
    BACKENDS,
    PLATFORMS,
    Implementation,
    by_platform,
    check_fits,
    in_rows,
    unsupported_on,
)
from pallas_kernels.int4_matmul.spec import PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.lowering_platform import by_lowering_platform
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.partitioned import alone_or_partitioned


def int4_matmul(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    offset: jax.Array | None = None,
    *,
    spec: PackedSpec,
    implementation: Implementation = None,
    preferred_element_type: Any = None,
    precision: Any = None,
    fits: str = "",
) -> jax.Array:
    """x[*B, M, K] @ dequantize(codes, scale, zero_point, offset)[*B, K, N] -> [*B, M, N].

    Args:
      x: float[*B, M, K].
      codes: the packed weight, see spec.py; its own leading axes are x's batch axes *B. Without any, all of x's
        leading axes are rows.
      scale, zero_point, offset: see spec.py; leading axes as codes'.
      spec: how codes and scales are to be read.
      implementation: None picks what is fastest and always works; a name is that implementation or an error; of a
        sequence of names the first that takes the weight on the platform is used.
      preferred_element_type: dtype of the result; None is x's. Sums are float32 in any case.
      precision: of the products, as lax.dot_general's: None is jax.default_matmul_precision's.
      fits: a dtype of 8 bits that holds every number of x, "int8" or "float8_e4m3fn": x may be multiplied in it where
        that is faster.

    Raises:
      UnsupportedError: no such implementation, or none of those named takes this spec; while a program is
        lowered, for a platform that none of them runs on.
      ValueError: shapes that do not fit the spec, another word for `fits`.
    """
    w = Packed(codes, scale, zero_point, offset)
    check_fits(fits)
    _check(x, w, spec)
    names = implementation if implementation is None or isinstance(implementation, str) else tuple(implementation)
    by_platform(names, spec)  # raises for unknown or unfit names, before any tracing
    dtype = jnp.dtype(preferred_element_type or x.dtype)
    return _int4_matmul(x, w, spec, names, dtype, resolved_precision(precision), fits)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _int4_matmul(x, w: Packed, spec: PackedSpec, implementation, dtype, precision, fits) -> jax.Array:
    batch, columns = w.codes.shape[:-2], spec.columns(w.codes.shape)
    if x.size == 0 or columns == 0:
        return jnp.zeros((*x.shape[:-1], columns), dtype)
    rows = x if batch else x.reshape(-1, x.shape[-1])
    out = _product(*vary_alike((rows, w)), spec, implementation, precision, dtype, fits)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _value(x, w: Packed, spec: PackedSpec, implementation, precision, dtype, fits) -> Any:
    """dtype[*B, M, N] from x[*B, M, K] and codes [*B, ...]."""
    chosen = by_platform(implementation, spec)

    def run_by(name: str, platform: str):
        run = functools.partial(BACKENDS[name].run, spec=spec, platform=platform, precision=precision, dtype=dtype)
        run = functools.partial(run, fits=fits) if fits in BACKENDS[name].fits else run
        return lambda x, w: _batched(run, platform)(x, w).astype(dtype)

    def on(platform: str):
        run = run_by(chosen[platform], platform)
        if implementation is None and not BACKENDS[chosen[platform]].partitions:
            return alone_or_partitioned(run, run_by("xla", platform))
        return run

    refusal = functools.partial(unsupported_on, implementation, spec)
    return by_lowering_platform({platform: on(platform) for platform in chosen}, x, w, refusal=refusal)


_product: Any = jax.custom_vjp(_value, nondiff_argnums=(2, 3, 4, 5, 6))


def _forward(x, w, spec, implementation, precision, dtype, fits):
    return _product(x, w, spec, implementation, precision, dtype, fits), (x, w)


def _backward(spec, implementation, precision, dtype, fits, residuals, dy):
    del dtype, fits
    x, own = residuals
    chosen = by_platform(implementation, spec)
    w, rows_spec = in_rows(own, spec)

    def by_xla(platform: str):
        compute = xla.accumulator(x.dtype) if platform == "cpu" else x.dtype
        one = functools.partial(gradients.of_input, spec=rows_spec, dtype=compute, precision=precision)
        return lambda dy, own: _batched(one, platform)(dy, in_rows(own, spec)[0]).astype(x.dtype)

    def to_input(platform: str):
        backend = BACKENDS[chosen[platform]] if platform in chosen else None
        if backend is None or backend.transposed is None or asks_for_float32(x.dtype, precision):
            return by_xla(platform)
        one = functools.partial(backend.transposed, spec=spec, dtype=x.dtype)
        alone = _batched(one, platform)
        return alone if backend.partitions or implementation else alone_or_partitioned(alone, by_xla(platform))

    forms = {platform: to_input(platform) for platform in PLATFORMS}
    dx = by_lowering_platform(forms, dy, own, refusal=functools.partial(unsupported_on, implementation, spec))
    flat = tiles.flat_scales(w, rows_spec)
    batched = functools.partial(_batched, platform="cpu")
    dscale = batched(lambda both, w: gradients.scale_cotangent(both[0], both[1], w, rows_spec))((x, dy), flat)
    doffset = None
    if w.offset is not None:
        doffset = batched(lambda both, w: gradients.offset_cotangent(both[0], both[1], rows_spec))((x, dy), flat)
        doffset = gradients.like(doffset, own.offset)
    return dx, Packed(no_cotangent(own.codes), gradients.like(dscale, own.scale), no_cotangent(own.zero_point), doffset)


_product.defvjp(_forward, _backward)


def no_cotangent(part: Any) -> Any:
    return None if part is None else np.zeros(part.shape, jax.dtypes.float0)


def _batched(one: Callable[[Any, Packed], jax.Array], platform: str) -> Callable[[Any, Packed], jax.Array]:
    """`one` over leading axes of the codes: one after the other on a CPU (bounded memory), together elsewhere."""

    def run(x: Any, w: Packed) -> jax.Array:
        batch = w.codes.shape[:-2]
        if not batch:
            return one(x, w)
        if platform != "cpu":
            mapped = one
            for _ in batch:
                mapped = jax.vmap(mapped)
            return mapped(x, w)
        flat = jax.tree.map(lambda part: part.reshape(-1, *part.shape[len(batch) :]), (x, w))
        out = lax.map(lambda pair: one(*pair), flat)
        return out.reshape(*batch, *out.shape[1:])

    return run


def _check(x: jax.Array, w: Packed, spec: PackedSpec) -> None:
    have, want = tiles.lengths_along_k(w.codes, spec)
    if have != want:
        raise ValueError(f"codes of shape {w.codes.shape} hold {have} along K, wanted {want} for {spec}")
    if x.shape[-1] != spec.length:
        raise ValueError(f"x has shape {x.shape}, wanted [..., {spec.length}] for a weight of {spec.length} rows")
    batch = w.codes.shape[:-2]
    if batch and x.shape[:-2] != batch:
        raise ValueError(f"x has shape {x.shape}, wanted batch axes {batch} as the codes of shape {w.codes.shape} have")
    k, n = (spec.num_groups, spec.columns(w.codes.shape))
    wanted = (k, n) if spec.orientation == "kn" else (n, k)
    for name, part in zip(("scale", "zero_point", "offset"), w[1:], strict=True):
        if part is None:
            continue
        shape = (*part.shape[:-2], part.shape[-1]) if spec.layout == "tpu" else part.shape
        tail = shape[-2:]
        columns_fit = tail[spec.k_axis] == k and tail[-3 - spec.k_axis] in (1, n)
        if len(tail) != 2 or not columns_fit:
            raise ValueError(f"{name} has shape {part.shape}, wanted [..., {wanted[0]}, {wanted[1]}] for {spec}")
