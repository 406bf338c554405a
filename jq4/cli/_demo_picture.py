"""The picture of `jq4 demo`: where the bytes go, what each weight lost, and what the model's predictions lost.

Four panels over the same variants, one colour each: bytes held (bars, from zero), perplexity (dots), KLD of every
predicted token (histogram over a logarithmic axis, because it spans six orders of magnitude), and SQNR of every
packed leaf.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jq4.drawing import COLOURS, GREY, count_klds, draw_klds, kld_edges, png_of, subplots


def draw(data: Mapping[str, Any], kld: Mapping[str, np.ndarray], file: Path) -> None:
    """Writes the PNG. `data` is what `jq4 demo --json` prints, `kld` f32[tokens] of each packed variant by name."""
    colours = {each["name"]: colour for each, colour in zip(data["variants"], COLOURS, strict=False)}
    with subplots(2, 2, (12.5, 8.6)) as (figure, panels):
        _draw_bytes(panels[0, 0], data["variants"])
        _draw_perplexity(panels[0, 1], data["variants"], colours)
        edges = kld_edges(list(kld.values()))
        counts = {name: count_klds(values, edges) for name, values in kld.items()}
        draw_klds(panels[1, 0], edges, counts, {name: float(values.mean()) for name, values in kld.items()}, colours)
        _draw_sqnr(panels[1, 1], data["variants"][1:], colours)
        figure.suptitle(
            f"{data['model']}: {data['parameters'] / 1e6:.2f} M parameters, dense and at 4 bits",
            x=0.01,
            ha="left",
            fontsize=14,
            fontweight="bold",
        )
        file.write_bytes(png_of(figure))


def _draw_bytes(axes: Any, variants: Sequence[Mapping[str, Any]]) -> None:
    names = [each["name"] for each in variants]
    linear = np.array([each["bytes_linear"] for each in variants]) / 1e6
    others = np.array([each["bytes"] for each in variants]) / 1e6 - linear
    places = np.arange(len(names))
    axes.barh(places, linear, color="#3d4a63", label="linear layers")
    axes.barh(places, others, left=linear, color="#c9d1dc", label="embedding, head, norms (dense)")
    for place, (a, b, each) in enumerate(zip(linear, others, variants, strict=True)):
        label = f" {a + b:.2f} MB\n {each['bits_per_weight_linear']:.2f} bits a linear weight"
        axes.text(a + b, place, label, va="center", fontsize=9)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * (linear + others).max())
    axes.set_xlabel("MB held")
    axes.set_title("Bytes")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9)


def _draw_perplexity(axes: Any, variants: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    places = np.arange(len(variants))
    found = np.array([each["perplexity"] for each in variants])
    axes.axvline(found[0], color=GREY, linewidth=1, linestyle=":")
    axes.hlines(places, found[0], found, color=[colours[each["name"]] for each in variants], linewidth=3)
    axes.scatter(found, places, s=90, color=[colours[each["name"]] for each in variants], zorder=3)
    for place, (value, each) in enumerate(zip(found, variants, strict=True)):
        extra = "" if not place else f"  ({100 * (value / found[0] - 1):+.1f} %)"
        agreement = each.get("top1_agreement")
        extra += "" if agreement is None else f", top-1 agreement {agreement:.1%}"
        label = f"{value:.2f}{extra}"
        axes.annotate(label, (found.min(), place), (6, -17), textcoords="offset points", fontsize=9)
    spread = max(found.max() - found.min(), 0.01 * found[0])
    axes.set_xlim(found.min() - 0.1 * spread, found.max() + 0.15 * spread)
    axes.set_ylim(len(variants) - 0.4, -0.5)
    axes.set_yticks(places, [each["name"] for each in variants])
    axes.set_xlabel("perplexity on held-out text (the axis does not start at zero)")
    axes.set_title("Perplexity")


def _draw_sqnr(axes: Any, variants: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    paths = [leaf["path"] for leaf in variants[0]["leaves"] if leaf["sqnr_db"] is not None]
    places = np.arange(len(paths))
    for each in variants:
        by_path = {leaf["path"]: leaf["sqnr_db"] for leaf in each["leaves"]}
        axes.scatter(
            [by_path[path] for path in paths], places, s=70, color=colours[each["name"]], label=each["name"], zorder=3
        )
    axes.set_yticks(places, [_short(path) for path in paths])
    axes.invert_yaxis()
    axes.grid(axis="y", color="#e8ebf0", zorder=0)
    axes.set_xlabel("signal to quantization noise, dB (6 dB are one bit)")
    axes.set_title("What each weight lost")
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(variants))


def _short(path: str) -> str:
    """params/layers/mlp/up_proj/kernel -> mlp up_proj."""
    parts = [part for part in path.split("/") if part not in ("params", "layers", "kernel")]
    return " ".join(parts)
