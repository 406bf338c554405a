"""An HTML page that needs no other file: its style within, its pictures as data, no script and no link outside."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2330; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } th, td { padding: .3rem .9rem; border-bottom: 1px solid #e3e7ee; text-align: right }
th:first-child, td:first-child { text-align: left } img { width: 100% } summary { cursor: pointer }
pre { background: #f5f7fa; padding: .8rem 1rem; white-space: pre-wrap; border-radius: 4px; margin: .3rem 0 1rem }
.note { color: #5a6475; font-size: .9rem } .wide { overflow-x: auto }
"""


def page(title: str, body: str) -> str:
    """A whole document around `body`, which is HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(png: bytes, alt: str) -> str:
    """A PNG inside of the page."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'
