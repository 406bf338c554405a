"""What the GPU kernels are compared with, on the same shapes: XLA's forms, and torch's kernels where torch has a GPU.

Each is a function (case, repeats) -> seconds of one product, or raises Unavailable with the reason.
"""

import importlib
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.gpu_lab.cases import Case, group_sizes
from benchmarks.gpu_lab.running import HOPPER_KIND, copies_for, product_of, random_rows, random_weight, seconds_of
from jq4.layouts import prepare


class UnavailableError(Exception):
    """This rival cannot run here; the message says why."""


def by_kernel(case: Case, repeats: int) -> float:
    return _packed(case, repeats, "hopper")


def by_xla_int4(case: Case, repeats: int) -> float:
    return _packed(case, repeats, None)


def by_xla_bf16(case: Case, repeats: int) -> float:
    random = np.random.default_rng(0)
    size = (*case.lead, case.k, case.n)
    weights = [
        jnp.asarray(random.normal(size=size).astype(np.float32), case.dtype)
        for _ in range(copies_for(2 * math.prod(size)))
    ]
    sizes = group_sizes(case, random)

    def product(x: Any, w: Any) -> Any:
        if sizes is not None:
            return lax.ragged_dot(x, w, jnp.asarray(sizes))
        return x @ (w.T if case.transposed else w)

    return seconds_of(product, random_rows(case, random), weights, repeats)


def _packed(case: Case, repeats: int, layout: str | None) -> float:
    random = np.random.default_rng(0)
    first = prepare(random_weight(case, random).packed, HOPPER_KIND, layout=layout)
    weights = [first, *(_copy(first) for _ in range(copies_for(first.nbytes) - 1))]
    sizes, own = group_sizes(case, random), product_of(case)
    given = [] if sizes is None else [jnp.asarray(sizes)]
    return seconds_of(lambda x, q: own(x, q, *given), random_rows(case, random), weights, repeats)


def _copy(weight: Any) -> Any:
    import jax

    return jax.tree.map(lambda part: part.copy(), weight)


def _refuse_other_than_plain(name: str, case: Case) -> None:
    if case.experts or case.transposed or case.fits or case.bits != 4:
        raise UnavailableError(f"{name} is compared with at 4 bits, floating rows and one weight")


def by_torch_bf16(case: Case, repeats: int) -> float:
    _refuse_other_than_plain("torch", case)
    torch = _torch()
    x = torch.randn(case.rows, case.k, dtype=torch.bfloat16, device="cuda")
    weights = [
        torch.randn(case.n, case.k, dtype=torch.bfloat16, device="cuda") for _ in range(copies_for(2 * case.weights))
    ]
    return _torch_seconds(torch, lambda w: torch.nn.functional.linear(x, w), weights, repeats)


def by_tinygemm(case: Case, repeats: int) -> float:
    """torch's _weight_int4pack_mm: groups of 32 to 256, bf16, with zero points."""
    _refuse_other_than_plain("tinygemm", case)
    torch = _torch()
    if case.group_size not in (32, 64, 128, 256) or case.k % 1024 or case.n % 8:
        raise UnavailableError(f"tinygemm has no groups of {case.group_size}, or not for {case.k} x {case.n}")
    x = torch.randn(case.rows, case.k, dtype=torch.bfloat16, device="cuda")
    scales = torch.rand(case.groups, case.n, 2, dtype=torch.bfloat16, device="cuda")

    def packed() -> Any:
        codes = torch.randint(0, 256, (case.n, case.k // 2), dtype=torch.uint8, device="cuda")
        return torch.ops.aten._convert_weight_to_int4pack(codes, 8)

    weights = [packed() for _ in range(copies_for(case.weights // 2))]

    def product(w: Any) -> Any:
        return torch.ops.aten._weight_int4pack_mm(x, w, case.group_size, scales)

    return _torch_seconds(torch, product, weights, repeats)


def by_gemlite(case: Case, repeats: int) -> float:
    _refuse_other_than_plain("gemlite", case)
    torch = _torch()
    try:
        gemlite = importlib.import_module("gemlite")
    except ImportError as error:
        raise UnavailableError(f"gemlite is not installed: {error}") from error
    x = torch.randn(case.rows, case.k, dtype=torch.float16, device="cuda")

    def packed() -> Any:
        layer = gemlite.GemLiteLinear(
            4, group_size=case.group, in_features=case.k, out_features=case.n,
            input_dtype=gemlite.DType.FP16, output_dtype=gemlite.DType.FP16,
        )  # fmt: skip
        codes = torch.randint(0, 16, (case.n, case.k), dtype=torch.uint8, device="cuda")
        scales = torch.rand(case.n * case.groups, 1, dtype=torch.float16, device="cuda")
        zeros = torch.full_like(scales, 8)
        layer.pack(codes, scales, zeros, None)
        return layer

    weights = [packed() for _ in range(copies_for(case.weights // 2))]
    return _torch_seconds(torch, lambda layer: layer(x), weights, repeats)


RIVALS: dict[str, Callable[[Case, int], float]] = {
    "mosaic_gpu": by_kernel,
    "xla-bf16": by_xla_bf16,
    "xla-int4": by_xla_int4,
    "torch-bf16": by_torch_bf16,
    "tinygemm": by_tinygemm,
    "gemlite": by_gemlite,
}


def _torch() -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise UnavailableError(f"torch is not installed: {error}") from error
    if not torch.cuda.is_available():
        raise UnavailableError("torch has no GPU here")
    return torch


def _torch_seconds(torch: Any, product: Callable[[Any], Any], weights: Sequence[Any], repeats: int) -> float:
    for weight in weights:
        product(weight)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for weight in weights:
            product(weight)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000 / len(weights))
    return statistics.median(times)
