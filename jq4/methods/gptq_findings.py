"""What GPTQ (jq4.methods.gptq) found of the slices of a weight, and how it is said."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jq4.methods.gptq_options import Options


class Findings(NamedTuple):
    """What is worth knowing of each slice of a weight, all [*B].

    Attributes:
      damping: f32, what was added to the Hessian's diagonal, in units of its mean.
      dead: i32, inputs that were never anything but zero; not counted in starved slices.
      starved: bool, whether it saw too few rows and went to the fallback.
      error: f32, E|x^T Q - x^T W|^2 / E|x^T W|^2 over the calibration rows x, W being corrected if it was; of every
        n-th column where there are more than 256.
      output_error: f32, the same of W as it was given; of nothing where the slice is starved.
    """

    damping: jax.Array
    dead: jax.Array
    starved: jax.Array
    error: jax.Array
    output_error: jax.Array

    def is_short(self, options: Mapping[str, Any]) -> bool:
        """Whether the statistics did not suffice in some slice."""
        return bool(jnp.any(self.starved) | jnp.any(self.damping > _with_margin(Options(**options).damping)))

    def note(self, options: Mapping[str, Any]) -> str:
        """The findings in words; empty where there is nothing to say."""
        wanted = Options(**options)
        raised = int(jnp.sum(self.damping > _with_margin(wanted.damping)))
        said = []
        if starved := int(jnp.sum(self.starved)):
            said.append(
                f"{starved} of {self.starved.size} slices saw fewer than {wanted.rows_wanted} rows: {wanted.fallback} "
                "without data"
            )
        if raised:
            said.append(
                f"damping raised from {wanted.damping:g} to {float(jnp.max(self.damping)):g} in {raised} of "
                f"{self.damping.size} slices, whose Hessian has no Cholesky factor"
            )
        if dead := int(jnp.sum(self.dead)):
            said.append(f"{dead} inputs that were never anything but zero, whose weights are now zero")
        return "; ".join(said)


def _with_margin(damping: float) -> float:
    return damping * 1.01  # f32 holds no .01
