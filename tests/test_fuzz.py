"""Oracle: `re` for what matches; for hostile files the rule: opened or a JQ4Error, within a second, else a defect."""

import random
import re

import pytest

from benchmarks.fuzz import campaign
from benchmarks.fuzzing.readers import READERS
from jq4 import JQ4Error
from jq4.checkpoint.foreign.file_patterns import matches

NAMES = (
    "model.layers.18.mlp.up_proj",
    "lm_head",
    "aab",
    "abcd",
    "",
    "xxy",
    "1-2.3",
    "vision.mlp_x",
    "a" * 12,
)  # `re` takes its time
PATTERNS = (
    r".*up_proj$",
    r"^(?!.*lm_head).*",
    r"model\.layers\.(?:[0-9]|1[0-9])\.mlp\.(gate|up|down)_proj",
    r"(?i).*UP_PROJ",
    r".*\.18\..*(?:gate|up).*",
    r"[^.]+\.layers\.\d+\b.*",
    r"(?<=x)y",
    r"x*?y",
    r"(a|ab)(c|bcd)*$",
    r"\w+\W\S*",
    "",
    "^$",
    r"(?:.?){20}.{20}",
    r".*\Bmlp",
    r"[\d\-.]+",
    r"(?:a|b|){3,}c",
    r"(?:a*)*b",
    r"[^\W\d]+$",
    r"a{2,3}b?",
)


@pytest.mark.parametrize("reader", sorted({*READERS} - {"checkpoint"}))
def test_a_few_hostile_files_of_each_format(reader, tmp_path, capsys):
    found = campaign(reader, 60, 1, tmp_path)
    assert not found["misbehaved"], capsys.readouterr().err
    assert found["refused"] > 5 and found["opened"] + found["refused"] == 60


def test_a_file_is_made_by_its_number_alone(tmp_path):
    """So that one that misbehaves can be opened again."""
    made = []
    for _ in range(2):
        reader = READERS["gptq"](tmp_path)
        reader.prepared(random.Random("gptq:0:7"))
        made.append({path.name: path.is_file() and path.read_bytes() for path in (tmp_path / "gptq").iterdir()})
    assert made[0] == made[1]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_re_has_it(pattern):
    for name in NAMES:
        assert matches(pattern, name, "here") == (re.match(pattern, name) is not None), name
        assert matches(pattern, name, "here", anywhere=True) == (re.search(pattern, name) is not None), name


def test_random_patterns_match_as_re_has_it():
    draw = random.Random(0)

    def expression(depth: int = 0) -> str:
        kind = draw.randrange(9 if depth < 4 else 3)
        if kind < 3:
            return draw.choice(("a", "b", ".", "[ab]", "[^a]", r"\b", "$", "^", r"\w"))
        inner = expression(depth + 1)
        if kind == 3:
            return f"(?:{inner}|{expression(depth + 1)})"
        if kind == 4:
            return f"(?:{inner}){draw.choice(('*', '+', '?', '{2}', '{1,3}', '*?', '{0}', '{2,}'))}"
        return f"(?={inner})" if kind == 5 else f"(?!{inner})" if kind == 6 else inner + expression(depth + 1)

    for _ in range(1500):
        pattern, name = expression(), "".join(draw.choice("ab_.") for _ in range(draw.randrange(7)))
        assert matches(pattern, name, "here") == (re.match(pattern, name) is not None), (pattern, name)


@pytest.mark.parametrize(
    "pattern, text",
    [
        (
            "(",
            r"here: '\(' is not a regular expression that is read \(missing \), unterminated subpattern.*Mend config",
        ),
        ("(" * 2000, "not a regular expression that is read"),
        ("a{99999999999999}", "the repetition number is too large"),
        (r"(.)\1", "groupref is not read"),
        ("((((((.*)*)*)*)*)*.*)*" * 40 + "!", "it takes too long"),
        ("a" * 5000, "is longer than 4000 characters"),
    ],
)
def test_patterns_that_are_not_read_are_refused(pattern, text):
    with pytest.raises(JQ4Error, match=text):
        matches(pattern, "a" * 300, "here")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*!", "((([a-z.]*)*)*)*!", "(a|a)*b", "(.*.*)*.*!"])
def test_patterns_that_would_take_re_for_ever_do_not(pattern):
    assert matches(pattern, "a" * 100 + ".", "here") is False
