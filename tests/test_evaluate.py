"""Evaluation against numpy's own log-softmax in float64, and against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jq4
from jq4.errors import JQ4Error
from jq4.evaluate import evaluate, rows_of, sqnr_db
from jq4.inventory import bytes_on_disk, inventory, totals, with_errors
from jq4.qarray import QArray
from jq4.quantize_report import QuantizeReport

VOCABULARY = 23


def table_model(seed: int, scale: float = 3.0):
    """A bigram model: the logits at a position are the row of its token."""
    table = np.random.default_rng(seed).normal(0, scale, (VOCABULARY, VOCABULARY)).astype(np.float32)
    return table, jax.jit(lambda tokens: jnp.asarray(table)[tokens])


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (7, 12), np.int32)


def test_figures_are_those_of_numpy_in_float64(tokens):
    (table_q, model), (table_p, reference) = table_model(1), table_model(2)
    found = evaluate(model, tokens, reference=reference, batch_size=3)

    log_q, log_p = log_softmax(table_q[tokens[:, :-1]]), log_softmax(table_p[tokens[:, :-1]])
    nll = -np.take_along_axis(log_q, tokens[:, 1:, None], -1)
    kld = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    np.testing.assert_allclose(found.nll, nll.mean(), rtol=1e-6)
    np.testing.assert_allclose(found.perplexity, np.exp(nll.mean()), rtol=1e-6)
    np.testing.assert_allclose(found.kld_mean, kld.mean(), rtol=1e-6)
    percentiles = [found.kld_p50, found.kld_p90, found.kld_p99, found.kld_p99_9]
    np.testing.assert_allclose(percentiles, np.percentile(kld, [50, 90, 99, 99.9]), rtol=1e-5)
    np.testing.assert_allclose(found.kld_max, kld.max(), rtol=1e-6)
    assert found.top1_agreement == (log_p.argmax(-1) == log_q.argmax(-1)).mean()
    assert (found.tokens, found.rows, found.context) == (7 * 11, 7, 12)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_the_batch_size_changes_nothing(tokens, batch_size):
    (_, model), (_, reference) = table_model(1), table_model(2)
    once = evaluate(model, tokens, reference=reference, batch_size=3)
    again = evaluate(model, tokens, reference=reference, batch_size=batch_size)
    assert once == again
    np.testing.assert_array_equal(once.kld, again.kld)


def test_standard_errors_are_those_of_a_mean_of_rows(tokens):
    """Oracle: the bootstrap, which draws whole rows again and looks at how far the mean moves."""
    (_, model), (_, reference) = table_model(1), table_model(2)
    found = evaluate(model, tokens, reference=reference)
    rows = found.kld.reshape(found.rows, -1).mean(-1)
    draws = np.random.default_rng(0).integers(0, found.rows, (20000, found.rows))
    spread = rows[draws].mean(-1).std() * np.sqrt(found.rows / (found.rows - 1))  # the bootstrap's own bias
    np.testing.assert_allclose(found.kld_mean_standard_error, spread, rtol=0.03)
    np.testing.assert_allclose(
        found.log_perplexity_ratio, np.log(found.perplexity / found.reference_perplexity), rtol=1e-5
    )
    assert found.perplexity_standard_error > 0 and found.top1_agreement_standard_error > 0
    alone = evaluate(model, tokens[:1], reference=reference)
    assert alone.kld_mean_standard_error is None and "perplexity_standard_error" not in alone.as_dict()


def test_a_model_is_no_distance_from_itself(tokens):
    _, model = table_model(1)
    found = evaluate(model, tokens, reference=model)
    assert (found.kld_mean, found.kld_max, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert found.reference_perplexity == found.perplexity


def test_a_uniform_model_has_the_vocabulary_for_its_perplexity(tokens):
    found = evaluate(lambda t: jnp.zeros((*t.shape, VOCABULARY), jnp.bfloat16), tokens)
    np.testing.assert_allclose(found.perplexity, VOCABULARY, rtol=1e-6)
    assert "kld_mean" not in found.as_dict()


def test_a_model_that_knows_nothing_has_no_finite_perplexity(tokens):
    """A likelihood of exp(-1000) at every place: nll is finite, its exponential is not."""
    never = jnp.zeros((*tokens.shape, 2)).at[..., 0].set(1000.0)
    found = evaluate(lambda ids: never[: len(ids)], np.ones_like(tokens))
    assert found.nll == pytest.approx(1000) and found.perplexity == float("inf")


def test_the_reference_may_rule_tokens_out(tokens):
    _, model = table_model(1)
    found = evaluate(model, tokens * 0 + 1, reference=lambda t: model(t).at[..., 0].set(-jnp.inf))
    assert np.isfinite(found.kld_mean) and found.kld_mean > 0


def test_one_shape_is_compiled_and_progress_is_told(tokens):
    _, model = table_model(1)
    shapes, steps = set(), []

    def watched(batch):
        shapes.add(batch.shape)
        return model(batch)

    evaluate(watched, tokens, batch_size=4, progress=lambda done, total: steps.append((done, total)))
    assert shapes == {(4, 12)}
    assert steps == [(4, 7), (7, 7)]


def test_logits_that_are_not_finite_are_an_error(tokens):
    _, model = table_model(1)
    with pytest.raises(JQ4Error, match=r"nll is nan at row 0, position 0: the logits there are not finite"):
        evaluate(lambda t: model(t) * jnp.nan, tokens)


def test_vocabularies_that_differ_are_an_error(tokens):
    _, model = table_model(1)
    with pytest.raises(JQ4Error, match="one vocabulary"):
        evaluate(model, tokens, reference=lambda t: model(t)[..., :5])


@pytest.mark.parametrize("shape", [(3,), (2, 1), (0, 4), (1, 2, 3)])
def test_tokens_of_a_wrong_shape_are_an_error(shape):
    with pytest.raises(JQ4Error, match=r"wanted \[rows, context\]"):
        evaluate(table_model(1)[1], np.zeros(shape, np.int32))


def test_a_text_is_cut_into_rows_and_the_tail_dropped():
    rows, dropped = rows_of(np.arange(11), 4, vocab_size=11)
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert dropped == 3 and rows.dtype == np.int32


def test_rows_are_cut_each_by_itself():
    rows, dropped = rows_of(np.arange(10).reshape(2, 5), 2, vocab_size=10)
    np.testing.assert_array_equal(rows, [[0, 1], [2, 3], [5, 6], [7, 8]])
    assert dropped == 2
    assert rows_of(np.arange(10).reshape(2, 5), None, vocab_size=10)[0].shape == (2, 5)


@pytest.mark.parametrize(
    ("ids", "context", "message"),
    [
        (np.zeros(4, np.float32), None, "ids.npy: dtype float32, wanted integers"),
        (np.zeros((1, 2, 3), int), None, r"ids.npy: shape \(1, 2, 3\), wanted a text \[n\] or rows"),
        (np.zeros((0,), int), None, "ids.npy: there are no tokens in it"),
        (np.zeros((2, 5), int), 6, "ids.npy: the rows have 5 tokens, fewer than the context of 6"),
        (np.zeros(5, int), 6, "ids.npy: the text has 5 tokens, fewer than the context of 6"),
        (np.zeros(5, int), 1, "ids.npy: a context of 1 predicts nothing"),
        (np.array([[1, 9], [3, 10]]), 2, r"ids.npy: token 10 at \[1, 1\] is outside of the model's vocabulary of 10"),
        (np.array([1, -1]), 2, r"ids.npy: token -1 at \[1\] is outside"),
    ],
)
def test_bad_ids_are_errors_that_say_so(ids, context, message):
    with pytest.raises(JQ4Error, match=message):
        rows_of(ids, context, vocab_size=10, name="ids.npy")


def packed_leaf() -> QArray:
    """8 codes a column, all 8 + (0..7 alternating): levels 0..7, scale 2 for the first group and 3 for the second."""
    codes = np.array([[8 | 9 << 4], [10 | 11 << 4], [12 | 13 << 4], [14 | 15 << 4]], np.uint8)
    return QArray(jnp.asarray(codes), jnp.asarray([[2.0], [3.0]], jnp.bfloat16), group_size=4)


def test_sqnr_is_the_ratio_of_energies():
    exact = np.array([[0.0], [2], [4], [6], [12], [15], [18], [22]], np.float32)  # the last is off by one
    wanted = 10 * np.log10((exact**2).sum() / 1.0)
    np.testing.assert_allclose(sqnr_db(exact, packed_leaf()), wanted, rtol=1e-5)
    assert sqnr_db(exact, exact) == float("inf")
    assert sqnr_db(np.zeros(3, np.float32), np.ones(3, np.float32)) == float("-inf")


def test_an_inventory_counts_what_is_held():
    tree = {
        "params": {"a": {"kernel": packed_leaf()}, "b": jnp.zeros((3, 2), jnp.bfloat16), "c": jnp.zeros(4, jnp.int4)}
    }
    kernel, b, c = inventory(tree)
    assert (kernel.path, kernel.shape, kernel.format, kernel.group_size) == ("params/a/kernel", (8, 1), "int4", 4)
    assert (kernel.bytes, kernel.bits_per_weight) == (4 + 2 * 2, 8.0)
    assert (b.format, b.group_size, b.bytes, b.packed) == ("bfloat16", None, 12, False)
    assert (c.bytes, c.host_bytes) == (2, 4)
    summed = totals([kernel, b, c])
    assert summed["parameters"] == 18 and summed["bytes"] == 22 and summed["bytes_host"] == 24
    assert summed["bits_per_weight"] == pytest.approx(8 * 22 / 18)
    assert summed["bits_per_weight_packed"] == 8.0


def test_an_inventory_needs_shapes_only():
    tree = {"kernel": packed_leaf(), "bias": jnp.zeros(1)}
    assert inventory(jax.eval_shape(lambda: tree)) == inventory(tree)


def test_errors_are_for_the_leaves_that_differ():
    exact = np.array([[0.0], [2], [4], [6], [12], [15], [18], [22]], np.float32)
    tree, reference = {"w": packed_leaf(), "b": jnp.ones(2)}, {"w": exact, "b": jnp.ones(2)}
    bias, weight = with_errors(inventory(tree), tree, reference)
    assert bias.sqnr_db is None
    assert weight.sqnr_db == pytest.approx(10 * np.log10(1233), rel=1e-5)
    with pytest.raises(JQ4Error, match="b is in one of them only"):
        with_errors(inventory(tree), tree, {"w": exact})
    with pytest.raises(JQ4Error, match=r"w: shape \(8, 1\), but \(7, 1\) in the reference"):
        with_errors(inventory(tree), tree, {**reference, "w": exact[:7]})


def test_bytes_on_disk_are_those_of_all_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"12345")
    (tmp_path / "y").write_bytes(b"678")
    assert bytes_on_disk(tmp_path) == 8
    assert bytes_on_disk(tmp_path / "y") == 3


def test_sqnr_of_a_leaf_of_zeros_is_infinite_in_reports_too():
    zeros = jnp.zeros((8, 4))
    report = QuantizeReport()
    packed = jq4.quantize({"kernel": zeros}, "hqq-w4g4-asym", report=report)["kernel"]
    assert report.leaves[0].sqnr_db == sqnr_db(zeros, packed) == float("inf")
