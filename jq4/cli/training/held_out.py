"""What rows that nothing is learned from say of a training on its way.

A state is measured as it will be served, by `jq4.evaluate`, in the dtype that is trained in; what the loss draws at
random (tokens, adapters dropped) and what it weighs beside are left out.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from jq4.cli.training.task import Phase, Task

FIGURES = ("kld_mean", "kld_p99", "top1_agreement", "nll", "perplexity")


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Measures a state every so many steps.

    Attributes:
      task: whose rows and reference.
      fixed: what the losses look at beside what is trained, on the devices.
      every: steps; None for never.
      keep_best: whether the best state is chosen by what is measured.
    """

    task: Task
    fixed: Any
    mesh: Any
    batch_size: int
    every: int | None
    keep_best: bool

    @classmethod
    def of(cls, task: Task, fixed: Any, mesh: Any, arguments: argparse.Namespace) -> "HeldOut":
        return cls(task, fixed, mesh, arguments.batch_size, arguments.measure_every, arguments.keep_best)

    def is_due(self, step: int) -> bool:
        """Whether the state after `step` is measured; the one before the first step is, and the last of the run."""
        return self.every is not None and (step % self.every == 0 or step == self.task.phases[-1].stop)

    def may_keep(self, phase: Phase) -> bool:
        """Whether a state of the phase may be the best: it is rounded as the recipe says, not by an earlier stage's."""
        return self.keep_best and phase is self.task.phases[-1]

    def measuring(self, phase: Phase) -> Callable[[Any], dict[str, float]]:
        """What is trained -> its figures; compiled once for a phase."""
        import jax

        from jq4.evaluate import evaluate

        forward, first = jax.jit(phase.forward), self.mesh.devices.flat[0]
        reference = None if self.task.reference is None else self.task.reference.logits

        def measure(trained: Any) -> dict[str, float]:
            def logits(tokens: Any) -> Any:
                return jax.device_put(forward(trained, self.fixed, self._placed(tokens)), first)

            found = evaluate(logits, self.task.text.held_out, reference=reference, batch_size=self.batch_size).as_dict()
            return {name: found[name] for name in FIGURES if name in found}

        return measure

    def _placed(self, tokens: Any) -> Any:
        """Tokens [B, T] on the devices, cut over them where they can be."""
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        spec = PartitionSpec(self.mesh.axis_names) if len(tokens) % self.mesh.size == 0 else PartitionSpec()
        return jax.device_put(tokens, NamedSharding(self.mesh, spec))
