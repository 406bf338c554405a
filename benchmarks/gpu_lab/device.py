"""One block of a kernel, on a CPU: its PTX, instruction by instruction, its copies and its tensor cores.

What is emulated as the PTX ISA tells it: registers of 128 threads at a time, shared memory with the copy engine's
swizzles, tiled copies with zeros beyond the ends, mbarriers with their transaction bytes, named barriers, wgmma with
its fragments and descriptors, cp.async with its groups, and mma. What is asynchronous on the chip is so here, and in an
order drawn at random: copies happen some time after they were asked for, products of wgmma at the last moment that the
program allows. Shared memory begins as NaNs. So a program that does not wait for what it reads, or gives away what is
still being read, computes something else.

Not emulated: time, the memory model's fences, and clusters. Threads of a warpgroup must take the same branches, and run
in step: whether the warps of a block of one warpgroup wait for each other is for races.py to say.
"""

from collections.abc import Sequence

import numpy as np

from benchmarks.gpu_lab.host_code import DevicePointer, Launch, TensorMap
from benchmarks.gpu_lab.memory import (
    ARRAY_BASE,
    PARAMETER_BASE,
    REGISTERS,
    SHARED_BASE,
    THREADS,
    Copy,
    MBarrier,
    WrongProgramError,
    elements,
)
from benchmarks.gpu_lab.ptx import Program
from benchmarks.gpu_lab.races import NoRaces, Races
from benchmarks.gpu_lab.warpgroup import Warpgroup


def run_kernel(program: Program, launch: Launch, arrays: Sequence[np.ndarray], seed: int = 0) -> None:
    """Runs all blocks; `arrays` are the kernel's arguments, results among them, which are written in place."""
    memory = [array.reshape(-1).view(np.uint8) for array in arrays]
    itemsizes = [array.itemsize for array in arrays]
    random = np.random.default_rng(seed)
    for z, y, x in np.ndindex(launch.grid[::-1]):
        Block(program, launch, memory, itemsizes, (x, y, z), random).run()


def registers_at_launch(threads: int) -> int:
    """Of a thread, in a block that has a core to itself: what `setmaxnreg` shares out anew, and no more than that."""
    return min(255, REGISTERS // threads) // 8 * 8


class Block:
    """Shared memory, barriers and warpgroups of one block."""

    def __init__(
        self, program: Program, launch: Launch, memory: Sequence[np.ndarray], itemsizes: Sequence[int],
        index: tuple[int, int, int], random: np.random.Generator,
    ) -> None:  # fmt: skip
        self.program, self.launch, self.memory, self.itemsizes, self.index = program, launch, memory, itemsizes, index
        self.random = random
        self.shared = np.full(SHARED_BASE + launch.shared_bytes + 1024, 0xFF, np.uint8)
        self.mbarriers: dict[int, MBarrier] = {}
        self.barriers: dict[int, set[int]] = {}
        self.copies: list[Copy] = []
        self.races = Races(len(self.shared)) if launch.threads == THREADS else NoRaces()
        self.warpgroups = [Warpgroup(self, i) for i in range(launch.threads // THREADS)]
        self.registers = [registers_at_launch(launch.threads)] * len(self.warpgroups)  # of a thread
        self.register_pool = sum(self.registers)

    def run(self) -> None:
        """Warpgroups and copies in an order drawn at random, until all is done."""
        while any(not one.done for one in self.warpgroups) or self.copies:
            ready = [one for one in self.warpgroups if not one.done and one.is_ready()]
            choice = int(self.random.integers(len(ready) + len(self.copies))) if ready or self.copies else -1
            if choice < 0:
                where = [one.program.instructions[one.counter] for one in self.warpgroups if not one.done]
                raise WrongProgramError(f"nothing can go on: {where}")
            if choice < len(ready):
                ready[choice].go_on()
            else:
                self.copies.pop(choice - len(ready)).run()

    def parameter(self, name: str) -> int:
        return PARAMETER_BASE + 4096 * self.program.parameters.index(name)

    def tensor_map(self, address: int) -> TensorMap:
        parameter, offset = divmod(address - PARAMETER_BASE, 4096)
        return self.launch.parameters[parameter][offset]

    def mbarrier(self, address: np.ndarray) -> MBarrier:
        return self.mbarriers[int(address[0])]

    def load(self, address: int, size: int) -> np.ndarray:
        """Bytes of shared or global memory, or of a parameter that is a pointer."""
        if address >= PARAMETER_BASE:
            pointer = self.launch.parameters[(address - PARAMETER_BASE) // 4096]
            assert isinstance(pointer, DevicePointer)
            return np.array([ARRAY_BASE * (pointer.array + 1) + pointer.offset], np.uint64).view(np.uint8)[:size]
        memory, offset = self.place(address)
        if offset < 0 or offset + size > len(memory):
            raise WrongProgramError(f"a read of {size} bytes at {address:#x}, outside of what there is")
        if offset % size:
            raise WrongProgramError(f"a read of {size} bytes at {address:#x}, which is not aligned to it")
        return memory[offset : offset + size]

    def place(self, address: int) -> tuple[np.ndarray, int]:
        if address < ARRAY_BASE:
            return self.shared, address
        return self.memory[address // ARRAY_BASE - 1], address % ARRAY_BASE

    def copy_bytes(self, source: np.ndarray, to: np.ndarray, size: int) -> None:
        """cp.async: `size` bytes of each thread, from global to shared memory."""
        for one, other in zip(source, to, strict=True):
            self.load(int(other), size)[:] = self.load(int(one), size)

    def copy_in(self, box: TensorMap, at: Sequence[int], shared: int, barrier: MBarrier) -> None:
        size = self.itemsizes[box.array]
        where, inside, offsets = elements(box, at, shared, size)
        source = self.memory[box.array]
        for byte in range(size):
            self.shared[where + byte] = np.where(inside, source[np.where(inside, offsets * size + byte, 0)], 0)
        barrier.bytes -= len(where) * size
        barrier.settle()

    def copy_out(self, box: TensorMap, at: Sequence[int], shared: int) -> None:
        size = self.itemsizes[box.array]
        where, inside, offsets = elements(box, at, shared, size)
        for byte in range(size):
            self.memory[box.array][offsets[inside] * size + byte] = self.shared[where[inside] + byte]
