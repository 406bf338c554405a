"""Oracle: `re` for what matches; for hostile files the rule: opened or a JQ4Error, within a second, else a defect."""

import random
import re

import pytest

from benchmarks import fuzz_coverage
from benchmarks.fuzz import campaign
from benchmarks.fuzzing import limits, paths
from benchmarks.fuzzing.as_bytes import framed, input_of, unframed
from benchmarks.fuzzing.folders import Link
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


def test_a_path_outside_of_the_folder_counts_as_misbehaving(tmp_path):
    inside, outside = tmp_path / "in" / "file", tmp_path / "out"
    inside.parent.mkdir()
    inside.write_text("x")
    outside.write_text("x")
    with paths.watched(inside.parent):
        assert limits.outcome(inside.read_text)[0] == "opened"
        what, said = limits.outcome((inside.parent / ".." / "out").read_text)
    assert what == "misbehaved" and f"left its folder: open '{inside.parent}/../out'" in said


@pytest.mark.parametrize("reader", fuzz_coverage.GUIDED)
def test_readers_as_functions_of_bytes(reader, tmp_path):
    """The sound inputs open; changed ones, and bytes that are none, are opened or refused."""
    fed, draw = input_of(reader, tmp_path), random.Random(0)
    fed.warm_up()
    seeds = fed.seeds()
    assert reader == "recipe" or all(limits.outcome(fed.work(seed))[0] == "opened" for seed in seeds)
    with limits.bounded_memory(), paths.watched(tmp_path):
        for content in (b"", b"\xff" * 64, *(fed.changed(draw, seeds[0], _doubled) for _ in range(20))):
            what, said = limits.outcome(fed.work(content))
            assert what != "misbehaved", said


def _doubled(content: bytes, longest: int) -> bytes:
    """In place of the engine's own mutation."""
    return (content + content[: len(content) // 2])[:longest]


def test_files_are_framed_and_found_again():
    files = {"config.json": b"{}", "model.safetensors": bytes(9), "a link": Link("../x"), "a folder": None}
    assert unframed(framed(files)) == files
    assert unframed(framed({"../x": b"1", "..": b"2", "a": b"3"})) == {"a": b"3"}


@pytest.mark.skipif(not fuzz_coverage.available(), reason="atheris is not installed: pip install atheris")
def test_coverage_grows(tmp_path):
    found = fuzz_coverage.campaign("safetensors", 3, 0, tmp_path)
    assert not found["misbehaved"] and found["opened"] and found["refused"]
    assert found["branches"] > found["branches_of_seeds"] > 50 and any((tmp_path / "corpus").iterdir())


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
