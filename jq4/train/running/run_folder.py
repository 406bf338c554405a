"""The folder of a run under way, OUT.partial: what the run is, what it has figured, and states to go on from.

    OUT.partial/run.json         the identity: everything that the result depends on
    OUT.partial/start/           the calibrated solution that training begins at (a folder of jq4's own)
    OUT.partial/metrics.jsonl    a line a step
    OUT.partial/held_out.jsonl   a line for each state that was measured on rows that nothing is learned from
    OUT.partial/states/          Orbax; the last two, and the best of those that are judged

One process works there at a time. A run goes on from the states of one with the same identity, and of no other. When it
is done, what is worth keeping lies beside the model in OUT, and the folder goes.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jq4 import plain_json
from jq4.checkpoint.atomic import lock_folder, replace_file, unfinished
from jq4.errors import JQ4Error
from jq4.train.running.loop import TrainState
from jq4.train.running.metrics import Metrics
from jq4.train.running.states import States

SUFFIX = ".partial"
RUN, START, METRICS, HELD_OUT, STATES = "run.json", "start", "metrics.jsonl", "held_out.jsonl", "states"
_UNFINISHED = unfinished(Path(RUN)).name
_OURS = (RUN, START, START + SUFFIX, METRICS, METRICS + ".new", HELD_OUT, HELD_OUT + ".new", STATES)


class RunFolder:
    """A run's folder, which this process alone holds; `keeper` of jq4.train.running.loop.train.

    Attributes:
      begun: whether there is a state to go on from; it may be the one before the first step.
      resumed: steps done in it.
    """

    def __init__(self, folder: Path, *, judged: bool = False) -> None:
        self.folder = folder
        self.states = States(folder / STATES, judged=judged)
        self.begun = self.states.last is not None
        self.resumed = self.states.last or 0
        self.metrics = Metrics(folder / METRICS, self.resumed)
        self.held_out = Metrics(folder / HELD_OUT, self.resumed if self.begun else -1)

    @property
    def start(self) -> Path:
        return self.folder / START

    def state(self, like: Any, begin: Callable[[], TrainState]) -> TrainState:
        """The newest state that was kept, as `like` it (arrays or shapes with shardings); else what `begin` makes."""
        return begin() if self.states.last is None else self.states.restore(self.resumed, like)

    def figures(self, step: int, figures: dict[str, float]) -> None:
        self.metrics.add({"step": step, **figures})

    def measured(self, step: int, figures: Mapping[str, float]) -> None:
        """What rows held out say of the state after `step`."""
        self.held_out.add({"step": step, **figures})

    def keep(self, state: TrainState, step: int, lost: float | None = None) -> None:
        self.metrics.sync()
        self.held_out.sync()
        self.states.save(step, state, lost)

    def close(self) -> None:
        self.metrics.close()
        self.held_out.close()
        self.states.close()


@contextlib.contextmanager
def run_folder(
    folder: Path, identity: Mapping[str, Any], restart: bool, *, judged: bool = False
) -> Iterator[RunFolder]:
    """The folder of a run, made if need be. It stays whatever happens; `clear` it when its run is done.

    Args:
      judged: whether the best of the states that are kept with what they lose stays, beside the last.

    Raises:
      JQ4Error: another process is at work there, it holds something else, or another run (unless `restart` says to
        throw that away).
    """
    lock = lock_folder(folder, f"{folder}: another run is at work there; wait for it, or choose another --out")
    try:
        _check_ours(folder)
        if restart or not _goes_on(folder, identity):
            clear(folder)
            replace_file(folder / RUN, plain_json.dumps(identity, indent=2).encode())
        held = RunFolder(folder, judged=judged)
        try:
            yield held
        finally:
            held.close()
    finally:
        os.close(lock)


def clear(folder: Path) -> None:
    """Empties a run's folder, the identity first: a kill on the way leaves nothing that would be gone on from."""
    for name in (RUN, _UNFINISHED):
        (folder / name).unlink(missing_ok=True)
    for name in _OURS:
        path = folder / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _check_ours(folder: Path) -> None:
    if strangers := sorted({path.name for path in folder.iterdir()} - {*_OURS, _UNFINISHED}):
        raise JQ4Error(f"{folder}: holds {strangers[0]}, which no training wrote; remove or rename the folder")


def _goes_on(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the folder holds a run of this identity; JQ4Error for another run's that has come to a state."""
    file = folder / RUN
    if not file.exists():
        return False
    try:
        held = json.loads(file.read_bytes())
        differing = sorted(name for name in {*held, *identity} if held.get(name) != identity.get(name))
    except (ValueError, AttributeError, TypeError) as error:
        raise JQ4Error(f"{file}: not of a training of jq4 ({error}); remove {folder}, or --restart") from error
    if not differing:
        return True
    if not any((folder / STATES).glob("[1-9]*")):  # no step that could be lost
        return False
    raise JQ4Error(
        f"{folder}: holds the unfinished work of another run, whose {', '.join(differing)} differ: give the same "
        "command to finish that one, or --restart to throw its work away"
    )
