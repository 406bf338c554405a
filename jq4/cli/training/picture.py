"""The picture of `jq4 train`: the loss of every step, its running mean, and what rows held out say on the way."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jq4.drawing import COLOURS, GREY, INK, has_matplotlib, png_of, subplots


def draw(
    rows: Sequence[Mapping[str, Any]], judged: Sequence[Mapping[str, Any]], judged_by: str, about: Mapping[str, Any]
) -> bytes | None:
    """A PNG; None for want of matplotlib. `judged_by` is the figure of `judged` that is drawn, in nats too."""
    if not has_matplotlib():
        return None
    steps = np.array([row["step"] for row in rows])
    losses = np.array([row["loss"] for row in rows])
    with subplots(1, 1, (8.0, 4.5)) as (figure, panels):
        axes = panels[0, 0]
        axes.plot(steps, losses, color=GREY, linewidth=0.6, alpha=0.7, label="each step")
        axes.plot(steps, running_mean(losses), color=COLOURS[1], linewidth=1.8, label="running mean")
        if judged:
            at = {row["step"]: row[judged_by] for row in judged}
            label = f"held out, {judged_by}"
            axes.plot(list(at), list(at.values()), color=COLOURS[2], marker="o", markersize=4, label=label)
            if (kept := about.get("kept")) is not None:
                axes.plot(kept, at[kept], "o", markersize=11, markerfacecolor="none", color=INK, label="kept")
        if losses.min() > 0 and losses.max() > 4 * losses.min():
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats a token")
        axes.set_title(f"{about['training']}: {about['loss_first']:.4f} -> {about['loss_last']:.4f}")
        axes.legend(frameon=False, fontsize=9)
        return png_of(figure)


def running_mean(losses: np.ndarray) -> np.ndarray:
    """The mean over the last twentieth of the steps, or as many as there are before."""
    width = max(1, len(losses) // 20)
    sums = np.concatenate([[0.0], np.cumsum(losses, dtype=np.float64)])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
