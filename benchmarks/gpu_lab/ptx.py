"""PTX text as a list of instructions with their branch targets; the language is NVIDIA's PTX ISA."""

import dataclasses
import re
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `@guard name operands`.

    Attributes:
      name: with its modifiers, as in "add.s32".
      operands: as written; a vector of registers keeps its braces.
      guard: the predicate, or "".
      negated: whether the guard is to be false.
      line: of the text, for errors.
    """

    name: str
    operands: tuple[str, ...]
    guard: str
    negated: bool
    line: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel's instructions, the index each label stands for, and the names of its parameters in order."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    parameters: tuple[str, ...]


def parse(text: str) -> Program:
    """The one kernel of a PTX module. Labels within braces (inline assembly) are its own: they are numbered."""
    head, _, body = text.partition("\n{")
    parameters = tuple(re.findall(r"\.param[^,)\n]*?(\w+_param_\d+)", head))
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    scopes, count = [0], 0
    for line, token in _tokens(body):
        if token == "{":
            count += 1
            scopes.append(count)
        elif token == "}":
            if len(scopes) == 1:
                break
            scopes.pop()
        elif token.endswith(":"):
            labels[_scoped(token[:-1], scopes[-1])] = len(instructions)
        elif not token.startswith("."):
            instructions.append(_instruction(token, scopes[-1], line))
    return Program(tuple(instructions), labels, parameters)


def _tokens(body: str) -> Iterator[tuple[int, str]]:
    """Braces of scopes, labels with their colons, and statements without their semicolons."""
    for number, line in enumerate(body.splitlines()):
        rest = line.split("//")[0].strip()
        while rest:
            if rest[0] in "{}":
                yield number, rest[0]
                rest = rest[1:].strip()
            elif match := re.match(r"([$\w]+:)(?!:)\s*", rest):
                yield number, match[1]
                rest = rest[match.end() :]
            else:
                statement, _, rest = rest.partition(";")
                yield number, statement.strip()
                rest = rest.strip()


def _scoped(label: str, scope: int) -> str:
    return label if label.startswith("$") else f"{label}@{scope}"


def _instruction(statement: str, scope: int, line: int) -> Instruction:
    guard, negated = "", False
    if match := re.match(r"@(!?)(%?\w+)\s+", statement):
        negated, guard, statement = bool(match[1]), match[2], statement[match.end() :]
    name, _, rest = statement.partition(" ") if "\t" not in statement else statement.replace("\t", " ").partition(" ")
    operands = tuple(operand.strip() for operand in _split(rest.strip()))
    if name.startswith("bra"):
        operands = (_scoped(operands[0], scope),)
    return Instruction(name, operands, guard, negated, line)


def _split(rest: str) -> list[str]:
    """At commas outside braces and brackets."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(rest):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(rest[start:at])
            start = at + 1
    return [*parts, rest[start:]] if rest else []
