"""Distillation: all packed leaves learned together, end to end, against the dense model's own predictions.

    minimise  mean over tokens of KL(p_dense || p_learned)        nats; the figure that jq4.evaluate reports

Block-wise tuning cannot know which errors of a block the later ones forgive; this can, and it is how few bits come
nearest to the dense model. Two phases, each kept only if it is better on rows held out: first scales and offsets alone,
which are few and generalize; then, with a `rate` above zero, each weight's code as well (jq4.tuning.learned), which
pays where few bits have lost much and learns small samples by heart where little is left to gain.

There are more codes to learn than calibration tokens to learn them from, so the rows are soon learned by heart: 1,500
steps over 97 rows of 256 are worse on other text than 600. What helps is that the teacher answers any question: rows
are made from the calibration rows by drawing some of their tokens anew from the dense model's own prediction at that
place (`perturbed_rows`, `perturbed_share`), and the teacher's predictions on these rows, which are new sequences nearly
as likely as text, are learned as well. This takes one forward pass where sampling whole rows (LLM-QAT, Liu et al.
2023) takes one a token; and what a small model makes up from its first word is far from the text it will meet, so that
it measured worse, at equal steps, than text with three tokens in ten replaced. Half of what is learned from stays
text, however many rows were made. `more_rows` takes rows made in any way. And a part of the rows, `held_out`, is not
learned from at all: what is kept is the best on those, the start included.

Held at a time: the dense weights twice (the teacher's, and the learned ones with their gradient), with `rounding` the
variables and two moments of the size of the weights in f32, the activations of one batch, and its logits thrice.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.divergence import divergence
from jq4.errors import JQ4Error
from jq4.tuning.descent import Progress, Rows, Settings, descend, split_rows
from jq4.tuning.effort import END_TO_END, TOKENS, defaults
from jq4.tuning.learned_tree import begin_tree, harden_tree, learned_tree
from jq4.tuning.perturb import perturb
from jq4.tuning.rounded_inputs import with_rounded_inputs

Logits = Callable[[Any, jax.Array], jax.Array]  # (tree, tokens i32[B, T]) -> [B, T, V]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The mean over a row's positions of KL(dense || learned), f32[B]."""

    logits: Logits

    def __call__(self, variables: Any, context: Any, batch: jax.Array) -> jax.Array:
        packed, dense = context
        learned = with_rounded_inputs(self.logits, packed)(learned_tree(variables, packed, dense), batch)  # [B, T, V]
        return jnp.mean(divergence(learned, self.logits(dense, batch)), axis=-1)


def distill(
    logits: Logits,
    dense: Any,
    packed: Any,
    rows: Any,
    *,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    more_rows: Any = None,
) -> Any:
    """The tree with its packed leaves tuned; of the same static form, and never worse on the rows held out.

    Args:
      logits: of dense trees; the same function at every call is compiled once.
      dense, packed: the whole tree before and after quantizing.
      rows: tokens i32[R, T] of calibration.
      options: see jq4.tuning.effort; what is missing is as in its default effort.
      seed: of the rows that are made and of the batches' order.
      more_rows: tokens i32[R', T] to learn from too, such as text that the dense model wrote; not what is judged by.

    Raises:
      JQ4Error: for options, rows or packed leaves that cannot be, and for a loss that is not finite.
    """
    rows = np.asarray(rows, np.int32)
    if rows.ndim != 2 or not rows.size:
        raise JQ4Error(f"distill: calibration rows of shape {rows.shape}, wanted [rows, tokens]")
    options = {"batch_size": max(1, TOKENS // rows.shape[1]), **defaults(END_TO_END, options)}
    settings = Settings.of(options)
    learned, judges = split_rows(len(rows), options["held_out"])
    made = [perturb(logits, dense, rows[learned], options["perturbed_rows"], options["perturbed_share"], seed)]
    if more_rows is not None:
        made.append(np.asarray(more_rows, np.int32).reshape(-1, rows.shape[1]))
    everything = np.concatenate([rows, *made])
    others = np.arange(len(rows), len(everything))
    learners = np.concatenate([np.resize(learned, max(len(learned), len(others))), others])  # half of them text
    batches = Rows(lambda indices: everything[indices], learners, judges)
    for phase in _phases(settings):
        variables = begin_tree(packed, dense, rounding=phase.rate > 0, scales=phase.scale_rate > 0)
        best, _, _ = descend(Divergence(logits), variables, (packed, dense), batches, phase, seed, progress)
        packed = harden_tree(best, packed, dense)
    return packed


def _phases(settings: Settings) -> list[Settings]:
    """Scales and offsets first, where both they and codes are to be learned."""
    alone = dataclasses.replace(settings, rate=0.0)
    return [alone, settings] if settings.rate and settings.scale_rate else [settings]
