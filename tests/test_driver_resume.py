"""Oracle: the files of a run that nobody killed; those of a run killed again and again are the same, byte by byte.

Run as a script this file is the victim: it imports JAX once, and forks for each run that is to be killed.
"""

import dataclasses
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jq4.errors import CheckpointError
from tests.killed_runs import Victim, contents, serve

KILLS = 4
RECIPE = "gptq-w4g16"


def parts() -> tuple[Any, Any, np.ndarray]:
    """A chain of three blocks, its source and calibration rows, from their numbers."""
    import jax
    import jax.numpy as jnp

    from jq4.chain import TreeSource
    from models.chain import LAYERS, decoder_chain
    from models.config import DecoderConfig
    from models.decoder import Decoder
    from tests.random_model import CONFIG

    # square leaves, all of one shape: what is compiled for one is compiled for all
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = DecoderConfig.from_hf(CONFIG | small | {"num_hidden_layers": 3})
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)
    rows = random.integers(0, config.vocab_size, (64, 16), np.int32)  # two units of computation
    return decoder_chain(config), TreeSource(jax.tree.map(jnp.asarray, params), LAYERS), rows


def run(
    destination: Path,
    recipe: str = RECIPE,
    kill_at: int | None = None,
    change: Callable[[Any], Any] = lambda chain: chain,
    **options: Any,
) -> tuple[Any, int]:
    """Quantizes; before step number `kill_at` (of progress, syncs, renames, removals) the process kills itself."""
    from jq4.driver import quantize_blocks

    steps = 0

    def step(*_: Any) -> None:
        nonlocal steps
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            step()
            return function(*args, **kwargs)

        return call

    kept = os.fsync, os.replace, shutil.rmtree
    os.fsync, os.replace, shutil.rmtree = map(counted, kept)
    try:
        chain, source, rows = parts()
        result = quantize_blocks(change(chain), source, recipe, rows, destination=destination, progress=step, **options)
    finally:
        os.fsync, os.replace, shutil.rmtree = kept
    return result, steps


def answer(destination: str, kill_at: int | None, options: dict[str, Any]) -> dict[str, Any]:
    result, steps = run(Path(destination), kill_at=kill_at, **options)
    return {"steps": steps, "resumed": result.resumed_blocks}


class Quantizing(Victim):
    """The process whose children quantize and are killed; `cache` is a folder for what they compile."""

    def __init__(self, cache: Path) -> None:
        compiled_once = {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        super().__init__(__file__, **compiled_once)

    def run(
        self, destination: Path, kill_at: int | None = None, kill_after: float | None = None, **options: Any
    ) -> dict[str, Any]:
        """{"killed", "seconds"}, and of one that came through "steps" and "resumed", the blocks that it found done.

        Killed before its step `kill_at`, by itself, or `kill_after` seconds from its start, from without.
        """
        return self.ask(kill_after, destination=str(destination), kill_at=kill_at, options=options)


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    process = Quantizing(tmp_path_factory.mktemp("compiled"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def undisturbed(victim, tmp_path_factory):
    """The folder of a run that nobody killed, and how many steps it took."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    done = victim.run(folder)
    assert not done["killed"] and done["resumed"] == 0
    return folder, done["steps"]


@pytest.mark.arithmetic
def test_killed_at_random_points_it_gives_the_same_bytes(victim, undisturbed, tmp_path):
    """The runs differ in batch size, and some keep their activations in files: that changes no byte either."""
    wanted, steps = undisturbed
    assert steps > 60
    draw, folder = random.Random(0), tmp_path / "out"
    for _ in range(KILLS):
        kill_at = draw.randrange(steps // 4, steps // 2)
        done = victim.run(folder, kill_at=kill_at, batch_size=draw.choice([1, 16, 128]), memory=draw.choice([0, 2**20]))
        assert done["killed"]
        assert not (folder / "jq4.json").exists()
        assert (tmp_path / "out.partial").is_dir()
    done = victim.run(folder, batch_size=16, memory=0)
    assert not done["killed"] and done["resumed"] >= 2
    assert contents(folder) == contents(wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_at_a_random_time_it_gives_the_same_bytes(victim, undisturbed, tmp_path):
    """Killed from without, wherever it is: in a computation, a write, between two of its steps."""
    wanted, _ = undisturbed
    seconds = victim.run(tmp_path / "timed")["seconds"]
    draw, kills = random.Random(0), 0
    for share in (draw.uniform(0.5, 0.8), draw.uniform(0.3, 0.6)):
        kills += victim.run(tmp_path / "out", kill_after=seconds * share)["killed"]
    assert kills
    if not (tmp_path / "out" / "jq4.json").exists() or (tmp_path / "out.partial").exists():
        assert not victim.run(tmp_path / "out")["killed"]
    assert contents(tmp_path / "out") == contents(wanted)


def test_killed_in_the_save_it_gives_the_same_bytes(victim, undisturbed, tmp_path):
    wanted, steps = undisturbed
    done = victim.run(tmp_path / "out", kill_at=steps - 12)
    assert done["killed"] and not (tmp_path / "out" / "jq4.json").exists()
    done = victim.run(tmp_path / "out")
    assert done["resumed"] == 3 and contents(tmp_path / "out") == contents(wanted)


@pytest.mark.parametrize("before_the_end", [5, 1])
def test_killed_while_its_work_is_removed_it_gives_the_same_bytes(victim, undisturbed, tmp_path, before_the_end):
    wanted, steps = undisturbed
    assert victim.run(tmp_path / "out", kill_at=steps - before_the_end)["killed"]
    assert contents(tmp_path / "out") == contents(wanted) and (tmp_path / "out.partial").exists()
    assert not victim.run(tmp_path / "out")["killed"]
    assert contents(tmp_path / "out") == contents(wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_run_does_not_go_on_from_this_one(victim, undisturbed, tmp_path):
    from jq4.errors import JQ4Error

    _, steps = undisturbed
    assert victim.run(tmp_path / "out", kill_at=steps - 12)["killed"]
    with pytest.raises(
        JQ4Error, match=r"out.partial: holds the unfinished work of another run, whose calibration rows, recipe differ"
    ):
        run(tmp_path / "out", recipe="rtn-w4g16")
    with pytest.raises(JQ4Error, match=r"the unfinished work of another run, whose functions differ"):
        run(tmp_path / "out", change=lambda chain: dataclasses.replace(chain, head=lambda *of: 2 * chain.head(*of)))
    assert (tmp_path / "out.partial" / "journal.json").exists()
    result, _ = run(tmp_path / "out", recipe="rtn-w4g16", restart=True)
    assert result.resumed_blocks == 0 and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_not_ours_is_left_alone(tmp_path):
    from jq4.errors import JQ4Error

    (tmp_path / "out.partial").mkdir()
    thesis, journal = tmp_path / "out.partial" / "thesis.tex", tmp_path / "out.partial" / "journal.json"
    thesis.write_text("precious")
    for restart in (False, True):
        with pytest.raises(JQ4Error, match=r"out.partial: holds thesis.tex and no journal, so it is not ours"):
            run(tmp_path / "out", recipe="rtn-w4g16", restart=restart)
    journal.write_text("{")
    with pytest.raises(JQ4Error, match=r"out.partial: holds thesis.tex, so it is not ours"):
        run(tmp_path / "out", recipe="rtn-w4g16", restart=True)
    assert thesis.read_text() == "precious"
    thesis.unlink()
    with pytest.raises(JQ4Error, match=r"journal.json: not a journal of jq4"):
        run(tmp_path / "out", recipe="rtn-w4g16")


def test_a_full_disk_is_told_with_the_file(tmp_path):
    """A limit on the size of files stands in for the disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**11, limit[1]))
    try:
        with pytest.raises(OSError, match=r"x_hat.npy"):
            run(tmp_path / "out", memory=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_a_save_that_fails_keeps_the_work(tmp_path, monkeypatch):
    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.save", full)
        with pytest.raises(CheckpointError, match=r"Orbax cannot write these arrays \(RESOURCE_EXHAUSTED: No space"):
            run(tmp_path / "out", "rtn-w4g16")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    result, _ = run(tmp_path / "out", "rtn-w4g16")
    assert result.resumed_blocks == 3


def test_a_destination_that_orbax_would_not_find_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\\b: has a backslash in it, which Orbax takes for a slash"):
        run(tmp_path / "a\\b", "rtn-w4g16")
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    import jq4.driver  # imported once, before the forks
    import models.decoder

    assert jq4.driver and models.decoder
    serve(answer)
