"""The report as Markdown, to be put into a model card or an issue."""

from collections.abc import Mapping, Sequence
from typing import Any

from jq4.quality_report.sections import Section, sections


def markdown_of(data: Mapping[str, Any]) -> str:
    """The whole report."""
    return "\n\n".join([f"# {_cell(title_of(data))}", *map(_section, sections(data))]) + "\n"


def title_of(data: Mapping[str, Any]) -> str:
    against = data.get("reference")
    return f"{data['model']}" + ("" if against is None else f" against {against}")


def _section(section: Section) -> str:
    parts = [f"## {section.title}"]
    if section.text:
        parts.append("\n\n".join(section.text.split("\n")))
    if section.rows:
        rule = ["---", *["---:"] * (len(section.head) - 1)]
        parts.append("\n".join(map(_row, (section.head, rule, *section.rows))))
    return "\n\n".join(parts)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
