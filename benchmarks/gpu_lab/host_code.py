"""The host's half of a compiled Mosaic GPU kernel, run without a GPU: what would be launched, and with what.

The compiler leaves it as LLVM IR (MOSAIC_GPU_DUMP_HOST_LLVM): straight-line code that describes to the copy engine the
arrays it will read (cuTensorMapEncodeTiled's arguments) and launches the kernel. `launch_of` runs that code, so the
descriptors and the grid are the ones a GPU would get.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A tiled array as the copy engine knows it; axes are row-major, the last one contiguous.

    Attributes:
      array: which argument of the kernel it is a view of.
      offset: bytes from the argument's beginning.
      sizes, strides: in elements.
      swizzle: bytes; 16 is none.
      box: elements that one copy moves.
    """

    array: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    swizzle: int
    box: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DevicePointer:
    """Byte `offset` of the kernel's argument `array`."""

    array: int
    offset: int = 0

    def __add__(self, other: int) -> "DevicePointer":
        return dataclasses.replace(self, offset=self.offset + other)


@dataclasses.dataclass(frozen=True)
class HostPointer:
    """Byte `offset` of a host variable; negative ones are the function's own arguments."""

    variable: int
    offset: int = 0

    def __add__(self, other: int) -> "HostPointer":
        return dataclasses.replace(self, offset=self.offset + other)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel's launch: blocks, threads of a block, bytes of shared memory, and the parameters.

    A parameter is a DevicePointer, or {byte: TensorMap}.
    """

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    parameters: tuple[Any, ...]


def launch_of(text: str) -> Launch:
    """What the host code `text` launches."""
    body = re.search(r"^define \S+ @\w+_mosaic_gpu\((.*?)\) \{\n(.*?)^\}", text, re.M | re.S)
    assert body is not None, "no host function in the dump"
    host = _Host({f"%{i}": HostPointer(-1 - i) for i in range(body[1].count("%"))})
    for line in body[2].splitlines():
        host.step(line.strip())
        if host.launch is not None:
            return host.launch
    raise ValueError("the host code launches nothing")


class _Host:
    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.memory: dict[HostPointer, Any] = {}
        self.launch: Launch | None = None
        self.variables = 0

    def step(self, line: str) -> None:
        target, _, rest = line.rpartition(" = ") if re.match(r"%\S+ = ", line) else ("", "", line)
        if target:
            target, rest = line.split(" = ", 1)
        name = rest.split(" ", 1)[0]
        result = getattr(self, f"do_{name}")(rest) if name else None
        if target:
            self.values[target] = result

    def value(self, word: str) -> Any:
        word = word.strip()
        if word in ("undef", "poison"):
            return {}
        return self.values[word] if word.startswith("%") else int(word)

    def do_insertvalue(self, rest: str) -> Any:
        _, aggregate, part, indices = _operands(rest)
        return {**self.value(aggregate), indices: self.value(part)}

    def do_extractvalue(self, rest: str) -> Any:
        _, aggregate, _, indices = _operands(rest + " ,")
        return self.value(aggregate)[indices]

    def do_alloca(self, rest: str) -> Any:
        del rest
        self.variables += 1
        return HostPointer(self.variables)

    def do_getelementptr(self, rest: str) -> Any:
        kind, pointer, indices = _element(rest)
        base, numbers = self.value(pointer), [self.value(index) for index in indices]
        if kind.startswith("{"):  # a parameter of the launch's struct: any distinct place will do
            return base + 4096 * numbers[-1]
        return base + numbers[0] * {"i8": 1, "i32": 4, "i64": 8, "ptr": 8}[kind]

    def do_load(self, rest: str) -> Any:
        match = re.match(r"load (.+), ptr (%\S+?), align", rest)
        assert match is not None, rest
        pointer = self.value(match[2])
        if pointer.variable < 0:
            return DevicePointer(pointer.offset // 8)
        if match[1].startswith("["):
            return {at.offset - pointer.offset: v for at, v in self.memory.items() if at.variable == pointer.variable}
        return self.memory[pointer]

    def do_store(self, rest: str) -> None:
        match = re.match(r"store (.+) (\S+), ptr (%\S+?), align", rest)
        assert match is not None, rest
        self.memory[self.value(match[3])] = self.value(match[2])

    def do_mul(self, rest: str) -> Any:
        left, right = _pair(rest)
        return self.value(left) * self.value(right)

    def do_add(self, rest: str) -> Any:
        left, right = _pair(rest)
        return self.value(left) + self.value(right)

    def do_ptrtoint(self, rest: str) -> Any:
        return self.value(rest.split()[2])

    do_inttoptr = do_ptrtoint

    def do_ret(self, rest: str) -> None:
        del rest

    def do_call(self, rest: str) -> None:
        match = re.match(r"call \S+ @(\w+)\((.*)\)", rest)
        assert match is not None, rest
        arguments = [self.value(argument.split()[-1]) for argument in match[2].split(", ")]
        if match[1] == "mosaic_gpu_init_tma_desc":
            self._describe(arguments)
        else:
            self._launch(arguments)

    def _describe(self, arguments: list[Any]) -> None:
        place, pointer, _, rank, sizes, strides, swizzle, box = arguments
        lists = [tuple(self.memory[of + 8 * i] for i in range(rank)) for of in (sizes, strides, box)]
        self.memory[place] = TensorMap(pointer.array, pointer.offset, lists[0], lists[1], swizzle, lists[2])

    def _launch(self, arguments: list[Any]) -> None:
        grid, shared = tuple(arguments[1:4]), arguments[10]
        pointers = [
            argument for argument in arguments[11:] if isinstance(argument, HostPointer) and argument.variable > 0
        ]
        table, parameters, at = pointers[0], [], 0
        while (place := self.memory.get(table + 8 * at)) is not None:
            parameters.append(self._parameter(place))
            at += 1
        self.launch = Launch((grid[0], grid[1], grid[2]), arguments[7], shared, tuple(parameters))

    def _parameter(self, place: HostPointer) -> Any:
        held = self.memory.get(place)
        if held is not None and not isinstance(held, TensorMap):
            return held
        return {at.offset - place.offset: v for at, v in self.memory.items() if at.variable == place.variable}


def _operands(rest: str) -> tuple[str, str, str, tuple[int, ...]]:
    """(type, aggregate, part, indices) of insertvalue and extractvalue."""
    match = re.match(
        r"\w+ (\{.*?\}\S*|\S+) (\S+?), (?:\S+ (%\S+|\d+), )?([\d, ]+)", rest.replace("[", "<").replace("]", ">")
    )
    assert match is not None, rest
    return match[1], match[2], match[3] or "", tuple(int(number) for number in re.findall(r"\d+", match[4]))


def _element(rest: str) -> tuple[str, str, Sequence[str]]:
    match = re.match(r"getelementptr (?:inbounds )?(?:nuw )?(\{.*?\}|\S+), ptr (%\S+?), (.*)", rest)
    assert match is not None, rest
    return match[1], match[2], [index.split()[-1] for index in match[3].split(", ")]


def _pair(rest: str) -> list[str]:
    return rest.split(" ", 2)[2].replace("nuw ", "").replace("nsw ", "").replace("i64 ", "").split(", ")
