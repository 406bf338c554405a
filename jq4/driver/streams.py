"""The activations between two blocks: x[R, T, D] for R rows of T tokens, float32, on the host or in a file.

Two of them run through the model: x of the dense one, x^ of the quantized one, of which only what a recipe needs is
kept. A block maps each row by itself, so its outputs take the place of its inputs.

Rows are computed in units of about 1,024 tokens a device, whatever the batch size: sums over rows are made of the same
parts in the same order, so that another batch size (rows sent to the devices at a time) changes no byte. Another
number of devices does change the parts, by rounding.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jq4.errors import JQ4Error

_TOKENS_A_UNIT = 1024


class Placement:
    """Rows over devices, everything else on all of them."""

    def __init__(self, devices: Sequence[Any] | None) -> None:
        self.devices = tuple(devices) if devices else default_devices()
        mesh = jax.sharding.Mesh(np.asarray(self.devices), ("rows",))
        self._split = NamedSharding(mesh, PartitionSpec("rows"))
        self._whole = NamedSharding(mesh, PartitionSpec())

    def rows(self, array: Any) -> jax.Array:
        """Rows [B, ...] over the devices, or on all of them where they do not divide."""
        if len(self.devices) == 1:
            return jax.device_put(array, self.devices[0])
        even = array.shape[0] % len(self.devices) == 0
        return jax.device_put(array, self._split if even else self._whole)

    def everywhere(self, tree: Any) -> Any:
        return jax.device_put(tree, self.devices[0] if len(self.devices) == 1 else self._whole)


def default_devices() -> tuple[Any, ...]:
    """All accelerators; of CPU devices, which share one machine's cores, the first."""
    devices = jax.local_devices()
    return tuple(devices[:1] if devices[0].platform == "cpu" else devices)


class Stream:
    """Activations [R, T, D] of one model; `array` is a numpy array or a memory map of a file."""

    def __init__(self, array: np.ndarray, batch_size: int, placement: Placement) -> None:
        self.array = array
        self._placement = placement
        self._unit = unit_rows(array.shape[1], len(placement.devices))
        self._batch = -(-batch_size // self._unit) * self._unit

    def units(self) -> Iterator[tuple[slice, jax.Array]]:
        """The rows of each unit and their activations on the device, in order."""
        count = self.array.shape[0]
        for start in range(0, count, self._batch):
            batch = np.array(self.array[start : start + self._batch])
            for inner in range(0, len(batch), self._unit):
                unit = batch[inner : inner + self._unit]
                yield slice(start + inner, start + inner + len(unit)), self._placement.rows(unit)

    def advance(self, step: Callable[[jax.Array], jax.Array], name: str) -> None:
        """x <- step(x), unit by unit. Raises JQ4Error, saying `name`, for what is not finite."""
        for rows, x in self.units():
            out = np.asarray(step(x))
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
    unit = unit_rows(tokens.shape[1], len(placement.devices))
    for start in range(0, len(tokens), unit):
        part = np.asarray(embed(placement.rows(tokens[start : start + unit])))
        array[start : start + unit] = part
    return Stream(array, batch_size, placement)


def _in_file(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A memory map whose pages the disk has: a write to one that it had no room for would kill the process."""
    file.parent.mkdir(exist_ok=True)
    array = np.lib.format.open_memmap(file, "w+", np.float32, shape)
    with file.open("r+b") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return array


def unit_rows(length: int, num_devices: int) -> int:
    """Rows of `length` tokens that are computed at a time."""
    return max(1, _TOKENS_A_UNIT // length) * num_devices
