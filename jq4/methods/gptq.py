"""GPTQ (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers").

For a weight W[K, N] whose inputs x have the Hessian H = E[x x^T], find codes (and their groups' parameters) that

    minimise   E|x^T Q - x^T W|^2  =  tr(E^T H E),      E = W - Q

GPTQ rounds the rows of W one after another, and after each moves the rows that are still to come by what best makes up
for the error so far. Here that is rounding with feedback, an equal form of it: see jq4.methods.feedback. Columns do not
know of each other, so that a weight may be sharded over them.

What differs from the paper, each measured to help at equal bits on calibration rows held out:

  - a group's grid is searched for on entering it, from the updated weights, with scales of both signs where it is
    symmetric. A row's squared error counts R_kk^2 there, what it costs once later rows have made up for it.
  - `actorder: static` takes important inputs first without moving a row to another group: see jq4.methods.slots.
  - `refinements` rounds follow, of which none makes the error larger (but by f32 rounding): on entering a group its
    scale (and offset) is solved for by least squares in the Hessian's norm, given its codes and all other errors; then
    each of its codes becomes the best one given all others (coordinate descent: QuantEase, Behdin et al. 2023; CDQuant,
    Nair & Suggala 2024).
  - statistics of a pair (jq4.observe_pair) correct the weight first, for what the quantized layers before it have done
    to its inputs: see `corrected` in jq4.methods.hessian.

Dead inputs and damping: jq4.methods.hessian. A slice (an expert) whose statistics count fewer than `min_rows` rows is
not fitted to them: it is quantized by `fallback`, which looks at no data. (Of rows that are independent, 16 do better
than none at K of 128 and of 512; those of one text are not independent, hence 32.) Slices go one after another, so that
the work space is that of one: about five f32[K, K] and four f32[K, N]. What is traded for time: each refinement costs
as much as the first sweep, 2 K^2 N flops, besides K^3 / 3 for the factor.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jq4.errors import JQ4Error
from jq4.methods import hqq, rtn
from jq4.methods.canonical import Canonical
from jq4.methods.feedback import Entry, Solution, Sweep
from jq4.methods.grid import dequantized, refit, search
from jq4.methods.hessian import corrected, damped_factor, with_dead_inputs
from jq4.methods.slots import Slots, slots_of
from jq4.qarray import QArray, codes_of
from jq4.rounding import Encoding, Parameters, check_encoding, find_parameters
from jq4.statistics import WeightStatistics

ACTORDERS = ("static", "none")
FALLBACKS = {"hqq": hqq.quantize, "rtn": rtn.quantize}


class Findings(NamedTuple):
    """What is worth knowing of each slice of a weight, all [*B].

    Attributes:
      damping: f32, what was added to the Hessian's diagonal, in units of its mean.
      dead: i32, inputs that were never anything but zero; not counted in starved slices.
      starved: bool, whether it saw too few rows and went to the fallback.
      error: f32, E|x^T Q - x^T W|^2 / E|x^T W|^2 over the calibration rows x, W being corrected if it was.
    """

    damping: jax.Array
    dead: jax.Array
    starved: jax.Array
    error: jax.Array

    def is_short(self, options: Mapping[str, Any]) -> bool:
        """Whether the statistics did not suffice in some slice."""
        return bool(jnp.any(self.starved) | jnp.any(self.damping > _with_margin(Options(**options).damping)))

    def note(self, options: Mapping[str, Any]) -> str:
        """The findings in words; empty where there is nothing to say."""
        wanted = Options(**options)
        raised = int(jnp.sum(self.damping > _with_margin(wanted.damping)))
        said = []
        if starved := int(jnp.sum(self.starved)):
            said.append(
                f"{starved} of {self.starved.size} slices saw fewer than {wanted.rows_wanted} rows: {wanted.fallback} "
                "without data"
            )
        if raised:
            said.append(
                f"damping raised from {wanted.damping:g} to {float(jnp.max(self.damping)):g} in {raised} of "
                f"{self.damping.size} slices, whose Hessian has no Cholesky factor"
            )
        if dead := int(jnp.sum(self.dead)):
            said.append(f"{dead} inputs that were never anything but zero, whose weights are now zero")
        return "; ".join(said)


@dataclasses.dataclass(frozen=True)
class Options:
    """The method's options; see `quantize`."""

    damping: float = 0.01
    refinements: int = 2
    starts: int = 16
    actorder: str = "static"
    correction: float = 1.0
    min_rows: int = 32
    fallback: str = "hqq"

    def __post_init__(self) -> None:
        whole = self.refinements >= 0 and self.starts >= 1 and self.min_rows >= 0
        if not whole or self.damping < 0 or not 0 <= self.correction <= 1:
            raise JQ4Error(
                f"gptq: damping={self.damping}, refinements={self.refinements}, starts={self.starts}, "
                f"correction={self.correction}, min_rows={self.min_rows}: wanted damping >= 0, refinements >= 0, "
                "starts >= 1, 0 <= correction <= 1, min_rows >= 0"
            )
        for name, value, known in (("actorder", self.actorder, ACTORDERS), ("fallback", self.fallback, FALLBACKS)):
            if value not in known:
                raise JQ4Error(f"gptq: {name} is {value!r}, wanted one of {', '.join(known)}")

    @property
    def rows_wanted(self) -> int:
        """min_rows, and one at least: no rows are no reason for weights of zero."""
        return max(self.min_rows, 1)


def _with_margin(damping: float) -> float:
    return damping * 1.01  # f32 holds no .01


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
    weight: jax.Array, statistics: WeightStatistics, encoding: Encoding, **options: Any
) -> tuple[QArray, Findings]:
    """`quantize`, and what was found on the way."""
    check_encoding(encoding, weight.ndim)
    if getattr(statistics, "outer_total", None) is None:
        raise JQ4Error("gptq needs a Hessian: call jq4.observe(..., collect=('hessian',))")
    counts = statistics.count
    canonical = Canonical.of(weight.shape, encoding, statistics.outer_total.shape)
    inner = dataclasses.replace(encoding, axis=-2, group_size=canonical.group_size)
    solver = _Solver(canonical, inner, Options(**options))
    totals = (statistics.outer_total, statistics.cross_total)
    each = (canonical.matrices(weight), counts, *totals)
    flat = jax.tree.map(lambda part: part.reshape(-1, *part.shape[counts.ndim :]), each[1:])
    codes, parameters, findings = jax.lax.map(lambda args: solver(*args), (each[0], *flat))
    findings = jax.tree.map(lambda part: part.reshape(counts.shape), findings)
    return canonical.packed(codes, parameters, encoding, jnp.dtype(weight.dtype).name), findings


@dataclasses.dataclass(frozen=True)
class _Solver:
    """Quantizes one matrix [K, N]."""

    canonical: Canonical
    encoding: Encoding
    options: Options

    def __call__(
        self, weight: jax.Array, count: jax.Array, outer: jax.Array, cross: jax.Array | None
    ) -> tuple[jax.Array, Parameters, Findings]:
        """Codes u8[K, N], parameters f32[G, N] and findings, of sums over `count` rows."""
        rows = jnp.maximum(count, 1).astype(jnp.float32)
        starved = count < self.options.rows_wanted

        def by_rows(_: None) -> Any:
            return self._solve(weight.astype(jnp.float32), outer / rows, None if cross is None else cross / rows)

        codes, parameters, findings = jax.lax.cond(starved, lambda _: self._fall_back(weight), by_rows, None)
        return codes, parameters, findings._replace(starved=starved)

    def _fall_back(self, weight: jax.Array) -> tuple[jax.Array, Parameters, Findings]:
        canonical = self.canonical
        runs = weight.astype(jnp.float32).reshape(canonical.runs, canonical.length, -1)
        q = FALLBACKS[self.options.fallback](runs, None, self.encoding)
        joined: Any = (
            None if part is None else part.astype(jnp.float32).reshape(-1, part.shape[-1])
            for part in (q.scale, q.zero_point, q.offset)
        )
        nothing = Findings(jnp.float32(0), jnp.int32(0), jnp.bool(False), jnp.float32(0))
        return codes_of(q).reshape(weight.shape), Parameters(*joined), nothing

    def _solve(
        self, weight: jax.Array, hessian: jax.Array, cross: jax.Array | None
    ) -> tuple[jax.Array, Parameters, Findings]:
        matrix, dead = with_dead_inputs(hessian)
        unit = jnp.mean(jnp.diagonal(matrix))
        slots = slots_of(self.canonical, jnp.diagonal(matrix), self.options.actorder)
        matrix = slots.spread_square(matrix) + jnp.diag((~slots.holds[:, 0]).astype(jnp.float32))
        upper, damping = damped_factor(matrix, unit, self.options.damping)
        weight = slots.spread(weight)  # f32[P, N]
        if cross is not None and self.options.correction:
            weight = corrected(weight, slots.spread_square(cross), matrix, upper, self.options.correction)
        weight = jnp.where(slots.spread(dead[:, None]), 0.0, weight)
        solution = self._first(weight, upper, slots)
        if self.options.refinements:
            solution = jax.lax.fori_loop(
                0, self.options.refinements, lambda _, held: self._refined(weight, matrix, slots, held), solution
            )
        error = _ratio(_energy(solution.error, matrix), _energy(weight, matrix))
        codes, parameters = slots.natural(solution.codes, solution.parameters)
        return codes, parameters, Findings(damping, jnp.sum(dead).astype(jnp.int32), jnp.bool(False), error)

    def _first(self, weight: jax.Array, upper: jax.Array, slots: Slots) -> Solution:
        """GPTQ's own sweep."""
        pivot = jnp.diagonal(upper)[:, None]  # f32[P, 1]
        pull = _without_diagonal(jnp.transpose(upper) / pivot)

        def enter(entry: Entry) -> tuple[Parameters, jax.Array]:
            expected = entry.rows.weight if slots.group == weight.shape[0] else _updated(entry)
            if self.encoding.observer == "mse":
                found = search(expected, entry.rows.importance, self.encoding, self.options.starts)
            elif self.encoding.observer == "percentile":
                found = find_parameters(_without_nothing(expected, entry.rows.importance), self.encoding)
            else:
                found = find_parameters(expected, self.encoding)
            return found, entry.error

        importance = jnp.where(slots.holds, jnp.square(pivot), 0.0)
        return self._sweep(slots, enter)(weight, importance, pull, self._nothing(weight, slots))

    def _refined(self, weight: jax.Array, matrix: jax.Array, slots: Slots, solution: Solution) -> Solution:
        """One round of refitted parameters and coordinate descent."""
        diagonal = jnp.diagonal(matrix)[:, None]
        pull = _without_diagonal(matrix / diagonal)
        form = self.encoding.number_format

        def enter(entry: Entry) -> tuple[Parameters, jax.Array]:
            pulled = entry.target - entry.rows.weight + jnp.matmul(entry.pull, entry.error, precision="highest")
            curvature = entry.rows.importance  # H_kk
            own = curvature * (entry.pull + jnp.eye(entry.pull.shape[0], dtype=jnp.float32))
            gradient = curvature * (pulled + entry.error)
            found = refit(entry.rows.codes, entry.parameters, gradient, own, self.encoding)
            return found, entry.rows.weight - dequantized(entry.rows.codes, found, form)

        return self._sweep(slots, enter)(weight, jnp.where(slots.holds, diagonal, 0.0), pull, solution)

    def _sweep(self, slots: Slots, enter: Any) -> Sweep:
        return Sweep(self.encoding.number_format, slots.group, enter)

    def _nothing(self, weight: jax.Array, slots: Slots) -> Solution:
        """What GPTQ starts from."""
        width = 1 if self.encoding.per_tensor else weight.shape[1]
        part = jnp.zeros((weight.shape[0] // slots.group, 1, width), jnp.float32)
        has_zero_point = not self.encoding.symmetric and not self.encoding.has_offset
        none = Parameters(part, part if has_zero_point else None, part if self.encoding.has_offset else None)
        return Solution(jnp.zeros(weight.shape, jnp.uint8), none, jnp.zeros_like(weight))


def _updated(entry: Entry) -> jax.Array:
    """A group's weights f32[g, N] after the updates for all errors before it, as GPTQ has them on entering it.

    A row that moves by d has d less of an error, and pulls the rows after it back: d = pulled - pull @ d.
    """
    pulled = entry.target - entry.rows.weight
    moved = jax.lax.linalg.triangular_solve(entry.pull, pulled, left_side=True, lower=True, unit_diagonal=True)
    return entry.rows.weight + moved


def _without_nothing(rows: jax.Array, importance: jax.Array) -> jax.Array:
    """A group's rows f32[g, N], NaN where a slot holds none; a group of nothing else as it is."""
    holds = importance > 0
    return jnp.where(holds | ~jnp.any(holds), rows, jnp.nan)


def _without_diagonal(matrix: jax.Array) -> jax.Array:
    return matrix * (1 - jnp.eye(matrix.shape[0], dtype=jnp.float32))


def _energy(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """tr(rows^T H rows), f32[]."""
    return jnp.sum(rows * jnp.matmul(matrix, rows, precision="highest"))


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), 0.0)
