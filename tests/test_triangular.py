"""Oracle: numpy's Cholesky factor and solve, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jq4.methods.triangular import factored, solved

pytestmark = pytest.mark.arithmetic


def positive(size):
    x = np.random.default_rng(0).normal(size=(2 * size, size)).astype(np.float32)
    return x.T @ x / size


@pytest.mark.parametrize(("size", "square"), [(96, 32), (40, 40), (60, 20)])
def test_squares_give_the_factor_and_its_solves(size, square):
    matrix, rows = positive(size), np.random.default_rng(1).normal(size=(size, 7)).astype(np.float32)
    lower = factored(jnp.asarray(matrix), square)
    read = np.kron(np.tril(np.ones((size // square, size // square))), np.ones((square, square))) > 0
    wanted = np.linalg.cholesky(matrix.astype(np.float64))
    np.testing.assert_allclose(np.asarray(lower)[read], wanted[read], atol=2e-6)
    found = solved(jnp.where(read, lower, jnp.nan), jnp.asarray(rows), square)
    np.testing.assert_allclose(found, np.linalg.solve(matrix.astype(np.float64), rows), rtol=1e-4, atol=1e-4)


def test_a_matrix_without_a_factor_gives_nan_on_the_diagonal():
    matrix = np.eye(96, dtype=np.float32)
    matrix[40, 40] = -1
    diagonal = np.diagonal(factored(jnp.asarray(matrix), 32))
    assert np.isfinite(diagonal[:32]).all() and np.isnan(diagonal[32:64]).any()
