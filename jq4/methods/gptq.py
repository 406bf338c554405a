"""GPTQ (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers").

For a weight W[K, N] whose inputs x have the Hessian H = E[x x^T], find codes (and their groups' parameters) that

    minimise   E|x^T Q - x^T W|^2  =  tr(E^T H E),      E = W - Q

GPTQ rounds the rows of W one after another, and after each moves the rows that are still to come by what best makes up
for the error so far. Here that is rounding with feedback, an equal form of it: see jq4.methods.feedback. Columns do not
know of each other, so that a weight may be sharded over them.

What differs from the paper, each measured to help at equal bits on calibration rows held out:

  - a group's grid is searched for on entering it, from the updated weights, with scales of both signs where it is
    symmetric. A row's squared error counts L_kk^2 there, what it costs once later rows have made up for it.
  - `actorder: static` takes important inputs first without moving a row to another group: see jq4.methods.slots.
  - `refinements` rounds follow, of which none makes the error larger (but by f32 rounding): on entering a group its
    scale (and offset) is solved for by least squares in the Hessian's norm, given its codes and all other errors; then
    each of its codes becomes the best one given all others (coordinate descent: QuantEase, Behdin et al. 2023; CDQuant,
    Nair & Suggala 2024).
  - statistics of a pair (jq4.observe_pair) correct the weight first, for what the quantized layers before it have done
    to its inputs: see `towards_dense` in jq4.methods.hessian.

Dead inputs and damping: jq4.methods.hessian. A slice (an expert) whose statistics count fewer than `min_rows` rows is
not fitted to them: it is quantized by `fallback`, which looks at no data. (Of rows that are independent, 16 do better
than none at K of 128 and of 512; those of one text are not independent, hence 32.) Slices go one after another, each in
a few programs (jq4.methods.gptq_solver), so that the work space is that of one: besides the statistics (of a stack, a
copy of one slice's; they may be given up for it) one f32[K, K] and about five f32[K, N], more where groups are longer
than 512. What is traded for time: a refinement takes 2 K^2 N flops where the first sweep takes K^2 N, and the factor
K^3 / 3.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jq4.errors import JQ4Error
from jq4.methods.canonical import Canonical
from jq4.methods.gptq_findings import Findings
from jq4.methods.gptq_options import Options
from jq4.methods.gptq_solver import Solved, Solver
from jq4.qarray import QArray
from jq4.rounding import Encoding, check_encoding
from jq4.statistics import WeightStatistics


def quantize(weight: jax.Array, statistics: WeightStatistics, encoding: Encoding, **options: Any) -> QArray:
    """Quantizes a weight float[*B, K, N], given statistics with a Hessian.

    Args:
      damping: of the Hessian's diagonal, in units of its mean; raised where there is no Cholesky factor.
      refinements: rounds of refitted scales and coordinate descent after GPTQ's own sweep.
      starts: factors for an end of a group's range, where the observer is "mse".
      actorder: "static", or "none" for the natural order.
      correction: how much of the quantized prefix's damage is undone, 0..1; of meaning for statistics of a pair.
      min_rows: slices that saw fewer rows go to the fallback.
      fallback: "hqq" or "rtn".
    """
    return diagnosed(weight, statistics, encoding, **options)[0]


def diagnosed(
    weight: jax.Array,
    statistics: WeightStatistics,
    encoding: Encoding,
    *,
    release: Callable[[str], None] | None = None,
    **options: Any,
) -> tuple[QArray, Findings]:
    """`quantize`, and what was found on the way; `release` is called with each sum of the statistics that was used."""
    check_encoding(encoding, weight.ndim)
    if getattr(statistics, "outer_total", None) is None:
        raise JQ4Error("gptq needs a Hessian: call jq4.observe(..., collect=('hessian',))")
    canonical = Canonical.of(weight.shape, encoding, statistics.outer_total.shape)
    inner = dataclasses.replace(encoding, axis=-2, group_size=canonical.group_size)
    solver = Solver(canonical, inner, Options(**options))
    solved = _solved(solver, weight, statistics, release)
    packed = _packed(solved, canonical=canonical, encoding=encoding, dtype=jnp.dtype(weight.dtype).name)
    return packed, jax.tree.map(lambda part: part.reshape(statistics.count.shape), solved.findings)


def _solved(solver: Solver, weight: jax.Array, statistics: WeightStatistics, release: Any) -> Solved:
    """Of all slices, stacked [S, ...]."""
    counts = statistics.count
    sums = (counts, statistics.outer_total, statistics.cross_total, statistics.way_total)
    if counts.ndim == 0:
        matrix = weight if solver.canonical.is_matrix else _only_matrix(weight, canonical=solver.canonical)
        return _stacked([solver(matrix, *sums, release=release)])
    matrices = _matrices(weight, canonical=solver.canonical)
    flat = (matrices, *jax.tree.map(lambda part: part.reshape(-1, *part.shape[counts.ndim :]), sums))
    if any(isinstance(part, Tracer) for part in jax.tree.leaves(flat)):
        return jax.lax.map(lambda each: solver(*each), flat)
    slices = [solver(*jax.tree.map(lambda part, i=i: part[i], flat)) for i in range(len(matrices))]
    if release is not None:
        release("cross_total")
    return _stacked(slices)


def _stacked(slices: list[Solved]) -> Solved:
    return jax.tree.map(lambda *parts: jnp.stack(parts), *slices)


@functools.partial(jax.jit, static_argnames="canonical")
def _matrices(weight: jax.Array, canonical: Canonical) -> jax.Array:
    return canonical.matrices(weight)


@functools.partial(jax.jit, static_argnames="canonical")
def _only_matrix(weight: jax.Array, canonical: Canonical) -> jax.Array:
    return canonical.matrices(weight)[0]


@functools.partial(jax.jit, static_argnames=("canonical", "encoding", "dtype"))
def _packed(solved: Solved, canonical: Canonical, encoding: Encoding, dtype: str) -> QArray:
    return canonical.packed(solved.codes, solved.parameters, encoding, dtype)
