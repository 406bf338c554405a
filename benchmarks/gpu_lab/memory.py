"""Shared memory of a block as the copy engine and mbarriers see it, and where the emulated addresses lie."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.gpu_lab.host_code import TensorMap

THREADS = 128
NO_GROUP = 1 << 30
REGISTERS = 65536  # of a core
SHARED_BASE = 1024  # where shared memory begins: swizzles count from multiples of 1024
ARRAY_BASE = 1 << 40  # argument i of the kernel lies at (i + 1) * ARRAY_BASE
PARAMETER_BASE = 1 << 60


class WrongProgramError(Exception):
    """The program did what a GPU would not forgive."""


@dataclasses.dataclass
class MBarrier:
    """An arrival counter in shared memory with a count of bytes still to come."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def arrive(self, threads: int) -> None:
        self.pending -= threads
        if self.pending < 0:
            raise WrongProgramError("more arrivals at an mbarrier than it was made for")
        self.settle()

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


@dataclasses.dataclass
class Copy:
    """A copy that was asked for: what to do, and who asked; of cp.async, in what group of theirs."""

    run: Callable[[], None]
    warpgroup: int
    is_store: bool
    group: int = NO_GROUP


def swizzled(address: np.ndarray, span: int) -> np.ndarray:
    """Addresses with their 16-byte chunks exchanged within rows of `span` bytes; 16 is no swizzle."""
    chunks = span // 16
    return address ^ (((address >> 7) % chunks) << 4)


def check_copy(box: TensorMap, size: int, shared: int) -> None:
    """What cuTensorMapEncodeTiled and the copies themselves refuse."""
    inner = box.box[-1] * size
    aligned = all(stride * size % 16 == 0 for stride in box.strides[:-1]) and box.strides[-1] == 1
    fits = max(box.box) <= 256 and inner % 16 == 0 and (box.swizzle == 16 or inner <= box.swizzle) and len(box.box) <= 5
    if not aligned or not fits or shared % 128 or box.offset % 16:
        raise WrongProgramError(f"a copy that the engine would refuse: {box} of {size} bytes to {shared:#x}")


def elements(box: TensorMap, at: Sequence[int], shared: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each element of a box: its address in shared memory, whether it is inside the array, its place there.

    Args:
      box: the tiled array.
      at: coordinates of the box's corner, the contiguous axis first.
      shared: where the box lies in shared memory.
      size: bytes of an element.
    """
    check_copy(box, size, shared)
    index = np.stack(np.meshgrid(*map(np.arange, box.box), indexing="ij"), -1).reshape(-1, len(box.box))
    address = swizzled(shared + size * np.arange(len(index)), box.swizzle)
    index = index + np.asarray(at[::-1])
    inside = np.all((index >= 0) & (index < np.asarray(box.sizes)), axis=-1)
    return address, np.asarray(inside), index @ np.asarray(box.strides) + box.offset // size
