"""The activations between two blocks: x[R, T, D] for R rows of T tokens, float32, on the host or in a file.

Two of them run through the model: x of the dense one, x^ of the quantized one, of which only what a recipe needs is
kept. A block maps each row by itself, so its outputs take the place of its inputs.

Rows are computed in units of about 512 tokens, each whole on one device, the devices taking turns: sums over rows are
made of the same parts in the same order, so that neither another batch size (rows read at a time) nor another number
of devices changes a byte. Only the rows are shared out: each device holds the block at work, and the first one all
that is made of it.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jq4.checkpoint.atomic import naming
from jq4.errors import JQ4Error

_TOKENS_A_UNIT = 512

Item = TypeVar("Item")


class Placement:
    """Units of rows over devices, everything else on the first."""

    def __init__(self, devices: Sequence[Any] | None) -> None:
        self.devices = tuple(devices) if devices else default_devices()

    def unit(self, array: Any, number: int) -> jax.Array:
        """The activations of one unit on the device whose turn it is."""
        return jax.device_put(array, self.devices[number % len(self.devices)])

    def first(self, tree: Any) -> Any:
        return jax.device_put(tree, self.devices[0])


def default_devices() -> tuple[Any, ...]:
    """All accelerators; of CPU devices, which share one machine's cores, the first."""
    devices = jax.local_devices()
    return tuple(devices[:1] if devices[0].platform == "cpu" else devices)


class Stream:
    """Activations [R, T, D] of one model; `array` is a numpy array or a memory map of a file."""

    def __init__(self, array: np.ndarray, batch_size: int, placement: Placement) -> None:
        self.array = array
        self._placement = placement
        self._unit = unit_rows(array.shape[1])
        self._batch = -(-batch_size // self._unit) * self._unit

    def units(self) -> Iterator[tuple[slice, jax.Array]]:
        """The rows of each unit and their activations on its device, in order."""
        count = self.array.shape[0]
        for start in range(0, count, self._batch):
            batch = np.array(self.array[start : start + self._batch])
            for inner in range(0, len(batch), self._unit):
                unit = batch[inner : inner + self._unit]
                first = start + inner
                yield slice(first, first + len(unit)), self._placement.unit(unit, first // self._unit)

    def advance(self, step: Callable[[jax.Array], jax.Array], name: str) -> None:
        """x <- step(x), unit by unit. Raises JQ4Error, saying `name`, for what is not finite."""
        for rows, made in _ahead(((rows, step(x)) for rows, x in self.units()), len(self._placement.devices)):
            out = np.asarray(made)
            if not np.isfinite(out).all():
                row, position = np.argwhere(~np.isfinite(out))[0][:2]
                raise JQ4Error(
                    f"{name}: the outputs of row {rows.start + int(row)} at position {int(position)} are not finite: "
                    "look for overflow in the model's dtype, or a damaged checkpoint (jq4 inspect)"
                )
            self.array[rows] = out


def make_stream(
    tokens: np.ndarray,
    embed: Callable[[jax.Array], jax.Array],
    file: Path | None,
    batch_size: int,
    placement: Placement,
) -> Stream:
    """The embeddings of rows i32[R, T], in `file` if one is given, as a stream."""
    width = jax.eval_shape(embed, jax.ShapeDtypeStruct((1, tokens.shape[1]), np.int32)).shape[-1]
    shape = (*tokens.shape, width)
    array = np.empty(shape, np.float32) if file is None else _in_file(file, shape)
    unit = unit_rows(tokens.shape[1])
    for start in range(0, len(tokens), unit):
        part = np.asarray(embed(placement.first(tokens[start : start + unit])))
        array[start : start + unit] = part
    return Stream(array, batch_size, placement)


def _in_file(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A memory map whose pages the disk has: a write to one that it had no room for would kill the process."""
    file.parent.mkdir(exist_ok=True)
    with naming(file):
        array = np.lib.format.open_memmap(file, "w+", np.float32, shape)
    with naming(file), file.open("r+b") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return array


def unit_rows(length: int) -> int:
    """Rows of `length` tokens that are computed at a time."""
    return max(1, _TOKENS_A_UNIT // length)


def _ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The items in order, `count` of them made before the first is given."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) == count:
            yield waiting.popleft()
    yield from waiting
