"""The inputs of one weight as a Gaussian, and how far one such Gaussian is from another.

    KL(N(m_b, S_b) || N(m_a, S_a)) / K                                                      nats a channel
        = (tr(S_a^-1 S_b) - K + (m_b - m_a)^T S_a^-1 (m_b - m_a) + log det S_a - log det S_b) / 2K

with whole covariances S[K, K] or their diagonals, by what was collected. DAMPING times the mean variance of a is added
to both diagonals, so that dead channels neither divide by zero nor count for much. All of it in float64 on the host.
"""

import dataclasses

import numpy as np

DAMPING = 0.01


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Sums over the inputs of one slice, in float64: additive, so that halves are put together from parts."""

    count: int
    absmax: np.ndarray  # f64[K]
    total: np.ndarray  # f64[K]
    square: np.ndarray  # f64[K], or f64[K, K] where whole covariances are compared

    def plus(self, other: "Inputs") -> "Inputs":
        absmax = np.maximum(self.absmax, other.absmax)
        return Inputs(self.count + other.count, absmax, self.total + other.total, self.square + other.square)

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.count

    @property
    def moments(self) -> np.ndarray:
        """E[x x^T] or its diagonal."""
        return self.square / self.count

    @property
    def mean_square(self) -> np.ndarray:
        return np.diagonal(self.moments) if self.square.ndim == 2 else self.moments

    @property
    def covariance(self) -> np.ndarray:
        """f64[K, K] or its diagonal."""
        outer = np.outer(self.mean, self.mean) if self.square.ndim == 2 else self.mean**2
        return self.moments - outer

    @property
    def variance(self) -> np.ndarray:
        return np.maximum(self.mean_square - self.mean**2, 0.0)


def damping_of(a: Inputs) -> float:
    """What is added to every variance."""
    return DAMPING * float(a.variance.mean()) + float(np.finfo(np.float32).tiny)


def divergence(a: Inputs, b: Inputs) -> float:
    """KL(N(b) || N(a)) / K, nats a channel."""
    damping, moved = damping_of(a), b.mean - a.mean
    if a.square.ndim == 1:
        of_a, of_b = a.variance + damping, b.variance + damping
        return float(np.mean((of_b + moved**2) / of_a - 1 + np.log(of_a) - np.log(of_b)) / 2)
    features = len(moved)
    of_a, of_b = (each.covariance + damping * np.eye(features) for each in (a, b))
    both = np.linalg.solve(of_a, np.concatenate([of_b, moved[:, None]], axis=1))
    traced = np.trace(both[:, :features]) + moved @ both[:, features]
    return float((traced - features + np.linalg.slogdet(of_a)[1] - np.linalg.slogdet(of_b)[1]) / (2 * features))
