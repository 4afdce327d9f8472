"""Figures of the reports: arrays in, a matplotlib `Figure` out, and a figure as a data URI for a page.

No state of pyplot, no window, no file. Which numbers are drawn, and what is said about them, is the report's
business. The same arrays give the same bytes.
"""

import base64
from collections.abc import Sequence
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

__all__ = ["CLIP", "agreement", "compared", "data_uri", "density", "histogram", "shown_range"]

CLIP = (0.025, 0.975)
"""Quantiles between which axes are drawn; what is beyond stands at the rim."""
_TURNING = LinearSegmentedColormap.from_list("turning", ["#1f5fa8", "#f7f7f7", "#b35806"])
_DENSITY = LinearSegmentedColormap.from_list("density", ["#e3e9f2", "#7d93b2", "#16305a"])
_POINTS = 2000  # above this, points hide one another: hexagons that are counted instead
_BINS = 40
_INK, _FAINT, _FILL, _RIM, _MARK = "#2b2f36", "#c9ced6", "#7d93b2", "#c4d0e0", "#b35806"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "svg.fonttype": "none",  # text stays text: small, sharp, and in the reader's own font
    "svg.hashsalt": "gradsift",  # else the ids in the file differ from run to run
}
_DPI = 200  # of what is drawn as pixels
_FONT = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"


def histogram(x_N: NDArray[np.float64], *, label: str) -> Figure:
    """How the values are spread over `shown_range`; what is beyond adds to the outermost bars, in a lighter tone.

    A line marks the median.

    Args:
        x_N: at least one finite value.
        label: of the horizontal axis.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _figure(4.4, 2.3)
        span = _with_width(shown_range(x_N))
        for values, color in ((np.clip(x_N, *span), _RIM), (x_N, _FILL)):
            axes.hist(values, bins=_BINS, range=span, color=color, edgecolor="white", linewidth=0.4)
        axes.axvline(float(np.median(x_N)), color=_MARK, linewidth=1.2)
        axes.set(xlim=span, xlabel=label, ylabel="pairs")
        _sparse_ticks(axes)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        return figure


def compared(x_N: NDArray[np.float64], is_selected_N: NDArray[np.bool_], *, label: str) -> Figure:
    """How the selected rows are spread, as a line, over how all are; each as shares of its own number of rows.

    What is beyond the `shown_range` of both adds to the outermost bars.

    Args:
        x_N: at least one finite value.
        is_selected_N: which of the rows are selected: at least one.
        label: of the horizontal axis.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _figure(4.4, 2.3)
        span = _with_width(_range_of_both(x_N, is_selected_N))
        for values, kind, color, name in (
            (x_N, "stepfilled", _RIM, "pool"),
            (x_N[is_selected_N], "step", _MARK, "selected"),
        ):
            shares = np.full(len(values), 100 / len(values))
            style: dict[str, Any] = {"histtype": kind, "color": color, "linewidth": 1.3, "label": name}
            axes.hist(np.clip(values, *span), bins=_BINS, range=span, weights=shares, **style)
        axes.set(xlim=span, xlabel=label, ylabel="% of the rows")
        axes.legend(frameon=False, loc="best", handlelength=1.2)
        _sparse_ticks(axes)
        return figure


def density(
    x_N: NDArray[np.float64],
    y_N: NDArray[np.float64],
    *,
    xlabel: str,
    ylabel: str,
    counted: str = "pairs",
    is_selected_N: NDArray[np.bool_] | None = None,
) -> Figure:
    """One value against another, each over its `shown_range`: points, or where there are many, hexagons.

    A value beyond is drawn at the rim. A line marks 0, unless rows are selected.

    Args:
        x_N, y_N: at least one finite value each, of the same rows.
        xlabel, ylabel: of the axes.
        counted: what a point is, on the scale of the hexagons.
        is_selected_N: rows that stand out, at least one; the axes have room for them.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _figure(4.4, 2.3)
        xlim, ylim = (_with_width(_range_of_both(values_N, is_selected_N)) for values_N in (x_N, y_N))
        x_N, y_N = np.clip(x_N, *xlim), np.clip(y_N, *ylim)
        if len(x_N) <= _POINTS:
            size = float(np.clip(2500 / len(x_N), 3, 16))
            axes.scatter(x_N, y_N, s=size, color=_FILL, alpha=0.65, linewidths=0, rasterized=True, clip_on=False)
        else:
            hexagons = axes.hexbin(
                x_N, y_N, gridsize=(44, 16), extent=(*xlim, *ylim), bins="log", mincnt=1,
                cmap=_DENSITY, linewidths=0.1, rasterized=True,
            )  # fmt: skip
            bar = figure.colorbar(hexagons, ax=axes, pad=0.02, aspect=14, label=counted, format=FuncFormatter(_tick))
            bar.ax.yaxis.set_minor_formatter(NullFormatter())
            bar.outline.set_visible(False)
        axes.set(xlim=xlim, ylim=ylim, xlabel=xlabel, ylabel=ylabel)
        if is_selected_N is None:
            axes.axvline(0, color=_MARK, linewidth=0.9)
        else:
            size = float(np.clip(2500 / is_selected_N.sum(), 3, 16))
            axes.scatter(
                x_N[is_selected_N], y_N[is_selected_N], s=size, color=_MARK, alpha=0.65, linewidths=0, rasterized=True,
                clip_on=False,
            )  # fmt: skip
        _sparse_ticks(axes)
        return figure


def agreement(rho_MM: NDArray[np.float64], names: Sequence[str]) -> Figure:
    """Correlations in numbers and colours, from blue at -1 through white to orange at 1; a dash for NaN."""
    with mpl.rc_context(STYLE):
        size = len(names)
        figure, axes = _figure(1.75 + 0.72 * size, 0.75 + 0.42 * size)
        axes.imshow(rho_MM, cmap=_TURNING, vmin=-1, vmax=1, aspect="auto")
        for (row, column), rho in np.ndenumerate(rho_MM):
            text = "–" if np.isnan(rho) else f"{rho:z.2f}".replace("-", "−")
            axes.text(column, row, text, ha="center", va="center", color="white" if abs(rho) > 0.8 else _INK)
        axes.set_xticks(range(size), names, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(size), names)
        axes.set_xticks(np.arange(1, size) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, size) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        return figure


def shown_range(x_N: NDArray[np.float64]) -> tuple[float, float]:
    """The values at the quantiles `CLIP`, rounded outwards to values that are there: all of them up to 40 rows."""
    low, high = np.quantile(x_N, CLIP[0], method="lower"), np.quantile(x_N, CLIP[1], method="higher")
    return float(low), float(high)


def _range_of_both(x_N: NDArray[np.float64], is_selected_N: NDArray[np.bool_] | None) -> tuple[float, float]:
    """`shown_range`, widened to that of the selected rows."""
    ends = [shown_range(x_N)] + ([] if is_selected_N is None else [shown_range(x_N[is_selected_N])])
    return min(low for low, _ in ends), max(high for _, high in ends)


def data_uri(figure: Figure) -> str:
    """The figure as an SVG inside a data URI. ASCII."""
    with mpl.rc_context(STYLE):
        svg = StringIO()
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", dpi=_DPI, metadata=nothing)
    text = svg.getvalue().replace("'DejaVu Sans'", _FONT)  # matplotlib measures by a font that it brings along
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Of this size in inches; constrained layout, so that labels of any length have room."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _with_width(span: tuple[float, float]) -> tuple[float, float]:
    """The range with a margin, so that the outermost values, or a single one, are inside and not on the rim."""
    low, high = span
    margin = 0.03 * (high - low) or max(abs(low) * 0.05, 0.5)
    return low - margin, high + margin


def _sparse_ticks(axes: Axes) -> None:
    for axis, count in ((axes.xaxis, 6), (axes.yaxis, 5)):
        axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(_tick))


def _tick(value: float, _: int | None = None) -> str:
    """-200000 → −200k."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * scale or (abs(value) >= scale and scale > 1e3):
            return f"{value / scale:g}{unit}".replace("-", "−")
    return f"{value:g}".replace("-", "−")
