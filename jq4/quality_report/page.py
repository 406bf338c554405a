"""The report as one HTML page that needs no other file; its pictures by matplotlib, where that is installed."""

from collections.abc import Mapping
from html import escape
from typing import Any

from jq4 import drawing, html_page
from jq4.quality_report import pictures
from jq4.quality_report.markdown import title_of
from jq4.quality_report.sections import Section, sections


def page_of(data: Mapping[str, Any]) -> str:
    """The whole report."""
    title = title_of(data)
    image = _image(data)
    parts = [f"<h1>{escape(title)}</h1>", *map(_section, sections(data))]
    parts.insert(2, image)  # below the figures that count most
    return html_page.page(f"jq4 report: {title}", "\n".join(parts))


def _image(data: Mapping[str, Any]) -> str:
    if not pictures.can_draw(data):
        return ""
    if not drawing.has_matplotlib():
        return f'<p class="note">Pictures were skipped, {drawing.WANTS_MATPLOTLIB}.</p>'
    return html_page.picture(pictures.draw(data), "error by layer, KLD of every token, bits against KLD")


def _section(section: Section) -> str:
    text = "".join(f"<p>{escape(line)}</p>" for line in section.text.split("\n") if line)
    body = text + (html_page.table(section.head, section.rows) if section.rows else "")
    if section.long:
        return f"<details><summary><b>{escape(section.title)}</b></summary>{body}</details>"
    return f"<h2>{escape(section.title)}</h2>{body}"
