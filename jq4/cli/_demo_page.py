"""The HTML report of `jq4 demo`: one file that needs no other, the picture inside of it."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jq4 import html_page
from jq4.report import format_bytes, format_figure

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
    table = html_page.table(["", *(each["name"] for each in variants)], table_rows(variants))
    samples = "".join(
        f"<h2>Text from {escape(each['name'])}</h2><pre><b>{escape(data['prompt'])}</b>{escape(each['sample'])}</pre>"
        for each in variants
    )
    image = "" if picture is None else html_page.picture(picture.read_bytes(), _ALT)
    restored = data["restored"]
    same, same_logits = ("yes" if restored[key] else "NO" for key in ("identical", "same_logits"))
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    body = f"""<h1>{escape(data["model"])} at 4 bits</h1>
<p>A language model of {data["parameters"]:,} parameters, dense and with its linear layers packed to 4 bits, run packed:
{data["tokens"]:,} tokens of held-out text predicted, in rows of {data["context"]}.</p>
{table}
<p class="note">Embedding, output head and norms stay dense. KLD is KL(dense || packed) of each predicted token. A model
this small is not bound by memory bandwidth, which is where packed weights are faster.</p>
{image}
<h2>Saved and restored</h2>
<p>{escape(restored["recipe"])} was saved to <code>{escape(restored["folder"])}</code>,
{format_bytes(restored["bytes_on_disk"])} on disk, and restored: {restored["leaves"]} leaves bit for bit the same:
<b>{same}</b>; logits the same: <b>{same_logits}</b>.</p>
{samples}
<p class="note">Made by <code>jq4 demo</code> in {data["seconds"]:.0f} s; {escape(versions)}.</p>"""
    file.write_text(html_page.page(f"jq4 demo: {data['model']}", body), encoding="utf-8")


_ALT = "bytes, perplexity, KLD of every token and SQNR of every leaf, dense and packed"
