"""The training loop: a pure step made of a loss and an optimizer, and what runs it, saves it and goes on where it died.

    state = begin(trained, optimizer)
    step  = make_step(loss, optimizer)
    state = train(step, state, fixed, batches, steps=400, ...)

What is trained is any pytree: params, params with quantizers, adapters. `fixed` is what the loss looks at beside it (a
teacher's weights, a packed base): an argument of the program, not a constant in it. It knows nothing of models.

Whatever a step does depends on the state and on its number: batches come by number (jq4.train.running.rows, or a grain
MapDataset), and what is drawn at random in a loss is drawn from keys that the batch carries. So there is nothing to
save but the state, and a run that is killed and resumed any number of times gives the losses of one that was not, to
the last bit, on the same number of devices.

Masters, gradients and moments are float32, whatever the loss computes in. A batch has a leading axis of parts
[A, B / A, ...]: a part at a time goes through the loss, and their gradients are summed, so that activations are those
of one part. A loss that is a mean over rows gives the gradient of the whole batch.

The host stays one step ahead of the device: a step's figures are read when the next one has been dispatched.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jq4.errors import JQ4Error

Loss = Callable[[Any, Any, Any], jax.Array]  # (trained, fixed, a part of a batch) -> f32[], the mean over its rows
Step = Callable[[Any, Any, Any], tuple[Any, dict[str, jax.Array]]]


class TrainState(NamedTuple):
    """All that changes in training: steps done i32[], what is trained, and the optimizer's moments."""

    step: Any
    trained: Any
    optimizer: Any


class Batches(Protocol):
    """Batches by the number of their step, each a pytree of arrays [A, B / A, ...]."""

    def __getitem__(self, step: int, /) -> Any: ...


class Keeper(Protocol):
    """What keeps a run: figures as they come, and states to go on from."""

    def figures(self, step: int, figures: dict[str, float]) -> None:
        """The figures of step `step`, counted from 1, in order."""
        ...

    def keep(self, state: TrainState, step: int) -> None:
        """The state after `step`, whose figures and all before have been told."""
        ...


def begin(trained: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; float leaves become float32 masters."""
    masters = jax.tree.map(_master, trained)
    return TrainState(jnp.zeros((), jnp.int32), masters, optimizer.init(masters))


def make_step(loss: Loss, optimizer: optax.GradientTransformation, shardings: Any = None) -> Step:
    """The compiled step (state, fixed, batch) -> (state, {"loss", "gradient_norm"}); it takes the state's buffers over.

    Args:
      loss: of (trained, fixed, part), a mean over the part's rows.
      optimizer: any optax transformation.
      shardings: of the state, as `jq4.train.running.mesh.shardings_over` gives them; None where there is one device.
    """

    def step(state: TrainState, fixed: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        found, gradient = _mean_over_parts(loss, state.trained, fixed, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes its step count
            updates, moments = optimizer.update(gradient, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        figures = {"loss": found, "gradient_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, trained, moments), figures

    out: dict[str, Any] = {} if shardings is None else {"out_shardings": (shardings, None)}
    return jax.jit(step, donate_argnums=0, **out)


def train(
    step: Step,
    state: TrainState,
    fixed: Any,
    batches: Batches,
    *,
    steps: int,
    keeper: Keeper,
    keep_when: Callable[[int], bool],
    look_when: Callable[[int], bool] = lambda step: False,
    look: Callable[[TrainState, int], None] = lambda state, step: None,
    place: Callable[[Any], Any] = lambda batch: batch,
    stop: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Runs the steps that the state has not had yet; the state after the last, or after the step that `stop` asked at.

    Args:
      step: of `make_step`. The state is taken over: use the one returned.
      steps: in all, those included that were done before.
      keeper: is told every step's loss, gradient norm and seconds, and keeps the states after some steps.
      keep_when: (steps done) -> whether that state is kept, beside the last one and that of a stop.
      look_when, look: at some states somebody looks, before they are kept.
      place: puts a batch on the devices.

    Raises:
      JQ4Error: a loss or a gradient that is not finite; no state from after it is kept.
    """
    done = kept = int(state.step)
    told = _Told(keeper)
    while done < steps and not stop():
        state, found = step(state, fixed, place(batches[done]))
        done += 1
        told.after(done, found)
        if look_when(done):
            told.rest()
            look(state, done)
            told.go_on()
        if keep_when(done) or done == steps:
            told.rest()
            keeper.keep(state, done)
            told.go_on()
            kept = done
    if kept < done:
        told.rest()
        keeper.keep(state, done)
    return state


# ---------------------------------------------------------------------------------------------------------------


class _Told:
    """Tells a keeper the figures of each step once the next one is under way."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self.waiting: tuple[int, dict[str, jax.Array]] | None = None
        self.since = time.perf_counter()

    def after(self, step: int, found: dict[str, jax.Array]) -> None:
        self.rest()
        self.waiting = (step, found)

    def go_on(self) -> None:
        """What was done since the last step's figures is not a part of the next step."""
        self.since = time.perf_counter()

    def rest(self) -> None:
        if self.waiting is None:
            return
        (step, found), self.waiting = self.waiting, None
        figures = {name: float(value) for name, value in found.items()}
        now = time.perf_counter()
        figures["seconds"], self.since = now - self.since, now
        for name, value in figures.items():
            if not math.isfinite(value):
                raise JQ4Error(
                    f"step {step}: the {name.replace('_', ' ')} is {value}: the training diverged; lower the rate, or "
                    "clip gradients"
                )
        self.keeper.figures(step, figures)


def _master(leaf: Any) -> jax.Array:
    leaf = jnp.array(leaf)  # a copy, since steps take theirs over
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _mean_over_parts(loss: Loss, trained: Any, fixed: Any, batch: Any) -> tuple[jax.Array, Any]:
    """The mean of the parts' losses and gradients, float32."""
    of_part = jax.value_and_grad(lambda trained, part: loss(trained, fixed, part).astype(jnp.float32))
    parts = len(jax.tree.leaves(batch)[0])
    if parts == 1:
        return of_part(trained, jax.tree.map(lambda each: each[0], batch))

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_part(trained, part)), None

    total, _ = jax.lax.scan(add, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained)), batch)
    return jax.tree.map(lambda each: each / parts, total)
