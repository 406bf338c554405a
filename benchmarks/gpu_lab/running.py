"""Products on the device at hand: are they right, and how long do they take?

A time is the median over repeats of one program that multiplies by COPIES different weights in turn, which together are
several times as large as the second-level cache, divided by their number. A repeat launches the program until
LEAST_SECONDS are full and waits for the last, so that the host's part hides behind the device's. Before a result is
looked at, free memory is filled with NaNs, so that what a kernel forgets to write is seen.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jq4
from benchmarks.gpu_lab.cases import Case, group_sizes, numbers_that_fit, spread_over_groups, wanted_product
from jq4.layouts import prepare
from jq4.matmul import packed_matmul, spec_of
from pallas_kernels.grouped_int4_matmul import grouped_int4_matmul

CACHE_BYTES = 256 * 2**20  # what the weights of one program are larger than
MOST_COPIES = 64
LEAST_SECONDS, MOST_LAUNCHES = 5e-3, 64  # of a repeat
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-8, "float32": 2**-12}  # of a result, whose weights may be rounded too
HOPPER_KIND = "NVIDIA H200"


@dataclasses.dataclass(frozen=True)
class Weight:
    """A random packed weight [k, n], neutral, and what it stands for."""

    packed: jq4.QArray
    dense: np.ndarray  # f64


def random_weight(case: Case, random: np.random.Generator) -> Weight:
    levels, of_groups = 2**case.bits, (*case.lead, case.groups, case.n)
    codes = random.integers(0, levels, (*case.lead, case.k, case.n)).astype(np.uint8)
    scale = random.uniform(0.5, 1.5, of_groups) * random.choice([-1, 1], of_groups) / 64
    scale = jnp.asarray(scale, case.scale_dtype)
    zero = jnp.asarray(random.integers(0, levels, of_groups), jnp.uint8) if case.asymmetric else None
    even = np.concatenate([codes, np.zeros((*case.lead, case.k % 2, case.n), np.uint8)], -2)
    held = codes if case.bits == 8 else even[..., ::2, :] | even[..., 1::2, :] << 4
    packed = jq4.QArray(
        jnp.asarray(held), scale, zero, format=f"int{case.bits}",
        group_size=case.group, padding=case.k % 2 if case.bits == 4 else 0, dtype=case.dtype,
    )  # fmt: skip
    middle = spread_over_groups(np.asarray(zero), case) if case.asymmetric else levels / 2
    return Weight(packed, (codes - middle) * spread_over_groups(np.asarray(scale), case))


def error_of(case: Case, seed: int) -> float:
    """The relative error of our product of fresh random operands, NaN where something was not written."""
    random = np.random.default_rng(seed)
    weight = random_weight(case, random)
    x = random_rows(case, random)
    prepared, sizes = prepare(weight.packed, HOPPER_KIND, layout="hopper"), group_sizes(case, random)
    poison_memory()
    got = np.asarray(product_of(case)(x, prepared, *([] if sizes is None else [jnp.asarray(sizes)])), np.float64)
    with_expert = case.rows if sizes is None else int(sizes.sum())
    dense = np.swapaxes(weight.dense, -1, -2) if case.transposed else weight.dense
    wanted = wanted_product(np.asarray(x)[:with_expert], dense, sizes)
    error = float(np.linalg.norm(got[:with_expert] - wanted) / np.linalg.norm(wanted))
    return error if not got[with_expert:].any() else math.inf  # rows without an expert are zeros


def random_rows(case: Case, random: np.random.Generator) -> jax.Array:
    """x; or dy, of a product by the transpose."""
    size = (case.rows, case.n if case.transposed else case.k)
    if case.fits:
        return jnp.asarray(numbers_that_fit(case.fits, size, random).astype(np.float32), case.dtype)
    return jnp.asarray(random.normal(size=size), case.dtype)


def product_of(case: Case) -> Callable[..., jax.Array]:
    """(x, q), or (x, q, rows of each expert): the product of a case."""
    if case.transposed:
        forward = product_of(dataclasses.replace(case, transposed=False))

        def backward(dy: jax.Array, *of_weight: Any) -> jax.Array:
            x = jnp.zeros((case.rows, case.k), dy.dtype)
            return jax.vjp(lambda x: forward(x, *of_weight), x)[1](dy)[0]

        return jax.jit(backward)
    if case.experts:
        return jax.jit(lambda x, q, sizes: ragged_product(x, q, sizes, case.fits))
    if case.fits:
        return jax.jit(lambda x, q: packed_matmul(x, q, x.dtype, fits=case.fits))
    return ours


def ragged_product(x: jax.Array, q: Any, sizes: jax.Array, fits: str) -> jax.Array:
    return grouped_int4_matmul(
        x, q.codes, q.scale, q.zero_point, group_sizes=sizes, spec=spec_of(q), fits=fits
    )  # fmt: skip


def poison_memory(nbytes: int = 2**28) -> None:
    """Fills memory with NaNs and frees it."""
    jnp.full(nbytes // 4, jnp.nan, jnp.float32).block_until_ready().delete()


@jax.jit
def ours(x: jax.Array, q: Any) -> jax.Array:
    """By the form that the layout of `q` and the device ask for."""
    return packed_matmul(x, q, x.dtype)


def copies_for(nbytes: int) -> int:
    return max(2, min(MOST_COPIES, -(-CACHE_BYTES // nbytes)))


def seconds_of(product: Callable[..., Any], x: Any, weights: Sequence[Any], repeats: int) -> float:
    """The median time of one product."""
    program = jax.jit(lambda x, weights: [product(x, weight) for weight in weights])

    def seconds(launches: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready([program(x, weights) for _ in range(launches)])
        return (time.perf_counter() - start) / launches

    seconds(1)  # compiles
    launches = launches_for(seconds(1))
    return statistics.median(seconds(launches) for _ in range(repeats)) / len(weights)


def launches_for(once: float) -> int:
    """Of a program that takes so many seconds, those of a repeat."""
    return max(1, min(MOST_LAUNCHES, math.ceil(LEAST_SECONDS / once)))


def ceilings(repeats: int, size: int = 8192, megabytes: int = 2048) -> dict[str, float]:
    """What this device does at best, measured: bytes a second of a sum over memory, and bf16 products."""
    count = megabytes * 2**20 // 4
    parts = [jnp.ones(count, jnp.float32)]
    read = seconds_of(lambda _, part: jnp.sum(part), 0.0, parts, repeats)
    square = jnp.ones((size, size), jnp.bfloat16)
    multiply = seconds_of(lambda x, w: x @ w, square, [square] * 4, repeats)
    return {"read_bytes_per_second": 4 * count / read, "bf16_flops": 2 * size**3 / multiply}
