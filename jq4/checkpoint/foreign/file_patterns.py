"""Regular expressions that come with a file: matched in time that no expression of theirs can make exponential.

`re` backtracks: "(a+)+$" against thirty letters takes minutes, and a file names both the expression and the names that
it is held against. Here a parsed expression is asked where it can end, for each place where it can begin (Thompson,
1968): a node gives the set of its ends, and is asked once for each beginning. That is polynomial, and cut off besides.
Groups, repeats, classes, anchors and looking around are what names of modules need; back references are refused.
"""

import functools
import re
import warnings
from collections.abc import Iterable
from typing import Any

from jq4.errors import JQ4Error

_LONGEST = 4000  # characters of an expression or a name
_STEPS = 100_000  # beginnings and ends that are kept; real expressions and names have hundreds
_REMEDY = "Mend config.json: name the modules, or write a simpler expression."

_parser: Any = getattr(re, "_parser")  # noqa: B009  the parser of `re`, which its own compiler asks
_ops: Any = getattr(re, "_constants")  # noqa: B009
_ONE = (_ops.LITERAL, _ops.NOT_LITERAL, _ops.ANY, _ops.IN)


def matches(pattern: str, name: str, where: str, *, anywhere: bool = False) -> bool:
    """Whether `pattern` matches from the start of `name`, as re.match has it, or `anywhere` in it, as re.search has.

    `where` is what errors call the pattern.

    Raises JQ4Error for what is no regular expression, or one that would take too long.
    """
    if len(pattern) > _LONGEST or len(name) > _LONGEST:
        raise JQ4Error(f"{where}: {pattern!r} or the name {name!r} is longer than {_LONGEST} characters. {_REMEDY}")
    try:
        parsed = _parsed(pattern)
        starts = set(range(len(name) + 1)) if anywhere else {0}
        return bool(_Match(name, parsed.state.flags).ends_of(parsed, starts))
    except (re.error, OverflowError, RecursionError) as error:
        raise JQ4Error(
            f"{where}: {pattern!r} is not a regular expression that is read "
            f"({error or type(error).__name__}). {_REMEDY}"
        ) from None


@functools.lru_cache(maxsize=512)
def _parsed(pattern: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _parser.parse(pattern)


class _Match:
    """One name held against one parsed expression; places are 0 to len(name)."""

    def __init__(self, name: str, flags: int) -> None:
        self.name, self.steps = name, 0
        self.ignores_case, self.dot_is_all = bool(flags & re.IGNORECASE), bool(flags & re.DOTALL)
        self.known: dict[tuple[int, int], frozenset[int]] = {}

    def ends_of(self, nodes: Iterable[Any], starts: set[int]) -> set[int]:
        """Where the nodes, one after the other, can end."""
        for node in nodes:
            starts = set().union(*(self._ends(node, start) for start in starts))
            if not starts:
                break
        return starts

    def _ends(self, node: tuple[Any, Any], start: int) -> Iterable[int]:
        key = id(node), start
        if key not in self.known:
            self.known[key] = found = frozenset(self._new_ends(*node, start))
            self.steps += 1 + len(found)
            if self.steps > _STEPS:
                raise re.error("it takes too long")
        return self.known[key]

    def _new_ends(self, op: Any, argument: Any, start: int) -> Iterable[int]:
        if op in _ONE:
            return (start + 1,) if start < len(self.name) and self._takes(op, argument, self.name[start]) else ()
        if op is _ops.AT:
            return (start,) if self._is_at(argument, start) else ()
        if op is _ops.BRANCH:
            return set().union(*(self.ends_of(branch, {start}) for branch in argument[1]))
        if op is _ops.SUBPATTERN and not argument[1] and not argument[2]:
            return self.ends_of(argument[3], {start})
        if op in (_ops.MAX_REPEAT, _ops.MIN_REPEAT):
            return self._repeated(*argument, start=start)
        if op in (_ops.ASSERT, _ops.ASSERT_NOT):
            return (start,) if self._looks(*argument, start=start) is (op is _ops.ASSERT) else ()
        raise re.error(f"{str(op).lower()} is not read")

    def _repeated(self, least: int, most: int, nodes: Any, *, start: int) -> set[int]:
        """After as many rounds as there are places, a further one changes nothing."""
        places, rounds = {start}, len(self.name) + 2
        for _ in range(min(least, rounds)):
            places = self.ends_of(nodes, places)
        found, fresh = set(places), places
        for _ in range(min(most - least, rounds)):
            fresh = self.ends_of(nodes, fresh) - found if fresh else fresh
            found |= fresh
        return found

    def _looks(self, direction: int, nodes: Any, *, start: int) -> bool:
        if direction > 0:
            return bool(self.ends_of(nodes, {start}))
        begin = start - nodes.getwidth()[0]  # looking back has one width
        return begin >= 0 and start in self.ends_of(nodes, {begin})

    def _is_at(self, place: Any, start: int) -> bool:
        if place in (_ops.AT_BEGINNING, _ops.AT_BEGINNING_STRING):
            return start == 0
        if place in (_ops.AT_END, _ops.AT_END_STRING):
            return start == len(self.name)
        before, after = (0 <= at < len(self.name) and _is_word(self.name[at]) for at in (start - 1, start))
        return (before != after) is (place is _ops.AT_BOUNDARY)

    def _takes(self, op: Any, argument: Any, letter: str) -> bool:
        if op is _ops.ANY:
            return self.dot_is_all or letter != "\n"
        cases = {ord(letter), ord(letter.lower()[0]), ord(letter.upper()[0])} if self.ignores_case else {ord(letter)}
        if op is _ops.IN:
            negated = argument[0][0] is _ops.NEGATE
            return any(_in(one, code) for one in argument[negated:] for code in cases) is not negated
        return (argument in cases) is (op is _ops.LITERAL)


def _in(member: tuple[Any, Any], code: int) -> bool:
    op, argument = member
    if op is _ops.LITERAL:
        return code == argument
    if op is _ops.RANGE:
        return argument[0] <= code <= argument[1]
    letter, name = chr(code), str(argument)
    tests = {"DIGIT": letter.isdecimal(), "SPACE": letter.isspace(), "WORD": _is_word(letter)}
    return tests[name.rpartition("_")[2]] is ("_NOT_" not in name)


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"
