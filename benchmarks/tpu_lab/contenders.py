"""What is compiled side by side: each a function of one product's arguments, for a case and a block choice.

    tpu             pallas_kernels.int4_matmul's own kernel
    xla             pallas_kernels.int4_matmul's XLA form for the TPU
    pallas-bf16     a plain Pallas matmul of bf16 weights: what four bits are to be faster than
    xla-bf16        XLA's own dot of bf16 weights
    xla-dequantize  XLA: unpack, scale, one dot
    xla-grouped     XLA: one dot a group, partial sums scaled
    experts-tpu     pallas_kernels.grouped_int4_matmul's own kernel, on rows sorted by expert
    experts-xla     its XLA form
    tpu-inference   the blockwise kernel of that package where it is installed: int8 (or fp8) activations, symmetric

The last is run, never copied: `TPU_INFERENCE` names the folder that its wheel is unpacked in, and of the package only
the kernel's modules are imported (its `__init__` needs a whole serving stack).
"""

import dataclasses
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.tpu_lab.chips import Chip
from jq4.formats import FORMATS
from pallas_kernels.grouped_int4_matmul import grouped_int4_matmul
from pallas_kernels.int4_matmul import PackedSpec, int4_matmul

PEER = "TPU_INFERENCE"
MOST_PARTIAL_SUMS = 2**31  # bytes: beyond, a dot a group is no sensible way to multiply


class RefusedError(ValueError):
    """A contender does not take the case."""


@dataclasses.dataclass(frozen=True)
class Case:
    """x[rows, k] @ W[k, n]; a group size of 0 is one scale for each column. With `experts`, each row by one of them.

    `format` is a name of jq4.formats; `integers` says that x holds whole numbers of at most 127.
    """

    rows: int
    k: int
    n: int
    group_size: int = 128
    asymmetric: bool = False
    dtype: str = "bfloat16"
    experts: int = 0
    format: str = "int4"
    integers: bool = False

    @property
    def group(self) -> int:
        return self.group_size or self.k

    @property
    def groups(self) -> int:
        return -(-self.k // self.group)

    @property
    def fits(self) -> str:
        return "int8" if self.integers else ""

    @property
    def macs(self) -> int:
        return self.rows * self.k * self.n


@dataclasses.dataclass(frozen=True)
class Program:
    """What a contender compiles for a case: `label` tells its choices apart."""

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def _struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _x(case: Case) -> jax.ShapeDtypeStruct:
    return _struct((case.rows, case.k), case.dtype)


def _packed(case: Case) -> tuple[Any, ...]:
    """(codes int4[K, N], scale bf16[G, 1, N], zero_point u8[G, 1, N] or None)."""
    scale = (case.groups, 1, case.n)
    zero_point = _struct(scale, jnp.uint8) if case.asymmetric else None
    return _struct((case.k, case.n), jnp.int4), _struct(scale, jnp.bfloat16), zero_point


def _prepared(case: Case) -> tuple[Any, ...]:
    """The same with the codes as `jq4.prepare` lays them for a TPU: words i32[ceil(K / 8), N], or int8[K, N]."""
    _, scale, zero_point = _packed(case)
    if case.format == "int8":
        return _struct((case.k, case.n), jnp.int8), scale, zero_point
    return _struct((-(-case.k // 8), case.n), jnp.int32), scale, zero_point


def _spec(case: Case) -> PackedSpec:
    form = FORMATS[case.format]
    return PackedSpec(case.k, form.bits, form.levels, case.group, layout="tpu")


def prepared(case: Case) -> tuple[Any, ...]:
    """(x, codes, scale, zero_point) as our kernel takes them."""
    return _x(case), *_prepared(case)


def _ours(implementation: str) -> Callable[[Case, Chip], Iterator[Program]]:
    def programs(case: Case, chip: Chip) -> Iterator[Program]:
        spec = _spec(case)

        def product(x: Any, codes: Any, scale: Any, zero_point: Any) -> jax.Array:
            return int4_matmul(x, codes, scale, zero_point, spec=spec, implementation=implementation, fits=case.fits)

        yield Program(implementation, product, (_x(case), *_prepared(case)))

    return programs


def _experts(implementation: str | None) -> Callable[[Case, Chip], Iterator[Program]]:
    def programs(case: Case, chip: Chip) -> Iterator[Program]:
        if not case.experts:
            raise RefusedError("it takes experts")
        spec = _spec(case)

        def product(x: Any, codes: Any, scale: Any, zero_point: Any, sizes: Any) -> jax.Array:
            return grouped_int4_matmul(
                x, codes, scale, zero_point, group_sizes=sizes, spec=spec, implementation=implementation,
                fits=case.fits,
            )  # fmt: skip

        stacked = jax.tree.map(lambda part: _struct((case.experts, *part.shape), part.dtype), _prepared(case))
        yield Program(f"{case.experts}", product, (_x(case), *stacked, _struct((case.experts,), jnp.int32)))

    return programs


# --- bf16 --------------------------------------------------------------------------------------------------------


def _xla_bf16(case: Case, chip: Chip) -> Iterator[Program]:
    yield Program("dot", lambda x, w: x @ w, (_x(case), _struct((case.k, case.n), case.dtype)))


def _pallas_bf16(case: Case, chip: Chip) -> Iterator[Program]:
    arguments = (_x(case), _struct((case.k, case.n), case.dtype))
    if case.k % 128:
        raise RefusedError(f"the yardstick takes K a multiple of 128, not {case.k}")
    for blocks in _blocks(case):
        label = "x".join(map(str, blocks))
        yield Program(label, lambda x, w, b=blocks: plain_matmul(x, w, b, chip.vmem * 3 // 4), arguments)


def _blocks(case: Case) -> Iterator[tuple[int, int, int]]:
    rows = min(case.rows, 512)
    for depth, width in ((2048, 1024), (1024, 2048)) if rows < 512 else ((512, 1024), (1024, 1024), (2048, 1024)):
        yield rows, _divisor(case.k, depth), min(width, -(-case.n // 128) * 128)


def _divisor(length: int, most: int) -> int:
    """The largest multiple of 128 that divides `length` and is at most `most`; `length` where there is none."""
    return next((size for size in range(most, 0, -128) if length % size == 0), length)


def plain_matmul(x: jax.Array, w: jax.Array, blocks: tuple[int, int, int], vmem: int) -> jax.Array:
    """x[M, K] @ w[K, N] in f32 sums, one block of K after the other."""
    (rows, depth, width), (m, k), n = blocks, x.shape, w.shape[1]
    steps = k // depth

    def kernel(x_ref: Any, w_ref: Any, out_ref: Any, sum_ref: Any) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            sum_ref[...] = jnp.zeros_like(sum_ref)

        sum_ref[...] += jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == steps - 1)
        def _() -> None:
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    return pl.pallas_call(
        kernel,
        name="plain_matmul",
        grid=(pl.cdiv(m, rows), pl.cdiv(n, width), steps),
        in_specs=[
            pl.BlockSpec((rows, depth), lambda i, j, t: (i, t)),
            pl.BlockSpec((depth, width), lambda i, j, t: (t, j)),
        ],
        out_specs=pl.BlockSpec((rows, width), lambda i, j, t: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem
        ),
    )(x, w)


# --- XLA on packed weights -----------------------------------------------------------------------------------------


def _shifted(codes: jax.Array, scale: jax.Array, zero_point: Any, dtype: Any) -> jax.Array:
    """The levels `dtype`[G, g, N] of int4 codes [K, N]."""
    levels = codes.astype(dtype).reshape(scale.shape[0], -1, codes.shape[-1])
    return levels if zero_point is None else levels - (zero_point.astype(dtype) - jnp.asarray(8, dtype))


def _xla_dequantize(case: Case, chip: Chip) -> Iterator[Program]:
    def product(x: jax.Array, codes: jax.Array, scale: jax.Array, zero_point: Any) -> jax.Array:
        weight = _shifted(codes, scale, zero_point, x.dtype) * scale.astype(x.dtype)
        return x @ weight.reshape(codes.shape)

    yield Program("dequantize", product, (_x(case), *_whole_groups(case)))


def _xla_grouped(case: Case, chip: Chip) -> Iterator[Program]:
    if (sums := 4 * case.groups * case.rows * case.n) > MOST_PARTIAL_SUMS:
        raise RefusedError(f"its partial sums would be {sums / 2**30:.1f} GiB")

    def product(x: jax.Array, codes: jax.Array, scale: jax.Array, zero_point: Any) -> jax.Array:
        rows = x.reshape(x.shape[0], scale.shape[0], -1)
        weight = codes.astype(x.dtype).reshape(scale.shape[0], -1, codes.shape[-1])
        parts = jnp.einsum("mgk,gkn->gmn", rows, weight, preferred_element_type=jnp.float32)
        if zero_point is not None:
            shift = zero_point.astype(jnp.float32) - 8.0
            parts = parts - jnp.sum(rows.astype(jnp.float32), axis=2).T[:, :, None] * shift
        return jnp.sum(parts * scale.astype(jnp.float32), axis=0).astype(x.dtype)

    yield Program("grouped", product, (_x(case), *_whole_groups(case)))


def _whole_groups(case: Case) -> tuple[Any, ...]:
    if case.k % case.group or case.format != "int4":
        raise RefusedError(
            f"it takes int4 in whole groups, not K = {case.k} of {case.format} in groups of {case.group}"
        )
    return _packed(case)


# --- tpu-inference -------------------------------------------------------------------------------------------------


def _tpu_inference(case: Case, chip: Chip) -> Iterator[Program]:
    kernel, tuned = _peer()
    if case.asymmetric or case.format != "int4":
        raise RefusedError("it takes int4 without zero points")
    if case.k % case.group or not case.group_size:
        raise RefusedError("its blockwise kernel takes whole groups")
    inputs = "float8_e4m3fn" if chip.name == "tpu7x" else "int8"
    codes, scale, _ = _packed(case)
    arguments = (_x(case), _struct(codes.shape[::-1], codes.dtype), _struct(scale.shape, jnp.float32))
    rows = min(case.rows, 512)
    for width, depth in ((1024, 2048), (512, case.k), (256, case.k)):
        if case.k % depth or case.n % width or depth % case.group:
            continue
        blocks = tuned.TunedValue(rows, width, depth, 1)

        def product(x: Any, w: Any, scale: Any, blocks: Any = blocks) -> Any:
            return kernel(x, w, scale, block_size=case.group, x_q_dtype=jnp.dtype(inputs), tuned_value=blocks)

        yield Program(f"{inputs} {rows}x{depth}x{width}", product, arguments)


def _peer() -> tuple[Any, Any]:
    """(the blockwise kernel, the module of its block sizes) of an unpacked tpu-inference wheel."""
    folder = os.environ.get(PEER)
    if not folder or not (Path(folder) / "tpu_inference").is_dir():
        raise RefusedError(f"{PEER} names no folder with an unpacked tpu-inference wheel")
    if "tpu_inference" not in sys.modules:
        sys.path.append(folder)
        package = types.ModuleType("tpu_inference")
        package.__path__ = [str(Path(folder) / "tpu_inference")]
        sys.modules["tpu_inference"] = package
        sys.modules["tpu_inference.logger"] = _silent_logger()
    within = "tpu_inference.kernels.quantized_matmul"
    kernel = importlib.import_module(f"{within}.blockwise_kernel").quantized_matmul_kernel
    return kernel, importlib.import_module(f"{within}.tuned_block_sizes")


def _silent_logger() -> types.ModuleType:
    """What the kernel's modules import of the package besides themselves: its own logger belongs to the server."""
    module = types.ModuleType("tpu_inference.logger")
    nothing = types.SimpleNamespace(**dict.fromkeys(("warning", "warning_once", "info", "debug"), lambda *_: None))
    module.__dict__["init_logger"] = lambda _: nothing
    return module


CONTENDERS: dict[str, Callable[[Case, Chip], Iterator[Program]]] = {
    "tpu": _ours("tpu"),
    "xla": _ours("xla"),
    "experts-tpu": _experts("tpu"),
    "experts-xla": _experts("xla"),
    "pallas-bf16": _pallas_bf16,
    "xla-bf16": _xla_bf16,
    "xla-dequantize": _xla_dequantize,
    "xla-grouped": _xla_grouped,
    "tpu-inference": _tpu_inference,
}
DENSE = [name for name in CONTENDERS if not name.startswith("experts")]
EXPERTS = [name for name in CONTENDERS if name.startswith("experts")]
BASELINE = "pallas-bf16"
