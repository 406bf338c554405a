"""128 threads of a block, in step: control, warps, loads and stores, and what they ask of the chip's engines."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.gpu_lab.alu import OPERATIONS, WIDTHS, bits_type
from benchmarks.gpu_lab.host_code import TensorMap
from benchmarks.gpu_lab.memory import SHARED_BASE, THREADS, Copy, MBarrier, WrongProgramError, swizzled
from benchmarks.gpu_lab.ptx import Instruction
from benchmarks.gpu_lab.tensor_cores import (
    element_type,
    left_fragments,
    registers_of,
    right_fragments,
    summed_in_fixed_point,
    sums_of,
)

_SPANS = {1: 128, 2: 64, 3: 32}  # bytes of a swizzled row, by a descriptor's mode


class Warpgroup:
    """128 threads that run one program, all at the same place of it."""

    def __init__(self, block: Any, index: int) -> None:
        self.block, self.program, self.index = block, block.program, index
        self.counter, self.done = 0, False
        self.registers: dict[str, np.ndarray] = {}
        self.waits_at: int | None = None  # a named barrier that it has arrived at
        self.products: list[list[Callable[[], None]]] = [[]]  # of wgmma: committed groups, then the one being filled
        self.copy_group = 0  # of cp.async: the one being filled
        thread = np.arange(THREADS, dtype=np.uint32) + np.uint32(THREADS * index)
        self.warps = np.arange(THREADS) // 32 + THREADS // 32 * index
        self.special = {
            "%tid.x": thread,
            **{f"%ctaid.{axis}": self._all(i) for axis, i in zip("xyz", block.index, strict=True)},
        }

    @staticmethod
    def _all(value: int, kind: Any = np.uint32) -> np.ndarray:
        return np.full(THREADS, value & (2 ** (8 * np.dtype(kind).itemsize) - 1), kind)

    def is_ready(self) -> bool:
        """Whether the instruction at the counter can be finished."""
        instruction = self.program.instructions[self.counter]
        if self.waits_at is not None:
            return False
        if "try_wait" in instruction.name:
            barrier = self.block.mbarrier(self.address(instruction.operands[1]))
            return barrier.phase % 2 != int(self.value(instruction.operands[2], "b32")[0]) % 2
        if instruction.name.startswith("setmaxnreg.inc"):
            others = sum(count for i, count in enumerate(self.block.registers) if i != self.index)
            return others + int(instruction.operands[0]) <= self.block.register_pool
        if instruction.name.startswith("cp.async.bulk.wait_group"):
            return not any(copy.is_store and copy.warpgroup == self.index for copy in self.block.copies)
        if instruction.name == "cp.async.wait_group":
            return not any(copy.group < self._awaited(instruction) for copy in self.block.copies)
        return True

    def _awaited(self, instruction: Instruction) -> int:
        """Groups of cp.async before this one are to be done."""
        return self.copy_group - int(instruction.operands[0])

    def go_on(self) -> None:
        """Runs until something must be waited for."""
        while not self.done and self.is_ready():
            instruction = self.program.instructions[self.counter]
            self.counter += 1
            self.execute(instruction)
            self.done = self.done or self.counter >= len(self.program.instructions)

    def execute(self, instruction: Instruction) -> None:
        active = np.ones(THREADS, bool)
        if instruction.guard:
            active = self.registers[instruction.guard] ^ instruction.negated
        words = instruction.name.split(".")
        if handler := getattr(self, f"do_{words[0]}", None):
            handler(instruction, words[1:], active)
            return
        if words[0] not in OPERATIONS:
            raise NotImplementedError(f"{instruction}")
        target, *operands = instruction.operands
        types = _operand_types(words[0], words[1:], len(operands))
        values = [self.value(operand, kind) for operand, kind in zip(operands, types, strict=True)]
        self.assign(target, OPERATIONS[words[0]](words[1:], values), active)

    # --- operands ------------------------------------------------------------------------------------------------

    def value(self, operand: str, kind: str) -> np.ndarray:
        if operand.startswith("{"):  # mov packs registers into a wider one
            parts = [
                self.value(part.strip(), f"b{WIDTHS[kind] // (operand.count(',') + 1)}") for part in _listed(operand)
            ]
            return np.stack(parts, -1).reshape(-1).view(bits_type(kind))
        if operand in self.special:
            return self.special[operand]
        if operand.startswith("%") or operand in self.registers:
            if operand not in self.registers:
                raise WrongProgramError(f"{operand} is read before it is written")
            return self.registers[operand]
        if operand.startswith("0f"):
            return self._all(int(operand[2:], 16))
        if re.match(r"-?(0x)?[0-9A-Fa-f]+U?$", operand):
            number = int(operand.rstrip("U"), 0)
            return np.full(THREADS, bool(number)) if kind == "pred" else self._all(number, bits_type(kind))
        if "_param_" in operand:
            return self._all(self.block.parameter(operand), np.uint64)
        return self._all(SHARED_BASE, np.uint64)  # the one array in shared memory

    def address(self, operand: str) -> np.ndarray:
        """i64 addresses of "[register + offset]"."""
        match = re.match(r"\[\s*([^+\s\]]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        assert match is not None, operand
        base = self.value(match[1], "b64").astype(np.int64)
        return base + int(match[2] or 0)

    def assign(self, target: str, value: np.ndarray, active: np.ndarray) -> None:
        if target.startswith("{"):  # mov unpacks a register into narrower ones
            names = _listed(target)
            parts = value.view(np.uint8).reshape(THREADS, len(names), -1)
            for i, name in enumerate(names):
                part = np.ascontiguousarray(parts[:, i])
                self.assign(name, part.view(f"u{part.shape[1]}")[:, 0], active)
        elif active.all():
            self.registers[target] = value
        else:
            self.registers[target] = np.where(active, value, self.registers.get(target, np.zeros_like(value)))

    # --- control and warps ---------------------------------------------------------------------------------------

    def do_bra(self, instruction: Instruction, words: Sequence[str], active: np.ndarray) -> None:
        if active.any() != active.all():
            raise WrongProgramError(f"threads of a warpgroup part at line {instruction.line}")
        if active.all():
            self.counter = self.program.labels[instruction.operands[0]]

    def do_ret(self, instruction: Instruction, words: Sequence[str], active: np.ndarray) -> None:
        self.done = bool(active.all())

    def do_shfl(self, instruction: Instruction, words: Sequence[str], active: np.ndarray) -> None:
        target, source, lane = instruction.operands[:3]
        warps = self.value(source, words[-1]).reshape(4, 32)
        by = self.value(lane, "b32").reshape(4, 32)
        lanes = np.broadcast_to(np.arange(32, dtype=np.uint32), (4, 32))
        chosen = {"idx": by, "bfly": lanes ^ by, "up": lanes - by, "down": lanes + by}[words[1]]
        self.assign(target, np.take_along_axis(warps, chosen.astype(np.int64) & 31, 1).reshape(-1), active)

    def do_elect(self, instruction: Instruction, words: Sequence[str], active: np.ndarray) -> None:
        register, predicate = instruction.operands[0].split("|")
        self.assign(register, self._all(0), active)
        self.assign(predicate, np.arange(THREADS) % 32 == 0, active)

    def do_bar(self, instruction: Instruction, words: Sequence[str], active: np.ndarray) -> None:
        number = int(self.value(instruction.operands[0], "b32")[0])
        wanted = int(instruction.operands[1]) if len(instruction.operands) > 1 else self.block.launch.threads
        arrived = self.block.barriers.setdefault(number, set())
        arrived.add(self.index)
        self.waits_at = number
        if len(arrived) * THREADS == wanted:
            for index in arrived:
                self.block.warpgroups[index].waits_at = None
            arrived.clear()
            self.block.races.barrier()

    def _nothing(self, instruction: Instruction, words: Sequence[str], active: np.ndarray) -> None:
        """Fences and hints."""

    do_prefetch = do_fence = do_griddepcontrol = do_membar = _nothing

    def do_setmaxnreg(self, instruction: Instruction, words: Sequence[str], active: np.ndarray) -> None:
        """Registers of a thread: more of them only as others have given back (`is_ready` waits for it)."""
        self.block.registers[self.index] = int(instruction.operands[0])

    # --- memory --------------------------------------------------------------------------------------------------

    def do_ld(self, instruction: Instruction, words: Sequence[str], active: np.ndarray) -> None:
        kind, names = words[-1], _listed(instruction.operands[0])
        size, addresses = WIDTHS[kind] // 8, self.address(instruction.operands[1])
        self.block.races.read(addresses[active], size * len(names), self.warps[active])
        whole = np.stack([self.block.load(int(address), size * len(names)) for address in addresses])
        for i, name in enumerate(names):
            value = np.ascontiguousarray(whole[:, i * size : (i + 1) * size]).view(bits_type(kind))[:, 0]
            self.assign(name, value.astype(np.uint32) if size == 1 else value, active)

    def do_st(self, instruction: Instruction, words: Sequence[str], active: np.ndarray) -> None:
        kind, names = words[-1], _listed(instruction.operands[1])
        size, addresses = WIDTHS[kind] // 8, self.address(instruction.operands[0])
        values = np.stack([self.value(name, kind).astype(bits_type(kind)) for name in names], -1)
        self.block.races.write(addresses[active], size * len(names), self.warps[active])
        for thread in np.flatnonzero(active):
            self.block.load(int(addresses[thread]), size * len(names))[:] = values[thread].view(np.uint8)

    def do_ldmatrix(self, instruction: Instruction, words: Sequence[str], active: np.ndarray) -> None:
        names = _listed(instruction.operands[0])
        places = self._matrices(instruction.operands[1], len(names), "trans" in words)
        for name, place in zip(names, places, strict=True):
            self.block.races.read(place.reshape(-1), 2, np.repeat(self.warps, 2))
            halves = np.concatenate([self.block.load(int(address), 2) for address in place.reshape(-1)])
            self.assign(name, halves.view(np.uint32), active)

    def do_stmatrix(self, instruction: Instruction, words: Sequence[str], active: np.ndarray) -> None:
        names = _listed(instruction.operands[1])
        places = self._matrices(instruction.operands[0], len(names), "trans" in words)
        for name, place in zip(names, places, strict=True):
            self.block.races.write(place.reshape(-1), 2, np.repeat(self.warps, 2))
            halves = np.ascontiguousarray(self.value(name, "b32")).view(np.uint8).reshape(-1, 2)
            for address, half in zip(place.reshape(-1), halves, strict=True):
                self.block.load(int(address), 2)[:] = half

    def _matrices(self, operand: str, count: int, transposed: bool) -> list[np.ndarray]:
        """Addresses [128, 2] of both halves of a thread's register, for each of `count` matrices of 8 x 8 halves.

        Thread 8 i + r of a warp names row r of matrix i; thread t holds elements 2 (t % 4) and the next of row t / 4,
        or of the transpose.
        """
        rows = self.address(operand).reshape(4, 32)
        row, column = np.arange(32)[:, None] // 4, 2 * (np.arange(32)[:, None] % 4) + np.arange(2)
        row, column = np.broadcast_arrays(row, column)
        row, column = (column, row) if transposed else (row, column)
        return [(rows[:, 8 * i : 8 * i + 8][:, row] + 2 * column).reshape(THREADS, 2) for i in range(count)]

    def do_mbarrier(self, instruction: Instruction, words: Sequence[str], active: np.ndarray) -> None:
        operands = instruction.operands
        if words[0] == "init":
            if active.any():
                thread, count = int(np.flatnonzero(active)[0]), self.value(operands[1], "b32")
                place = int(self.address(operands[0])[thread])
                self.block.mbarriers[place] = MBarrier(int(count[thread]), int(count[thread]))
        elif words[0] == "try_wait":  # `is_ready` has waited
            self.assign(operands[0], np.ones(THREADS, bool), active)
        else:
            assert words[0] == "arrive", instruction
            barrier, threads = self.block.mbarrier(self.address(operands[1])), int(active.sum())
            if "expect_tx" in words:
                barrier.bytes += int(self.value(operands[2], "b32")[active].sum())
            barrier.arrive(threads)

    def do_cp(self, instruction: Instruction, words: Sequence[str], active: np.ndarray) -> None:
        """cp.async of every thread, and cp.async.bulk.tensor in both directions; `is_ready` waits for their groups."""
        if "bulk" not in words:
            self._copy_by_threads(instruction, words, active)
            return
        if "tensor" not in words or not active.any():
            return
        if active.sum() != 1:
            raise WrongProgramError(f"{active.sum()} threads ask for one copy at line {instruction.line}")
        thread = int(np.flatnonzero(active)[0])
        is_store = words[words.index("tensor") + 2] == "global"
        place, shared = instruction.operands[:2] if is_store else instruction.operands[1::-1]
        box, at = self._tile(place, thread)
        address = int(self.address(shared)[thread])
        if is_store:
            run = functools.partial(self.block.copy_out, box, at, address)
        else:
            barrier = self.block.mbarrier(self.address(instruction.operands[2]))
            run = functools.partial(self.block.copy_in, box, at, address, barrier)
        self.block.copies.append(Copy(run, self.index, is_store))

    def _copy_by_threads(self, instruction: Instruction, words: Sequence[str], active: np.ndarray) -> None:
        """Of a warp at a time; what a warp has waited for, others may read after a barrier."""
        if words[-1] == "commit_group":
            self.copy_group += 1
        elif words[-1] == "wait_group":
            self.block.races.settle(self._awaited(instruction))
        else:
            to, source = (self.address(operand) for operand in instruction.operands[:2])
            size = int(instruction.operands[2])
            self.block.races.write(to[active], size, self.warps[active], group=self.copy_group)
            for warp in np.unique(self.warps[active]):
                own = active & (self.warps == warp)
                run = functools.partial(self.block.copy_bytes, source[own], to[own], size)
                self.block.copies.append(Copy(run, self.index, False, self.copy_group))

    def _tile(self, operand: str, thread: int) -> tuple[TensorMap, list[int]]:
        """ "[map, {i, j, ...}]": the map and the signed coordinates, the contiguous axis first."""
        match = re.match(r"\[\s*([^,]+),\s*(\{.*\})\s*\]", operand)
        assert match is not None, operand
        coordinates = [self.value(name, "b32").view(np.int32)[thread] for name in _listed(match[2])]
        return self.block.tensor_map(int(self.value(match[1], "b64")[thread])), [int(one) for one in coordinates]

    # --- tensor cores --------------------------------------------------------------------------------------------

    def do_mma(self, instruction: Instruction, words: Sequence[str], active: np.ndarray) -> None:
        """mma.sync m16n8k16 of each warp, in f32."""
        shape, kinds = words[2], words[-4:]
        assert (shape, kinds[0], kinds[3]) == ("m16n8k16", "f32", "f32") and active.all(), instruction
        left, right, before = (
            np.stack([self.value(name, "b32") for name in _listed(operand)], -1) for operand in instruction.operands[1:]
        )
        a = left_fragments(left, kinds[1]).reshape(-1, 16, 16)
        products = (a @ right_fragments(right, kinds[2])).reshape(-1, 8)
        total = (sums_of(before.view(np.float32)) + products).astype(np.float32)
        for i, name in enumerate(_listed(instruction.operands[0])):
            self.assign(name, np.ascontiguousarray(registers_of(total)[:, i]).view(np.uint32), active)

    def do_wgmma(self, instruction: Instruction, words: Sequence[str], active: np.ndarray) -> None:
        if words[0] == "mma_async":
            sums, factors, descriptor, use_sums, *scales_and_transposed = instruction.operands
            assert self.value(use_sums, "pred").all(), instruction
            where, kind = int(self.value(descriptor, "b64")[0]), words[-1]
            if factors.startswith("{"):
                wanted = {"s8": [], "e4m3": ["1", "1"]}.get(kind, ["1", "1", "0"])
                assert scales_and_transposed == wanted, instruction
                registers = np.stack([self.value(name, "b32").copy() for name in _listed(factors)], -1)
                left = functools.partial(left_fragments, registers, kind)
            else:
                assert scales_and_transposed == ["1", "1", "1", "0"], instruction  # the left operand as it lies: [k, m]
                left = functools.partial(self._left, int(self.value(factors, "b64")[0]), kind)
            self.products[-1].append(functools.partial(self._multiply, _listed(sums), left, where, kind))
        elif words[0] == "commit_group":
            self.products.append([])
        elif words[0] == "wait_group":
            allowed = int(instruction.operands[0])
            while len(self.products) - 1 > allowed:
                for product in self.products.pop(0):
                    product()

    def _multiply(self, sums: list[str], left: Callable[[], np.ndarray], descriptor: int, kind: str) -> None:
        """sums[64, n] += left[64, 16 or 32] right[n, 16 or 32]^T, right in shared memory; f32, int32 or fixed point."""
        columns = len(sums) * 2
        a = left()
        b = self._right(descriptor, columns, a.shape[1], kind)
        number = np.int32 if kind == "s8" else np.float32
        held = np.stack([self.registers[name].view(number) for name in sums], -1)
        before = sums_of(held)
        total = summed_in_fixed_point(before, a, b) if kind == "e4m3" else (before + a @ b.T).astype(number)
        for i, name in enumerate(sums):
            self.registers[name] = np.ascontiguousarray(registers_of(total)[:, i]).view(np.uint32)

    def _right(self, descriptor: int, columns: int, depth: int, kind: str) -> np.ndarray:
        """f64[columns, depth] that a descriptor of a K-major operand points to."""
        return self._matrix(descriptor, columns, depth, kind)

    def _left(self, descriptor: int, kind: str) -> np.ndarray:
        """f64[64, 16] that a descriptor of an M-major operand of 16-bit elements points to: 64 of them fill a row."""
        return self._matrix(descriptor, 16, 64, kind).T

    def _matrix(self, descriptor: int, rows: int, width: int, kind: str) -> np.ndarray:
        """f64[rows, width] in rows of swizzled bytes, eight after another, then the next eight a stride away."""
        start, stride, mode = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4, descriptor >> 62
        if mode not in _SPANS or descriptor >> 49 & 7:
            raise NotImplementedError(f"wgmma's descriptor {descriptor:#x}: only swizzled operands are emulated")
        span, size = _SPANS[mode], np.dtype(element_type(kind)).itemsize
        row, byte = np.meshgrid(np.arange(rows), np.arange(width * size), indexing="ij")
        address = swizzled(start + row // 8 * stride + row % 8 * span + byte, span)
        return self.block.shared[address].view(element_type(kind)).astype(np.float64)


def _listed(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]


def _operand_types(name: str, words: Sequence[str], count: int) -> list[str]:
    """The types that immediate operands of an instruction have."""
    kind = words[-1]
    if name == "cvt":
        return [kind] * count
    if name in ("shl", "shr"):
        return [kind, "b32"]
    if name == "bfe":
        return [kind, "b32", "b32"]
    if name == "selp":
        return [kind, kind, "pred"]
    if name == "setp":
        return [kind, kind, "pred"][:count]
    if name == "mad" and words[0] == "wide":
        return [kind, kind, f"b{2 * WIDTHS[kind]}"]
    return [kind] * count
