"""`observe`: streaming statistics of the inputs of every weight that a function multiplies by.

The function is run as it is, one batch after another, and the sums of each are added to the total in the order of the
batches: memory is the function's own and the sums', and that of a batch's sums where its rows would take more
(jq4.outer_rows). A batch is computed on the device where it lies, by the same program on each, and the total is on the
first one's: so that the sums are the same bytes however many devices share the batches. They are in float32, per weight
and per stacked slice (a scanned layer, an expert); see jq4.statistics for their shapes. Another batch size changes them
by rounding only.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jq4.axes import is_array, watched_call
from jq4.beside import beside, device_of
from jq4.errors import JQ4Error
from jq4.qarray import is_qarray
from jq4.sparing_jit import sparing_jit
from jq4.statistics import CHEAP, Statistics, WeightStatistics, check_collectable, condensed, merge, settled
from jq4.watch import Frame, Watcher

Collect = Collection[str] | Callable[[str], Collection[str]]


@dataclasses.dataclass(frozen=True)
class Programs:
    """What one call compiled, for later calls with the same function and the same `collect`, such as block by block."""

    steps: dict[Any, Any] = dataclasses.field(default_factory=dict)
    axes: dict[str, int] = dataclasses.field(default_factory=dict)
    tables: dict[str, int] = dataclasses.field(default_factory=dict)


def observe(
    function: Callable[..., Any],
    tree: Any,
    batches: Iterable[Any],
    *,
    collect: Collect = CHEAP,
    alone: Collection[str] = (),
    programs: Programs | None = None,
) -> Statistics:
    """Statistics of what each weight of `tree` is multiplied by in `function(tree, batch)`, over all batches.

    Args:
      function: any traceable function; called as function(tree, batch), or function(tree, *batch) for a tuple.
      tree: the parameters; a weight is a float leaf of two axes or more. QArrays are dequantized, in the program.
      batches: pytrees of arrays; may be a generator, of which one batch a device is held at a time.
      collect: some of "absmax", "mean", "mean_square", "hessian" (counts always come along), or a function from a
        leaf's path to them. A Hessian of K inputs takes 4*K*K bytes a slice, so it is only collected where asked.
      alone: paths of weights whose statistics serve no other: their Hessians may be kept in half the memory
        (jq4.upper_squares).
      programs: of an earlier call with this function, `collect` and `alone`, so that nothing is compiled again; filled
        here.

    Returns:
      Statistics: path -> WeightStatistics, with `.axes` as jq4.contraction_axes gives them.

    Raises:
      JQ4Error: no batches, or a name in `collect` that cannot be collected.
    """
    collects = collector(collect)

    def gather(arguments: Any) -> Watcher:
        tree, args = arguments
        watcher = Watcher(collects)
        leaves, run = watched_call(function, watcher, dense(tree), args, {})
        run(leaves)
        return watcher

    here = beside(tree)
    return accumulate(
        gather, ((here(batch), as_arguments(batch)) for batch in batches), "observe", programs, frozenset(alone)
    )


def accumulate(
    gather: Callable[[Any], Watcher],
    calls: Iterable[Any],
    name: str,
    programs: Programs | None = None,
    alone: frozenset[str] = frozenset(),
) -> Statistics:
    """The sums of what `gather` finds in each call's arguments, added up in their order, on the first one's device.

    `gather(arguments)` is traced once for each structure and set of shapes, and returns the watcher that has seen all.
    Hessians of the paths `alone` may be in half the memory (jq4.upper_squares).
    """
    programs = programs or Programs()
    total: dict[str, WeightStatistics] | None = None
    for arguments in calls:
        leaves, structure = jax.tree.flatten(arguments)
        static = tuple((place, type(leaf), leaf) for place, leaf in enumerate(leaves) if not is_array(leaf))
        key = (structure, static, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves if is_array(leaf)))
        if key not in programs.steps:
            programs.steps[key] = _step(gather, leaves, structure, programs.axes, programs.tables)
        arrays = [jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves if is_array(leaf)]
        total = _added(total, programs.steps[key], arrays, alone)
    if total is None:
        raise JQ4Error(f"{name} was given no batches: wanted at least one")
    return Statistics(dict(total), tuple(programs.axes.items()), tuple(programs.tables))


def _added(
    total: dict[str, WeightStatistics] | None,
    step: Callable[..., dict[str, WeightStatistics]],
    arrays: list[Any],
    alone: frozenset[str],
) -> dict[str, WeightStatistics]:
    """The total, whose arrays are taken over, with the statistics of one more call."""
    if total is None:
        return _settled(step(arrays), alone)
    home = device_of(total)
    is_home = home == device_of(arrays)
    if is_home and not _is_traced(total):
        jax.block_until_ready(total)  # of each device's batches one is under way, not all
    found = step(arrays)
    if home is not None and not is_home:
        found = jax.device_put(_settled(found, alone), home)
    both = {path: more for path, more in found.items() if path in total}
    new = {path: more for path, more in found.items() if path not in total}
    return total | _settled(new, alone) | _merge({path: total[path] for path in both}, both)


def _settled(found: dict[str, WeightStatistics], alone: frozenset[str]) -> dict[str, WeightStatistics]:
    """Outer products summed, in arrays of their own: a program may give back an array that it was given."""
    return _merge(_nothing(found, alone), found)


@functools.partial(jax.jit, static_argnames="alone")
def _nothing(found: dict[str, WeightStatistics], alone: frozenset[str]) -> dict[str, WeightStatistics]:
    """A total of no rows. (Made by the program that adds to it, it would lie in its temporaries as well.)"""
    total = {path: settled(statistics, path in alone) for path, statistics in found.items()}
    return jax.tree.map(jnp.zeros_like, total)


@functools.partial(jax.jit, donate_argnums=0)
def _merge(total: dict[str, WeightStatistics], found: dict[str, WeightStatistics]) -> dict[str, WeightStatistics]:
    return {path: merge(total[path], new) for path, new in found.items()}


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def dense(tree: Any) -> Any:
    """The tree with its QArrays dequantized."""
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_qarray(leaf) else leaf, tree, is_leaf=is_qarray)


def as_arguments(batch: Any) -> tuple[Any, ...]:
    """A batch as the further arguments of a function."""
    return batch if isinstance(batch, tuple) else (batch,)


def collector(collect: Collect) -> Callable[[str], frozenset[str]]:
    if callable(collect):
        return lambda path: check_collectable(collect(path))
    names = check_collectable(collect)
    return lambda path: names


def _step(
    gather: Callable[[Any], Watcher],
    leaves: list[Any],
    structure: Any,
    axes: dict[str, int],
    tables: dict[str, int],
) -> Callable[..., dict[str, WeightStatistics]]:
    """Statistics of one call, jitted, for arguments like these.

    `axes` and `tables` are filled with what the trace learns. An array that several sums are made of is given once.
    """
    learned: dict[str, Any] = {}
    dynamic = [place for place, leaf in enumerate(leaves) if is_array(leaf)]
    kept = [None if is_array(leaf) else leaf for leaf in leaves]

    def statistics(arrays: list[Any]) -> list[Any]:
        merged = list(kept)
        for place, array in zip(dynamic, arrays, strict=True):
            merged[place] = array
        watcher = gather(jax.tree.unflatten(structure, merged))
        axes.update(watcher.axes)
        tables.update(watcher.looked_up)
        leaves, learned["structure"] = jax.tree.flatten(_by_path(watcher.frame))
        different = {id(leaf): leaf for leaf in leaves}
        learned["places"] = [list(different).index(id(leaf)) for leaf in leaves]
        return list(different.values())

    program = sparing_jit(statistics)

    def step(arrays: list[Any]) -> dict[str, WeightStatistics]:
        found = program(arrays)
        return jax.tree.unflatten(learned["structure"], [found[place] for place in learned["places"]])

    return step


def _by_path(frame: Frame) -> dict[str, WeightStatistics]:
    """Statistics by path, their leading axes in the leaf's own order; uses of one leaf are merged."""
    found: dict[str, WeightStatistics] = {}
    shapes: dict[str, Any] = {}
    for key, statistics in frame.items():
        order = sorted(range(len(key.leading)), key=lambda place: key.leading[place])
        ordered = jax.tree.map(
            lambda leaf, order=order: jax.lax.transpose(leaf, (*order, *range(len(order), leaf.ndim))), statistics
        )
        kind = (tuple(sorted(key.leading)), key.features)
        if key.path in found and shapes[key.path] != kind:
            raise JQ4Error(
                f"{key.path}: it is contracted along its axes {shapes[key.path][1]} in one place and {key.features} in "
                "another, so its inputs have no common statistics. Leave it out: collect=lambda path: ..."
            )
        found[key.path] = merge(found[key.path], ordered) if key.path in found else ordered
        shapes[key.path] = kind
    return {path: dataclasses.replace(condensed(each), leaf_axes=shapes[path]) for path, each in found.items()}
