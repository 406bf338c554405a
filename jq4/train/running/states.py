"""States of a training on disk, in Orbax: written while training goes on, each whole or not at all.

Orbax copies a state to the host before `save` returns, so that the next step may take its buffers over, and writes it
under a temporary name that it renames last; what a killed process left unfinished is removed when the folder is opened
again. The folder itself is made before `save` returns: made in the background, as is Orbax's default, a thread that
waits for it can miss that it is there, and gives up after five minutes. A state is restored onto whatever devices
`like` lies on, which need not be those that it was saved from.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jq4.errors import CheckpointError

_LOST = "lost"


class States:
    """The states in a folder; the last `keep` are kept, and where they are judged the one that lost least."""

    def __init__(self, folder: Path, keep: int = 2, *, judged: bool = False) -> None:
        waiting = ocp.AsyncOptions(create_directories_asynchronously=False)
        kept: dict[str, Any] = _last_and_best(keep) if judged else {"max_to_keep": keep}
        options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True, async_options=waiting, **kept)
        self.folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def last(self) -> int | None:
        """The step of the newest state; None where there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the state that lost least of those that were judged; None where none was."""
        return self._manager.best_step()

    @property
    def least(self) -> float | None:
        """What the best state loses."""
        metrics = None if self.best is None else self._manager.metrics(self.best)
        return None if metrics is None else metrics[_LOST]

    def save(self, step: int, state: Any, lost: float | None = None) -> None:
        """Begins to write a state, and what it loses where that was judged; waits for the one before."""
        with _told(self.folder):
            judged = None if lost is None else {_LOST: lost}
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=judged, force=True)

    def restore(self, step: int, like: Any) -> Any:
        """The state after `step`, in the tree of `like` (arrays or their shapes) and where that lies."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with _told(self.folder):
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def wait(self) -> None:
        """Until what was begun is written."""
        with _told(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _last_and_best(keep: int) -> dict[str, Any]:
    """The best for Orbax twice: what stays, and what it calls the best. Of equals both times the latest."""

    def lost(metrics: Any) -> float:
        return metrics[_LOST]

    best = BestN(get_metric_fn=lost, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    policy = AnyPreservationPolicy([LatestN(n=keep), best])
    return {"preservation_policy": policy, "best_fn": lost, "best_mode": "min"}


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: a state of the training cannot be written or read ({error})") from error
