"""Oracles: float64 sums over all tokens, and the divergence that jq4.evaluate reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import jit

from jq4.train import divergence, divergence_from, likeliest

RANDOM = np.random.default_rng(2)
TEACHER, MODEL = (jnp.asarray(RANDOM.normal(0, 2, (5, 40)), jnp.float32) for _ in range(2))


def softmax(logits, temperature=1.0):
    weights = np.exp(np.asarray(logits, np.float64) / temperature)
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_its_formula(temperature):
    p, q = softmax(TEACHER, temperature), softmax(MODEL, temperature)
    wanted = temperature**2 * (p * np.log(p / q)).sum(-1)
    found = jit(lambda model, teacher: divergence(model, teacher, temperature))(MODEL, TEACHER)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 39])
def test_the_likeliest_and_the_rest_bound_it(k):
    kept = likeliest(TEACHER, k, "float32")
    p, q = softmax(TEACHER), softmax(MODEL)
    wanted = []
    for row in range(len(p)):
        order = np.argsort(-p[row])
        lumped = [np.append(each[row][order[:k]], each[row][order[k:]].sum()) for each in (p, q)]
        wanted.append((lumped[0] * np.log(lumped[0] / lumped[1])).sum())
    found, gradient = jit(jax.value_and_grad(lambda model: divergence_from(kept, model).sum()))(MODEL)
    np.testing.assert_allclose(found, np.sum(wanted), rtol=1e-5)
    assert found <= (p * np.log(p / q)).sum() + 1e-5
    assert np.isfinite(gradient).all()


def test_all_tokens_are_the_whole_of_it():
    kept = lambda model, teacher: divergence_from(likeliest(teacher, 40, "float32"), model).sum()  # noqa: E731
    whole = lambda model, teacher: divergence(model, teacher).sum()  # noqa: E731
    both = jit(lambda *given: [jax.value_and_grad(each, (0, 1))(*given) for each in (kept, whole)])
    (found, gradients), (wanted, wanted_gradients) = both(MODEL, TEACHER)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradients[0], wanted_gradients[0], atol=1e-5)
    assert not gradients[1].any() and not wanted_gradients[1].any()  # the teacher is not taught


def test_what_is_stored_is_small():
    kept = likeliest(TEACHER, 4)
    assert [part.dtype.name for part in kept] == ["int32", "float16", "float16"]
    np.testing.assert_allclose(
        divergence_from(kept, MODEL), divergence_from(likeliest(TEACHER, 4, "float32"), MODEL), rtol=0.01
    )
