"""What rows that nothing is learned from say of a training on its way.

A state is measured by `jq4.evaluate`, rounded as it will be served, in the dtype that is trained in (what is written is
measured in the dtype of its model); what the loss draws at random (tokens, adapters dropped) and what it weighs beside
are left out. The reference runs again each time.
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
      mesh: these.
      batch_size: rows at a time, as many as a part of a step's.
      every: steps; None for never.
    """

    task: Task
    fixed: Any
    mesh: Any
    batch_size: int
    every: int | None

    @classmethod
    def of(cls, task: Task, fixed: Any, mesh: Any, arguments: argparse.Namespace) -> "HeldOut":
        return cls(task, fixed, mesh, arguments.batch_size // arguments.accumulate, arguments.measure_every)

    def is_due(self, step: int) -> bool:
        """Whether the state after `step` is measured; the one before the first step is, and the last of the run."""
        return self.every is not None and (step % self.every == 0 or step == self.task.phases[-1].stop)

    def measuring(self, phase: Phase) -> Callable[[Any, int], dict[str, float]]:
        """(what is trained, steps done) -> its figures; compiled once for a phase."""
        import jax

        from jq4.errors import JQ4Error
        from jq4.evaluate import evaluate

        forward, first = jax.jit(phase.forward), self.mesh.devices.flat[0]
        reference = None if self.task.reference is None else self.task.reference.logits

        def measure(trained: Any, step: int) -> dict[str, float]:
            def logits(tokens: Any) -> Any:
                return jax.device_put(forward(trained, self.fixed, self._placed(tokens)), first)

            rows = self.task.text.held_out
            try:
                found = evaluate(logits, rows, reference=reference, batch_size=self.batch_size).as_dict()
            except JQ4Error as error:
                raise JQ4Error(
                    f"step {step}, rows held out: {error} If training diverged: lower the rate, or clip gradients"
                ) from error
            return {name: found[name] for name in FIGURES if name in found}

        return measure

    def _placed(self, tokens: Any) -> Any:
        """Tokens [B, T] on the devices, cut over them where they can be."""
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        spec = PartitionSpec(self.mesh.axis_names) if len(tokens) % self.mesh.size == 0 else PartitionSpec()
        return jax.device_put(tokens, NamedSharding(self.mesh, spec))
