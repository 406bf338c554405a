"""Which implementations of int4_matmul there are, and which one serves a platform. A new backend: one file, one entry.

    name         platforms   what
    reference    all         the oracle of reference.py: the dense weight appears
    xla          all         xla.py: a form for each platform
    tpu          tpu         tpu.py: one Pallas kernel, for the tpu layout; tpu_interpret runs it on a CPU, for tests.
                             Of 8 bits it is that or XLA's form, whichever is faster (tpu_int8.py)
    mosaic_gpu   gpu         mosaic_gpu.py: one Pallas kernel, for the hopper layout, which who asks gets, and its
                             transpose, mosaic_gpu_transposed.py
    mosaic_gpu_mma   gpu     mosaic_gpu_mma.py: likewise, for Ampere and Ada GPUs, whose transpose is XLA's

A backend is a function (x[M, K], Packed, spec, *, platform, precision, dtype) -> [M, N] in f32, or in the `dtype`
that its caller will round to in any case, and a function that says why it cannot take a spec, or None. It may have a
transpose of its own, (dy[M, N], Packed, spec, *, dtype) -> dtype[M, K], of factors of 16 bits (else gradients.py).
`choose` goes through names in order; an implementation of None stands for PREFERRED, which ends with "xla", and "xla"
takes everything.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pallas_kernels.int4_matmul.gpu_fragments import rows_of
from pallas_kernels.int4_matmul.mosaic_gpu import int4_matmul_mosaic_gpu
from pallas_kernels.int4_matmul.mosaic_gpu import refusal as mosaic_gpu_refusal
from pallas_kernels.int4_matmul.mosaic_gpu_mma import int4_matmul_mosaic_gpu_mma
from pallas_kernels.int4_matmul.mosaic_gpu_mma import refusal as mosaic_gpu_mma_refusal
from pallas_kernels.int4_matmul.mosaic_gpu_transposed import int4_matmul_mosaic_gpu_transposed
from pallas_kernels.int4_matmul.reference import int4_matmul_reference
from pallas_kernels.int4_matmul.spec import HOPPER, PackedSpec
from pallas_kernels.int4_matmul.tiles import Packed
from pallas_kernels.int4_matmul.tpu import refusal as tpu_refusal
from pallas_kernels.int4_matmul.tpu_int8 import matmul_tpu
from pallas_kernels.int4_matmul.tpu_transposed import int4_matmul_tpu_transposed
from pallas_kernels.int4_matmul.xla import int4_matmul_xla

PLATFORMS = ("cpu", "tpu", "gpu")
Implementation = str | Sequence[str] | None
FITS = ("", "int8", "float8_e4m3fn")


class UnsupportedError(ValueError):
    """No implementation that was asked for takes this weight on this platform; the message says why for each."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation: its function, where it runs, why it refuses a spec (None: it does not), and its transpose.

    `fits` are the dtypes of 8 bits that `run` takes as that word, for an x that holds no other numbers; `partitions`
    says whether XLA can cut it for several devices: of a kernel it cannot (pallas_kernels.partitioned).
    """

    run: Callable[..., jax.Array]
    platforms: tuple[str, ...] = PLATFORMS
    refusal: Callable[[PackedSpec], str | None] = lambda spec: None
    partitions: bool = True
    fits: tuple[str, ...] = ()
    transposed: Callable[..., jax.Array] | None = None


def in_rows(w: Packed, spec: PackedSpec) -> tuple[Packed, PackedSpec]:
    """What XLA's operations read: the hopper layout is undone, others stay."""
    return rows_of(w, spec) if spec.layout == HOPPER else (w, spec)


def _reference(
    x: jax.Array, w: Packed, spec: PackedSpec, *, platform: str, precision: Any = None, dtype: Any = None
) -> jax.Array:
    w, spec = in_rows(w, spec)
    return int4_matmul_reference(x, *w, spec=spec, precision=precision)


def _xla(
    x: jax.Array, w: Packed, spec: PackedSpec, *, platform: str, precision: Any = None, dtype: Any = None
) -> jax.Array:
    return int4_matmul_xla(x, *in_rows(w, spec), platform=platform, precision=precision)


BACKENDS: dict[str, Backend] = {
    "reference": Backend(_reference),
    "xla": Backend(_xla),
    "tpu": Backend(
        matmul_tpu,
        ("tpu",),
        tpu_refusal,
        partitions=False,
        fits=("int8",),
        transposed=int4_matmul_tpu_transposed,
    ),
    "tpu_interpret": Backend(
        functools.partial(matmul_tpu, interpret=True),
        ("cpu",),
        tpu_refusal,
        fits=("int8",),
        transposed=functools.partial(int4_matmul_tpu_transposed, interpret=True),
    ),
    "mosaic_gpu": Backend(
        int4_matmul_mosaic_gpu,
        ("gpu",),
        mosaic_gpu_refusal,
        partitions=False,
        fits=("int8", "float8_e4m3fn"),
        transposed=int4_matmul_mosaic_gpu_transposed,
    ),
    "mosaic_gpu_mma": Backend(
        int4_matmul_mosaic_gpu_mma,
        ("gpu",),
        mosaic_gpu_mma_refusal,
        partitions=False,
        fits=("int8", "float8_e4m3fn"),
    ),
}

OF_FRAGMENTS = ("mosaic_gpu", "mosaic_gpu_mma")  # what reads the hopper layout as it lies
PREFERRED: dict[str, tuple[str, ...]] = {"cpu": ("xla",), "tpu": ("tpu", "xla"), "gpu": (*OF_FRAGMENTS, "xla")}


def choose(implementation: Implementation, platform: str, spec: PackedSpec) -> str | None:
    """The first name that takes `spec` on `platform`, or None. Unknown names are an error."""
    names = PREFERRED[platform] if implementation is None else _names(implementation)
    return next((name for name in names if refusal(name, platform, spec) is None), None)


def refusal(name: str, platform: str, spec: PackedSpec) -> str | None:
    """Why the implementation `name` cannot serve, or None."""
    backend = BACKENDS[name]
    if platform not in backend.platforms:
        return f"{name} runs on {', '.join(backend.platforms)}, not on {platform}"
    return backend.refusal(spec)


def _names(implementation: str | Sequence[str]) -> tuple[str, ...]:
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in names:
        if name not in BACKENDS:
            raise UnsupportedError(
                f"unknown implementation {name!r} of int4_matmul: wanted one of {', '.join(BACKENDS)}"
            )
    return names


def check_fits(fits: str) -> None:
    if fits not in FITS:
        raise ValueError(f"fits is {fits!r}, wanted one of {', '.join(map(repr, FITS))}")


def by_platform(implementation: Implementation, spec: PackedSpec) -> dict[str, str]:
    """The chosen name for every platform that has one; raises where none has."""
    chosen = {platform: name for platform in PLATFORMS if (name := choose(implementation, platform, spec))}
    if not chosen:
        raise unsupported_on(implementation, spec, PLATFORMS)
    return chosen


def unsupported_on(implementation: Implementation, spec: PackedSpec, platforms: Sequence[str]) -> UnsupportedError:
    """The error of a weight that nothing named takes on these platforms."""
    names = _names(implementation or ("xla",))
    reasons = {reason for on in platforms for name in names if (reason := refusal(name, on, spec))}
    return UnsupportedError(f"no implementation of {implementation!r} takes {spec}: {'; '.join(sorted(reasons))}")
