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

CALIBRATED = {"gptq_kld": "GPTQ", "best_kld": "best calibrated"}


def draw_bits(panel: Any, rows: list[dict[str, Any]]) -> None:
    longest = {row["form"]: row for row in sorted(rows, key=lambda row: row["steps"])}.values()
    series = {name: [(row, row[key]) for row in longest if key in row] for key, name in CALIBRATED.items()}
    series["torchao QAT"] = [
        (row, min(peer["kld_mean"] for peer in row["torchao"])) for row in longest if "torchao" in row
    ]
    series["trained (jq4)"] = [(row, row["kld_mean"]) for row in longest]
    for (name, found), colour, marker in zip(series.items(), drawing.COLOURS, "ovxs", strict=False):
        if found:
            bits, klds = [row["bits_per_weight"] for row, _ in found], [kld for _, kld in found]
            panel.scatter(bits, klds, color=colour, marker=marker, label=name)
    for row in longest:
        panel.annotate(row["form"], (row["bits_per_weight"], row["kld_mean"]), fontsize=7, rotation=30)
    panel.set_xlabel("bits a weight, scales included")


def draw_minutes(panel: Any, rows: list[dict[str, Any]]) -> None:
    for form, colour in zip(dict.fromkeys(row["form"] for row in rows), drawing.COLOURS, strict=False):
        of_form = sorted((row for row in rows if row["form"] == form), key=lambda row: row["steps"])
        minutes = [0.0, *(row["seconds"] / 60 for row in of_form)]
        klds = [of_form[0]["gptq_kld"], *(row["kld_mean"] for row in of_form)]
        panel.plot(minutes, klds, color=colour, marker="o", label=form)
    panel.set_xlabel("minutes of training, from GPTQ at 0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--png", type=Path, required=True)
    options = parser.parse_args()
    found = [json.loads(file.read_text()) for file in options.files]
    with drawing.subplots(len(found), 2, (10, 4 * len(found))) as (figure, panels):
        for (left, right), each in zip(panels, found, strict=True):
            draw_bits(left, each["rows"])
            draw_minutes(right, each["rows"])
            for panel in (left, right):
                panel.set_title(each["model"])
                panel.set_yscale("log")
                panel.set_ylabel("KL(dense || packed), nats a token")
                panel.legend(frameon=False, fontsize=8)
        options.png.write_bytes(drawing.png_of(figure))


if __name__ == "__main__":
    main()
