"""GPTQ of one matrix W[K, N], as a few programs one after another: what one of them needs, the next need not hold.

    program         reads                       gives                                    f32[K, K] in memory
    towards         W, H, C                     (C - H)^T W f32[K, N]                    H and C; C may go then
    factored        H                           H and its factor L, the rows' order      H and H with L; H may go then
    placed          W, L, (C - H)^T W           W corrected, in that order f32[P, N]     H with L
    first           W, L                        GPTQ's own solution                      H with L
    refined         W, H, a solution            one of less error                        H with L
    finished        W, H, a solution            natural codes, parameters and findings   H with L

"H with L" is both in the memory of one (jq4.methods.factored_hessian). Statistics of one weight alone may bring
(C - H)^T W in place of C (jq4.observe_pair), and the first program is left out; their H may come as its squares on and
above the diagonal, in half the memory (jq4.upper_squares).

Each is compiled once for a shape. In a trace they are inlined. What a program holds besides is small where groups are
short; a group of more than 512 rows is one square of the matrix, so that for one scale a channel (g = K) `refined` has
four f32[K, K] more, and the others one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jq4.methods.canonical import Canonical
from jq4.methods.factored_hessian import FactoredHessian
from jq4.methods.feedback import Entry, Solution, Sweep
from jq4.methods.gptq_findings import Findings
from jq4.methods.gptq_options import FALLBACKS, Options
from jq4.methods.grid import dequantized, refit, search
from jq4.methods.hessian import damped_factor, mean_of_rows, mended_diagonal, towards_dense
from jq4.methods.slots import Slots, slots_of
from jq4.methods.triangular import solved
from jq4.qarray import codes_of
from jq4.rounding import Encoding, Parameters, find_parameters
from jq4.upper_squares import whole

_MEASURED_COLUMNS = 256


class Solved(NamedTuple):
    """Codes u8[K, N], parameters f32[G, N], and what was found."""

    codes: jax.Array
    parameters: Parameters
    findings: Findings


class _Factor(NamedTuple):
    both: FactoredHessian
    slots: Slots
    diagonal: jax.Array  # f32[P]
    dead: jax.Array  # bool[K]
    damping: jax.Array  # f32[]


@dataclasses.dataclass(frozen=True)
class Solver:
    """Quantizes matrices of one shape.

    Attributes:
      encoding: with `axis` -2 and a group size.
    """

    canonical: Canonical
    encoding: Encoding
    options: Options

    def __call__(
        self,
        weight: jax.Array,
        count: jax.Array,
        outer: Any,
        cross: jax.Array | None = None,
        way: jax.Array | None = None,
        release: Callable[[str], None] | None = None,
    ) -> Solved:
        """Of W float[K, N] and sums over `count` rows: H and C f32[K, K], or (C - H)^T W f32[K, N] for C.

        H may be in the form of jq4.upper_squares.

        `release` is called with the name of a sum, as jq4.statistics has it, once it has been used.
        """
        release = release or _keep
        starved = count < self.options.rows_wanted
        by_rows = functools.partial(self._by_rows, weight, outer, cross, way, release)
        if isinstance(starved, Tracer):
            found = jax.lax.cond(starved, lambda: _fallen_back(weight, self), by_rows)
        elif bool(starved):
            found = _fallen_back(weight, self)
            release("cross_total")
            release("way_total")
        else:
            found = by_rows()
        return found._replace(findings=found.findings._replace(starved=starved))

    def _by_rows(self, weight: jax.Array, outer: Any, cross: Any, way: Any, release: Callable[[str], None]) -> Solved:
        if not self.options.correction:
            way = None
        elif way is None and cross is not None:
            way = _towards(weight, whole(outer), cross)
        release("cross_total")
        factor = _factored(outer, self)
        release("outer_total")
        placed = _placed(weight, way, factor, self)
        del way
        release("way_total")
        solution = _first(placed, factor, self)
        if self.options.refinements:
            solution = _refined(placed, factor, solution, self)
        return _finished(weight, placed, factor, solution)


def _keep(name: str) -> None:
    """No sum is given up."""


_program = functools.partial(jax.jit, static_argnames="solver")


@_program
def _fallen_back(weight: jax.Array, solver: Solver) -> Solved:
    canonical = solver.canonical
    runs = weight.astype(jnp.float32).reshape(canonical.runs, canonical.length, -1)
    q = FALLBACKS[solver.options.fallback](runs, None, solver.encoding)
    joined: Any = (
        None if part is None else part.astype(jnp.float32).reshape(-1, part.shape[-1])
        for part in (q.scale, q.zero_point, q.offset)
    )
    nothing = Findings(jnp.float32(0), jnp.int32(0), jnp.bool(False), jnp.float32(0), jnp.float32(0))
    return Solved(codes_of(q).reshape(weight.shape), Parameters(*joined), nothing)


@jax.jit
def _towards(weight: jax.Array, outer: jax.Array, cross: jax.Array) -> jax.Array:
    return towards_dense(weight.astype(jnp.float32), outer, cross)


def _factored(outer: Any, solver: Solver) -> _Factor:
    slots, diagonal, dead = _ordered(outer, solver)
    both, damping = damped_factor(outer, slots, diagonal, solver.options.damping)
    return _Factor(both, slots, diagonal, dead, damping)


@_program
def _ordered(outer: Any, solver: Solver) -> tuple[Slots, jax.Array, jax.Array]:
    """The slots, H's diagonal f32[P] in them, and which inputs are dead, bool[K]."""
    natural, dead = mended_diagonal(outer)
    slots = slots_of(solver.canonical, natural, solver.options.actorder)
    return slots, jnp.where(slots.holds, slots.spread(natural[:, None]), 1.0)[:, 0], dead


@_program
def _placed(weight: jax.Array, way: jax.Array | None, factor: _Factor, solver: Solver) -> jax.Array:
    """The weight f32[P, N] in slots, corrected, zero where its inputs are dead."""
    slots = factor.slots
    placed = slots.spread(weight.astype(jnp.float32))
    if way is not None:
        placed = placed + solver.options.correction * solved(factor.both.squares, slots.spread(way), slots.section)
    return jnp.where(slots.spread(factor.dead[:, None]), 0.0, placed)


@_program
def _first(weight: jax.Array, factor: _Factor, solver: Solver) -> Solution:
    """GPTQ's own sweep."""
    encoding, slots = solver.encoding, factor.slots
    pivot = factor.both.pivots[:, None]  # f32[P, 1]

    def enter(entry: Entry) -> tuple[Parameters, jax.Array]:
        expected = entry.rows.weight if slots.group == len(weight) else _updated(entry)
        if encoding.observer == "mse":
            found = search(expected, entry.rows.importance, encoding, solver.options.starts)
        elif encoding.observer == "percentile":
            found = find_parameters(_without_nothing(expected, entry.rows.importance), encoding)
        else:
            found = find_parameters(expected, encoding)
        return found, entry.error

    importance = jnp.where(slots.holds, jnp.square(pivot), 0.0)
    sweep = Sweep(encoding.number_format, slots.group, enter, causal=True)
    return sweep(weight, importance, factor.both.pull_of_factor(), _nothing(weight, slots, encoding))


@functools.partial(jax.jit, static_argnames="solver", donate_argnames="solution")
def _refined(weight: jax.Array, factor: _Factor, solution: Solution, solver: Solver) -> Solution:
    """Rounds of refitted parameters and coordinate descent."""
    encoding, slots = solver.encoding, factor.slots
    diagonal = factor.diagonal[:, None] / mean_of_rows(slots, factor.diagonal)  # in a unit whose square f32 holds

    def enter(entry: Entry) -> tuple[Parameters, jax.Array]:
        pulled = entry.target - entry.rows.weight + jnp.matmul(entry.pull, entry.error, precision="highest")
        curvature = entry.rows.importance  # H_kk
        own = curvature * (entry.pull + jnp.eye(entry.pull.shape[0], dtype=jnp.float32))
        gradient = curvature * (pulled + entry.error)
        found = refit(entry.rows.codes, entry.parameters, gradient, own, encoding)
        return found, entry.rows.weight - dequantized(entry.rows.codes, found, encoding.number_format)

    sweep = Sweep(encoding.number_format, slots.group, enter, causal=False)
    importance, pull = jnp.where(slots.holds, diagonal, 0.0), factor.both.pull_of_hessian(factor.diagonal)

    def round_of(_: Any, held: Solution) -> Solution:
        return sweep(weight, importance, pull, held)

    return jax.lax.fori_loop(0, solver.options.refinements, round_of, solution)


@jax.jit
def _finished(weight: jax.Array, placed: jax.Array, factor: _Factor, solution: Solution) -> Solved:
    """The solution in the rows' natural order, and its errors."""
    slots, stride = factor.slots, -(-weight.shape[1] // _MEASURED_COLUMNS)
    mine, whole = (part[:, ::stride] for part in (solution.error, placed))  # f32[P, n]
    given = slots.spread(weight[:, ::stride].astype(jnp.float32))
    natural = jnp.where(slots.spread(factor.dead[:, None])[:, 0], 0.0, factor.diagonal)
    compared = jnp.concatenate([mine, whole, given - whole + mine, given], axis=1)
    energies = jnp.sum(factor.both.energies(compared, natural).reshape(4, -1), axis=1)
    dead = jnp.sum(factor.dead).astype(jnp.int32)
    codes, parameters = slots.natural(solution.codes, solution.parameters)
    errors = _ratio(energies[0], energies[1]), _ratio(energies[2], energies[3])
    return Solved(codes, parameters, Findings(factor.damping, dead, jnp.bool(False), *errors))


def _nothing(weight: jax.Array, slots: Slots, encoding: Encoding) -> Solution:
    """What GPTQ starts from."""
    width = 1 if encoding.per_tensor else weight.shape[1]
    part = jnp.zeros((weight.shape[0] // slots.group, 1, width), jnp.float32)
    has_zero_point = not encoding.symmetric and not encoding.has_offset
    none = Parameters(part, part if has_zero_point else None, part if encoding.has_offset else None)
    return Solution(jnp.zeros(weight.shape, jnp.uint8), none, jnp.zeros_like(weight))


def _updated(entry: Entry) -> jax.Array:
    """A group's weights f32[g, N] after the updates for all errors before it, as GPTQ has them on entering it.

    A row that moves by d has d less of an error, and pulls the rows whose turn is later back: d = pulled - pull @ d.
    """
    pulled = entry.target - entry.rows.weight
    moved = jax.lax.linalg.triangular_solve(entry.pull, pulled, left_side=True, lower=False, unit_diagonal=True)
    return entry.rows.weight + moved


def _without_nothing(rows: jax.Array, importance: jax.Array) -> jax.Array:
    """A group's rows f32[g, N], NaN where a slot holds none; a group of nothing else as it is."""
    holds = importance > 0
    return jnp.where(holds | ~jnp.any(holds), rows, jnp.nan)


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), 0.0)
