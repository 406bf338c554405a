"""Drift: has what a model reads moved away from what it was calibrated on? Told from statistics of its weights' inputs.

For a weight's inputs x[K] let a be calibration and b the new text, with means m_a, m_b and covariances S_a, S_b:

    divergence     KL(N(m_b, S_b) || N(m_a, S_a)) / K                              nats a channel; the verdict's measure
                   = (tr(S_a^-1 S_b) - K + (m_b - m_a)^T S_a^-1 (m_b - m_a) + log det S_a - log det S_b) / 2K
    mean shift     sqrt(mean_k (m_b - m_a)_k**2 / S_a,kk)                          in standard deviations
    scale shift    sqrt(mean_k (log(rms_b,k / rms_a,k))**2)                        .1: channels are some 10 % off
    absmax ratio   max_k absmax_b,k / max_k absmax_a,k                             what static activation scales clip at
    frobenius      |H_b - H_a|_F / |H_a|_F, with H = E[x x^T]                      what GPTQ's choices rest on

S is the whole covariance where Hessians were collected, its diagonal otherwise. A hundredth of the mean variance of a
is added to both diagonals, so that dead channels neither divide by zero nor count for much.

A divergence of two finite texts is never zero. How large is it where nothing moved? The calibration text is cut into
parts, and halves made of them are compared with each other: that null distribution knows the spread between one
passage and another. At the null a divergence is proportional to 1/n_a + 1/n_b rows, by which the halves' is scaled to
the sizes at hand. A slice (a layer, an expert) moved where its divergence exceeds MARGIN times the largest of its null
divergences. That is a statement about inputs; what it costs only KLD on the new text tells.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jq4.errors import JQ4Error
from jq4.input_divergence import Inputs, damping_of, divergence
from jq4.statistics import Statistics, WeightStatistics, merge
from jq4.upper_squares import whole

MARGIN = 2.0
SPLITS = 16  # at most, of the parts into halves


@dataclasses.dataclass(frozen=True)
class SliceDrift:
    """One weight, or one slice of a stacked one; figures are None where one of the texts never reached it.

    Attributes:
      null: the largest divergence of two halves of calibration, scaled to these sizes; None without parts.
      calibration_rows, new_rows: how many inputs it saw.
      divergence, mean_shift, scale_shift, absmax_ratio, frobenius: see the module's text.
    """

    path: str
    index: tuple[int, ...]
    null: float | None
    calibration_rows: int
    new_rows: int
    divergence: float | None = None
    mean_shift: float | None = None
    scale_shift: float | None = None
    absmax_ratio: float | None = None
    frobenius: float | None = None

    @property
    def threshold(self) -> float | None:
        return None if self.null is None else MARGIN * self.null

    @property
    def moved(self) -> bool | None:
        """Whether its inputs moved; a slice that only the new text reaches did. None: nothing tells."""
        if self.new_rows and not self.calibration_rows:
            return True
        if self.divergence is None or self.threshold is None:
            return None
        return self.divergence > self.threshold

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "threshold": self.threshold, "moved": self.moved}


@dataclasses.dataclass(frozen=True)
class Drift:
    """What `drift` found.

    Attributes:
      slices: by path, slices in order.
      covariance: "full" or "diagonal".
      splits: how many pairs of halves the null distribution is made of.
    """

    slices: tuple[SliceDrift, ...]
    covariance: str
    splits: int

    @property
    def moved(self) -> list[SliceDrift]:
        """The slices that moved, the farthest (against its threshold) first."""
        far = [each for each in self.slices if each.moved]
        return sorted(far, key=lambda each: -(each.divergence or np.inf) / (each.threshold or 1))

    @property
    def share_moved(self) -> float:
        """Of the slices of which it can be told, the share that moved."""
        told = [each.moved for each in self.slices if each.moved is not None]
        return sum(told) / len(told) if told else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "covariance": self.covariance,
            "splits": self.splits,
            "margin": MARGIN,
            "share_moved": self.share_moved,
            "slices": [each.as_dict() for each in self.slices],
        }


def drift(stats_a: Statistics | Sequence[Statistics], stats_b: Statistics) -> Drift:
    """How far the inputs of each weight moved from calibration to a new text.

    Args:
      stats_a: of jq4.observe on calibration's text; or, so that there is a verdict, a list of such statistics, one for
        each of an even number of parts of the text, 4 or more.
      stats_b: the same on the new text. Both need "absmax", "mean" and "mean_square"; where both have Hessians, whole
        covariances are compared.

    Raises:
      JQ4Error: statistics that lack something, of different weights, or of different sizes.
    """
    parts = [] if isinstance(stats_a, Statistics) else list(stats_a)
    if not isinstance(stats_a, Statistics) and len(parts) < 2:
        raise JQ4Error(f"drift: {len(parts)} parts of calibration, wanted 2 or more (an even number, 4 for a verdict)")
    whole = merge_statistics(parts) if parts else stats_a
    assert isinstance(whole, Statistics)
    paths = [path for path in whole if path in stats_b]
    if not paths:
        raise JQ4Error("drift: the two statistics have no weight in common: observe the same function on both texts")
    halves = list(_halves(len(parts)))
    full = all(stats[path].outer_total is not None for stats in (whole, stats_b) for path in paths)
    slices = []
    for path in paths:
        slices += _slices_of(path, whole[path], stats_b[path], [part[path] for part in parts], halves, full)
    return Drift(tuple(slices), "full" if full else "diagonal", len(halves))


def merge_statistics(parts: Iterable[Statistics]) -> Statistics:
    """The statistics of several texts as if they were one."""
    parts = list(parts)
    merged = dict(parts[0])
    for part in parts[1:]:
        if part.keys() != merged.keys():
            raise JQ4Error(f"statistics of different weights ({sorted(part.keys() ^ merged.keys())[0]}) do not merge")
        merged = {path: merge(merged[path], part[path]) for path in merged}
    return Statistics(merged, parts[0].grouped_axes, parts[0].looked_up)


def _halves(parts: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of halves of the parts, part 0 always in the first; at most SPLITS of them, evenly chosen."""
    if parts < 4:
        return
    everything = list(itertools.combinations(range(1, parts), parts // 2 - 1))
    step = -(-len(everything) // SPLITS)
    for others in everything[::step]:
        first = (0, *others)
        yield first, tuple(part for part in range(parts) if part not in first)


def _slices_of(
    path: str,
    a: WeightStatistics,
    b: WeightStatistics,
    parts: Sequence[WeightStatistics],
    halves: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    full: bool,
) -> list[SliceDrift]:
    host_a, host_b = _host(path, a), _host(path, b)
    if host_a.absmax.shape != host_b.absmax.shape:
        raise JQ4Error(f"{path}: inputs {host_a.absmax.shape} in one statistics and {host_b.absmax.shape} in the other")
    host_parts = [_host(path, part) for part in parts]
    found = []
    for index in np.ndindex(*host_a.count.shape):
        inputs = [_inputs(each, index, full) for each in (host_a, host_b, *host_parts)]
        null = _null(inputs[0], inputs[1], inputs[2:], halves)
        found.append(_compare(path, index, inputs[0], inputs[1], null))
    return found


def _host(path: str, statistics: WeightStatistics) -> WeightStatistics:
    for name, sums in (("absmax", "absmax"), ("mean", "total"), ("mean_square", "square_total")):
        if getattr(statistics, sums) is None:
            raise JQ4Error(f"{path}: {name} was not collected: call observe(..., collect=(..., {name!r}))")
    return jax.device_get(statistics)


def _inputs(statistics: WeightStatistics, index: tuple[int, ...], full: bool) -> Inputs:
    squares = whole(statistics.outer_total) if full else statistics.square_total
    sums = (np.asarray(each[index], np.float64) for each in (statistics.absmax, statistics.total, squares))
    return Inputs(int(statistics.count[index]), *sums)


def _compare(path: str, index: tuple[int, ...], a: Inputs, b: Inputs, null: float | None) -> SliceDrift:
    if not (a.count and b.count):
        return SliceDrift(path, index, null, a.count, b.count)
    damping = damping_of(a)
    mean_shift = np.sqrt(np.mean((b.mean - a.mean) ** 2 / (a.variance + damping)))
    scales = [np.log(each.mean_square + damping) / 2 for each in (a, b)]
    scale_shift = np.sqrt(np.mean((scales[1] - scales[0]) ** 2))
    absmax_ratio = b.absmax.max() / max(a.absmax.max(), np.finfo(np.float32).tiny)
    frobenius = np.linalg.norm(b.moments - a.moments) / max(np.linalg.norm(a.moments), np.finfo(np.float32).tiny)
    figures = map(float, (divergence(a, b), mean_shift, scale_shift, absmax_ratio, frobenius))
    return SliceDrift(path, index, null, a.count, b.count, *figures)


def _null(
    a: Inputs, b: Inputs, parts: Sequence[Inputs], halves: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> float | None:
    """The largest divergence of two halves, scaled to the sizes of a and b; None where nothing was seen or split."""
    if not (a.count and b.count):
        return None
    found = []
    for first, second in halves:
        one, other = _sum(parts, first), _sum(parts, second)
        if one.count and other.count:
            scaled = (1 / a.count + 1 / b.count) / (1 / one.count + 1 / other.count)
            found += [divergence(one, other) * scaled, divergence(other, one) * scaled]
    return float(max(found)) if found else None


def _sum(parts: Sequence[Inputs], chosen: Iterable[int]) -> Inputs:
    first, *others = (parts[part] for part in chosen)
    for other in others:
        first = first.plus(other)
    return first
