"""What the leaves of one stage of a block are multiplied by, over all calibration rows.

    alone     x^ runs through the block whose earlier stages are quantized (dequantized, in a dense tree): E[x^ x^T^]
    in pairs  x runs through the dense block beside it, row for row: E[x x^T^] as well, for methods that undo what the
              quantized prefix has done to their inputs

Only what a method asks for is collected, once for all leaves that see the same inputs; what the block computes after
the stage is not computed at all, since nothing asks for it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jq4.chain import Chain
from jq4.driver.streams import Stream
from jq4.freed_pages import give_back_freed_pages
from jq4.observe import Programs, observe
from jq4.observe_pair import observe_pair
from jq4.statistics import Statistics, check_finite

Collects = Mapping[str, frozenset[str]]


class Collector:
    """path -> what to collect of it; `programs` holds what was compiled for the first block, for those after it.

    `alone` are paths of weights with fewer outputs than inputs whose statistics serve no other: of a pair, what the
    inputs' cross-correlation makes of such a weight takes less memory than itself.
    """

    def __init__(self, collects: Collects, alone: Iterable[str] = ()) -> None:
        self._collects = dict(collects)
        self.alone = frozenset(alone)
        self.programs = Programs()

    def __call__(self, path: str) -> frozenset[str]:
        return self._collects.get(path, frozenset())


def collectors(
    stages: Sequence[Sequence[str]], wanted: Collects, shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, int]
) -> list[tuple[Collector | None, dict[str, str]]]:
    """For each stage: what to collect (None: nothing), and whose statistics serve each of its leaves."""
    made = []
    for stage in stages:
        asking = [path for path in stage if wanted.get(path)]
        serves = {
            path: next(p for p in asking if _kind(p, shapes, axes) == _kind(path, shapes, axes)) for path in asking
        }
        collects = {
            first: frozenset[str]().union(*(wanted[path] for path in asking if serves[path] == first))
            for first in set(serves.values())
        }
        alone = [path for path in collects if _is_narrow(shapes[path], axes[path]) and len(serves) == 1]
        made.append((Collector(collects, alone) if asking else None, serves))
    return made


def _is_narrow(shape: tuple[int, ...], axis: int) -> bool:
    """Whether a weight is a matrix [K, N] with N < K."""
    return len(shape) == 2 and axis == -2 and shape[1] < shape[0]


def _kind(path: str, shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, int]) -> tuple[Any, ...]:
    shape = shapes[path]
    return len(shape), shape[:-2], axes[path], shape[axes[path]]


def stage_statistics(
    chain: Chain,
    index: int,
    collector: Collector,
    serves: Mapping[str, str],
    quantized_block: Any,
    inputs: Stream,
    dense_block: Any = None,
    dense_inputs: Stream | None = None,
) -> Statistics:
    """Statistics of a stage's leaves. Raises JQ4Error naming block and leaf where inputs are not finite."""
    number = jnp.int32(index)
    how: Any = {"collect": collector, "alone": collector.alone, "programs": collector.programs}
    if dense_inputs is None:
        batches = _given_back(((number, x) for _, x in inputs.units()))
        found = observe(chain.block, quantized_block, batches, **how)
    else:
        pairs = _given_back(_pairs(number, dense_inputs, inputs))
        trees = (dense_block, quantized_block)
        found = observe_pair(chain.block, *trees, pairs, **how)
    weights = {path: found[first] for path, first in serves.items()}
    for path in dict.fromkeys(serves.values()):
        check_finite(f"block {index}: {path}", found[path])
    return Statistics(weights, found.grouped_axes, found.looked_up)


def _given_back(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches; between the first two, the pages that compiling for the first has taken are given back."""
    for number, batch in enumerate(batches):
        if number == 1:
            give_back_freed_pages()
        yield batch


def _pairs(number: jax.Array, dense: Stream, quantized: Stream) -> Iterator[tuple[Any, Any]]:
    for (_, x), (_, y) in zip(dense.units(), quantized.units(), strict=True):
        yield (number, x), (number, y)
