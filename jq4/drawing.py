"""What pictures of jq4 share: colours, matplotlib's style, and the histogram of a divergence that spans decades.

matplotlib is the optional extra `plot`; it is imported where a picture is made, and never shows a window.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

INK, GREY = "#1d2330", "#8a93a3"
COLOURS = ("#8a93a3", "#d1495b", "#2e86ab", "#edae49", "#66a182", "#8d6a9f", "#00798c", "#b5651d", "#5f0f40", "#4f772d")
SMALLEST_KLD = 1e-6
WANTS_MATPLOTLIB = "for want of matplotlib: pip install jq4[plot]"


def has_matplotlib() -> bool:
    """Whether the optional extra `plot` is installed."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


@contextlib.contextmanager
def subplots(rows: int, columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """(figure, panels [rows, columns]) in the house's style, closed afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY}
    style |= {"xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 11}
    with plt.rc_context(style):
        figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        try:
            yield figure, panels
        finally:
            plt.close(figure)


def png_of(figure: Any) -> bytes:
    """The picture, as bytes that hold no version and no time: the same figures give the same file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return stream.getvalue()


def kld_edges(divergences: Sequence[np.ndarray], bins: int = 70) -> np.ndarray:
    """Edges f64[bins + 1], evenly spaced on a logarithmic axis, that hold all divergences; what is less than the
    first edge belongs to the first bin."""
    top = max(float(values.max()) for values in divergences)
    least = max(SMALLEST_KLD, min(float(np.percentile(values, 0.2)) for values in divergences))
    return np.geomspace(least, max(top, 10 * least) * 1.01, bins + 1)


def count_klds(divergence: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """How many of f32[tokens] lie in each bin, i64[bins]."""
    return np.histogram(np.maximum(divergence.astype(np.float64), edges[0]), edges)[0]


def draw_klds(
    axes: Any, edges: np.ndarray, counts: Mapping[str, Any], means: Mapping[str, float], colours: Any
) -> None:
    """A histogram of each name's divergences, and a line at its mean."""
    for name, mean in means.items():
        label = f"{name}: mean {mean:.4f}"
        axes.stairs(counts[name], edges, fill=True, color=colours[name], alpha=0.45, label=label)
        axes.axvline(mean, color=colours[name], linewidth=1.5)
    axes.set_xscale("log")
    axes.set_xlabel("KL(dense || packed) of one predicted token, nats")
    axes.set_ylabel("tokens")
    axes.set_title("How far the predictions moved")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
