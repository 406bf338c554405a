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
from benchmarks.gpu_lab.cases import Case
from jq4.layouts import prepare
from jq4.matmul import packed_matmul

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
    codes = random.integers(0, 16, (case.k, case.n)).astype(np.uint8)
    scale = random.uniform(0.5, 1.5, (case.groups, case.n)) * random.choice([-1, 1], (case.groups, case.n)) / 64
    scale = jnp.asarray(scale, case.scale_dtype)
    zero = jnp.asarray(random.integers(0, 16, (case.groups, case.n)), jnp.uint8) if case.asymmetric else None
    even = np.concatenate([codes, np.zeros((case.k % 2, case.n), np.uint8)])
    packed = jq4.QArray(
        jnp.asarray(even[::2] | even[1::2] << 4), scale, zero,
        group_size=case.group, padding=case.k % 2, dtype=case.dtype,
    )  # fmt: skip
    spread = [
        np.repeat(np.asarray(part, np.float64), case.group, 0)[: case.k] for part in (scale, zero) if part is not None
    ]
    return Weight(packed, (codes - (spread[1] if case.asymmetric else 8.0)) * spread[0])


def error_of(case: Case, seed: int) -> float:
    """The relative error of our product of fresh random operands, NaN where something was not written."""
    random = np.random.default_rng(seed)
    weight = random_weight(case, random)
    x = jnp.asarray(random.normal(size=(case.rows, case.k)), case.dtype)
    prepared = prepare(weight.packed, HOPPER_KIND, layout="hopper")
    poison_memory()
    got = np.asarray(ours(x, prepared), np.float64)
    wanted = np.asarray(x, np.float64) @ weight.dense
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def poison_memory(nbytes: int = 2**28) -> None:
    """Fills memory with NaNs and frees it."""
    jnp.full(nbytes // 4, jnp.nan, jnp.float32).block_until_ready().delete()


@jax.jit
def ours(x: jax.Array, q: Any) -> jax.Array:
    """By the form that the layout of `q` and the device ask for."""
    return packed_matmul(x, q, x.dtype)


def copies_for(nbytes: int) -> int:
    return max(2, min(MOST_COPIES, -(-CACHE_BYTES // nbytes)))


def seconds_of(product: Callable[[Any, Any], Any], x: Any, weights: Sequence[Any], repeats: int) -> float:
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
