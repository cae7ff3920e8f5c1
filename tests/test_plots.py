"""Pictures: what their lines, bars and dots stand for, against numbers computed elsewhere; the same
bytes every time; one clear line where there can be none."""

import dataclasses
import math
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import torch
from helpers import OOD
from sklearn.metrics import roc_curve

import eval as script
from lhact import cache
from lhact.evaluation import activity as activities
from lhact.evaluation import results
from lhact.evaluation.score import fit_methods, score
from lhact.evaluation.uncertainty import Bootstrap
from lhact.methods.compose import parse, parse_setting, parse_sweep, variants
from lhact.reporting import plot_style, plots
from lhact.reporting.lines import best_settings

CPU = torch.device("cpu")
METHODS = ["energy", "lhact", "bats", "lhact+maxlogit"]
ELEMENTWISE = ["lhact", "lhact-low", "lhact-high", "react", "bfact", "vra", "optfs"]
OTHERS = ["bats", "ash-p", "ash-b", "ash-s", "scale", "l2norm", "ras"]


@pytest.fixture
def opened(tmp_path, write_cache, small_sets, small_head):
    return cache.open_cache(write_cache(tmp_path / "small", small_sets, *small_head), OOD)


def evaluate(opened, methods):
    """(result, scores, activity) of parsed methods."""
    fitted = fit_methods(opened, methods, CPU)
    scored = score(opened, fitted, CPU)
    about = results.About("imagenet", "small", opened.info)
    result = results.summarise(about, scored, bootstrap=Bootstrap(100))
    return result, scored, activities.measure(opened, fitted, CPU)


@pytest.fixture
def evaluated(opened):
    return evaluate(opened, [parse(name) for name in METHODS])


def drawn(name, result, scored, activity=None):
    """Stem -> figure of that picture."""
    return dict(plots.figures(result, scored, activity, [name]))


def swept(opened, *sweeps):
    methods = variants(["lhact"], [], [parse_sweep(text) for text in sweeps], published=False)
    # Without the set that is too small for an interval, averages have one.
    result, scored, _ = evaluate(opened.without("Textures"), methods)
    return result, drawn("sweep", result, scored)["sweep-lhact"].axes


def lines(axis, style=None):
    """(x, y) of the axis's lines, of those with that style or marker."""
    return [
        (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
        for line in axis.lines
        if style is None or style in (line.get_linestyle(), line.get_marker())
    ]


# Figures against numbers


def test_score_histograms_are_densities_with_the_threshold(evaluated):
    result, scored, _ = evaluated
    figure = drawn("scores", *evaluated)["scores-lhact"]
    panels = [axis for axis in figure.axes if axis.axison]
    assert len(panels) == 2 * len(OOD)
    for number, axis in enumerate(panels):
        method = scored[number // len(OOD)]  # energy above, lhact below
        sets = {"id": method.scores["id"], "ood": method.scores[OOD[number % len(OOD)]]}
        for values, patch in zip(sets.values(), axis.patches, strict=True):
            heights, edges, _ = patch.get_data()
            assert len(heights) == round(2 * len(values) ** (1 / 3))
            np.testing.assert_allclose(edges[[0, -1]], [min(values), max(values)])
            for height, (left, right) in zip(heights, pairwise(edges), strict=True):
                inside = sum(left <= value < right for value in map(float, values))
                inside += right == edges[-1]  # the largest score is of the last bin
                assert height == pytest.approx(inside / len(values) / (right - left), abs=1e-9)
        [(place, _)] = lines(axis, "--")
        ordered = sorted(map(float, sets["id"]))
        assert place[0] == ordered[round(0.05 * len(ordered))]
        row = result.methods[number // len(OOD)].rows[number % len(OOD)]
        assert axis.get_title("right") == f"FPR95 {row.metrics['fpr95']:.1f} %"


def test_the_middle_of_the_scores_is_drawn():
    values = np.concatenate([np.random.default_rng(0).normal(0, 1, 5000), [1e6]]).astype("f4")
    low, high = plots._limits([values, values[:-1] - 1])
    assert -6 < low < -3
    assert 2 < high < 5
    assert plots._limits([np.full(3, 2.0)]) == (1.5, 2.5)
    assert plots._limits([np.array([3.0, 1.0])]) == (1.0, 3.0)  # a small set is drawn whole


def sklearn_roc(own, other):
    labels = [1] * len(own) + [0] * len(other)
    fpr, tpr, _ = roc_curve(labels, np.concatenate([own, other]), drop_intermediate=False)
    return 100 * fpr, 100 * tpr


def test_roc_curves_are_those_of_scikit_learn(evaluated):
    result, scored, _ = evaluated
    figure = drawn("roc", *evaluated)["roc"]
    for number, axis in enumerate(figure.axes):
        curves = lines(axis)
        assert len(curves) == len(METHODS) + 1, "and the line at 95 %"
        for curve, method in zip(curves, scored, strict=False):
            wanted = sklearn_roc(method.scores["id"], method.scores[OOD[number % len(OOD)]])
            np.testing.assert_allclose(curve, wanted, atol=1e-9)
    assert [axis.get_xscale() for axis in figure.axes] == ["linear"] * 4 + ["log"] * 4
    assert [bool(axis.get_ylabel()) for axis in figure.axes] == [True, False, False, False] * 2
    handles = figure.legends[0].get_texts()
    assert [text.get_text() for text in handles] == [method.method for method in result.methods]


def test_a_roc_curve_of_many_images_keeps_the_points_that_can_be_seen():
    rng = np.random.default_rng(0)
    own, other = rng.normal(1.5, 1, 20_000), rng.normal(0, 1, 30_000)
    fpr, tpr = plots.roc(own, other)
    wanted = sklearn_roc(own, other)
    assert len(fpr) < 4000 < len(wanted[0]) / 2
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 100, 100)
    points = set(zip(*np.round(wanted, 9), strict=True))
    assert set(zip(fpr.round(9), tpr.round(9), strict=True)) <= points, "none is made up"
    assert np.abs(np.diff(fpr)).max() <= 0.21
    assert np.abs(np.diff(tpr)).max() <= 0.21


def lhact(value, low, high, order=2):
    raised = max(value, low)
    return raised if raised < high else raised / math.sqrt(1 + (raised / high) ** (2 * order)) + low


def test_activity_against_numpy(opened, small_sets, evaluated, monkeypatch):
    """Files are read a few rows at a time."""
    scored, told = evaluated[1], []
    monkeypatch.setattr("lhact.evaluation.score.CPU_ROWS", 7)
    fitted = [method.fitted for method in scored]
    activity = activities.measure(opened, fitted, CPU, told.append)
    assert sum(told) == sum(opened.sets[name].images for name in ("id", *OOD))
    assert max(told) == 7
    low, high = (scored[1].fitted.parameters[name] for name in ("low", "high"))
    rectifiers = scored[1].fitted.rectifiers
    assert activity.edges[0] == 0
    for name in ("id", *OOD):
        rows = small_sets[name].astype(np.float64)
        counts, _ = np.histogram(rows, activity.edges)
        shares = activity.densities[name] * np.diff(activity.edges)
        np.testing.assert_allclose(shares, counts / rows.size)
        np.testing.assert_allclose(activity.means[()][name], rows.mean(axis=0), rtol=1e-6)
        after = np.vectorize(lhact)(rows, low, high).mean(axis=0)
        np.testing.assert_allclose(activity.means[rectifiers][name], after, rtol=1e-5)
    assert set(activity.densities) == {"id", *OOD}, "not the calibration set"
    curve = [lhact(float(np.float32(point)), low, high) for point in activity.points]
    np.testing.assert_allclose(activity.curves[rectifiers], curve, rtol=1e-5)
    assert len(activity.means) == 3, "that of lhact and lhact+maxlogit is the same"


def test_the_range_of_activations(tmp_path, write_cache, small_sets, small_head):
    """Negative activations are drawn, and a set whose activations are all the same."""
    below = {name: rows - 2 for name, rows in small_sets.items()}
    opened = cache.open_cache(write_cache(tmp_path / "below", below, *small_head))
    edges = activities.measure(opened, [], CPU).edges
    assert edges[0] == pytest.approx(-2)
    same = {name: np.zeros_like(rows) for name, rows in small_sets.items()}
    opened = cache.open_cache(write_cache(tmp_path / "same", same, *small_head))
    found = activities.measure(opened, [], CPU)
    assert (found.edges[0], found.edges[-1]) == (0, 1)
    assert found.densities["id"][0] == pytest.approx(len(found.densities["id"]))


@pytest.mark.parametrize("name", ELEMENTWISE + OTHERS)
def test_only_functions_of_single_activations_have_a_curve(opened, name):
    [method] = fit_methods(opened, [parse(name)], CPU)
    points = np.linspace(0, 4, 101)
    curve = activities.elementwise_curve(method.rectifiers[0], points, 12, CPU)
    assert (curve is not None) is (name in ELEMENTWISE)
    if curve is not None:
        row = torch.tensor([[points[37]] + [9.0] * 11], dtype=torch.float32)
        alone = method.rectifiers[0](activations=row)[0, 0]
        assert curve[37] == pytest.approx(float(alone), rel=1e-5)


def test_rectification_with_its_thresholds(evaluated):
    _, scored, activity = evaluated
    figures = drawn("rectification", *evaluated)
    assert set(figures) == {"rectification-lhact", "rectification-lhact-maxlogit"}
    top, middle, bottom = figures["rectification-lhact"].axes
    parameters = scored[1].fitted.parameters
    marks = [float(x[0]) for x, _ in lines(top, ":")]
    assert marks == [parameters["low"], parameters["high"]]
    assert [text.get_text() for text in top.texts] == [
        f"{name} {parameters[name]:.3g}" for name in ("low", "high")
    ]
    densities = [patch.get_data().values for patch in middle.patches]
    np.testing.assert_array_equal(densities, [activity.densities[name] for name in ("id", *OOD)])
    for name, patch in zip(OOD, bottom.patches, strict=True):
        for ratio, ood, own in zip(
            patch.get_data().values, activity.densities[name], activity.densities["id"], strict=True
        ):
            assert ratio == pytest.approx(ood / own) if own and ood else math.isnan(ratio)


def test_a_threshold_beyond_the_picture_is_not_marked(opened):
    method = variants(["react"], [parse_setting("react.high=inf")], [], published=False)
    figures = drawn("rectification", *evaluate(opened, method))
    assert not figures["rectification-react"].axes[0].texts


def test_channel_means_are_sorted_by_those_of_id(opened, small_sets, evaluated):
    figures = drawn("channels", *evaluated)
    assert set(figures) == {f"channels-{name}" for name in ("lhact", "bats", "lhact-maxlogit")}
    order = np.argsort(small_sets["id"].mean(axis=0))
    axes = figures["channels-bats"].axes
    for axis, name in zip(axes, OOD, strict=False):
        [(_, other), (_, own)] = lines(axis, "o")
        np.testing.assert_allclose(own, small_sets["id"].mean(axis=0)[order], rtol=1e-5)
        np.testing.assert_allclose(other, small_sets[name].mean(axis=0)[order], rtol=1e-5)
    clip = evaluated[1][2].fitted.rectifiers[0].constants
    spread = 1.05 * clip["std"].numpy()
    for axis, name in zip(axes[4:], OOD, strict=True):
        mean = clip["mean"].numpy()
        after = np.clip(small_sets[name], mean - spread, mean + spread).mean(axis=0)
        np.testing.assert_allclose(lines(axis, "o")[0][1], after[order], rtol=1e-5)


def test_a_sweep_of_one_parameter_is_a_line(opened):
    result, (upper, lower) = swept(opened, "lhact.order=4,1,2")
    averages = {method.parameters["order"]: method.average for method in result.methods}
    for axis, metric in ((upper, "fpr95"), (lower, "auroc")):
        (places, values), *bars = lines(axis, "-")
        assert list(places) == [1, 2, 4]
        assert list(values) == [averages[order].metrics[metric] for order in places]
        assert [(tuple(x), tuple(y)) for x, y in bars] == [
            ((order, order), averages[order].uncertainty.intervals[metric]) for order in places
        ]
    assert lower.get_xlabel() == "order"


def test_a_sweep_of_two_parameters_is_a_heat_map(opened):
    result, axes = swept(opened, "lhact.high_percentile=90,80,95", "lhact.order=2,1")
    for axis, metric in zip(axes[:2], ("fpr95", "auroc"), strict=True):
        image = axis.images[0].get_array()
        assert image.shape == (2, 3)
        for method in result.methods:
            column = [80, 90, 95].index(method.parameters["high_percentile"])
            row = [1, 2].index(method.parameters["order"])
            assert image[row, column] == method.average.metrics[metric]
            assert f"{image[row, column]:.1f}" in [text.get_text() for text in axis.texts]
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("high_percentile", "order")


def test_a_sweep_of_three_parameters_is_points_against_each(opened):
    sweeps = ("lhact.low_percentile=10,30", "lhact.high_percentile=90,95", "lhact.order=1,2")
    result, axes = swept(opened, *sweeps)
    assert len(axes) == 6
    for axis, name in zip(axes, ("low_percentile", "high_percentile", "order"), strict=False):
        dots = sorted((float(x[0]), float(y[0])) for x, y in lines(axis, "o"))
        wanted = [(m.parameters[name], m.average.metrics["fpr95"]) for m in result.methods]
        assert dots == sorted(wanted)


def test_of_a_sweep_the_setting_that_the_table_marks_is_drawn(opened):
    methods = variants(["energy", "lhact"], [], [parse_sweep("lhact.order=1,2,8")], False)
    result, scored, _ = evaluate(opened, methods)
    best = min(result.methods[1:], key=lambda method: method.average.metrics["fpr95"])
    assert [result.methods[i] for i in best_settings(result)] == [result.methods[0], best]
    tied = dataclasses.replace(best.rows[0], tied=50.0)
    marked = dataclasses.replace(best, rows=(tied, *best.rows[1:]))
    others = tuple(marked if method is best else method for method in result.methods)
    best_of = best_settings(dataclasses.replace(result, methods=others))
    assert others[best_of[1]] is not marked, "its FPR95 says little"
    assert list(drawn("scores", result, scored)) == [
        "scores-energy",
        f"scores-lhact-order-{best.parameters['order']}",
    ]


def test_methods_against_sets_with_intervals(evaluated):
    """Hollow where scores are tied."""
    first, *others = evaluated[0].methods
    tied = tuple(dataclasses.replace(row, tied=50.0) for row in first.rows)
    methods = (dataclasses.replace(first, rows=tied), *others)
    result = dataclasses.replace(evaluated[0], methods=methods)
    panels = drawn("comparison", result, evaluated[1])["comparison"].axes
    assert [axis.get_title("left") for axis in panels[:5]] == [*OOD, "average"]
    for number, axis in enumerate(panels):
        metric = ("fpr95", "auroc")[number // 5]
        rows = [method.rows[number % 5] for method in result.methods]
        dots = [(float(x[0]), float(y[0])) for x, y in lines(axis, "o")]
        assert dots == [(row.metrics[metric], place) for place, row in enumerate(rows)]
        known = [(row.uncertainty, i) for i, row in enumerate(rows) if row.uncertainty]
        bars = [(tuple(x), tuple(y)) for x, y in lines(axis, "-")]
        assert bars == [(sure.intervals[metric], (i, i)) for sure, i in known]
        assert bool(bars) is (number % 5 < 3), "of Textures and averages over it there are none"
        faces = [line.get_mfc() for line in axis.lines if line.get_marker() == "o"]
        assert [face == "white" for face in faces] == [True, False, False, False]
    assert [text.get_text() for text in panels[0].get_yticklabels()] == METHODS
    assert not any(text.get_text() for text in panels[1].get_yticklabels())


def test_published_averages_beside_ours(opened):
    names = ["energy", "lhact", "react", "vra"]
    result, scored, _ = evaluate(opened, [parse(name) for name in names])
    figure = drawn("published", result, scored)["published"]
    # Table 6 of the paper: energy (ReAct's own numbers), LHAct and ReAct; VRA does not stand there
    table6 = ((58.41, 21.85, 32.68), (86.17, 95.42, 93.08))
    for axis, metric, numbers in zip(figure.axes, ("fpr95", "auroc"), table6, strict=True):
        assert [float(x[0]) for x, _ in lines(axis, "D")] == list(numbers)
        ours = [method.average.metrics[metric] for method in result.methods[:3]]
        assert [float(x[0]) for x, _ in lines(axis, "o")] == ours
    # A cache that another tool wrote may not say which network it is of.
    unknown = dataclasses.replace(opened.info.network, arch=None, weights=None, checkpoint=None)
    info = dataclasses.replace(opened.info, network=unknown)
    of_unknown = dataclasses.replace(result, about=results.About("imagenet", "small", info))
    parts = {"resnet18 own.pth": result, "unknown network unknown weights": of_unknown}
    for name, part in parts.items():
        legend = drawn("published", part, scored)["published"].legends[0]
        assert [text.get_text() for text in legend.get_texts()] == [
            f"{name}, 90 OOD images",
            "published: resnet50 IMAGENET1K_V1, 35,640 OOD images",
        ]


def test_published_averages_are_of_those_four_sets(opened):
    assert not drawn("published", *evaluate(opened.without("SUN"), [parse("energy")]))


def test_pictures_without_activity_or_energy(opened):
    result, scored, _ = evaluate(opened, [parse("msp")])
    figures = dict(plots.figures(result, scored))
    assert set(figures) == {"scores-msp", "roc", "comparison", "published"}
    assert len(figures["scores-msp"].axes) == 4, "nothing to stand before"


def test_no_legend_is_cut_off_where_there_is_one_set(tmp_path, write_cache, small_sets, small_head):
    sets = {name: small_sets[name] for name in ("id", "calibration", "SUN")}
    one = cache.open_cache(write_cache(tmp_path, sets, *small_head))
    legends = 0
    for _, figure in plots.figures(*evaluate(one, [parse(name) for name in METHODS])):
        for legend in figure.legends:
            ends = legend.get_window_extent()
            assert 0 <= ends.x0 < ends.x1 <= figure.bbox.width
            legends += 1
    assert legends == 4 + 1 + 2 + 3, "of scores, ROC curves, rectification functions and channels"


# Looks


def test_a_name_keeps_its_colour_and_no_two_look_alike():
    names = [*plot_style.METHOD_COLOURS, *(f"method {i}" for i in range(14))]
    looks = plot_style.looks(names, plot_style.METHOD_COLOURS)
    assert len(set(looks.values())) == 21
    assert {name: looks[name].colour for name in plot_style.METHOD_COLOURS} == (
        plot_style.METHOD_COLOURS
    )
    few = plot_style.looks(["own", "lhact"], plot_style.METHOD_COLOURS)
    assert few["own"].colour != few["lhact"].colour == looks["lhact"].colour
    assert set(plot_style.SET_COLOURS) == set(OOD)


def test_more_sets_than_columns_go_on_below():
    figure, grid = plot_style.panels({f"set {i}": "#123456" for i in range(6)}, 2, 1.0)
    assert len(figure.axes) == 16
    assert sum(axis.axison for axis in figure.axes) == 12
    assert [grid[f"set {i}"][0].get_title("left") for i in range(6)] == list(grid)
    places = {axis.get_subplotspec().rowspan.start for axis in grid["set 5"]}
    assert places == {2, 3}
    assert figure.get_figwidth() == 7.0


def test_file_names_are_safe_everywhere_and_differ():
    used = {}
    titles = ["a b=1.5, c=2", "a b+1.5/c:2", "A-B-1.5-C-2", "scores é*?", "x" * 300, "x" * 301]
    stems = [plot_style.distinct_stem(title, used) for title in titles]
    assert stems[:3] == ["a-b-1.5-c-2", "a-b-1.5-c-2-2", "A-B-1.5-C-2-3"]
    assert len({stem.lower() for stem in stems}) == len(titles)
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert all(stem and set(stem) <= allowed and len(stem) <= 100 for stem in stems)


# Bytes


@pytest.mark.parametrize("form", ["png", "pdf", "svg"])
def test_the_same_bytes_every_time(evaluated, form):
    """Whatever the user's own settings are; these are left alone."""
    figures = drawn("rectification", *evaluated)
    for axis in figures["rectification-lhact"].axes:
        # The layout's last digits change from run to run, and an SVG names its parts by them.
        bounds = axis.get_position(original=True).bounds
        assert bounds == pytest.approx(np.round(bounds, 6), abs=1e-12)
    first = {stem: plots.render(figure, form) for stem, figure in figures.items()}
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 50, "svg.fonttype": "none"}):
        before = dict(matplotlib.rcParams)
        again = {}
        for stem, figure in plots.figures(*evaluated, ["rectification"]):
            assert dict(matplotlib.rcParams) == before
            again[stem] = plots.render(figure, form)
        assert dict(matplotlib.rcParams) == before
    assert first == again
    one = first["rectification-lhact"]
    if form == "png":
        assert one[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(one[16:20], "big") == 3.3 * 300
    if form == "pdf":
        assert b"/FontFile2" in one, "fonts are embedded as TrueType"
        assert b"CreationDate" not in one
    if form == "svg":
        assert b"<svg" in one
        assert b"date>" not in one


def test_a_form_that_there_is_not():
    figure = plot_style.panels({"a": "#123456"}, 1, 1.0)[0]
    with pytest.raises(ValueError, match="png, pdf, svg, got 'gif'"):
        plots.render(figure, "gif")


# From the command line


@pytest.fixture
def run(tmp_path, write_cache, small_sets, small_head, run_eval):
    """run(*arguments) -> (status, stdout, stderr) of eval.py on a small cache."""
    write_cache(tmp_path / "cache" / "imagenet" / "resnet50", small_sets, *small_head)
    return lambda *arguments: run_eval("--cache-dir", tmp_path / "cache", *arguments)


def test_plots_of_a_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "render", lambda figure, form: form.encode())
    place = tmp_path / "new" / "plots"
    status, out, _ = run("--methods", "react", "--plots", place)
    assert status == 0
    stems = "scores-react scores-energy roc rectification-react channels-react comparison published"
    assert {path.name for path in place.iterdir()} == {
        f"{stem}.{form}" for stem in stems.split() for form in ("png", "pdf")
    }
    assert (place / "roc.pdf").read_text() == "pdf"
    assert run("--methods", "react")[1] == out, "the table is the same"


def test_plots_without_matplotlib(run, tmp_path, monkeypatch):
    """One line that names the extra, before anything else: the cache is not there either."""
    for name in [name for name in sys.modules if name.startswith("lhact.reporting.plot")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(script, "open_job", lambda job: pytest.fail("work is done"))
    status, out, err = run("--plots", tmp_path / "plots")
    assert (status, out) == (1, "")
    [line] = err.splitlines()
    assert line.startswith("eval.py: --plots needs matplotlib (")
    assert line.endswith("pip install 'lhact[plots]'")
