"""How well a model predicts a text, and how far it is from another model: perplexity, KLD, top-1 agreement.

The text is rows of T tokens that know nothing of each other. In each row the logits at positions 0..T-2 predict the
tokens at 1..T-1; every one of them counts alike (llama.cpp, in contrast, scores the second half of a row only, and so
reports lower figures). With q the model's distribution, p the reference's, and v over the vocabulary:

    nll         = -log q(next token)                                     nats, a token
    perplexity  = exp(mean nll)
    KLD         = KL(p || q) = sum_v p(v) (log p(v) - log q(v))          nats, a token; mean and percentiles
    agreement   = mean [argmax p == argmax q]                            0..1
    log ratio   = mean (nll of q - nll of p) = log(perplexity of q / perplexity of p)

Every mean carries a standard error. Tokens of one row share their context and so their luck; the rows are what is
independent, and so an error is that of the mean of R rows' means, std(ddof=1) / sqrt(R) (llama.cpp takes every token
for independent, which is smaller); that of perplexity is perplexity * error of nll. One row alone has none.

Perplexity alone hides damage, because errors on the text's own tokens cancel; KLD does not. Log-softmax and sums over v
are in float32; means over tokens in float64 on the host, so that the batch size changes nothing but rounding. Rows
stream through in batches: what is kept is three numbers a token.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.errors import JQ4Error
from jq4.sqnr import sqnr

LogitsFunction = Callable[[jax.Array], jax.Array]  # i32[B, T] -> float[B, T, V]
KLD_PERCENTILES = {"kld_p50": 50, "kld_p90": 90, "kld_p99": 99, "kld_p99_9": 99.9}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. Figures against a reference are None where there was none.

    Attributes:
      tokens: how many tokens were predicted, rows * (context - 1).
      context: T, tokens in a row.
      nll: mean negative log-likelihood in nats.
      log_perplexity_ratio: log(perplexity / reference_perplexity), token by token and so free of the text's own spread.
      *_standard_error: of the mean of that name, see the module's text; None for a single row.
      kld: f32[tokens], the divergence at every position, row by row; not part of `as_dict`.
    """

    perplexity: float
    nll: float
    tokens: int
    rows: int
    context: int
    reference_perplexity: float | None = None
    kld_mean: float | None = None
    kld_p50: float | None = None
    kld_p90: float | None = None
    kld_p99: float | None = None
    kld_p99_9: float | None = None
    kld_max: float | None = None
    top1_agreement: float | None = None
    log_perplexity_ratio: float | None = None
    perplexity_standard_error: float | None = None
    kld_mean_standard_error: float | None = None
    top1_agreement_standard_error: float | None = None
    log_perplexity_ratio_standard_error: float | None = None
    kld: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """The figures that were measured, as plain numbers."""
        figures = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "kld"}
        return {name: value for name, value in figures.items() if value is not None}


def evaluate(
    logits_fn: LogitsFunction,
    tokens: Any,
    *,
    reference: LogitsFunction | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Runs `logits_fn` (and `reference`) over rows of tokens and compares.

    Args:
      logits_fn: i32[B, T] -> float[B, T, V]; jitted by the caller, so that weights are arguments and not constants.
      tokens: integers [R, T], T >= 2.
      reference: another such function, of the same vocabulary.
      batch_size: B. A short last batch is filled up, so that one shape is compiled; the filling is not counted.
      progress: called with (rows done, rows in all) after each batch.

    Raises:
      JQ4Error: tokens of a wrong shape, vocabularies that differ, logits that are not finite.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise JQ4Error(f"the tokens have shape {tokens.shape}, wanted [rows, context] with a context of 2 or more")
    if batch_size < 1:
        raise JQ4Error(f"batch_size is {batch_size}, wanted 1 or more")
    rows = tokens.shape[0]
    batch_size = min(batch_size, rows)
    kept: list[dict[str, np.ndarray]] = []
    for start in range(0, rows, batch_size):
        batch = tokens[start : start + batch_size]
        filled = jnp.asarray(np.resize(batch, (batch_size, tokens.shape[1])), jnp.int32)  # repeats rows to fill up
        found = _compare(logits_fn(filled), None if reference is None else reference(filled), filled)
        kept.append({name: np.asarray(value)[: len(batch)] for name, value in found.items()})
        if progress is not None:
            progress(min(start + batch_size, rows), rows)
    return _summarize({name: np.concatenate([each[name] for each in kept]) for name in kept[0]})


def _compare(logits: jax.Array, reference: jax.Array | None, tokens: jax.Array) -> dict[str, jax.Array]:
    wanted = (*tokens.shape, logits.shape[-1])
    for name, found in (("model", logits), ("reference", reference)):
        if found is not None and found.shape != wanted:
            raise JQ4Error(
                f"the {name}'s logits have shape {found.shape}, wanted {wanted}: the model and its reference must "
                "have one vocabulary"
            )
    return _token_figures(logits, reference, tokens)


@jax.jit
def _token_figures(logits: jax.Array, reference: jax.Array | None, tokens: jax.Array) -> dict[str, jax.Array]:
    """Logits [B, T, V], tokens i32[B, T] -> figures f32 or bool [B, T-1]."""
    next_token = tokens[:, 1:, None]  # i32[B, T-1, 1]
    log_q = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)  # f32[B, T-1, V]
    figures = {"nll": -jnp.take_along_axis(log_q, next_token, axis=-1)[..., 0]}
    if reference is not None:
        log_p = jax.nn.log_softmax(reference[:, :-1].astype(jnp.float32), axis=-1)
        figures["reference_nll"] = -jnp.take_along_axis(log_p, next_token, axis=-1)[..., 0]
        # a token that p rules out (-inf) adds nothing, whatever q says of it
        figures["kld"] = jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * (log_p - log_q), 0.0), axis=-1)
        figures["agree"] = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
    return figures


def _summarize(figures: dict[str, np.ndarray]) -> Evaluation:
    for name, values in figures.items():
        if not np.isfinite(values).all():
            row, position = np.argwhere(~np.isfinite(values))[0]
            raise JQ4Error(
                f"{name} is {values[row, position]} at row {row}, position {position}: the logits there are not "
                "finite. Look for NaN or Inf in the weights (`jq4 inspect`), or for overflow in a narrow dtype."
            )
    rows, length = figures["nll"].shape
    nll, nll_error = _mean(figures["nll"])
    perplexity = _perplexity(nll)
    evaluation = Evaluation(
        perplexity,
        nll,
        rows * length,
        rows,
        length + 1,
        perplexity_standard_error=None if nll_error is None else perplexity * nll_error,
    )
    if "kld" not in figures:
        return evaluation
    kld = figures["kld"].ravel()
    increase = figures["nll"].astype(np.float64) - figures["reference_nll"]
    means = {"kld_mean": figures["kld"], "top1_agreement": figures["agree"], "log_perplexity_ratio": increase}
    found: dict[str, Any] = {name: float(np.percentile(kld, rank)) for name, rank in KLD_PERCENTILES.items()}
    for name, values in means.items():
        found[name], found[f"{name}_standard_error"] = _mean(values)
    return dataclasses.replace(
        evaluation,
        reference_perplexity=_perplexity(_mean(figures["reference_nll"])[0]),
        kld_max=float(kld.max()),
        kld=kld,
        **found,
    )


def _perplexity(nll: float) -> float:
    with np.errstate(over="ignore"):  # infinite, of a model that knows nothing any more
        return float(np.exp(nll))


def _mean(values: np.ndarray) -> tuple[float, float | None]:
    """The mean over tokens [R, T-1], and its standard error, taken over rows."""
    rows = values.mean(axis=-1, dtype=np.float64)  # f64[R]
    error = None if len(rows) < 2 else float(rows.std(ddof=1) / np.sqrt(len(rows)))
    return float(values.mean(dtype=np.float64)), error


def rows_of(ids: Any, context: int | None, *, vocab_size: int, name: str = "ids") -> tuple[np.ndarray, int]:
    """Token ids, a whole text [n] or rows [R, T], as rows of `context` tokens.

    A text is cut every `context` tokens from its start; a row of T tokens gives T // context rows. What is left at an
    end, too short for a row, is dropped.

    Returns:
      The rows i32[R', context], and how many tokens were dropped.

    Raises:
      JQ4Error: naming `name`, for ids that are not integers, not 1-d or 2-d, outside of the vocabulary or too few.
    """
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise JQ4Error(f"{name}: dtype {ids.dtype}, wanted integers (int32 token ids)")
    if ids.ndim not in (1, 2):
        raise JQ4Error(f"{name}: shape {ids.shape}, wanted a text [n] or rows [rows, tokens] of token ids")
    if not ids.size:
        raise JQ4Error(f"{name}: there are no tokens in it")
    length = int(ids.shape[-1])
    context = length if context is None else context
    if context < 2:
        raise JQ4Error(f"{name}: a context of {context} predicts nothing, wanted 2 or more")
    if context > length:
        holder = "the text has" if ids.ndim == 1 else "the rows have"
        raise JQ4Error(f"{name}: {holder} {length} tokens, fewer than the context of {context}; use a shorter context")
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        where = tuple(int(i) for i in np.argwhere(outside)[0])
        raise JQ4Error(
            f"{name}: token {int(ids[where])} at {list(where)} is outside of the model's vocabulary of {vocab_size}; "
            "tokenize the text with this model's own tokenizer"
        )
    pieces = length // context
    rows = ids[..., : pieces * context].reshape(-1, context).astype(np.int32)
    return rows, ids.size - rows.size


def sqnr_db(weight: Any, approximation: Any) -> float:
    """`jq4.sqnr.sqnr` as a number: signal to quantization noise of one leaf in dB; inf where nothing differs."""
    return float(sqnr(weight, approximation))
