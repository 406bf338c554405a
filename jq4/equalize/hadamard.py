"""Orthogonal matrices that spread one large value over all channels, f64[n, n], exact to rounding.

    n = 2**a * m    H_n = H_(2**a) (x) H_m / sqrt(n)

Sylvester's H_2 doubles; Paley's two constructions give the orders p + 1 (p a prime, 3 modulo 4) and 2 (p + 1) (1 modulo
4): 12, 20, 24, 28, 36, 44, ..., which serve all widths of usual models (768 = 64 * 12, 896 = 32 * 28, 3584 = 128 * 28).
Where no such m is left over, a random orthogonal matrix of the odd part takes its place: orthogonal, if not as flat.
A randomized one flips signs at random first, so that no vector of a model happens to be a bad one.
"""

import functools

import numpy as np


def randomized(n: int, seed: int) -> np.ndarray:
    """An orthogonal f64[n, n]: random signs, then a Hadamard matrix; the same for the same seed everywhere."""
    random = np.random.Generator(np.random.PCG64(seed))
    signs = random.integers(0, 2, n) * 2.0 - 1.0
    return signs[:, None] * orthogonal(n, random)


def orthogonal(n: int, random: np.random.Generator) -> np.ndarray:
    """A Hadamard matrix of order n over sqrt(n); where none is known here, one times a random orthogonal matrix."""
    for doublings in range(n.bit_length()):
        rest, odd = divmod(n, 2**doublings)
        if odd:
            break
        core = _core(rest)
        if core is not None:
            return np.kron(_sylvester(doublings), core) / np.sqrt(n)
    doublings = (n & -n).bit_length() - 1
    odd_part, _ = np.linalg.qr(random.standard_normal((n >> doublings, n >> doublings)))
    return np.kron(_sylvester(doublings) / np.sqrt(2**doublings), odd_part)


def _sylvester(doublings: int) -> np.ndarray:
    return functools.reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * doublings, np.ones((1, 1)))


def _core(order: int) -> np.ndarray | None:
    """A Hadamard matrix (+-1) of this order by one construction, or None."""
    if order in (1, 2):
        return _sylvester(order - 1)
    if order % 4 == 0 and _is_prime(order - 1):
        skew = _bordered(order - 1, -1.0)
        return np.eye(order) + skew
    if order % 4 == 0 and order // 2 % 2 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        symmetric = _bordered(order // 2 - 1, 1.0)
        return np.kron(symmetric, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(np.eye(order // 2), [[1.0, -1.0], [-1.0, -1.0]])
    return None


def _bordered(prime: int, corner: float) -> np.ndarray:
    """Paley's conference matrix: Jacobsthal's matrix of differences' quadratic characters with a border of ones."""
    character = -np.ones(prime)
    character[[i * i % prime for i in range(prime)]] = 1.0
    character[0] = 0.0
    matrix = np.zeros((prime + 1, prime + 1))
    matrix[0, 1:], matrix[1:, 0] = 1.0, corner
    matrix[1:, 1:] = character[(np.arange(prime)[:, None] - np.arange(prime)[None]) % prime]
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))
