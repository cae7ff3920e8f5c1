"""Activity of the activations in, two pictures of it out: what a rectifier does to which of them,
and the mean of each channel before and after."""

from collections.abc import Iterator, Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lhact.evaluation.activity import Activity
from lhact.methods.compose import spell
from lhact.reporting import plot_style as style
from lhact.reporting.plot_view import Shown, View


def rectifications(view: View) -> Iterator[tuple[str, Figure]]:
    """For each method that begins with a function of single activations: that function, above the
    densities of ID and OOD activations, with its thresholds."""
    if view.activity is None:
        return
    for shown in view.shown:
        curve = view.activity.curves.get(shown.scores.fitted.rectifiers)
        if curve is not None:
            figure = _rectification(view.activity, curve, shown, view.sets)
            yield f"rectification {shown.label}", figure


def _rectification(
    activity: Activity, curve: np.ndarray, shown: Shown, sets: Mapping[str, style.Look]
) -> Figure:
    figure = Figure((style.SINGLE, 3.7), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[1.3, 1, 1])
    edges, own = activity.edges, activity.densities["id"]
    rectifier = shown.scores.fitted.rectifiers[0]
    parameters = spell({rectifier.name: rectifier.parameters})
    thresholds = {
        name: parameters[name]
        for name in ("low", "high")
        if name in parameters and edges[0] <= parameters[name] <= edges[-1]
    }
    top.plot(activity.points, activity.points, color=style.ID_COLOUR, lw=0.8, ls="--")
    top.plot(activity.points, curve, color=shown.look.colour, lw=1.4)
    top.set_ylim(min(0, curve.min()), 1.35 * max(curve.max(), *thresholds.values(), 0))
    top.set_ylabel("rectified")
    middle.stairs(own, edges, fill=True, color=style.ID_COLOUR)
    for name, look in sets.items():
        density = activity.densities[name]
        middle.stairs(density, edges, color=look.colour, lw=0.9)
        both = (density > 0) & (own > 0)
        ratio = np.divide(density, own, out=np.full_like(own, np.nan), where=both)
        bottom.stairs(ratio, edges, color=look.colour, lw=0.9, baseline=None)
    middle.set_yscale("log")
    middle.set_ylabel("density")
    bottom.axhline(1, color=style.ID_COLOUR, lw=0.8)
    bottom.set_yscale("log")
    least, most = bottom.get_ylim()
    bottom.set_ylim(max(least, 0.1), min(most, 10))  # beyond it are a few activations' whims
    style.label_logarithmic(bottom.yaxis)
    bottom.set_ylabel("OOD / ID")
    bottom.set_xlabel("activation")
    bottom.set_xlim(edges[0], edges[-1])
    for name, value in thresholds.items():
        for axis in (top, middle, bottom):
            axis.axvline(value, color=style.MARK_COLOUR, lw=0.7, ls=":")
        near_right = value > np.interp(0.75, [0, 1], edges[[0, -1]])
        top.annotate(
            f"{name} {value:.3g}",
            # One below the other, since low and high may be close.
            (value, 0.99 if name == "low" else 0.88),
            xycoords=("data", "axes fraction"),
            xytext=(-3 if near_right else 3, 0),
            textcoords="offset points",
            ha="right" if near_right else "left",
            va="top",
            bbox={"fc": "white", "ec": "none", "pad": 0.5},
        )
    handles = [
        style.line(style.ID_COLOUR, "--", "unchanged"),
        Patch(color=style.ID_COLOUR, label="ID"),
        *(style.line(look.colour, look.dash, name) for name, look in sets.items()),
    ]
    style.legend_below(figure, handles)
    figure.align_ylabels()
    return figure


def channel_means(view: View) -> Iterator[tuple[str, Figure]]:
    """For each method with rectifiers: the mean activation of every channel over ID and over each
    OOD set, before and after; channels sorted by their ID mean before."""
    if view.activity is None:
        return
    raw = view.activity.means[()]
    order = np.argsort(raw["id"], kind="stable")
    for shown in view.shown:
        rectifiers = shown.scores.fitted.rectifiers
        if not rectifiers:
            continue
        figure, grid = style.panels(view.colours, 2, 1.15)
        after = view.activity.means[rectifiers]
        stages = {"before": raw, f"after {shown.result.method}": after}
        for row, (stage, means) in enumerate(stages.items()):
            low, high = np.min(list(means.values())), np.max(list(means.values()))
            for name, axes in grid.items():
                axis = axes[row]
                for part, colour in ((name, view.sets[name].colour), ("id", style.BLACK)):
                    # Pixels also in vector formats: thousands of points, and nothing to edit.
                    axis.plot(means[part][order], "o", color=colour, ms=1, mew=0, rasterized=True)
                if low > 0:  # as behind a ReLU, where means of channels differ by powers of ten
                    axis.set_yscale("log")
                    axis.set_ylim(low / 1.1, high * 1.1)
                    style.label_logarithmic(axis.yaxis)
                else:
                    axis.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low) or 1)
                style.label_upright(axis, stage)
                if row == 1:
                    axis.set_xlabel("channel, by its ID mean")
        handles = [
            style.marker("o", style.BLACK, "ID"),
            style.marker("o", "white", "OOD set above"),
        ]
        style.legend_below(figure, handles)
        yield f"channels {shown.label}", figure
