"""What bits and minutes of training buy: the figures of `benchmarks.qat` as a picture.

    python -m benchmarks.qat_picture FILE.json ... --png FILE.png

A row of panels for each file: divergence by bits a weight, of calibrated, trained and torchao's models; and by
minutes of training, a line for each format that was trained for several numbers of steps.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from jq4 import drawing

NAMES = {"gptq": "GPTQ", "best": "the best calibrated", "torchao": "torchao QAT", "jq4": "trained (jq4)"}
Rows = list[dict[str, Any]]


def best_by_form(rows: Rows, method: str) -> Rows:
    """The row of least divergence of each form."""
    found = sorted((row for row in rows if row["method"].split()[0] == method), key=lambda row: -row["kld_mean"])
    return list({row["form"]: row for row in found}.values())


def draw_bits(panel: Any, rows: Rows) -> None:
    for (method, name), colour, marker in zip(NAMES.items(), drawing.COLOURS, "ovxs", strict=False):
        if found := best_by_form(rows, method):
            bits, klds = [row["bits_per_weight"] for row in found], [row["kld_mean"] for row in found]
            panel.scatter(bits, klds, color=colour, marker=marker, label=name)
    for row in best_by_form(rows, "gptq"):
        panel.annotate(row["form"], (row["bits_per_weight"], row["kld_mean"]), fontsize=7, rotation=30)
    panel.set_xlabel("bits a weight, scales included")


def draw_minutes(panel: Any, rows: Rows) -> None:
    for form, colour in zip(dict.fromkeys(row["form"] for row in rows), drawing.COLOURS, strict=False):
        trained = [row for row in rows if row["form"] == form and row["method"] in ("gptq", "jq4")]
        trained.sort(key=lambda row: row["steps"])
        minutes = [row["seconds"] / 60 if row["steps"] else 0.0 for row in trained]
        panel.plot(minutes, [row["kld_mean"] for row in trained], color=colour, marker="o", label=form)
    panel.set_xlabel("minutes of training, from GPTQ at 0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--png", type=Path, required=True)
    options = parser.parse_args()
    found = [json.loads(file.read_text()) for file in options.files]
    with drawing.subplots(len(found), 2, (10, 4 * len(found))) as (figure, panels):
        for (left, right), each in zip(panels, found, strict=True):
            rows = [row for run in each.get("runs", [each]) for row in run["rows"]]
            draw_bits(left, rows)
            draw_minutes(right, rows)
            for panel in (left, right):
                panel.set_title(each.get("runs", [each])[0]["model"])
                panel.set_yscale("log")
                panel.set_ylabel("KL(dense || packed), nats a token")
                panel.legend(frameon=False, fontsize=8)
        options.png.write_bytes(drawing.png_of(figure))


if __name__ == "__main__":
    main()
