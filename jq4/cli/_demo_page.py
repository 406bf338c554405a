"""The HTML report of `jq4 demo`: one file that needs no other, the picture inside of it."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jq4.report import format_bytes, format_figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2330; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } th, td { padding: .3rem .9rem; border-bottom: 1px solid #e3e7ee; text-align: right }
th:first-child, td:first-child { text-align: left } img { width: 100% }
pre { background: #f5f7fa; padding: .8rem 1rem; white-space: pre-wrap; border-radius: 4px; margin: .3rem 0 1rem }
.note { color: #5a6475; font-size: .9rem }
"""

ROWS = (
    ("bytes held", "bytes", format_bytes),
    ("bits a linear weight", "bits_per_weight_linear", format_figure),
    ("bits a weight, all leaves", "bits_per_weight", format_figure),
    ("perplexity", "perplexity", format_figure),
    ("KLD to dense, mean (nats)", "kld_mean", format_figure),
    ("KLD to dense, 99th percentile", "kld_p99", format_figure),
    ("top-1 agreement with dense", "top1_agreement", format_figure),
    ("tokens a second, one sequence", "tokens_per_second", format_figure),
)


def table_rows(variants: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The comparison, a row a figure and a column a variant, worded."""
    return [
        [label, *("-" if each.get(key) is None else word(each[key]) for each in variants)] for label, key, word in ROWS
    ]


def write_page(data: Mapping[str, Any], picture: Path | None, file: Path) -> None:
    """Writes the page for what `jq4 demo --json` prints."""
    variants = data["variants"]
    head = "".join(f"<th>{escape(each['name'])}</th>" for each in variants)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table_rows(variants))
    samples = "".join(
        f"<h2>Text from {escape(each['name'])}</h2><pre><b>{escape(data['prompt'])}</b>{escape(each['sample'])}</pre>"
        for each in variants
    )
    image = "" if picture is None else f'<img alt="{_ALT}" src="data:image/png;base64,{_base64(picture)}">'
    restored = data["restored"]
    same, same_logits = ("yes" if restored[key] else "NO" for key in ("identical", "same_logits"))
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    file.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>jq4 demo: {escape(data["model"])}</title>
<style>{_STYLE}</style></head><body>
<h1>{escape(data["model"])} at 4 bits</h1>
<p>A language model of {data["parameters"]:,} parameters, dense and with its linear layers packed to 4 bits, run packed:
{data["tokens"]:,} tokens of held-out text predicted, in rows of {data["context"]}.</p>
<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>
<p class="note">Embedding, output head and norms stay dense. KLD is KL(dense || packed) of each predicted token. A model
this small is not bound by memory bandwidth, which is where packed weights are faster.</p>
{image}
<h2>Saved and restored</h2>
<p>{escape(restored["recipe"])} was saved to <code>{escape(restored["folder"])}</code>,
{format_bytes(restored["bytes_on_disk"])} on disk, and restored: {restored["leaves"]} leaves bit for bit the same:
<b>{same}</b>; logits the same: <b>{same_logits}</b>.</p>
{samples}
<p class="note">Made by <code>jq4 demo</code> in {data["seconds"]:.0f} s; {escape(versions)}.</p>
</body></html>
""",
        encoding="utf-8",
    )


_ALT = "bytes, perplexity, KLD of every token and SQNR of every leaf, dense and packed"


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode("ascii")
