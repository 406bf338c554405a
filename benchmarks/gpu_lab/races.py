"""Do warps of a block wait for each other? Who touched which byte of shared memory since the last barrier.

A byte that one warp writes, another may read or write only after a barrier; one that a warp reads, another may write
only after a barrier. What cp.async writes is written from when it was asked for until its warp has waited for its
group, and nobody may read it before. The emulator runs a warpgroup's warps in step, which hides such races: here they
are errors.
"""

import numpy as np

from benchmarks.gpu_lab.memory import ARRAY_BASE, WrongProgramError


class NoRaces:
    """For blocks of several warpgroups, which the emulator runs in an order drawn at random."""

    def barrier(self) -> None: ...

    def read(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> None: ...

    def write(self, addresses: np.ndarray, size: int, warps: np.ndarray, group: int | None = None) -> None: ...

    def settle(self, group: int) -> None: ...


class Races(NoRaces):
    """Of a block's shared memory of so many bytes; warps are bits of masks."""

    def __init__(self, size: int) -> None:
        self.reads, self.writes = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        self.awaited = np.zeros(size, bool)  # what a copy of cp.async is still writing
        self.copies: list[tuple[int, np.ndarray, np.ndarray]] = []  # those copies: group, bytes, warps

    def barrier(self) -> None:
        self.reads[:] = self.writes[:] = 0

    def read(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> None:
        where, bits = _bytes_of(addresses, size, warps)
        _refuse(self.awaited[where], "reads what it has not waited for")
        _refuse(self.writes[where] & ~bits, "reads what another warp wrote, with no barrier between")
        np.bitwise_or.at(self.reads, where, bits)

    def write(self, addresses: np.ndarray, size: int, warps: np.ndarray, group: int | None = None) -> None:
        """Bytes that are written, or by cp.async in a group."""
        where, bits = _bytes_of(addresses, size, warps)
        if group is not None:
            self.copies.append((group, where, bits))
            self.awaited[where] = True
        self._mark(where, bits)

    def settle(self, group: int) -> None:
        """Groups of cp.async before this one have been waited for."""
        for _, where, bits in (copy for copy in self.copies if copy[0] < group):
            self._mark(where, bits)
            self.awaited[where] = False
        self.copies = [copy for copy in self.copies if copy[0] >= group]

    def _mark(self, where: np.ndarray, bits: np.ndarray) -> None:
        others = (self.reads[where] | self.writes[where]) & ~bits
        _refuse(others, "writes what another warp read or wrote, with no barrier between")
        np.bitwise_or.at(self.writes, where, bits)


def _refuse(found: np.ndarray, what: str) -> None:
    if found.any():
        raise WrongProgramError(f"a warp {what}")


def _bytes_of(addresses: np.ndarray, size: int, warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the bytes that are in shared memory, and their warps' bits."""
    shared = addresses < ARRAY_BASE
    where = (addresses[shared][:, None] + np.arange(size)).reshape(-1)
    return where, np.repeat(np.left_shift(1, warps[shared] % 4).astype(np.uint8), size)
