"""A result, its scores and the activity of the activations in, figures out, as a paper would print
them.

    for stem, figure in figures(result, scored, activity):
        Path(f"{stem}.pdf").write_bytes(render(figure, "pdf"))

To add a picture, write a function from a View to (name, figure) pairs and an entry of PLOTS.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lhact import published
from lhact.evaluation.activity import Activity
from lhact.evaluation.results import AVERAGE, MOST_TIES, MethodResult, Result, Row
from lhact.evaluation.score import MethodScores
from lhact.files import write_whole
from lhact.reporting import plot_style as style
from lhact.reporting.lines import network_text, uncertainty, varying
from lhact.reporting.plot_activations import channel_means, rectifications
from lhact.reporting.plot_style import render
from lhact.reporting.plot_view import Shown, View, activity_of

__all__ = ["PLOTS", "View", "activity_of", "figures", "render", "write"]

FORMS = ("png", "pdf")
METRICS = {"fpr95": "FPR95 (%)", "auroc": "AUROC (%)"}
# Columns of a heat map that leave room for a number in each cell.
MOST_NUMBERS = 8
Named = tuple[str, Figure]


def score_histograms(view: View) -> Iterator[Named]:
    """For each method: densities of its scores, ID beside each OOD set, below those of plain
    energy, with the threshold that keeps 95 % of ID. Drawn is the middle 99.8 % of each set."""
    for shown in view.shown:
        rows = [shown] if view.before in (None, shown) else [view.before, shown]
        figure, grid = style.panels(view.colours, len(rows), 0.95)
        limits = [_limits(row.scores.scores.values()) for row in rows]
        for name, axes in grid.items():
            for row, axis, limit in zip(rows, axes, limits, strict=True):
                _score_panel(axis, row, name, view.sets[name])
                axis.set_xlim(limit)
                style.label_upright(axis, row.result.method)
            axes[-1].set_xlabel("score")
        handles = [
            Patch(color=style.ID_COLOUR, label="ID"),
            Patch(color="none", ec=style.MARK_COLOUR, label="OOD set above"),
            style.line(style.MARK_COLOUR, "--", "threshold that keeps 95 % of ID"),
        ]
        style.legend_below(figure, handles)
        yield f"scores {shown.label}", figure


def _score_panel(axis: Axes, shown: Shown, name: str, look: style.Look) -> None:
    row, scores = shown.row(name), shown.scores.scores
    for values, edge, face in (
        (scores["id"], "none", style.ID_COLOUR),
        (scores[name], look.colour, to_rgba(look.colour, 0.3)),
    ):
        # Rice's rule: twice as many bins as the cube root of the number of values.
        bins = min(80, round(2 * len(values) ** (1 / 3)))
        edges = np.linspace(*_limits([values]), bins + 1)
        heights, _ = np.histogram(values, edges, density=True)
        axis.stairs(heights, edges, fill=True, fc=face, ec=edge, lw=0.9)
    axis.axvline(row.threshold, color=style.MARK_COLOUR, ls="--", lw=0.8)
    axis.set_title(f"FPR95 {row.metrics['fpr95']:.1f} %", loc="right", fontsize=6.5)
    axis.set_yticks([])
    axis.spines.left.set_visible(False)
    axis.set_ylim(bottom=0)


def _limits(sets: Iterable[np.ndarray]) -> tuple[float, float]:
    """Between which at least the middle 99.8 % of each of the sets lie: all of a small set."""
    ordered = [np.sort(values.astype(np.float64)) for values in sets]
    low = min(float(values[len(values) // 1000]) for values in ordered)
    high = max(float(values[-1 - len(values) // 1000]) for values in ordered)
    around = max(0.5, abs(low) / 1000)  # of scores that are all the same
    return (low, high) if low < high else (low - around, high + around)


def roc_curves(view: View) -> Iterator[Named]:
    """For each OOD set: the share of ID that is kept against the share of OOD, a line for each
    method; below the same on a logarithmic axis."""
    figure, grid = style.panels(dict.fromkeys(view.sets, style.BLACK), 2, 1.45)
    most = max(len(view.scored[0].scores[name]) for name in view.sets)
    for name, (linear, logarithmic) in grid.items():
        for shown in view.shown:
            fpr, tpr = roc(shown.scores.scores["id"], shown.scores.scores[name])
            for axis in (linear, logarithmic):
                axis.plot(fpr, tpr, color=shown.look.colour, ls=shown.look.dash, lw=0.9)
        for axis in (linear, logarithmic):
            axis.axhline(95, color=style.MARK_COLOUR, lw=0.5, ls=":", zorder=0)
            axis.set_ylim(0, 101)
            axis.set_yticks([0, 25, 50, 75, 95])
            style.label_upright(axis, "ID kept, TPR (%)")
        linear.set_xlim(-1, 100)
        logarithmic.set_xscale("log")
        logarithmic.set_xlim(10 ** np.floor(np.log10(100 / most)), 100)
        style.label_logarithmic(logarithmic.xaxis)
        logarithmic.set_xlabel("OOD kept, FPR (%)")
    handles = [style.line(shown.look.colour, shown.look.dash, shown.label) for shown in view.shown]
    style.legend_below(figure, handles)
    yield "roc", figure


def roc(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(FPR, TPR) in percent, ID positive, from (0, 0) to (100, 100): a point for every score, but
    for those that no eye could tell from the one before."""
    thresholds = np.unique(np.concatenate([id_scores, ood_scores]))[::-1]

    def kept(scores: np.ndarray) -> np.ndarray:
        above = len(scores) - np.searchsorted(np.sort(scores), thresholds, "left")
        return np.concatenate([[0.0], 100 * above / len(scores)])

    fpr, tpr = kept(ood_scores), kept(id_scores)
    # A picture is a few hundred pixels wide; the logarithm keeps what its axis spreads.
    coarse = np.round(np.stack([fpr, tpr, 20 * np.log10(np.maximum(fpr, 1e-4))]) * 5)
    moves = np.any(np.diff(coarse, axis=1) != 0, axis=0)
    keep = np.concatenate([[True], moves | np.append(moves[1:], True)])
    return fpr[keep], tpr[keep]


def sweeps(view: View) -> Iterator[Named]:
    """For each method with several settings: average FPR95 and AUROC against the parameter, as a
    heat map of two parameters, or as points against each of more."""
    for shown in view.shown:
        settings = [m for m in view.result.all_methods if m.method == shown.result.method]
        parameters = varying(view.result, shown.result)
        if len(settings) < 2 or not parameters:
            continue
        if len(parameters) == 2:
            figure = _heat_maps(settings, *parameters)
        else:
            figure = _sweep_lines(settings, parameters, shown.look)
        yield f"sweep {shown.result.method}", figure


def _sweep_lines(
    settings: Sequence[MethodResult], parameters: Sequence[str], look: style.Look
) -> Figure:
    """Hollow: settings whose scores are tied, of which FPR95 says little."""
    width = style.DOUBLE if len(parameters) > 1 else style.SINGLE
    figure = Figure((width, 2.9), layout="constrained")
    grid = figure.subplots(2, len(parameters), squeeze=False, sharex="col", sharey="row")
    for column, parameter in enumerate(parameters):
        ordered = sorted(settings, key=lambda m: m.parameters[parameter])
        places = [method.parameters[parameter] for method in ordered]
        for axis, (metric, title) in zip(grid[:, column], METRICS.items(), strict=True):
            values = [method.average.metrics[metric] for method in ordered]
            if len(parameters) == 1:
                axis.plot(places, values, color=look.colour)
            for method in ordered:
                _dot(axis, look, method.average, metric, method.parameters[parameter], upright=True)
            axis.grid(axis="y")
            if column == 0:
                axis.set_ylabel(f"average {title}")
        grid[1, column].set_xlabel(parameter)
    return figure


def _heat_maps(settings: Sequence[MethodResult], x: str, y: str) -> Figure:
    columns = sorted({method.parameters[x] for method in settings})
    rows = sorted({method.parameters[y] for method in settings})
    figure = Figure((style.DOUBLE, 0.8 + 0.3 * max(4, len(rows))), layout="constrained")
    for axis, (metric, title) in zip(figure.subplots(1, 2), METRICS.items(), strict=True):
        values = np.full((len(rows), len(columns)), np.nan)
        for method in settings:
            place = rows.index(method.parameters[y]), columns.index(method.parameters[x])
            values[place] = method.average.metrics[metric]
        colours = "cividis_r" if metric == "fpr95" else "cividis"  # yellow is better
        image = axis.imshow(values, cmap=colours, aspect="auto", origin="lower")
        for method in settings if len(columns) <= MOST_NUMBERS else ():
            value = method.average.metrics[metric]
            axis.text(
                columns.index(method.parameters[x]),
                rows.index(method.parameters[y]),
                "tied" if method.tied else f"{value:.1f}",
                color="white" if (image.norm(value) > 0.5) == (metric == "fpr95") else "black",
                ha="center",
                va="center",
                fontsize=6,
            )
        axis.set_xticks(range(len(columns)), [f"{value:.4g}" for value in columns])
        axis.set_yticks(range(len(rows)), [f"{value:.4g}" for value in rows])
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        figure.colorbar(image, ax=axis, label=f"average {title}")
    return figure


def comparison(view: View) -> Iterator[Named]:
    """Methods against sets: FPR95 and AUROC with their 95 % intervals, where there are some.
    Hollow: scores are tied, so that FPR95 says little."""
    names = [row.dataset for row in view.shown[0].result.rows]
    labels = _wrapped(view.shown)
    black = dict.fromkeys(names, style.BLACK)
    figure, grid = style.panels(black, 2, 0.35 + _height(labels), most_columns=5)
    for name, axes in grid.items():
        for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
            for place, shown in enumerate(view.shown):
                _dot(axis, shown.look, shown.row(name), metric, place)
            _method_axis(axis, labels)
            axis.set_xlabel(title)
    yield "comparison", figure


def published_comparison(view: View) -> Iterator[Named]:
    """Averages over the four sets of the paper's Table 6 beside the published ones, which are of
    ResNet-50 V1 on the whole sets."""
    rows = {row.method: row for row in reversed(published.ROWS)}
    shown = [method for method in view.shown if method.result.method in rows]
    if not shown or tuple(view.sets) != published.DATASETS:
        return
    labels = _wrapped(shown)
    figure = Figure((style.DOUBLE, 0.7 + 1.3 * _height(labels)), layout="constrained")
    for column, (axis, metric) in enumerate(zip(figure.subplots(1, 2), METRICS, strict=True)):
        for place, method in enumerate(shown):
            theirs = rows[method.result.method].values[AVERAGE][column]
            axis.plot(
                theirs, place, "D", ms=4.5, mfc="white", mec=method.look.colour, mew=1.0, zorder=3
            )
            _dot(axis, method.look, method.result.average, metric, place)
        _method_axis(axis, labels)
        axis.set_xlabel(f"average {METRICS[metric]}")
    images = sum(row.images for row in shown[0].result.rows if row.dataset in view.sets)
    handles = [
        style.marker("o", style.MARK_COLOUR, f"{network_text(view.result)}, {images:,} OOD images"),
        style.marker("D", "white", "published: resnet50 IMAGENET1K_V1, 35,640 OOD images"),
    ]
    style.legend_below(figure, handles)
    yield "published", figure


def _wrapped(shown: Sequence[Shown]) -> list[str]:
    """Labels with the method and each of its settings on lines of their own."""
    return [method.label.replace(" ", "\n", 1).replace(", ", "\n") for method in shown]


def _height(labels: Sequence[str]) -> float:
    """Inches that an axis of methods takes."""
    return (0.02 + 0.11 * max(1 + label.count("\n") for label in labels)) * len(labels)


def _method_axis(axis: Axes, labels: Sequence[str]) -> None:
    """Methods from top to bottom, named in the first column."""
    named = style.in_first_column(axis)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_yticks(range(len(labels)), labels if named else [""] * len(labels))
    axis.tick_params(axis="y", length=0)
    axis.margins(x=0.08)
    axis.grid(axis="both")


def _dot(
    axis: Axes, look: style.Look, row: Row, metric: str, place: float, upright: bool = False
) -> None:
    """The metric of that row with its interval, across or upright at that place of the other axis;
    hollow where its scores are tied, so that FPR95 says little."""
    order = -1 if upright else 1
    if limits := uncertainty(row).intervals.get(metric):
        axis.plot(*(limits, (place, place))[::order], color=look.colour)
    face = "white" if row.tied > MOST_TIES else look.colour
    dot = (row.metrics[metric], place)[::order]
    axis.plot(*dot, look.marker, color=look.colour, mfc=face, zorder=4)


PLOTS: Mapping[str, Callable[[View], Iterator[Named]]] = {
    "scores": score_histograms,
    "roc": roc_curves,
    "rectification": rectifications,
    "channels": channel_means,
    "sweep": sweeps,
    "comparison": comparison,
    "published": published_comparison,
}


def figures(
    result: Result,
    scored: Sequence[MethodScores],
    activity: Activity | None = None,
    names: Iterable[str] = tuple(PLOTS),
) -> Iterator[Named]:
    """(file stem, figure) of the named pictures that this result has; a stem is safe on every
    system, and no two are alike.

    scored: in the order of result.all_methods. activity: see evaluation.activity.measure; without
    it, pictures of activations are left out.
    """
    view = View(result, scored, activity)
    stems: dict[str, int] = {}
    for name in names:
        with style.styled():
            # A list, since a generator would leave its caller with this style between two figures.
            made = [(title, style.settle(figure)) for title, figure in PLOTS[name](view)]
        for title, figure in made:
            yield style.distinct_stem(title, stems), figure


def write(folder: Path, stem: str, figure: Figure) -> None:
    """The figure as <stem>.png and <stem>.pdf. Raises OSError where that cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    for form in FORMS:
        write_whole(folder / f"{stem}.{form}", render(figure, form))
