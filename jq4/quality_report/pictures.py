"""The report's picture: error by layer, the histogram of KLD, and bits against KLD where several models were measured.

Everything is drawn from the report's data alone, so that a report.json is enough to make its page again.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from jq4.drawing import COLOURS, GREY, draw_klds, png_of, subplots

_RUN = re.compile(r"(?<=layers/)\d+(?=/)")


def can_draw(data: Mapping[str, Any]) -> bool:
    return bool(_panels(data))


def draw(data: Mapping[str, Any]) -> bytes:
    """A PNG with the panels that the data has figures for."""
    panels = _panels(data)
    rows = -(-len(panels) // 2)
    columns = min(2, len(panels))
    with subplots(rows, columns, (6.4 * columns, 4.3 * rows)) as (figure, axes):
        for panel, place in zip(panels, axes.flat, strict=False):
            panel(place, data)
        for place in axes.flat[len(panels) :]:
            place.axis("off")
        return png_of(figure)


def _panels(data: Mapping[str, Any]) -> list[Callable[[Any, Mapping[str, Any]], None]]:
    found: list[Callable[[Any, Mapping[str, Any]], None]] = []
    if any(_error(leaf) is not None for leaf in data.get("leaves", [])):
        found.append(_draw_layers)
    if "kld_histogram" in data.get("evaluation", {}):
        found.append(_draw_kld)
    if len(data.get("compared", [])) > 1:
        found.append(_draw_bits)
    return found


def errors_by_layer(data: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Kind of weight -> layer -> error: the output error, or noise over signal where outputs are not known.

    A stacked leaf is a kind, its slices the layers (a mean over experts); of leaves that are named by layer, such as
    "layers_3/mlp/up_proj/kernel", those that differ by that number alone are a kind. "layers/03/mlp/up_proj/kernel" is
    a run of layers, stacked from layer 3 on.
    """
    gathered: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for leaf in data.get("leaves", []):
        if slices := leaf.get("slices"):
            run = _RUN.search(leaf["path"])
            kind, first = (leaf["path"], 0) if run is None else (_RUN.sub("*", leaf["path"]), int(run[0]))
            for each in slices:
                if (error := _error(each)) is not None:
                    gathered[kind][first + each["index"][0]].append(error)
        elif (error := _error(leaf)) is not None:
            number = re.search(r"(?<=[_/.])\d+(?=[_/.]|$)", leaf["path"])
            kind = leaf["path"] if number is None else leaf["path"].replace(number[0], "*", 1)
            gathered[kind][0 if number is None else int(number[0])].append(error)
    return {
        kind: {layer: sum(errors) / len(errors) for layer, errors in sorted(layers.items())}
        for kind, layers in gathered.items()
    }


def _error(figures: Mapping[str, Any]) -> float | None:
    if figures.get("output_error"):
        return figures["output_error"]
    return None if figures.get("sqnr_db") is None else 10 ** (-figures["sqnr_db"] / 10)


def _draw_layers(axes: Any, data: Mapping[str, Any]) -> None:
    by_outputs = any(leaf.get("output_error") for leaf in data["leaves"])
    for place, (kind, layers) in enumerate(errors_by_layer(data).items()):
        numbers, errors = list(layers), [100 * error for error in layers.values()]
        colour = COLOURS[(place + 1) % len(COLOURS)]
        axes.plot(numbers, errors, marker="o", markersize=4, color=colour, label=short_name(kind))
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("lost of the output's energy, %" if by_outputs else "lost of the weights' energy, %")
    axes.set_title("Error by layer")
    axes.legend(frameon=False, fontsize=8)


def _draw_kld(axes: Any, data: Mapping[str, Any]) -> None:
    found = data["evaluation"]
    histogram, name = found["kld_histogram"], "all tokens"
    draw_klds(axes, histogram["edges"], {name: histogram["counts"]}, {name: found["kld_mean"]}, {name: COLOURS[2]})
    for key, label in (("kld_p50", "p50"), ("kld_p99", "p99"), ("kld_p99_9", "p99.9")):
        if found.get(key):
            axes.axvline(found[key], color=GREY, linewidth=1, linestyle=":")
            axes.annotate(label, (found[key], axes.get_ylim()[1]), (2, -9), textcoords="offset points", fontsize=8)


def _draw_bits(axes: Any, data: Mapping[str, Any]) -> None:
    points = [each for each in data["compared"] if each.get("bits_per_weight_packed") and each.get("kld_mean")]
    draw_bits_against_kld(axes, [(p["name"], p["bits_per_weight_packed"], p["kld_mean"]) for p in points])


def draw_bits_against_kld(axes: Any, points: list[tuple[str, float, float]]) -> None:
    """A dot a model (name, bits, KLD); to the left is smaller, below is better."""
    for place, (name, bits, kld) in enumerate(points):
        colour = COLOURS[(place + 1) % len(COLOURS)]
        axes.scatter([bits], [kld], s=60, color=colour, zorder=3)
        axes.annotate(name, (bits, kld), (6, 5), textcoords="offset points", fontsize=8, parse_math=False)
    axes.set_yscale("log")
    axes.set_xlabel("bits a packed weight, scales included")
    axes.set_ylabel("mean KLD, nats")
    axes.margins(x=0.18, y=0.12)
    axes.set_title("Bits against KLD")


def short_name(path: str) -> str:
    """params/layers/mlp/up_proj/kernel -> mlp up_proj."""
    parts = [part for part in path.split("/") if part not in ("params", "layers", "*", "kernel")]
    return " ".join(parts) or path
