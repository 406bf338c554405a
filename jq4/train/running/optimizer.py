"""The optimizer of `jq4 train`: Adam whose steps are relative to the weights that they change, by a falling rate.

    m, v   = Adam's moments of the gradient                              Kingma & Ba 2015
    w     -= rate(t) * (rms(w) * m / sqrt(v) + decay * w)                rms of the whole leaf, at least FLOOR

Adam moves every weight by about its rate a step, whatever the weight is: 1e-3 is a hundredth of a weight in a small
model, a tenth in a wide one, whose weights are smaller, and nothing to a zero point of 2. Relative to the leaf (as in
Adafactor, Shazeer & Stern 2018) one rate means the same to kernels, steps of codes, zeros and norms of any model.

How fast is best hangs on how much there is to learn. On TinyStories-656K (`benchmarks/qat.py`, 8 rows a step, held-out
KLD, one seed) 3 bits come from .0982 to .0887 in 100 steps at 5e-3 and to .0941 at 1.7e-3; 4 bits with inputs of 8 from
.0249 to .0241, .0235 and .0247 in 60 steps at 2e-4, 7e-4 and 2e-3, where steps are shorter and little is lost. More
bits follow the same rule, which was not measured. Where a start has been learned already (`best-*`), still less is
left: on the evaluation rows these 4 bits come from .0225 to .0230 in 200 steps at 7e-4, and to .0221 at 2e-4. With
inputs of 4 bits as much is left as before: .269 to .266 at 7e-4, .271 to .270 at 2e-4.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from jq4.errors import JQ4Error
from jq4.recipe import Recipe
from jq4.rule import DENSE_BITS

RATE = 5e-3  # of 2 and 3 bits
LEARNED = 0.3  # of the rate, where little is left to learn
FLOOR = 1e-3  # of a leaf's rms: biases that are zero have to be able to move
SCHEDULES = ("cosine", "linear", "constant")

Schedule = Callable[[Any], Any]  # steps done -> rate


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """How fast.

    Attributes:
      rate: of the first step after the warmup.
      schedule: how it falls to zero until the last step, or not: one of SCHEDULES.
      warmup: steps in which it rises from zero.
      weight_decay: the share of a weight that is taken off, times the rate; of leaves with two axes or more.
      clip: the largest norm of a gradient; larger ones are shortened to it. 0 for none.
      relative: whether steps are shares of a leaf's rms; without, plain Adam's, for what begins at zero (adapters).
    """

    rate: float
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    relative: bool = True

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise JQ4Error(f"schedule is {self.schedule!r}, wanted one of {', '.join(SCHEDULES)}")
        for name in ("rate", "warmup", "weight_decay", "clip"):
            value = getattr(self, name)
            if not 0 <= value < float("inf") or (name == "rate" and not value):
                raise JQ4Error(f"{name} is {value}, wanted a number {'above 0' if name == 'rate' else 'of 0 or more'}")


def rate_for(recipe: Recipe, *, learned: bool = False) -> float:
    """The relative rate for the fewest bits of a recipe's weights: RATE, from 4 on divided by their largest level.

    Args:
      learned: whether training starts at codes that were learned; from 4 bits on, unless inputs have fewer than 8, it
        is LEARNED of that then.
    """
    rules = [rule for rule in recipe.rules if not rule.is_dense]
    bits = min((rule.num_bits for rule in rules), default=DENSE_BITS)
    if bits <= 3:
        return RATE
    inputs = min((rule.input_activations.num_bits for rule in rules if rule.input_activations), default=DENSE_BITS)
    return RATE / (2 ** (bits - 1) - 1) * (LEARNED if learned and inputs >= 8 else 1)


def rate_schedule(options: OptimizerOptions, steps: int) -> Schedule:
    """The rate by steps done, for a run of `steps`."""
    if options.warmup >= steps:
        raise JQ4Error(f"warmup is {options.warmup} of {steps} steps, wanted fewer")
    left = steps - options.warmup
    falling: dict[str, Schedule] = {
        "cosine": optax.cosine_decay_schedule(options.rate, left),
        "linear": optax.linear_schedule(options.rate, 0.0, left),
        "constant": optax.constant_schedule(options.rate),
    }
    if not options.warmup:
        return falling[options.schedule]
    rising = optax.linear_schedule(options.rate / (options.warmup + 1), options.rate, options.warmup)
    return optax.join_schedules([rising, falling[options.schedule]], [options.warmup])


def make_optimizer(options: OptimizerOptions, steps: int, done: int = 0) -> optax.GradientTransformation:
    """The optax transformation, for a run of `steps` of which `done` were made by another state of it."""
    parts = [optax.clip_by_global_norm(options.clip)] if options.clip else []
    parts.append(optax.scale_by_adam(b1=0.9, b2=0.99))
    if options.relative:
        parts.append(optax.scale_by_param_block_rms(FLOOR))
    if options.weight_decay:
        parts.append(optax.add_decayed_weights(options.weight_decay, mask=_has_two_axes))
    rate = rate_schedule(options, steps)
    return optax.chain(*parts, optax.scale_by_learning_rate(lambda count: rate(count + done)))


def _has_two_axes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
