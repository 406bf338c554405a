"""The steps of a run of `jq4 train`, on all devices that there are."""

import argparse
import contextlib
import dataclasses
import itertools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jq4.cli.training.held_out import HeldOut
from jq4.cli.training.task import Phase, Task


class Descended(NamedTuple):
    """What was trained, what it started from, and after how many steps it was as it is."""

    trained: Any
    start: Any
    kept: int


def descend(task: Task, arguments: argparse.Namespace, folder: Any) -> Descended:
    """Takes the steps that are left of a run; KeyboardInterrupt where it was asked to stop."""
    import jax

    from jq4.cli import _terminal
    from jq4.train.running.mesh import placed_over, rows_over, training_mesh
    from jq4.train.running.optimizer import rate_schedule
    from jq4.train.running.rows import ShuffledRows

    rate = rate_schedule(options_of(arguments), arguments.steps)
    mesh = training_mesh(arguments.fsdp, devices_of(arguments))
    check_rows_fit(arguments, mesh.size)
    along = task.along()
    start = task.start(folder.start, task.text.rows)
    rows, fixed = rows_over(mesh), placed_over(mesh, task.fixed(start))
    with _terminal.progress("training") as progress, stopping() as stop:
        progress(folder.resumed, arguments.steps)
        state = through_phases(
            task.phases,
            lambda: task.begin(start),
            Reporting(folder, arguments, rate, task, HeldOut.of(task, fixed, mesh, arguments), progress),
            mesh,
            fixed=fixed,
            batches=ShuffledRows(task.text.rows, arguments.batch_size, arguments.accumulate, arguments.seed, along),
            place=lambda batch: jax.device_put(batch, rows),
            stop=stop,
        )
    if int(state.step) < arguments.steps:
        folder.states.wait()
        _terminal.say(f"stopped after step {int(state.step)} of {arguments.steps}; the same command goes on from there")
        raise KeyboardInterrupt
    kept = arguments.steps
    if arguments.keep_best:
        folder.states.wait()
        kept = folder.states.best
    if kept < arguments.steps:
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
        del state  # two of them might not fit
        state = folder.states.restore(kept, like)
    return Descended(jax.device_put(state.trained, mesh.devices.flat[0]), start, kept)


def through_phases(
    phases: Sequence[Phase],
    begin: Callable[[], Any],
    keeper: "Reporting",
    mesh: Any,
    *,
    fixed: Any,
    batches: Any,
    **run: Any,
) -> Any:
    """The state after the last phase, or after the step at which it was asked to stop.

    A state is of the phase that its step lies in, the phase's last step included: from there another process goes on as
    this one would. `begin` makes what is trained before the first step; `run` is what the loop's `train` takes beside.
    """
    import jax

    from jq4.train.running.loop import make_step, train
    from jq4.train.running.optimizer import make_optimizer

    enters = (phase.enter for phase in phases)
    begun = jax.eval_shape(begin)
    shapes = list(itertools.accumulate(enters, lambda shape, enter: jax.eval_shape(enter, shape), initial=begun))
    arguments, folder = keeper.arguments, keeper.folder
    state, done = None, 0
    for number, (phase, shape) in enumerate(zip(phases, shapes[1:], strict=True), 1):
        if folder.resumed <= phase.stop:
            keeper.enter(number, phase)
            optimizer = make_optimizer(options_of(arguments), arguments.steps, done)
            opening = Opening.of(shape, optimizer, mesh, done)
            if state is None and folder.begun:
                state = folder.states.restore(folder.resumed, opening.like)
            elif state is None:
                state = opening.make(phase.enter(begin()))
                keeper.start(state)
            else:
                state = opening.make(phase.enter(state.trained))
            step = make_step(phase.loss, optimizer, opening.shardings)
            state = train(
                step,
                state,
                fixed,
                batches,
                steps=phase.stop,
                keeper=keeper,
                keep_when=keeper.keeps,
                look_when=keeper.held_out.is_due,
                look=keeper.look,
                **run,
            )
            if int(state.step) < phase.stop:
                break
        done = phase.stop
    return state


def options_of(arguments: argparse.Namespace) -> Any:
    from jq4.train.running.optimizer import OptimizerOptions

    names = ("rate", "schedule", "warmup", "weight_decay", "clip", "relative")
    given = {name: getattr(arguments, name) for name in names}
    if given["warmup"] is None:
        given["warmup"] = arguments.steps // 20
    return OptimizerOptions(**given)


def devices_of(arguments: argparse.Namespace) -> Any:
    import jax

    from jq4.errors import JQ4Error

    found = jax.devices()
    wanted = len(found) if arguments.devices is None else arguments.devices
    if not 1 <= wanted <= len(found):
        raise JQ4Error(f"--devices is {wanted}, and there are {len(found)}")
    return found[:wanted]


def check_rows_fit(arguments: argparse.Namespace, devices: int) -> None:
    """Raises JQ4Error where a step's rows cannot be cut alike over parts and devices."""
    from jq4.errors import JQ4Error

    wanted = arguments.accumulate * devices
    if arguments.batch_size % wanted:
        raise JQ4Error(
            f"--batch-size {arguments.batch_size} in {arguments.accumulate} parts over {devices} devices: wanted as "
            f"many rows on each, a multiple of {wanted}"
        )


@dataclasses.dataclass(frozen=True)
class Opening:
    """A state before its first step: its shapes with their shardings, and what makes it of what is trained."""

    like: Any
    shardings: Any
    make: Callable[[Any], Any]

    @classmethod
    def of(cls, shape: Any, optimizer: Any, mesh: Any, done: int) -> "Opening":
        import jax
        import jax.numpy as jnp

        from jq4.train.running.loop import begin
        from jq4.train.running.mesh import placed_over, shardings_over

        def begun(trained: Any) -> Any:
            return begin(trained, optimizer)._replace(step=jnp.int32(done))

        shapes = jax.eval_shape(begun, shape)
        shardings = shardings_over(mesh, shapes)
        like = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
        )
        compiled = jax.jit(begun, out_shardings=shardings)
        return cls(like, shardings, lambda trained: compiled(placed_over(mesh, trained)))


@dataclasses.dataclass
class Reporting:
    """Tells every step to metrics.jsonl and to the reader, measures, and keeps states."""

    folder: Any
    arguments: argparse.Namespace
    rate: Callable[[Any], Any]
    task: Task
    held_out: HeldOut
    progress: Callable[..., None]
    stage: dict[str, int] = dataclasses.field(default_factory=dict)
    last: float = float("nan")  # loss

    def __post_init__(self) -> None:
        self.lost: dict[int, float] = {}  # by step, of those that may be the best
        self.least = self.folder.states.least if self.arguments.keep_best else None

    def enter(self, number: int, phase: Phase) -> None:
        """What comes next is of this phase, counted from 1.

        The best is of the last phase: others round to other levels than the recipe's.
        """
        self.stage = {"stage": number} if len(self.task.phases) > 1 else {}
        self.measure = self.held_out.measuring(phase)
        self.judges = self.arguments.keep_best and number == len(self.task.phases)

    def figures(self, step: int, figures: dict[str, float]) -> None:
        more = {"rate": float(self.rate(step - 1)), "tokens_per_second": self.task.tokens_a_step / figures["seconds"]}
        self.folder.figures(step, figures | more | self.stage)
        self.progress(step, self.arguments.steps, description=f"training, loss {figures['loss']:.4f}")
        self.last = figures["loss"]

    def start(self, state: Any) -> None:
        """Looks at the state before the first step, and keeps it where it might be the best."""
        if self.held_out.is_due(0):
            self.look(state, 0)
        if self.is_best(0):
            self.folder.keep(state, 0, self.lost.get(0))

    def look(self, state: Any, step: int) -> None:
        """Measures a state."""
        from jq4.cli import _terminal

        found = self.measure(state.trained, step)
        self.folder.measured(step, found | self.stage)
        lost = found[self.task.judged_by]
        if self.judges:
            self.lost = {step: lost}
            self.least = lost if self.least is None else min(self.least, lost)
        if not sys.stderr.isatty():
            _terminal.say(f"step {step} of {self.arguments.steps}, held out: {self.task.judged_by} {lost:.4f}")

    def is_best(self, step: int) -> bool:
        """Whether nothing lost less than the state after this step."""
        return step in self.lost and self.lost[step] == self.least

    def keeps(self, step: int) -> bool:
        return step % self.arguments.save_every == 0 or self.is_best(step)

    def keep(self, state: Any, step: int) -> None:
        from jq4.cli import _terminal

        self.folder.keep(state, step, self.lost.get(step))
        if not sys.stderr.isatty():
            _terminal.say(f"step {step} of {self.arguments.steps}, loss {self.last:.4f}")


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM asked to stop after the step under way; a second Ctrl-C stops at once."""
    asked = False

    def ask(number: int, _: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    kept: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread: signals are someone else's
        for number in (signal.SIGINT, signal.SIGTERM):
            kept[number] = signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
