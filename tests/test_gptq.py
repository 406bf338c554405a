"""Oracle: GPTQ as its paper has it, in numpy and float64: a row at a time, from the Cholesky factor of the inverse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq4.methods import gptq
from jq4.qarray import codes_of
from jq4.rounding import Encoding, codes_of_blocks, find_parameters
from jq4.statistics import statistics_of

PAPER = {"refinements": 0, "actorder": "none"}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(rows, features, seed=1):
    """Rows whose features depend on each other, as those of a network do."""
    return normal(rows, features, seed=seed) @ normal(features, features, seed=seed + 1) + 0.3


def statistics(x):
    return statistics_of(jnp.asarray(x), frozenset({"hessian"}))


def gptq_of_the_paper(weight, x, encoding, damping=0.01):
    """Codes u8[K, N], and the scales f32[G, N] that a group gets from its updated weights."""
    weight = weight.astype(np.float64)
    hessian = x.astype(np.float64).T @ x.astype(np.float64) / len(x)
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[dead] = 0
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    size = encoding.group_size or len(weight)
    codes, groups = np.zeros(weight.shape, np.uint8), []
    for row in range(len(weight)):
        if row % size == 0:
            groups.append(find_parameters(jnp.asarray(weight[row : row + size], jnp.float32), encoding))
        parts: Any = (None if part is None else np.asarray(part, np.float64)[0] for part in groups[-1])
        scale, zero, offset = parts
        form, now = encoding.number_format, jnp.asarray(weight[row : row + 1], jnp.float32)
        codes[row] = np.asarray(codes_of_blocks(now, groups[-1], form))[0]
        levels = np.asarray(form.levels)[codes[row]] if form.levels else codes[row] - (8.0 if zero is None else zero)
        error = (weight[row] - levels * scale - (0 if offset is None else offset)) / upper[row, row]
        weight[row:] -= np.outer(upper[row, row:], error)
    return codes, np.concatenate([np.asarray(group.scale) for group in groups])


@pytest.mark.parametrize(
    "encoding",
    [
        Encoding(group_size=32),
        Encoding(group_size=32, symmetric=False, observer="minmax"),
        Encoding(group_size=32, symmetric=False, observer="minmax", zero_point="float"),
        Encoding(group_size=24),
        Encoding(group_size=100),
        Encoding(group_size=None),
        Encoding(format="nf4", group_size=64),
    ],
    ids=str,
)
def test_its_own_sweep_is_the_papers(encoding):
    weight, x = normal(151, 40), inputs(400, 151)
    q = jax.jit(lambda w, s: gptq.quantize(w, s, encoding, **PAPER))(weight, statistics(x))
    codes, scales = gptq_of_the_paper(weight, x, encoding)
    assert np.mean(codes_of(q) != codes) < 0.001  # a tie in f32 changes the codes after it as well
    np.testing.assert_allclose(np.asarray(q.scale, np.float32), scales, rtol=0.02)
