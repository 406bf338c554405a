"""Oracles: torch's kl_div and cross entropy, and float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import jit

import jq4
from jq4.train import (
    cosine_distance,
    distillation_loss,
    divergence,
    hidden_loss,
    jensen_shannon,
    likeliest,
    mean_over,
    next_token,
    relative_error,
    reverse_divergence,
)

torch = pytest.importorskip("torch", reason="torch is the oracle; install the peers extra")

RANDOM = np.random.default_rng(4)
LOGITS, TEACHER = (jnp.asarray(RANDOM.normal(0, 2, (2, 5, 12)), jnp.float32) for _ in range(2))
TOKENS = jnp.asarray(RANDOM.integers(0, 12, (2, 5)), jnp.int32)
MASK = jnp.asarray([[True] * 5, [True] * 3 + [False] * 2])
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def as_torch(array, gradient=False):
    return torch.tensor(np.array(array), dtype=torch.float64, requires_grad=gradient)


def torch_kl(target, of, temperature):
    """KL(target || of) at each position, by torch, of logits."""
    log_p, log_q = (torch.log_softmax(each / temperature, -1) for each in (target, of))
    return temperature**2 * torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_both_divergences_and_their_gradients_are_torchs(temperature):
    for ours, theirs in (
        (divergence, lambda q, p: torch_kl(p, q, temperature)),
        (reverse_divergence, lambda q, p: torch_kl(q, p, temperature)),
    ):
        found = jit(
            jax.value_and_grad(lambda q, p, ours=ours: ours(q, p, temperature=temperature).sum(), argnums=(0, 1))
        )
        value, (gradient, of_teacher) = found(LOGITS, TEACHER)
        student = as_torch(LOGITS, gradient=True)
        wanted = theirs(student, as_torch(TEACHER)).sum()
        wanted.backward()
        np.testing.assert_allclose(value, wanted.item(), **CLOSE)
        np.testing.assert_allclose(gradient, student.grad.numpy(), rtol=1e-4, atol=1e-5)
        assert not np.asarray(of_teacher).any()


def test_jensen_shannon_is_between():
    p, q = (torch.softmax(as_torch(each) / 2, -1).numpy() for each in (TEACHER, LOGITS))
    for share in (0.5, 0.1):
        m = share * p + (1 - share) * q
        wanted = 4 * (share * (p * np.log(p / m)).sum(-1) + (1 - share) * (q * np.log(q / m)).sum(-1))
        found = jit(lambda a, b, share=share: jensen_shannon(a, b, share, 2.0))(LOGITS, TEACHER)
        np.testing.assert_allclose(found, wanted, **CLOSE)
    small = jensen_shannon(LOGITS, TEACHER, 1e-3) / 1e-3
    np.testing.assert_allclose(small, divergence(LOGITS, TEACHER), rtol=0.1)
    assert (np.asarray(jensen_shannon(40 * LOGITS, TEACHER)) <= np.log(2) + 1e-6).all()  # bounded, as KL is not
    with pytest.raises(jq4.JQ4Error, match=r"share is 1.0, wanted between 0 and 1"):
        jensen_shannon(LOGITS, TEACHER, 1.0)


def test_a_mixture_over_text_alone_is_torchs():
    """Whatever finite padding holds, it changes neither the loss nor its gradients."""
    text = np.array(MASK)
    student = as_torch(LOGITS, gradient=True)
    soft = torch_kl(as_torch(TEACHER), student, 2.0)[torch.tensor(text)].mean()
    both = torch.tensor(text[:, 1:] & text[:, :-1])
    hard = torch.nn.functional.cross_entropy(student[:, :-1][both], torch.tensor(np.array(TOKENS))[:, 1:][both].long())
    (0.7 * soft + 0.3 * hard).backward()
    spoilt = jnp.where(MASK[..., None], TEACHER, 1e4 * TEACHER[::-1])
    loss = lambda q: distillation_loss(q, TOKENS, spoilt, MASK, share=0.7, temperature=2.0)  # noqa: E731
    value, gradient = jit(jax.value_and_grad(loss))(LOGITS)
    np.testing.assert_allclose(value, (0.7 * soft + 0.3 * hard).item(), **CLOSE)
    np.testing.assert_allclose(gradient, student.grad.numpy(), **CLOSE)
    np.testing.assert_allclose(next_token(LOGITS, TOKENS)[both.numpy()].mean(), hard.item(), **CLOSE)
    kept = likeliest(TEACHER, 12, "float32")
    np.testing.assert_allclose(
        distillation_loss(LOGITS, TOKENS, kept), jnp.mean(divergence(LOGITS, TEACHER)), rtol=1e-4
    )
    assert mean_over(jnp.ones((3, 2, 5)), jnp.zeros((2, 5), bool)) == 0


def test_losses_say_what_they_cannot():
    with pytest.raises(jq4.JQ4Error, match=r"temperature is 2.0, and the teacher's likeliest tokens are kept at 1"):
        distillation_loss(LOGITS, TOKENS, likeliest(TEACHER, 3), temperature=2.0)
    with pytest.raises(jq4.JQ4Error, match=r"there is no teacher, and its share is 1.0"):
        distillation_loss(LOGITS, TOKENS, None)
    with pytest.raises(jq4.JQ4Error, match=r"mask has shape \(2, 5\), and what it is for \(2, 5, 3\)"):
        mean_over(jnp.ones((2, 5, 3)), MASK)
    with pytest.raises(jq4.JQ4Error, match=r"wanted the same leaves of student and teacher, .* not in both: a, b"):
        hidden_loss({"a": LOGITS}, {"b": LOGITS})


def test_a_token_that_is_ruled_out_adds_nothing():
    ruled = TEACHER.at[..., 3].set(-jnp.inf)
    wanted = torch_kl(as_torch(ruled), as_torch(LOGITS), 1.0).nan_to_num(0)
    value, gradient = jit(jax.value_and_grad(lambda q: divergence(q, ruled).sum()))(LOGITS)
    p, q = (torch.softmax(as_torch(each), -1) for each in (ruled, LOGITS))
    wanted = torch.where(p > 0, p * (p.log() - q.log()), 0).sum()
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradient, (q - p).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", [jensen_shannon, reverse_divergence])
def test_what_both_rule_out_is_as_if_it_were_not_there(distance):
    """Such as the tokens that fill up a vocabulary; the bounded one is finite where only one rules out."""
    ruled, student = (each.at[..., -2:].set(-jnp.inf) for each in (TEACHER, LOGITS))
    value, gradient = jit(jax.value_and_grad(lambda q: distance(q, ruled).sum()))(student)
    wanted, of_rest = jit(jax.value_and_grad(lambda q: distance(q, TEACHER[..., :-2]).sum()))(LOGITS[..., :-2])
    np.testing.assert_allclose(value, wanted, **CLOSE)
    np.testing.assert_allclose(gradient, jnp.pad(of_rest, ((0, 0), (0, 0), (0, 2))), **CLOSE)
    if distance is jensen_shannon:
        for q, p in ((LOGITS, ruled), (student, TEACHER)):
            value, gradient = jit(jax.value_and_grad(lambda q, p: jensen_shannon(q, p).sum()))(q, p)
            assert np.isfinite(value) and np.isfinite(gradient).all()


def test_hidden_distances_are_their_formulas():
    x, y = (np.asarray(each, np.float64) for each in (LOGITS, TEACHER))
    np.testing.assert_allclose(relative_error(LOGITS, TEACHER), ((x - y) ** 2).sum(-1) / (y**2).sum(-1), rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(as_torch(LOGITS), as_torch(TEACHER), dim=-1)
    np.testing.assert_allclose(cosine_distance(LOGITS, TEACHER), 1 - cosine.numpy(), rtol=1e-4, atol=1e-6)
    assert relative_error(LOGITS, LOGITS).max() == 0 and relative_error(LOGITS, 0 * TEACHER).max() == 0
    layers = {"deep": jnp.stack([LOGITS, TEACHER, LOGITS]), "last": LOGITS}
    wanted = {"deep": jnp.stack([TEACHER, TEACHER, LOGITS]), "last": TEACHER}
    text = np.asarray(MASK)
    each = (((x - y) ** 2).sum(-1) / (y**2).sum(-1))[text].mean()
    np.testing.assert_allclose(hidden_loss(layers, wanted, MASK), (each / 3 + each) / 2, rtol=1e-5)
