"""The report in words and tables, once, for Markdown, HTML and the terminal alike."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jq4.how_made import made_rows, text_words
from jq4.report import (
    ADAPTERS_HEAD,
    adapters_rows,
    adapters_sentence,
    evaluation_rows,
    format_bytes,
    format_figure,
)

CALIBRATION = "calibration"  # a leaf's output errors are over the rows that it was calibrated on


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and a table; `long` ones are folded where a page can fold."""

    title: str
    text: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[Sequence[str], ...] = ()
    long: bool = False


def sections(data: Mapping[str, Any]) -> list[Section]:
    """What `data` (of compose_report) has something to say about, in order."""
    makers = (_quality, _size, _adapters, _weights, _slices, _experts, _compared, _made, _notes)
    return [section for make in makers if (section := make(data)) is not None]


def _quality(data: Mapping[str, Any]) -> Section | None:
    found = data.get("evaluation")
    if found is None:
        return None
    text = found.get("text", {})
    said = [
        f"Measured on {found['tokens']:,} predicted tokens: {found['rows']:,} rows of {found['context']} tokens"
        + (f" of {text_words({**text, 'rows': None})}" if text else "")
        + ", each token predicted from those before it in its row."
    ]
    if text.get("dropped_tokens"):
        said.append(f"{text['dropped_tokens']:,} tokens at the end, too few for a row, were left out.")
    if "kld_mean" in found:
        said.append("KLD is KL(reference || model) over the whole vocabulary, in nats a token.")
    if "perplexity_standard_error" in found:
        said.append("± is the standard error of a mean, taken over rows, whose tokens are not independent.")
    else:
        said.append("A single row tells no standard error.")
    return Section("Quality", " ".join(said), ("figure", "value"), tuple(evaluation_rows(found)))


def _size(data: Mapping[str, Any]) -> Section | None:
    held = data.get("totals")
    if not held:
        return None
    words = (
        ("parameters", "parameters", format_figure),
        ("parameters_packed", "of them packed", format_figure),
        ("bytes", "bytes held on the device, scales included", format_bytes),
        ("bytes_on_disk", "bytes on disk", format_bytes),
        ("bits_per_weight_packed", "bits a packed weight", format_figure),
        ("bits_per_weight", "bits a weight, all leaves", format_figure),
    )
    rows = tuple((label, word(held[key])) for key, label, word in words if held.get(key) is not None)
    return Section("Size", head=("", "value"), rows=rows)


def _adapters(data: Mapping[str, Any]) -> Section | None:
    adapters = data.get("adapters")
    if adapters is None:
        return None
    said = (
        f"There are {adapters_sentence(adapters)}; sizes of weights leave them out, and quality is measured with them."
    )
    return Section("Adapters", said, ADAPTERS_HEAD, tuple(adapters_rows(adapters)))


def _weights(data: Mapping[str, Any]) -> Section | None:
    leaves = data.get("leaves", [])
    if not leaves:
        return None
    weighted = sorted({leaf["weighting"] for leaf in leaves if leaf.get("weighting")})
    said = "SQNR: signal to quantization noise of the weights themselves."
    if weighted == [CALIBRATION]:
        said += " Output error, by layer: E|x(W - W')|² / E|xW|² over calibration's rows, as quantizing measured it."
    elif weighted:
        kinds = {"hessian": "the Hessian E[x xᵀ] (exact)", "mean_square": "its diagonal E[x²] (an estimate)"}
        said += (
            " Output error: E|x(W - W')|² / E|xW|² over the inputs x that the reference's weights met on the tokens "
            f"above, by {' and '.join(kinds[kind] for kind in weighted)}."
        )
    head = ("leaf", "shape", "format", "bytes", "bits/weight", "SQNR dB", "output error")
    return Section("Weights", said, head, tuple(_leaf_cells(leaf) for leaf in leaves))


def _leaf_cells(leaf: Mapping[str, Any]) -> tuple[str, ...]:
    group = "" if leaf.get("group_size") is None or not leaf.get("packed", True) else f" g{leaf['group_size']}"
    became = f"{leaf.get('format')}{group}"
    for remark in (leaf.get("note"), leaf.get("starved") and f"{leaf['starved']} starved"):
        became += f" ({remark})" if remark else ""
    shape = " ".join(map(str, leaf["shape"])) or "scalar"
    sizes = (format_bytes(leaf["bytes"]), f"{leaf['bits_per_weight']:.2f}")
    return (leaf["path"], shape, became, *sizes, _decibels(leaf.get("sqnr_db")), _share(leaf.get("output_error")))


def _slices(data: Mapping[str, Any]) -> Section | None:
    rows = [
        (leaf["path"], " ".join(map(str, each["index"])), _decibels(each["sqnr_db"]), _share(each["output_error"]))
        for leaf in data.get("leaves", [])
        for each in leaf.get("slices", ())
    ]
    if not rows:
        return None
    said = "Leaves stacked by layers or experts, slice by slice."
    return Section("Layers", said, ("leaf", "slice", "SQNR dB", "output error"), tuple(rows), long=True)


def _experts(data: Mapping[str, Any]) -> Section | None:
    stacks = data.get("experts")
    if not stacks:
        return None
    head = ("experts", "layer", "number", "inputs", "least tokens", "median", "most", "unseen", "starved")
    keys = ("experts", "features", "least", "median", "most", "unseen", "starved")
    rows = tuple(
        (each["path"], " ".join(map(str, each["index"])), *(format_figure(each[key]) for key in keys))
        for each in stacks
    )
    said = "Starved: an expert that saw fewer tokens than it has inputs, so that its Hessian is singular."
    return Section("Expert coverage", said, head, rows)


def _compared(data: Mapping[str, Any]) -> Section | None:
    others = data.get("compared")
    if not others:
        return None
    head = ("model", "bits/packed weight", "bytes", "KLD", "top-1 agreement", "perplexity")
    keys = ("kld_mean", "top1_agreement", "perplexity")
    rows = tuple(
        (
            each["name"],
            format_figure(each.get("bits_per_weight_packed")),
            "-" if each.get("bytes") is None else format_bytes(each["bytes"]),
            *(format_figure(each.get(key)) for key in keys),
        )
        for each in others
    )
    return Section("Bits against KLD", "On the same tokens, against the same reference.", head, rows)


def _made(data: Mapping[str, Any]) -> Section | None:
    rows = made_rows(data.get("recipe"), data.get("source"), data.get("calibration"))
    cost = data.get("cost", {})
    if cost.get("seconds") is not None:
        rows.append(("seconds to quantize", format_figure(cost["seconds"])))
    if cost.get("peak_memory_bytes") is not None:
        rows.append(("peak memory", format_bytes(cost["peak_memory_bytes"])))
    rows += [(f"version of {name}" if name != "device" else name, v) for name, v in data.get("versions", {}).items()]
    return Section("How it was made", head=("", "value"), rows=tuple(rows)) if rows else None


def _notes(data: Mapping[str, Any]) -> Section | None:
    notes = data.get("notes")
    return Section("Notes", "\n".join(notes)) if notes else None


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"
