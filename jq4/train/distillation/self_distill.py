"""A dense model taught to its packed self: one call, from a function and its params to packed leaves.

    packed = jq4.train.self_distill(model.apply, params, "gptq-w2g32-asym", rows, start=start, steps=400)

The function is trained as it will be served (jq4.fake_quantized), from a calibrated solution's scales and codes where
`start` gives one, to predict what the dense model predicts; and then packed (jq4.harden). Params and quantizers are
trained by one optimizer, as float32 masters: narrower params would lose its steps. The function is given them in their
own dtypes. It is what anybody would write with the parts of jq4.train, whose order is all there is to it;
`jq4 train` and who needs checkpoints, meshes or other losses writes that loop.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jq4.errors import JQ4Error
from jq4.recipe import Recipe
from jq4.rule import Rule
from jq4.train.begin import as_master, begin_at, quantizers
from jq4.train.distillation.inputs_of import inputs_of
from jq4.train.distillation.losses import distillation_loss, hidden_loss
from jq4.train.distillation.teacher_cache import TeacherCache, checked_rows, digest_of_rows
from jq4.train.fake import fake_quantized
from jq4.train.harden import harden
from jq4.train.quantizer import Quantizers
from jq4.train.running.optimizer import OptimizerOptions, make_optimizer, rate_for
from jq4.tuning.descent import Progress, draw_batches

_TOLD_EVERY = 25  # steps


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What the student is held to.

    Attributes:
      share: of the teacher's predictions; the rest is the next-token loss.
      temperature: of the predictions.
      hidden: names of leaves (jq4.train.inputs_of) whose inputs are to be the teacher's too.
      hidden_weight: what their mean relative error is multiplied by.
    """

    share: float = 1.0
    temperature: float = 1.0
    hidden: tuple[str, ...] = ()
    hidden_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or not 0 < self.temperature < float("inf"):
            raise JQ4Error(
                f"share is {self.share} and temperature {self.temperature}, wanted a share from 0 to 1, and a "
                "temperature above 0"
            )


def self_distill(
    logits: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    recipe: Recipe | Rule | str,
    rows: Any,
    *,
    start: Any = None,
    axes: Mapping[str, int] | None = None,
    lesson: Lesson | None = None,
    teacher: TeacherCache | None = None,
    mask: Any = None,
    steps: int = 400,
    batch_size: int = 8,
    optimizer: optax.GradientTransformation | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Any:
    """The tree with the leaves that the recipe means packed, after training.

    Args:
      logits: (params, tokens i32[B, T]) -> [B, T, V]; traceable.
      params: the dense tree, which is the teacher and where training starts.
      recipe, axes: as `jq4.fake_quantized` takes them.
      rows: tokens i32[R, T]: text, or such as jq4.train.generated_rows or jq4.tuning.perturb make.
      start: a tree with the packed leaves of a calibrated solution, which is started at (jq4.train.begin_at); or
        Quantizers, whose steps the dense weights start with.
      lesson: what is learned; by default the teacher's predictions alone.
      teacher: the teacher's predictions for these rows, if they are kept; else it is run in every step.
      mask: bool[R, T], True where there is text; by default everywhere.
      optimizer: by default that of `jq4 train` (jq4.train.running.optimizer), at the rate for the recipe's bits.
      progress: called with (steps done, steps in all, the loss) now and then.

    Raises:
      JQ4Error: for arguments that cannot be, a teacher of other rows, and a loss that is not finite.
    """
    recipe, rows, lesson = Recipe.of(recipe), checked_rows(rows), lesson or Lesson()
    mask = None if mask is None else np.asarray(mask, bool)
    _check(rows, mask, teacher, steps, batch_size)
    optimizer = optimizer or make_optimizer(OptimizerOptions(rate_for(recipe), warmup=steps // 20), steps)
    step = _stepper(logits, recipe, axes, lesson, optimizer)
    pair: Any = _begun(params, recipe, axes, start)
    state: Any = optimizer.init(pair)
    for done, indices in enumerate(draw_batches(np.arange(len(rows)), steps, batch_size, seed), 1):
        kept = None if teacher is None else teacher[indices]
        counted = None if mask is None else jnp.asarray(mask[indices])
        batch = (jnp.asarray(rows[indices], jnp.int32), counted, kept)
        pair, state, value = step(pair, state, params, batch)
        if done % _TOLD_EVERY == 0 or done == steps:
            _tell(done, steps, float(value), progress)
    return harden(_as_given(pair[0], params), pair[1], recipe, axes)


def _stepper(
    logits: Callable[[Any, jax.Array], jax.Array],
    recipe: Recipe,
    axes: Mapping[str, int] | None,
    lesson: Lesson,
    optimizer: optax.GradientTransformation,
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """One step of training, of (pair, state, dense params, (tokens, mask, predictions that are kept))."""
    forward = fake_quantized(inputs_of(logits, lesson.hidden), recipe, axes, strict=True)
    dense_forward = inputs_of(logits, lesson.hidden)

    def loss(pair: Any, dense: Any, tokens: jax.Array, mask: Any, kept: Any) -> jax.Array:
        found, inputs = forward((_as_given(pair[0], dense), pair[1]), tokens)
        wanted, wanted_inputs = dense_forward(dense, tokens)
        predicted = wanted if kept is None else kept
        value = distillation_loss(found, tokens, predicted, mask, share=lesson.share, temperature=lesson.temperature)
        if lesson.hidden:
            value += lesson.hidden_weight * hidden_loss(inputs, wanted_inputs, mask)
        return value

    @jax.jit
    def step(pair: Any, state: Any, dense: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(pair, dense, *batch)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes its step count
            updates, state = optimizer.update(gradient, state, pair)
            return optax.apply_updates(pair, updates), state, value

    return step


def _begun(params: Any, recipe: Recipe, axes: Mapping[str, int] | None, start: Any) -> Any:
    if start is None or isinstance(start, Quantizers):
        return _floats(jax.tree.map(as_master, params)), quantizers(params, recipe, axes=axes, start=start)
    begun, learned = begin_at(params, recipe, start, axes)
    return _floats(begun), learned


def _floats(params: Any) -> Any:
    """The tree with None for what has no gradient: counts, tables of indices."""
    return jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else None, params)


def _as_given(masters: Any, params: Any) -> Any:
    """The masters in the dtypes of the params, and what of them is not trained; gradients go straight through."""
    return jax.tree.map(lambda leaf, master: leaf if master is None else master.astype(leaf.dtype), params, masters)


def _tell(done: int, steps: int, value: float, progress: Progress | None) -> None:
    if not np.isfinite(value):
        raise JQ4Error(f"the loss is {value} at step {done}: wanted finite weights, or a lower rate of the optimizer")
    if progress is not None:
        progress(done, steps, value)


def _check(
    rows: np.ndarray, mask: np.ndarray | None, teacher: TeacherCache | None, steps: int, batch_size: int
) -> None:
    if steps < 1 or batch_size < 1:
        raise JQ4Error(f"steps is {steps} and batch_size {batch_size}, wanted 1 or more")
    if mask is not None and mask.shape != rows.shape:
        raise JQ4Error(f"the mask has shape {mask.shape}, wanted the rows' {rows.shape}")
    if teacher is not None and teacher.job.rows_digest != digest_of_rows(rows):
        raise JQ4Error(f"{teacher!r} is of other rows than these, {rows.shape}: wanted what was written for them")
