"""How a format is written: each weight is planned from its description alone, then encoded when its turn comes.

A writer is a module with

    NAME                                            what `jq4 convert --to` calls it
    plan(weight, options) -> Planned                how its tensors will hold a weight, dense or packed, or a JQ4Error
                                                    that says what it cannot hold and what to do
    quantization_config(planned, options) -> dict   what config.json says of them

so that a conversion can say what is lost before it reads a byte, and can write headers before the data.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from jq4.checkpoint.foreign.weights import LazyWeight
from jq4.checkpoint.safetensors_files import DTYPES
from jq4.freed_pages import give_back_mapped_pages

PIECE_BYTES = 16 * 2**20

# the modules of this package that write a format
WRITERS: tuple[str, ...] = (
    "compressed_tensors_writing",
    "gptq_writing",
    "awq_writing",
    "mxfp4_writing",
    "bnb_nf4",
    "mxfp4",
)


@dataclasses.dataclass(frozen=True)
class Planned:
    """One weight as a target holds it.

    Attributes:
      weight: what is written.
      tensors: name -> (dtype by safetensors' name, shape), in the order in which they are written.
      encode: makes those tensors of what `weight.read` gives.
      loss: what is lost, in words for the user ("scales bfloat16 to float16"); "" where reading the result gives the
        same codes and scales.
      doubt: what can only be known once the data is seen ("scales must fit float16"); "" for nothing. `encode` raises
        JQ4Error where it turns out badly.
      unpacked: why a packed weight is written dense by a format of packed ones; "" where it is not.
      requantized: whether a packed weight gets other codes, which a conversion does only where it is asked for.
      pieces: where it makes a single tensor: what `encode` makes of it, cut into flat arrays that follow each other and
        are made one by one, so that a large tensor never is in memory as a whole.
      by_rows: names of the tensors whose axis 0 follows the weight's, and that hold the same of a row whatever others
        are encoded with it; other tensors are then the same for any. Empty where rows are encoded together.
    """

    weight: LazyWeight
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    encode: Callable[[Any], Mapping[str, np.ndarray]] = dataclasses.field(repr=False)
    loss: str = ""
    doubt: str = ""
    unpacked: str = ""
    requantized: bool = False
    pieces: Callable[[Any], Iterable[np.ndarray]] | None = dataclasses.field(default=None, repr=False)
    by_rows: tuple[str, ...] = ()

    @property
    def of_rows(self) -> tuple[str, ...]:
        """The tensors that can be made a few rows at a time."""
        return tuple(self.tensors) if self.pieces is not None else self.by_rows

    @property
    def packed(self) -> bool:
        """Whether the target holds it packed."""
        return self.weight.packed and not self.unpacked


class Writer(Protocol):
    """A module of this package."""

    NAME: str

    def plan(self, weight: LazyWeight, options: Mapping[str, Any]) -> Planned: ...

    def quantization_config(self, planned: list[Planned], options: Mapping[str, Any]) -> dict[str, Any]: ...


def as_it_is(weight: LazyWeight) -> Planned:
    """A dense weight under its own name, in its own dtype."""
    name = next(name for name, dtype in DTYPES.items() if dtype == weight.abstract.dtype)
    return Planned(
        weight, {weight.name: (name, weight.shape)}, lambda array: {weight.name: np.asarray(array)}, pieces=flat_pieces
    )


def flat_pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """The elements of an array in order, a piece at a time; of a mapped file no more than a piece stays resident."""
    flat = array.reshape(-1)
    step = max(1, PIECE_BYTES // flat.dtype.itemsize)
    for start in range(0, flat.size, step):
        yield np.array(flat[start : start + step])
        give_back_mapped_pages(array)
