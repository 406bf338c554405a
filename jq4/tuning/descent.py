"""Gradient descent on the variables of packed leaves: several steps a dispatch, and the best by measure is kept.

A loss is a function of (variables, context, batch) that gives one figure a row, f32[B]; its mean over a batch, or an
`objective` of its own where what is learned is not yet what is stored, is followed downhill by Adam (Kingma & Ba 2015),
or by the gradient's sign (AutoRound, Cheng et al. 2023), with rates that fall to zero, linearly or along a
cosine, or stay. Straight-through weights do not settle by themselves, they flip between two codes as long as the rate
is large; falling rates let them.

Which batch is seen when is drawn from the seed on the host, so that the same seed gives the same bytes. What a step
ends with is no judgement: `checks` times on the way, and at the end, the loss is measured over all of the judges' rows,
and what comes back is the best of these and of the start, so never worse than the start.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jq4.errors import JQ4Error

DISPATCH_BYTES = 256 * 2**20  # of batches that go to the device at a time
STEPS_A_DISPATCH = 25
OPTIMIZERS = ("adam", "sign")
DECAYS = ("linear", "cosine", "constant")

Progress = Callable[[int, int, float], None]  # steps done, steps in all, the mean objective of the last dispatch


class RowLoss(Protocol):
    """Hashable, so that what is compiled for it is found again."""

    def __call__(self, variables: Any, context: Any, batch: Any) -> jax.Array:
        """The loss of each row, f32[B]."""
        ...


class Objective(Protocol):
    """Hashable too."""

    def __call__(self, variables: Any, context: Any, batch: Any, progress: jax.Array, start: jax.Array) -> jax.Array:
        """What is followed downhill, f32[]; `progress` is the share of steps done, `start` the loss at the start."""
        ...


@dataclasses.dataclass(frozen=True)
class MeanLoss:
    """The objective where the loss itself is learned."""

    loss: RowLoss

    def __call__(self, variables: Any, context: Any, batch: Any, progress: jax.Array, start: jax.Array) -> jax.Array:
        del progress, start
        return jnp.mean(self.loss(variables, context, batch))


@dataclasses.dataclass(frozen=True)
class Settings:
    """How far and how fast.

    Attributes:
      iterations, batch_size: steps, and the rows of one.
      optimizer, decay: one of OPTIMIZERS, one of DECAYS.
      rate, scale_rate, shift_rate: the first rates of `rounding`, `log_scale` and `shift`; zero leaves that alone.
      checks: how many times the loss is measured over the judges' rows after the start.
    """

    iterations: int
    batch_size: int
    rate: float
    scale_rate: float
    shift_rate: float
    optimizer: str = "adam"
    decay: str = "linear"
    checks: int = 4

    def __post_init__(self) -> None:
        for name, least in (("iterations", 0), ("batch_size", 1), ("checks", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise JQ4Error(f"{name} is {value!r}, wanted an integer, {least} or more")
        for name in ("rate", "scale_rate", "shift_rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise JQ4Error(f"{name} is {value!r}, wanted a number, zero or more")
        for name, known in (("optimizer", OPTIMIZERS), ("decay", DECAYS)):
            if getattr(self, name) not in known:
                raise JQ4Error(f"{name} is {getattr(self, name)!r}, wanted one of {', '.join(known)}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Settings":
        """Those of the options that are settings."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in options.items() if name in names})


@dataclasses.dataclass(frozen=True)
class Rows:
    """What batches are drawn from: `fetch` gives a tree of arrays [len(indices), ...] for rows' indices."""

    fetch: Callable[[np.ndarray], Any]
    learn: np.ndarray  # the indices that are learned from, i[n]
    judge: np.ndarray  # the indices that the loss is measured over, i[m]


def descend(
    loss: RowLoss,
    variables: Any,
    context: Any,
    rows: Rows,
    settings: Settings,
    seed: int,
    progress: Progress | None = None,
    objective: Objective | None = None,
) -> tuple[Any, float, float]:
    """The best variables found, and the judges' mean loss at the start and at the best."""
    objective = objective or MeanLoss(loss)
    first = _measure(loss, variables, context, rows, settings.batch_size)
    if not math.isfinite(first):
        raise JQ4Error(f"the loss at the start is {first}: wanted finite weights, inputs and targets")
    best, least = variables, first
    variables = jax.tree.map(jnp.array, variables)  # a copy, since steps take theirs over
    state = _optimizer(settings).init(variables)
    size = _bytes_of(rows.fetch(rows.learn[:1])) * settings.batch_size
    at_once = max(1, min(STEPS_A_DISPATCH, DISPATCH_BYTES // max(size, 1)))
    checks = {settings.iterations * (i + 1) // settings.checks for i in range(settings.checks)}
    order = draw_batches(rows.learn, settings.iterations, settings.batch_size, seed)
    for start, stop in _dispatches(settings.iterations, at_once, checks):
        batches = _reshaped(rows.fetch(order[start:stop].ravel()), stop - start)
        shares = np.arange(start, stop, dtype=np.float32) / settings.iterations
        given = (variables, state, context, batches, shares, np.float32(first))
        variables, state, losses = _steps(*given, objective=objective, settings=settings)
        if progress is not None:
            progress(stop, settings.iterations, float(jnp.mean(losses)))
        if stop in checks:
            found = _measure(loss, variables, context, rows, settings.batch_size)
            if found < least:  # false of a NaN
                best, least = jax.tree.map(jnp.array, variables), found
    return best, first, least


def split_rows(count: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows to learn from, and the rows to judge by: evenly spread, and all of them where a share makes no row."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 0.5:
        raise JQ4Error(f"held_out is {share!r}, wanted a share of the rows from 0 to 0.5")
    held = int(count * share)
    everyone = np.arange(count)
    if not held:
        return everyone, everyone
    judges = (np.arange(held) * count) // held
    return np.setdiff1d(everyone, judges), judges


def draw_batches(indices: np.ndarray, steps: int, batch_size: int, seed: int) -> np.ndarray:
    """i[steps, batch_size]: every index once, in a random order, before any of them again."""
    random = np.random.default_rng(seed)
    rounds = -(-steps * batch_size // len(indices))
    drawn = [random.permutation(indices) for _ in range(max(rounds, 1))]
    return np.concatenate(drawn)[: steps * batch_size].reshape(steps, batch_size)


def _dispatches(steps: int, at_once: int, checks: set[int]) -> Iterator[tuple[int, int]]:
    """The (start, stop) of runs of at most `at_once` steps that end at every check."""
    start = 0
    for check in sorted(checks):
        while start < check:
            stop = min(start + at_once, check)
            yield start, stop
            start = stop
    assert start == steps


def _reshaped(batches: Any, steps: int) -> Any:
    return jax.tree.map(lambda each: each.reshape(steps, -1, *each.shape[1:]), batches)


def _bytes_of(batch: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(batch))


def _measure(loss: RowLoss, variables: Any, context: Any, rows: Rows, batch_size: int) -> float:
    """The mean loss over the judges' rows; a short last batch is filled up with rows that are not counted."""
    total, count = 0.0, len(rows.judge)
    batch_size = min(batch_size, count)
    for start in range(0, count, batch_size):
        indices = rows.judge[start : start + batch_size]
        losses = _losses(variables, context, rows.fetch(np.resize(indices, batch_size)), loss=loss)
        total += float(np.sum(np.asarray(losses, np.float64)[: len(indices)]))
    return total / count


@functools.partial(jax.jit, static_argnames="loss")
def _losses(variables: Any, context: Any, batch: Any, *, loss: RowLoss) -> jax.Array:
    return loss(variables, context, batch)


@functools.partial(jax.jit, static_argnames=("objective", "settings"), donate_argnums=(0, 1))
def _steps(
    variables: Any,
    state: Any,
    context: Any,
    batches: Any,
    shares: jax.Array,
    start: jax.Array,
    *,
    objective: Objective,
    settings: Settings,
) -> tuple[Any, Any, jax.Array]:
    """As many steps as the batches have leading slices, after f32[S] shares of all; their objectives f32[S]."""
    optimizer = _optimizer(settings)

    def step(carry: tuple[Any, Any], given: tuple[Any, jax.Array]) -> tuple[tuple[Any, Any], jax.Array]:
        variables, state = carry
        batch, share = given
        value, gradient = jax.value_and_grad(lambda each: objective(each, context, batch, share, start))(variables)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes its step count
            updates, state = optimizer.update(gradient, state, variables)
        return (optax.apply_updates(variables, updates), state), value

    (variables, state), losses = jax.lax.scan(step, (variables, state), (batches, shares))
    return variables, state, losses


def _optimizer(settings: Settings) -> optax.GradientTransformation:
    def of(rate: float) -> optax.GradientTransformation:
        if not rate:
            return optax.set_to_zero()
        steps = max(settings.iterations, 1)
        decay = {
            "linear": optax.linear_schedule(rate, 0.0, steps),
            "cosine": optax.cosine_decay_schedule(rate, steps),
            "constant": rate,
        }[settings.decay]
        return optax.adam(decay) if settings.optimizer == "adam" else optax.sign_sgd(decay)

    rates = {"rounding": settings.rate, "log_scale": settings.scale_rate, "shift": settings.shift_rate}
    return optax.partition({name: of(rate) for name, rate in rates.items()}, _labels)


def _labels(variables: Any) -> Any:
    """Every array's name in jq4.tuning.learned.Variables."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].name, variables)
