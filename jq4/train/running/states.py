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

from jq4.errors import CheckpointError


class States:
    """The states in a folder; the last `keep` are kept."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        waiting = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, async_options=waiting)
        self.folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def last(self) -> int | None:
        """The step of the newest state; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Begins to write a state; waits for the one before."""
        with _told(self.folder):
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

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


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: a state of the training cannot be written or read ({error})") from error
