"""`quantize_blocks`: a chain of blocks (jq4.chain) quantized by a recipe, one block after another.

    x, x^ = embeddings of the calibration rows             of the dense model, and of the quantized one
    for each block:                                        what is in memory: two blocks, or a few, and their inputs
        dense = read it
        steps before the rules                             jq4.equalize, on statistics of x^
        its stages                                         jq4.driver.block
        x, x^ = dense block(x), packed block(x^)
        packed block to disk, journal                      jq4.driver.store, jq4.driver.journal
    the leaves outside of the blocks, the steps after the rules, the save

A recipe that needs no calibration (round-to-nearest, HQQ) needs no activations, and blocks are only read and written.
Each block is fitted to the inputs that it will meet, those of the quantized blocks before it.

What is promised: the same chain, source, recipe, rows, seed and versions give the same bytes, however often the run was
killed. A run that goes on computes the activations up to its block again, through the blocks that are done: that is
short beside what made them, and nothing of the size of the activations needs to be kept safe on disk.
"""

import contextlib
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jq4.chain import BlockSource, Chain
from jq4.checkpoint import save
from jq4.checkpoint.atomic import check_ours
from jq4.driver import end_to_end
from jq4.driver.block import check_dense_leaves, quantize_leaves, replaced
from jq4.driver.blocks import BlocksInOrder
from jq4.driver.job import Job, plan_job
from jq4.driver.journal import SUFFIX, Journal, journal_in
from jq4.driver.plan import paths_of, wanted_by
from jq4.driver.report import BlocksResult, LeafRow, whole_report
from jq4.driver.rows_learned import rows_learned
from jq4.driver.store import BlockStore
from jq4.errors import JQ4Error
from jq4.quantize import warn_of_idle_rules
from jq4.recipe import Recipe
from jq4.rule import Rule

Progress = Callable[[int, int, str], None]  # (blocks done, of all, what is being done)
STREAM_BYTES = 2**31  # of activations in memory; more lie in files


def quantize_blocks(
    chain: Chain,
    source: BlockSource,
    recipe: Recipe | Rule | str,
    rows: Any = None,
    *,
    destination: str | Path | None = None,
    effort: str = "default",
    seed: int = 0,
    batch_size: int = 8,
    devices: Sequence[Any] | None = None,
    memory: int = STREAM_BYTES,
    restart: bool = False,
    extra_files: Mapping[str, bytes] | None = None,
    provenance: Any = None,
    progress: Progress | None = None,
) -> BlocksResult:
    """Quantizes a model block by block, each on the outputs of the quantized blocks before it.

    Args:
      chain: the model's functions. Trees of it come back as dicts, by the paths of their leaves. A killed run goes on
        only with functions that compile from the same text (StableHLO): what a callback to Python does is not seen.
      source: its dense params, which are read block by block.
      recipe: a Recipe, a single Rule, or a preset's name; its steps are followed too.
      rows: token ids i32[R, T] to calibrate with; looked at only where the recipe needs them.
      destination: a folder to save to, written whole or not at all. DESTINATION.partial beside it holds the work, and
        the same call goes on where a killed one stopped. Without one the params are returned, and nothing is kept.
      effort: "light", "default" or "best": time for quality, in the steps that learn.
      seed: of whatever is drawn at random.
      batch_size: rows on the devices at a time; it changes no byte.
      devices: rows are shared among them; by default all accelerators, or one CPU device.
      memory: bytes of activations that may be held in memory; more are kept in files beside the work.
      restart: throw away the work of an unfinished run, whatever it was.
      extra_files, provenance: as `extra_files` and `source` of jq4.save, or a function that gives the latter once the
        arguments are found to be right. It should tell the source by its contents (SHA-256), for it says whether a
        killed run was of the same source; without one, all of the source is read to tell.
      progress: called with (blocks done, blocks in all, what is being done).

    Raises:
      JQ4Error: for anything wrong with what was given; nothing is left on disk then. It names block and leaf.

    Warns:
      IdleRuleWarning: for a rule that quantized no leaf.
    """
    started = time.perf_counter()
    say = progress or _say_nothing
    if batch_size < 1 or not 0 <= seed < 2**31:
        raise JQ4Error(f"batch_size is {batch_size} and seed is {seed}: wanted 1 or more, and 0 to 2**31 - 1")
    target = None if destination is None else Path(destination).expanduser().resolve()
    if target is not None:
        check_ours(target)
    job = plan_job(chain, source, Recipe.of(recipe), rows, effort=effort, seed=seed, devices=devices)
    provenance = provenance() if callable(provenance) else provenance
    identity = {} if target is None else job.identity(provenance)
    with _work_folder(target) as folder, journal_in(folder, identity, restart) as journal:
        resumed = len(journal.blocks)
        params, made = _quantized(job, folder, journal, batch_size, memory, say)
        report = whole_report(job.recipe, job.plan.leaves, job.outside, made, chain.num_blocks)
        if target is None:
            params = jax.tree.map(jnp.asarray, params)
        else:
            say(chain.num_blocks, chain.num_blocks, "saving")
            save(target, params, recipe=job.recipe, source=provenance, extra_files=extra_files)
    warn_of_idle_rules(report)
    return BlocksResult(
        params=params if target is None else None,
        report=report,
        rows=tuple(made),
        resumed_blocks=resumed,
        calibration_rows=None if job.rows is None else job.rows.shape[0],
        context=None if job.rows is None else job.rows.shape[1],
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
    )


def _quantized(
    job: Job, folder: Path, journal: Journal, batch_size: int, memory: int, say: Progress
) -> tuple[dict[str, Any], list[LeafRow]]:
    """The packed tree, its blocks as memory maps of `folder`, and the report's rows."""
    chain = job.chain
    store, before = BlockStore(folder / "blocks", chain.num_blocks), None
    if job.last_step is not None:
        before = BlockStore(folder / "dense", chain.num_blocks)
    blocks = BlocksInOrder(chain, job.source, job.recipe, job.plan, job.needs, job.placement, job.seed)
    if job.rows is not None:
        spilled = folder / "streams" if job.stream_bytes > memory else None
        blocks.embed(job.source.outside(), job.rows, batch_size, spilled)
    _run_blocks(blocks, store, before, journal, chain.num_blocks, say)
    params, of_outside = _outside_packed(job, blocks)
    params |= store.stacked()
    made = [row for block in journal.blocks for row in map(LeafRow.from_dict, block)] + of_outside
    if job.last_step is None or before is None or job.rows is None:
        return params, made
    dense, params = jax.tree.map(jnp.asarray, ({**job.source.outside(), **before.stacked()}, params))
    params = end_to_end.distilled(chain, dense, params, job.rows, job.last_step, job.seed, say)
    return params, rows_learned(made, dense, params)


def peak_memory() -> int:
    """Bytes, the most that this process ever held."""
    with contextlib.suppress(OSError):  # Linux; ru_maxrss counts there what a parent held at the fork, too
        held = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if held:
            return 1024 * int(held[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _run_blocks(
    blocks: BlocksInOrder,
    store: BlockStore,
    before: BlockStore | None,
    journal: Journal,
    num_blocks: int,
    say: Progress,
) -> None:
    """All blocks into the store, and into `before` as they were; those that the journal has are only run through."""
    while blocks.next < num_blocks:
        number = blocks.next
        if number < len(journal.blocks):
            say(number, num_blocks, f"block {number}: done before")
            blocks.skip(lambda number=number: store.block(number))
            continue
        say(number, num_blocks, f"block {number}")
        dense, packed, rows = blocks.quantize(lambda text, number=number: say(number, num_blocks, text))
        store.write(number, packed)
        if before is not None:
            before.write(number, dense)
        del dense, packed
        journal.add_block([row.as_dict() for row in rows])


def _outside_packed(job: Job, blocks: BlocksInOrder) -> tuple[dict[str, Any], list[LeafRow]]:
    """The params outside of the blocks, quantized where a rule says so, and their rows."""
    outside = job.source.outside()
    statistics = blocks.head_statistics(outside, wanted_by(job.outside))
    packed, rows = quantize_leaves(paths_of(outside), job.plan.recipe, statistics, None, None)
    tree = replaced(outside, packed)
    check_dense_leaves("", tree)
    return dict(tree), rows


@contextlib.contextmanager
def _work_folder(target: Path | None) -> Iterator[Path]:
    if target is not None:
        yield target.with_name(target.name + SUFFIX)
        return
    with tempfile.TemporaryDirectory(prefix="jq4-") as folder:
        yield Path(folder)


def _say_nothing(done: int, total: int, text: str) -> None:
    pass
