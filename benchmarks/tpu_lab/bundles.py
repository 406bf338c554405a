"""Reads the compiler's last dump of one operation: its VLIW bundles, the loops among them, and which units they use.

One line of `*-final_bundles.txt` is one bundle, issued in one cycle (a unit that is still busy may stall it, which
nothing here sees: model.py adds the MXU's own bound):

    0x84 LB: >> { instruction ;; instruction }  /* Start region 146 */
    ...
    0xb2   : >> { ... ;; %278 = sbr.rel (!%p523_p7) target = $region146 }

A branch back to an earlier region closes a loop; the comparison commented as its exit test tells how often the loop
runs, where that is known when compiling. Bundles that a branch may skip are counted as if they always ran.
`*-final_hlo-static-per-bundle-utilization.txt` has a row for each bundle: how many slots of each unit it fills.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:[ >]*\{")
_STARTS = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel \([^)]*\) target = \$region(\d+)")
_EXIT = re.compile(r"scmp\.(ge|gt|eq)\.[us]32(?:\.totalorder)? %\w+, (\d+) /\* loop exit test")
_FILE = re.compile(r"^\d+-(.+)-\d+-(final_bundles|final_hlo-static-per-bundle-utilization)\.txt$")
_OF_THE_PROGRAM = ("<late-", "TLP")  # the program's frame: the same few bundles in every program
SPILLS = ("VLOAD:FILL", "VSTORE:SPILL")


@dataclasses.dataclass(frozen=True)
class Loop:
    """Bundles [first, last], run `trips` times (None: known only at run time)."""

    first: int
    last: int
    trips: int | None
    inner: tuple["Loop", ...] = ()

    @property
    def bundles(self) -> int:
        """Of one trip, inner loops' own trips included (one, where unknown)."""
        own = self.last - self.first + 1 - sum(loop.last - loop.first + 1 for loop in self.inner)
        return own + sum((loop.trips or 1) * loop.bundles for loop in self.inner)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The bundles of one operation.

    Attributes:
      bundles: how many there are, each counted once.
      loops: the outermost ones.
      capacity: slots of each unit in one bundle.
      used: slots that each bundle fills, in the order of `capacity`.
    """

    bundles: int
    loops: tuple[Loop, ...] = ()
    capacity: dict[str, int] = dataclasses.field(default_factory=dict)
    used: tuple[tuple[int, ...], ...] = ()

    def cycles(self, steps: int | None = None) -> int:
        """Bundles issued in all. `steps`: how often the longest loop's body works (it runs idle to fill and drain)."""
        outside = self.bundles - sum(loop.last - loop.first + 1 for loop in self.loops)
        return outside + sum(self._trips(loop, steps) * loop.bundles for loop in self.loops)

    def _trips(self, loop: Loop, steps: int | None) -> int:
        known = loop.trips or steps or 1
        return steps if steps and loop is self.main and 0 <= known - steps <= 2 else known

    @property
    def main(self) -> Loop | None:
        """The loop over the grid: the outermost one with most bundles."""
        return max(self.loops, key=lambda loop: loop.bundles, default=None)

    @property
    def hottest(self) -> Loop | None:
        """The loop to look at: the main one, or the one in it that issues more than half of its bundles, and so on."""
        loop = self.main
        while loop is not None and loop.inner:
            inner = max(loop.inner, key=lambda one: (one.trips or 1) * one.bundles)
            if 2 * (inner.trips or 1) * inner.bundles <= loop.bundles:
                break
            loop = inner
        return loop

    @property
    def unknown_trips(self) -> int:
        """How many loops run as often as only the data tells."""
        return sum(loop.trips is None for loop in _all_loops(self.loops))

    def utilization(self, loop: Loop | None = None) -> dict[str, float]:
        """The part of each unit's slots that is filled, in a loop or overall."""
        rows = self.used if loop is None else self.used[loop.first : loop.last + 1]
        return {
            unit: round(sum(row[column] for row in rows) / max(1, slots * len(rows)), 3)
            for column, (unit, slots) in enumerate(self.capacity.items())
        }

    @property
    def spills(self) -> int:
        """Vector registers written to memory and read back, each counted once."""
        columns = [column for column, unit in enumerate(self.capacity) if unit in SPILLS]
        return sum(row[column] for row in self.used for column in columns)


def read_dump(folder: Path) -> dict[str, Schedule]:
    """The schedule of every operation dumped into a folder, by the operation's name in the program."""
    files: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        if (match := _FILE.match(path.name)) and not match[1].startswith(_OF_THE_PROGRAM):
            name = match[1].removesuffix("-schedule-analysis")
            files.setdefault(name, {})[match[2]] = path
    return {
        name: parse(kinds["final_bundles"].read_text(), _text(kinds.get("final_hlo-static-per-bundle-utilization")))
        for name, kinds in files.items()
        if "final_bundles" in kinds
    }


def _text(path: Path | None) -> str:
    return "" if path is None else path.read_text()


def parse(bundles: str, utilization: str = "") -> Schedule:
    """The schedule of one operation from the texts of its two files."""
    lines = [line for line in bundles.splitlines() if _BUNDLE.match(line)]
    capacity, used = _units(utilization)
    return Schedule(len(lines), _nested(sorted(_loops(lines), key=lambda one: (one[0], -one[1]))), capacity, used)


def _loops(lines: Sequence[str]) -> Iterator[tuple[int, int, int | None]]:
    """(first bundle, last bundle, trips) of every branch back. An inner loop ends first, and takes its exit test."""
    started: dict[str, int] = {}
    tests: list[tuple[int, int]] = []
    for place, line in enumerate(lines):
        started |= dict.fromkeys(_STARTS.findall(line), place)
        tests += [(place, int(bound) + (kind == "gt")) for kind, bound in _EXIT.findall(line)]
        for target in _BRANCH.findall(line):
            if (first := started.get(target, place + 1)) <= place:
                own = [bound for at, bound in tests if at >= first]
                tests = [test for test in tests if test[0] < first]
                yield first, place, own[-1] if own else None


def _nested(spans: Sequence[tuple[int, int, int | None]]) -> tuple[Loop, ...]:
    """The loops among spans sorted by their first bundle, outer before inner."""
    loops: list[Loop] = []
    rest = list(spans)
    while rest:
        first, last, trips = rest.pop(0)
        inner = [span for span in rest if span[1] <= last]
        rest = [span for span in rest if span[1] > last]
        loops.append(Loop(first, last, trips, _nested(inner)))
    return tuple(loops)


def _all_loops(loops: Sequence[Loop]) -> Iterator[Loop]:
    for loop in loops:
        yield loop
        yield from _all_loops(loop.inner)


def _units(text: str) -> tuple[dict[str, int], tuple[tuple[int, ...], ...]]:
    """({unit: slots}, rows): a title, the units' names, their slots, another title, then one row a bundle."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 4:
        return {}, ()
    names = [name.strip() for name in lines[1].split(",")]
    slots = [int(value) for value in lines[2].split()]
    return dict(zip(names, slots, strict=True)), tuple(tuple(int(v) for v in line.split()) for line in lines[4:])
