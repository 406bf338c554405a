"""One block: its stages in the order of their use, each quantized on what the stages before it have become.

    for each stage:  statistics of its leaves' inputs, in the block with the earlier stages quantized
                     codes by each leaf's rule and method
                     the packed leaves take the place of the dense ones
    then             learned rounding of the whole block, where the recipe says so

so that every layer is fitted to the inputs it will meet: GPTQ's own order (Frantar et al. 2022).

In memory are the dense block, as it was stored, and the packed one, whose leaves are dequantized one by one within the
programs that run it. Once the last stage's statistics are there, no more is asked of the dense block than that last
stage: it is passed on, and let go of.
"""

import time
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq4.chain import Chain
from jq4.driver.plan import BlockPlan, paths_of
from jq4.driver.report import LeafRow
from jq4.driver.stage_statistics import collectors, stage_statistics
from jq4.driver.streams import Stream
from jq4.errors import JQ4Error
from jq4.freed_pages import give_back_freed_pages
from jq4.leaf_errors import error_of
from jq4.paths import leaf_path
from jq4.qarray import is_qarray
from jq4.quantize import IdleRuleWarning, quantize
from jq4.quantize_report import LeafReport, QuantizeReport
from jq4.recipe import Recipe
from jq4.statistics import Statistics

_MEASURED_FLOPS = 2e11  # of one weight's output error; above, a part of its outputs is measured


class BlockQuantizer:
    """Quantizes the blocks of a chain by the rules of a plan."""

    def __init__(self, chain: Chain, plan: BlockPlan, pairs: bool, keeps_dense: bool) -> None:
        self._chain = chain
        self._plan = plan
        self._pairs = pairs
        self._keeps_dense = keeps_dense
        shapes = {leaf.path: leaf.shape for leaf in plan.leaves if leaf.shape is not None}
        self._collectors = collectors(plan.stages, plan.wanted, shapes, plan.axes)
        looking = (number for number, (collector, _) in enumerate(self._collectors) if collector is not None)
        self._last = max(looking, default=-1)

    def quantize(
        self,
        index: int,
        read: Callable[[], Any],
        inputs: Stream | None,
        dense_inputs: Stream | None,
        progress: Callable[[str], None],
        passed: Callable[[Any], None],
    ) -> tuple[Any, Any, list[LeafRow]]:
        """The dense block (None unless it is kept), the block with QArrays, and a row for each of them.

        Args:
          read: gives the dense block, which nobody else should hold.
          passed: called with it once nothing more will be asked of the streams that enter it.
        """
        dense = block = read()
        rows: list[LeafRow] = []
        name = f"block {index}: "
        if self._last < 0:
            check_dense_leaves(name, block)
            passed(dense)
        for number, (stage, (collector, serves)) in enumerate(zip(self._plan.stages, self._collectors, strict=True)):
            statistics = None
            if collector is not None:
                assert inputs is not None
                progress(name + ", ".join(path.split("/")[-2] for path in stage))
                _check_looked_at(name, block, collector.alone, everything=number == self._last)
                statistics = stage_statistics(
                    self._chain, index, collector, serves, block, inputs,
                    *((dense, dense_inputs) if self._pairs else ()),
                )  # fmt: skip
                give_back_freed_pages(block)
            leaves = {path: leaf for path, leaf in paths_of(block).items() if path in stage}
            if number == self._last:
                passed(dense)
                dense = dense if self._keeps_dense else None
            made, more = quantize_leaves(leaves, self._plan.recipe, statistics, self._plan.axes, index)
            del statistics, leaves
            give_back_freed_pages(block)
            rows += more
            block = replaced(block, made)
        return dense if self._keeps_dense else None, block, rows


def _check_looked_at(name: str, block: Any, alone: Collection[str], everything: bool) -> None:
    """Raises JQ4Error, naming the leaf, for a NaN or Inf that would go into statistics or through the dense block."""
    leaves = paths_of(block).items()
    check_dense_leaves(name, {path: leaf for path, leaf in leaves if everything or path in alone})


def quantize_leaves(
    leaves: Mapping[str, Any], recipe: Recipe, statistics: Statistics | None, axes: Any, index: int | None
) -> tuple[dict[str, Any], list[LeafRow]]:
    """The leaves by path as QArrays, and their rows; an error names the block too."""
    report = QuantizeReport()
    rows: list[LeafRow] = []
    started = [time.perf_counter()]
    kept: dict[str, Any] = {}

    def done(entry: LeafReport) -> None:
        jax.block_until_ready(entry.noise)
        seconds, started[0] = time.perf_counter() - started[0], time.perf_counter()
        kept[entry.path] = (entry, seconds)
        give_back_freed_pages()

    try:
        packed = _without_idle_warnings(leaves, recipe, statistics, axes, report, done)
    except JQ4Error as error:
        raise error if index is None else JQ4Error(f"block {index}: {error}") from error
    for path, q in packed.items():
        if is_qarray(q):
            entry, seconds = kept[path]
            rows.append(_row(index, entry, leaves[path], q, statistics, seconds))
    return {path: q for path, q in packed.items() if is_qarray(q)}, rows


def _without_idle_warnings(
    leaves: Mapping[str, Any], recipe: Recipe, statistics: Any, axes: Any, report: QuantizeReport, done: Any
) -> dict[str, Any]:
    """jq4.quantize; rules that quantize none of these leaves may quantize others, so nothing is said of them here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IdleRuleWarning)
        return quantize(dict(leaves), recipe, statistics, axes, report=report, progress=done, donate_stats=True)


def _row(
    index: int | None, entry: LeafReport, weight: Any, q: Any, statistics: Statistics | None, seconds: float
) -> LeafRow:
    sqnr_db = entry.sqnr_db
    return LeafRow(
        block=index,
        path=entry.path,
        shape=tuple(weight.shape),
        format=str(entry.format),
        group_size=int(entry.group_size or 0),
        sqnr_db=None if sqnr_db is None or not np.isfinite(sqnr_db) else sqnr_db,
        weighted_error=_output_error(entry, weight, q, statistics),
        note=entry.note,
        seconds=seconds,
        nbytes=entry.nbytes,
        energy=float(_energy(weight)),
    )


def _output_error(entry: LeafReport, weight: Any, q: Any, statistics: Statistics | None) -> float | None:
    """E|x D|**2 / E|x W|**2, of every n-th output where all of them would take longer than the method."""
    found = None if statistics is None else statistics.get(entry.path)
    if found is None:
        return None
    if entry.slices == 1 and not entry.starved:
        return entry.findings.output_error.item()  # the Hessian is given up
    flops = 4.0 * weight.size * weight.shape[q.axis]
    stride = int(np.ceil(flops / _MEASURED_FLOPS))
    near = q.dequantize()
    if stride > 1 and weight.ndim == 2:
        of_outputs = (slice(None), slice(None, None, stride)) if q.axis == -2 else (slice(None, None, stride),)
        weight, near = weight[of_outputs], near[of_outputs]
    return error_of(entry.path, weight, near, found, axis=q.axis).output_error


@jax.jit
def _energy(weight: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(weight.astype(jnp.float32)))


def replaced(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree with other leaves at these paths."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: leaves.get(leaf_path(keys), leaf), tree, is_leaf=is_qarray
    )


def check_dense_leaves(name: str, tree: Any) -> None:
    """Raises JQ4Error for a NaN or Inf in what stays dense; the packed leaves were checked as they were packed."""
    for path, leaf in paths_of(tree).items():
        if not is_qarray(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.all(jnp.isfinite(leaf))):
            raise JQ4Error(f"{name}{path}: holds NaN or Inf, wanted finite weights; repair the checkpoint")
