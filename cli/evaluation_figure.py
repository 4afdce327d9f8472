"""The figure of an experiment: what each method gains over random rows, by target and budget, with intervals."""

from itertools import cycle
from math import ceil
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cli.figures import STYLE

__all__ = ["evaluation_figure", "percent"]

_COLORS = ("#16305a", "#b35806", "#4d9221", "#762a83")


def percent(fraction: float) -> str:
    """0.005 → `0.5%`."""
    return f"{100 * fraction:.4g}%"


def evaluation_figure(outcome: dict[str, Any]) -> Figure:
    """A panel for each target set: a line for each method, a mark for each budget, hollow where tokens are matched.

    Args:
        outcome: `Evaluation.to_json()`.
    """
    targets = list(outcome["start"])
    methods = [m for m in outcome["settings"]["methods"] if m != "random"]
    budgets = list(dict.fromkeys((arm["fraction"], arm["match"]) for arm in outcome["arms"]))
    color_of = dict(zip(dict.fromkeys(fraction for fraction, _ in budgets), cycle(_COLORS), strict=False))
    with mpl.rc_context(STYLE):
        width = max(1.7 + 2.6 * len(targets), 5.2)  # room for the label below
        num_beside = int(width / 1.5)  # in the legend
        legend_height = 0.2 * ceil(len(budgets) / num_beside)
        height = 0.75 + legend_height + 0.16 * len(methods) * (1 + len(budgets))
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
        for panel, target in zip(panels, targets, strict=True):
            for b, (fraction, match) in enumerate(budgets):
                own = {
                    arm["method"]: arm["over_random"]
                    for arm in outcome["arms"]
                    if (arm["target"], arm["fraction"], arm["match"]) == (target, fraction, match)
                }
                offset = (b - (len(budgets) - 1) / 2) * 0.8 / max(len(budgets), 2)
                for m, method in enumerate(methods):
                    found = own[method]
                    span = [found["low"], found["high"]]
                    panel.plot(span, [m + offset] * 2, color=color_of[fraction], linewidth=1.4, zorder=1)
                label = f"{percent(fraction)} of the {match}"
                panel.plot(
                    [own[method]["value"] for method in methods],
                    [m + offset for m in range(len(methods))],
                    "o", color=color_of[fraction], markerfacecolor=color_of[fraction] if match == "rows" else "white",
                    markersize=4, label=label,
                )  # fmt: skip
            panel.axvline(0, color="#2b2f36", linewidth=0.8)
            panel.set_yticks(range(len(methods)), methods)
            panel.set_title(target)
            panel.tick_params(axis="y", length=0)
        panels[0].invert_yaxis()
        figure.supxlabel("drop of the held-out loss beyond that of random rows (nats per token)", fontsize=9)
        named = panels[0].get_legend_handles_labels()
        figure.legend(*named, loc="outside upper right", ncols=num_beside, frameon=False)
        return figure
