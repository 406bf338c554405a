"""Batches of rows by the number of their step: a shuffled order that is computed, not remembered.

Every row once, in a random order, before any of them again; the order of an epoch is drawn from (seed, epoch). Which
rows step n sees is a function of n alone, so that a resumed run needs nothing but n to see what it would have seen.

A batch is {"tokens": i32[A, B/A, T], "key": u32[A, B/A, 2]}: A parts (loop.py), and for each row a key of its
own for what is drawn at random there. The key belongs to the row's place in the run, not in the batch, so that another
number of parts or devices draws the same. What is known of each row beforehand (a teacher's predictions) goes along.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jq4.errors import JQ4Error


@dataclasses.dataclass(frozen=True)
class ShuffledRows:
    """`self[n]` is the batch of step n, counted from 0.

    Attributes:
      rows: i32[R, T]; may lie in a file (np.memmap).
      batch_size: B, rows a step.
      parts: A, that a step takes one after the other.
      seed: of the order and of the keys.
      along: by its name in the batch, what gives arrays [B, ...], or a tree of them, for the numbers of B rows.
    """

    rows: np.ndarray
    batch_size: int
    parts: int = 1
    seed: int = 0
    along: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or not self.rows.size:
            raise JQ4Error(f"the rows have shape {self.rows.shape}, wanted [rows, tokens] with something in it")
        if self.parts < 1 or self.batch_size < 1 or self.batch_size % self.parts:
            raise JQ4Error(f"a batch of {self.batch_size} rows in {self.parts} parts: wanted parts of equal size")

    def __getitem__(self, step: int, /) -> dict[str, Any]:
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, within = np.divmod(places, len(self.rows))
        chosen = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            chosen[epochs == epoch] = self._order(int(epoch))[within[epochs == epoch]]
        tokens = np.asarray(self.rows[chosen], np.int32)
        keys = np.stack([places >> 32, places & 0xFFFFFFFF], -1).astype(np.uint32)
        keys[:, 0] ^= np.uint32(self.seed & 0xFFFFFFFF)
        along = {name: held[chosen] for name, held in self.along.items()}
        return jax.tree.map(self._in_parts, {"tokens": tokens, "key": keys, **along})

    def _order(self, epoch: int) -> np.ndarray:
        held = self.__dict__.get("_held")
        if held is None or held[0] != epoch:
            held = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.rows)))
            object.__setattr__(self, "_held", held)
        return held[1]

    def _in_parts(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.parts, -1, *array.shape[1:])
