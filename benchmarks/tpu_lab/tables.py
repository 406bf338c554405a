"""Rows of measure.py as a table for people, and as a roofline plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.tpu_lab.chips import CHIPS
from benchmarks.tpu_lab.contenders import BASELINE

Row = Mapping[str, Any]
_CASE = ("chip", "rows", "k", "n", "group_size", "asymmetric")
COLORS = {
    "tpu": "#0072b2", "pallas-bf16": "#000000", "xla-bf16": "#999999", "xla-grouped": "#e69f00",
    "xla-dequantize": "#d55e00", "xla": "#009e73", "tpu-inference": "#cc79a7",
}  # fmt: skip


def case_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _CASE)


def with_speedups(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with how many times faster than the plain bf16 kernel's each is, by the model."""
    base = {case_of(row): row["us"] for row in rows if row["contender"] == BASELINE and "us" in row}
    return [
        {**row, "speedup": round(base[case_of(row)] / row["us"], 2)}
        if "us" in row and case_of(row) in base
        else {**row}
        for row in rows
    ]


def table_of(rows: Sequence[Row]) -> Table:
    """One line a program; microseconds by each limit, the larger being the modelled time."""
    table = Table(title="compiled for the chip, modelled: max(bundles / clock, MACs / MXU rate, bytes / bandwidth)")
    for name in ("chip", "M", "K x N", "group", "what", "blocks"):
        table.add_column(name, no_wrap=name != "blocks")
    for name in ("bundles µs", "MXU µs", "HBM µs", "bound", "x bf16", "step", "loop", "spills", "VMEM MiB", "units"):
        table.add_column(name, justify="right", no_wrap=name != "units")
    for row in with_speedups(rows):
        table.add_row(*_cells(row), end_section=False)
    return table


def _cells(row: Row) -> list[str]:
    group = (str(row["group_size"]) if row["group_size"] else "column") + (" +z" if row["asymmetric"] else "")
    first = [row["chip"], str(row["rows"]), f"{row['k']}x{row['n']}", group, row["contender"], row.get("label", "")]
    if "us" not in row:
        why = row.get("error", "compiles, not counted")
        return [*first, *[""] * 9, f"{row['status']}: {why}"[:160]]
    vmem = row.get("vmem_bytes")
    return [
        *first, *(f"{row[name]:.1f}" for name in ("bundles_us", "mxu_us", "hbm_us")), row["bound"],
        f"{row['speedup']:.2f}" if "speedup" in row else "", str(row.get("step_bundles", "")),
        str(row.get("loop_bundles", "")), str(row["spills"]), f"{vmem / 2**20:.1f}" if vmem else "",
        _busiest(row.get("units", {})),
    ]  # fmt: skip


def _busiest(units: Mapping[str, float]) -> str:
    """The three units with fewest free slots."""
    top = sorted(units.items(), key=lambda unit: -unit[1])[:3]
    return " ".join(f"{name} {100 * part:.0f}%" for name, part in top)


def plot(rows: Sequence[Row], file: str | Path) -> None:
    """Modelled TFLOP/s over rows of x, one panel a chip, under the roofs of bf16 and of four-bit weights."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    counted = [row for row in rows if "us" in row]
    chips = [name for name in CHIPS if any(row["chip"] == name for row in counted)]
    figure, panels = plt.subplots(1, len(chips), figsize=(4.2 * len(chips), 4), squeeze=False, sharey=True)
    for panel, chip in zip(panels[0], chips, strict=True):
        _panel(panel, chip, [row for row in counted if row["chip"] == chip])
    panels[0][0].set_ylabel("modelled TFLOP/s")
    panels[0][-1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _panel(panel: Any, name: str, rows: Sequence[Row]) -> None:
    chip, k, n = CHIPS[name], rows[0]["k"], rows[0]["n"]
    xs = sorted({row["rows"] for row in rows})
    bytes_of = {"4-bit roof": 0.5 + 2 / (rows[0]["group_size"] or k), "bf16 roof": 2.0}
    for (label, per_weight), style in zip(bytes_of.items(), (":", "--"), strict=True):
        roof = [min(chip.peak, 2 * m * k * n * chip.bandwidth / (per_weight * k * n + 2 * m * (k + n))) for m in xs]
        panel.plot(xs, [one / 1e12 for one in roof], style, color="black", lw=0.8, label=label)
    for contender in dict.fromkeys(row["contender"] for row in rows):
        own = sorted(
            (row["rows"], 2 * row["rows"] * k * n / row["us"] / 1e6) for row in rows if row["contender"] == contender
        )
        panel.plot(*zip(*own, strict=True), "o-", ms=3, lw=1.2, color=COLORS.get(contender), label=contender)
    panel.set(xscale="log", yscale="log", xlabel="rows of x", title=f"{name}: {k} x {n}")
    panel.set_xticks(xs, [str(m) for m in xs])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
