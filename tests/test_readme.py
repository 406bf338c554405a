"""Oracle: the README itself. Its Python runs as printed, and its commands name what exists."""

import re
import shlex
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def block(language: str, after: str = "") -> str:
    found = re.search(rf"{re.escape(after)}\s*```{language}\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no {language} block after {after!r}"
    return found.group(1)


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = block("python")
    assert len([line for line in source.splitlines() if line.strip()]) <= 16
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "model.jq4" / "jq4.json").is_file()
    assert "Array" not in capsys.readouterr().out


@pytest.mark.parametrize("mark", ["demo", "tests"])
def test_each_command_is_one_line_that_sets_itself_up(mark):
    command = block("bash", f"<!-- {mark} -->").strip()
    assert "\n" not in command
    words = shlex.split(command)
    assert words[:4] == ["python3", "-m", "venv", ".venv"]


def test_every_local_link_leads_somewhere():
    root = Path(__file__).resolve().parents[1]
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert [link for link in links if not (root / link).exists()] == []
