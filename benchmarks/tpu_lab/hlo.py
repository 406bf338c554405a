"""How often each operation of a compiled program runs, and the HBM bytes it moves; read from the program's text.

An operation is an instruction of the entry, or of a loop's body, where it runs as often as the loop (XLA writes the
trip count it knows beside a `while`, or the loop's condition tells it). Its bytes are those of its operands and result
that lie in HBM (a layout with S(n) lies elsewhere), each counted once, and of an operand that it only slices, or only
updates in place, the slice: never more than it moves, so that nothing is held against the program that it may not do.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

_HEADER = re.compile(r"^(ENTRY )?%?([\w.<>-]+) .*-> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.<>-]+) = (.*)$")
_ARRAY = re.compile(r"(pred|bf16|f8\w+|[a-z]\d+)\[([\d,]*)\](\{[^{}]*\})?")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|called_computations|branch_computations)=\{?([^,}]+(?:, %[^,}]+)*)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_STEPS = re.compile(r'"iteration_bounds":\[([^\]]*)\]')
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_SCOPED = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_MOVES_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "copy-done", "partition-id", "iota",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice"}
_RENAMES = {"bitcast", "reshape", "copy"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Operation:
    """What a chip runs as a whole.

    Attributes:
      times: how often, in all.
      nbytes: HBM bytes that one run moves.
      steps: iterations of its window, where XLA tells them.
      estimate: XLA's own estimate of its cycles, or None.
      scoped: VMEM bytes it takes for itself, or None.
      target: of a custom call.
    """

    name: str
    opcode: str
    times: int
    nbytes: int
    steps: int | None = None
    estimate: int | None = None
    scoped: int | None = None
    target: str = ""


class Program:
    """A compiled program's text."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if match := _HEADER.match(line):
                current = self.computations[match[2]] = []
                self.entry = match[2] if match[1] else self.entry
            elif match := _INSTRUCTION.match(line):
                current.append(_instruction(match[2], match[3], bool(match[1])))

    def operations(self) -> list[Operation]:
        """Everything that moves data, once each; the order is that of the text."""
        found = []
        for name, times in self._runs().items():
            instructions = self.computations[name]
            table = {one.name: one for one in instructions}
            for one in instructions:
                if one.opcode not in _MOVES_NOTHING:
                    found.append(self._operation(one, table, times))
        return found

    def _operation(self, one: Instruction, table: Mapping[str, Instruction], times: int) -> Operation:
        target = re.search(r'custom_call_target="([^"]*)"', one.attributes)
        return Operation(
            one.name,
            one.opcode,
            times,
            self._nbytes(one, table),
            _product(_STEPS.search(one.attributes)),
            _integer(_ESTIMATE.search(one.attributes)),
            _integer(_SCOPED.search(one.attributes)),
            target[1] if target else "",
        )

    def _runs(self) -> Counter[str]:
        """How often each computation of the control flow runs; those inside fusions and reductions are left out."""
        runs: Counter[str] = Counter()

        def enter(name: str, times: int) -> None:
            runs[name] += times
            for one in self.computations[name]:
                if one.opcode in ("while", "conditional", "call"):
                    trips = self._trips(one) if one.opcode == "while" else 1
                    for called in _called(one):
                        enter(called, times * (trips or 1))

        enter(self.entry, 1)
        return runs

    def _trips(self, loop: Instruction) -> int | None:
        """As XLA tells it, or the constant that the loop's condition compares its counter (from 0, by 1) with."""
        if told := _TRIPS.search(loop.attributes):
            return int(told[1])
        condition = self.computations[re.findall(r"condition=%?([\w.<>-]+)", loop.attributes)[0]]
        table = {one.name: one for one in condition}
        test = next(one for one in condition if one.root)
        bounds = [table[name].attributes for name in test.operands if table[name].opcode == "constant"]
        return int(bounds[0].split(")")[0]) if "direction=LT" in test.attributes and bounds else None

    def _nbytes(self, one: Instruction, table: Mapping[str, Instruction]) -> int:
        operands = [table[name] for name in one.operands if name in table]
        if one.opcode in _SLICES:
            return hbm_bytes(one.shape) + min(hbm_bytes(operands[0].shape), sum(_sizes(one.shape)))
        if one.opcode == "dynamic-update-slice":
            return 2 * sum(_sizes(operands[1].shape))
        if one.opcode.endswith("-done") or one.opcode == "copy-start":
            return sum(hbm_bytes(operand.shape) for operand in operands if one.opcode == "copy-start")
        if one.opcode != "fusion":
            return hbm_bytes(one.shape) + sum(hbm_bytes(operand.shape) for operand in operands)
        return self._fusion_bytes(one, operands)

    def _fusion_bytes(self, one: Instruction, operands: Sequence[Instruction]) -> int:
        inside = self.computations[_called(one)[0]]
        wholes = [hbm_bytes(operand.shape) for operand in operands]
        read = sum(min(whole, self._read_of(inside, place, whole)) for place, whole in enumerate(wholes) if whole)
        return read + min(hbm_bytes(one.shape), self._written(inside, hbm_bytes(one.shape)))

    def _read_of(self, inside: Sequence[Instruction], place: int, whole: int) -> int:
        """What a fusion reads of its operand `place`: slices, where it does nothing but slice or update it in place."""
        found = [one.name for one in inside if one.opcode == "parameter" and one.attributes.startswith(f"{place})")]
        return self._read_by_users(found[0], inside, whole)[0] if found else whole

    def _read_by_users(self, name: str, inside: Sequence[Instruction], whole: int) -> tuple[int, bool]:
        """(bytes read of a value that stands for the operand, whether the fusion also gives it back as it is)."""
        total, given_back = 0, any(one.root and one.name == name for one in inside)
        for user in inside:
            if name not in user.operands:
                continue
            if user.opcode in _SLICES:
                total += sum(_sizes(user.shape))
            elif user.opcode in _RENAMES:
                read, back = self._read_by_users(user.name, inside, whole)
                total, given_back = total + read, given_back or back
            elif user.opcode == "fusion":
                inner, place = self.computations[_called(user)[0]], user.operands.index(name)
                parameter = next(p for p in inner if p.opcode == "parameter" and p.attributes.startswith(f"{place})"))
                read, back = self._read_by_users(parameter.name, inner, whole)
                if back:
                    after, back = self._read_by_users(user.name, inside, whole)
                    read, given_back = read + after, given_back or back
                total += read
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return whole, False
        return total, given_back

    def _written(self, inside: Sequence[Instruction], whole: int) -> int:
        """What a fusion writes: the update, where its root updates in place."""
        table = {one.name: one for one in inside}
        root = next(one for one in inside if one.root)
        while root.opcode in _RENAMES:
            root = table[root.operands[0]]
        if root.opcode == "fusion":
            return self._written(self.computations[_called(root)[0]], whole)
        return sum(_sizes(table[root.operands[1]].shape)) if root.opcode == "dynamic-update-slice" else whole

    def collectives(self) -> dict[str, int]:
        """How often each kind of collective runs."""
        counts: Counter[str] = Counter()
        for one in self.operations():
            kind = one.opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                counts[kind] += one.times
        return dict(counts)

    def floats_of_shape(self, shapes: Collection[tuple[int, ...]]) -> int:
        """How many float arrays of these shapes (leading axes of 1 aside) the program makes outside of fusions."""
        found = 0
        for name in self._runs():
            for one in self.computations[name]:
                kinds = [] if one.opcode in _MOVES_NOTHING else _ARRAY.findall(one.shape)
                found += sum("f" in kind and _lengths(text) in shapes for kind, text, _ in kinds)
        return found

    def custom_calls(self, target: str = "tpu_custom_call") -> int:
        """How often kernels run, those that are fused with what surrounds them included."""
        return sum(
            times * self._calls_in(name, f'custom_call_target="{target}"') for name, times in self._runs().items()
        )

    def _calls_in(self, name: str, wanted: str) -> int:
        instructions = self.computations[name]
        own = sum(one.opcode == "custom-call" and wanted in one.attributes for one in instructions)
        fused = [_called(one)[0] for one in instructions if one.opcode == "fusion"]
        return own + sum(self._calls_in(inner, wanted) for inner in fused)


def hbm_bytes(shape: str) -> int:
    """Bytes of an array's or tuple's shape that lie in HBM."""
    return sum(size for size, layout in zip(_sizes(shape), _layouts(shape), strict=True) if not _elsewhere(layout))


def _elsewhere(layout: str) -> bool:
    return bool(re.search(r"S\([1-9]\d*\)", layout))


def _sizes(shape: str) -> list[int]:
    return [_nbytes_of(kind, lengths) for kind, lengths, _ in _ARRAY.findall(shape)]


def _layouts(shape: str) -> list[str]:
    return [layout for _, _, layout in _ARRAY.findall(shape)]


def _nbytes_of(kind: str, lengths: str) -> int:
    bits = 8 if kind == "pred" or kind.startswith("f8") else int(re.sub(r"\D", "", kind.removeprefix("bf")))
    return math.ceil(math.prod(int(length) for length in lengths.split(",") if length) * bits / 8)


def _lengths(text: str) -> tuple[int, ...]:
    lengths = [int(length) for length in text.split(",") if length]
    while lengths and lengths[0] == 1:
        lengths.pop(0)
    return tuple(lengths)


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    shape, rest = _split_shape(rest)
    opcode, _, rest = rest.partition("(")
    operands, attributes = _split_operands(rest)
    named = tuple(re.findall(r"%([\w.<>-]+)", operands))
    return Instruction(name, opcode.strip(), shape, named, operands + ")" + attributes, root)


def _split_shape(text: str) -> tuple[str, str]:
    """'(f32[2]{0:T(8)}, s32[]) while(...)' at the space that follows the shape."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == " " and depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""


def _split_operands(text: str) -> tuple[str, str]:
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""


def _called(one: Instruction) -> list[str]:
    return [name.strip().lstrip("%") for names in _CALLED.findall(one.attributes) for name in names.split(",")]


def _integer(match: re.Match[str] | None) -> int | None:
    return int(match[1]) if match else None


def _product(match: re.Match[str] | None) -> int | None:
    values = [int(value) for value in re.findall(r"\d+", match[1])] if match else []
    return math.prod(values) if values else None
