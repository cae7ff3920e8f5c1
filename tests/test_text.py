"""Each format read back: what stands in it is the result, and nothing stands beside a number that
it cannot be compared with."""

import csv
import io
import itertools
import json
import math
import re

import pytest

from lhact.evaluation.metrics import METRICS
from lhact.evaluation.results import About, MethodResult, Result, Row, mean_and_deviation
from lhact.evaluation.uncertainty import Bootstrap, Uncertainty
from lhact.methods.compose import BadMethod
from lhact.published import Numbers
from lhact.records import NetworkInfo, RecordedPreprocessing, SetInfo
from lhact.reporting import text as reporting
from lhact.reporting.lines import TITLES, Table, View, remarks

SOURCE = "LHAct, Table 6"
TABLES = ("table", "markdown", "latex")
LABELS = ["lhact", "published", "difference", "msp"]


def as_result(content):
    """The record whose JSON that is, read by its keys alone."""
    methods = {}
    for place in ("results", "baseline"):
        groups = itertools.groupby(
            content[place], key=lambda r: (r["method"], str(r["parameters"]))
        )
        methods[place] = [as_method_result(list(rows)) for _, rows in groups]
    info = SetInfo(
        network=NetworkInfo(**content["network"]),
        preprocessing=RecordedPreprocessing(**content["preprocessing"]),
        precision=content["precision"],
        fingerprint="",
        paths=(),
        **content["id"],
    )
    about = About(content["benchmark"], content["name"], info, tuple(content["findings"]))
    baseline = next(iter(methods["baseline"]), None)
    return Result(about, tuple(methods["results"]), baseline, content.get("bootstrap_of"))


def as_method_result(rows):
    found = []
    for row in rows:
        values = {
            key: row[key] for key in ("dataset", "images", "threshold", "tied", "uncertainty")
        }
        known = row["published"] and Numbers(**row["published"])
        metrics = {name: row[name] for name in METRICS}
        found.append(Row(metrics=metrics, published=known, **values))
    return MethodResult(rows[0]["method"], rows[0]["parameters"], tuple(found))


def formatted(kind, results, *view):
    return reporting.FORMATS[kind](Table(results, View(*view)))


FORMATS = {
    kind: lambda content, *view, kind=kind: formatted(kind, [as_result(content)], *view)
    for kind in reporting.FORMATS
}


def row(method, dataset, fpr95, auroc, parameters=(), published=None):
    return {
        "method": method,
        "parameters": dict(parameters),
        "dataset": dataset,
        "images": {"SUN": 10_000, "my_set": 7}.get(dataset, 10_007),
        "fpr95": fpr95,
        "auroc": auroc,
        "aupr_id": 91.125,
        "aupr_ood": 71.375,
        "fpr95_ood_positive": 44.4375,
        "threshold": 0.5,
        "tied": 0.0,
        "uncertainty": None,
        "published": published and {"fpr95": published[0], "auroc": published[1], "source": SOURCE},
    }


def result_of(rows, baseline=(), **changes):
    network = {
        "arch": "resnet50",
        "weights": "IMAGENET1K_V1",
        "checkpoint": None,
        "sha256": "ab",
        "classes": 1000,
        "channels": 2048,
    }
    return {
        "benchmark": "imagenet",
        "name": "resnet50",
        "network": network,
        "preprocessing": {"resize": 256},
        "precision": "fp32",
        "id": {"images": 50_000, "accuracy": 76.13},
        "results": list(rows),
        "findings": [],
        "baseline": list(baseline),
        "selected_on": None,
        **changes,
    }


LHACT = {"low": 0.21940805315971373, "high": 1.3520756840705868, "order": 2}


@pytest.fixture
def result():
    """lhact with published numbers for one set of two, and msp without any; no value is one that
    rounding leaves alone."""
    return result_of(
        [
            row("lhact", "SUN", 16.123456, 97.987654, LHACT, (16.87, 96.18)),
            row("lhact", "my_set", 7.654321, 88.111111, LHACT),
            row("lhact", "average", 11.888888, 93.049382, LHACT, (21.85, 95.42)),
            row("msp", "SUN", 100 / 3, 200 / 3),
            row("msp", "my_set", 100.0, 0.0),
            row("msp", "average", 200 / 3, 100 / 3),
        ]
    )


def cells_of(text, kind):
    """The rows of the table, each a list of its cells' text."""
    if kind == "table":
        # The second line has the numbers of images, the third is a rule.
        title, _, _, *body = text.split("\n\n")[1].splitlines()
        return [re.split(r" {2,}", line.strip()) for line in (title, *body)]
    if kind == "markdown":
        lines = [line for line in text.splitlines() if line.startswith("|")]
        return [
            [cell.strip() for cell in line.replace("**", "").strip("|").split("|")]
            for line in lines
            if "---" not in line
        ]
    lines = [line.removesuffix(r"\\") for line in text.splitlines() if line.endswith(r"\\")]
    sets, _, *rows = ([cell.strip() for cell in line.split(" & ")] for line in lines)
    names = [re.fullmatch(r"\\multicolumn\{\d\}\{c\}\{(.*)\}", cell)[1] for cell in sets[1:]]
    found = [["method", *names]]
    for label, *cells in rows:
        count = len(cells) // len(names)
        plain = [re.sub(r"\\textbf\{(.*)\}|\$(.*)\$", r"\1\2", cell) for cell in cells]
        grouped = ["/".join(plain[i : i + count]) for i in range(0, len(plain), count)]
        grouped = ["-" if set(group) <= set("-/") else group for group in grouped]
        found.append([label.removeprefix(r"\quad "), *grouped])
    return found


def rows_by_label(text, kind):
    return {
        cells[0]: [cell.replace(" / ", "/") for cell in cells[1:]] for cells in cells_of(text, kind)
    }


def test_formats_and_titles_are_the_command_lines():
    assert list(FORMATS) == ["table", "markdown", "latex", "csv", "json"]
    assert list(TITLES) == list(METRICS)


@pytest.mark.parametrize("kind", TABLES)
def test_numbers_published_and_difference(result, kind):
    """Rounded to two places; the difference is ours minus theirs, of numbers that are not rounded,
    with its sign."""
    text = FORMATS[kind](result)
    assert SOURCE in text
    rows = rows_by_label(text, kind)
    assert rows["method"] == ["SUN", r"my\_set" if kind == "latex" else "my_set", "average"]
    assert rows["lhact"] == ["16.12/97.99", "7.65/88.11", "11.89/93.05"]
    assert rows["published"] == ["16.87/96.18", "-", "21.85/95.42"]
    assert rows["difference"] == ["-0.75/+1.81", "-", "-9.96/-2.37"]
    assert rows["msp"] == ["33.33/66.67", "100.00/0.00", "66.67/33.33"]
    assert [label for label in rows if label] == ["method", *LABELS]


@pytest.mark.parametrize("kind", TABLES)
def test_no_published_lines_where_nothing_is_published(result, kind):
    result["results"] = result["results"][3:]
    text = FORMATS[kind](result)
    assert "published" not in text
    assert "difference" not in text


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("metrics", [["fpr95"], ["auroc"], ["auroc", "fpr95"]], ids=" ".join)
def test_published_numbers_follow_the_choice_of_metrics(result, kind, metrics):
    rows = rows_by_label(FORMATS[kind](result, metrics), kind)
    numbers = {"fpr95": ("16.12", "16.87", "-0.75"), "auroc": ("97.99", "96.18", "+1.81")}
    for label, place in (("lhact", 0), ("published", 1), ("difference", 2)):
        assert rows[label][0] == "/".join(numbers[metric][place] for metric in metrics)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize(
    "metrics",
    [["fpr95_ood_positive"], ["fpr95_ood_positive", "auroc"], ["fpr95", "fpr95_ood_positive"]],
)
def test_no_published_number_beside_the_ood_positive_fpr95(result, kind, metrics):
    text = FORMATS[kind](result, metrics)
    assert "44.44" in text
    assert "FPR95 (OOD positive)" in text
    hidden = ("16.87", "96.18", "21.85", "95.42", "difference", SOURCE)
    assert not [word for word in hidden if word in text]


@pytest.mark.parametrize("kind", TABLES)
def test_heading_says_network_convention_and_metrics_and_notes_the_parameters(result, kind):
    """The values used are always printed."""
    text = FORMATS[kind](result, ["fpr95", "aupr_ood"])
    assert "imagenet, resnet50 IMAGENET1K_V1, fp32; ID: 50,000 images, top-1 76.13 %" in text
    assert "FPR95 / AUPR (OOD positive) in %; a higher score means ID; FPR95 keeps 95 %" in text
    assert "lhact: low 0.219408, high 1.35208, order 2" in text
    assert "msp:" not in text
    result["network"] |= {"weights": None, "checkpoint": "mine.pth"}
    result["id"]["accuracy"] = None
    text = FORMATS[kind](result, ["auroc"])
    assert "resnet50 mine.pth, fp32; ID: 50,000 images, top-1 unknown (no labels)" in text
    assert "FPR95" not in text


@pytest.mark.parametrize("kind", TABLES)
def test_findings_stand_above_the_table(result, kind):
    plain = FORMATS[kind](result, ["auroc"])
    result["findings"] = ["no resize: resize 0", "top-1 is 67.60 %"]
    lines = FORMATS[kind](result, ["auroc"]).splitlines()
    comment = "% " if kind == "latex" else ""
    warning = f"{comment}not comparable with the published numbers: "
    assert lines[2:4] == [warning + finding for finding in result["findings"]]
    assert [*lines[:2], *lines[4:]] == plain.splitlines()


@pytest.mark.parametrize("kind", FORMATS)
def test_ends_with_one_line_break(result, kind):
    text = FORMATS[kind](result)
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert not re.search(r"[ \t]+$", text, re.MULTILINE)


def test_table_is_aligned(result):
    """Every cell ends where its column's title ends; the images of each set stand below its
    name."""
    title, images, rule, *rows = FORMATS["table"](result).split("\n\n")[1].splitlines()

    def ends(line):
        cells = re.finditer(r"(?:\S| (?! ))+", line.lstrip())
        return [cell.end() + len(line) - len(line.lstrip()) for cell in cells]

    assert re.split(r" {2,}", images.strip()) == ["10,000", "7"]
    assert ends(images) == ends(title)[1:3]
    assert rule == "-" * len(title)
    assert [ends(line)[1:] for line in rows] == [ends(title)[1:]] * 4


def test_markdown_is_a_table(result):
    lines = FORMATS["markdown"](result).splitlines()
    table = [line for line in lines if line.startswith("|")]
    first = lines.index(table[0])
    assert lines[first - 1 : first + len(table) + 1] == ["", *table, ""]
    assert {line.count("|") for line in table} == {5}
    assert table[1] == "| --- | ---: | ---: | ---: |"


def test_latex_is_a_table_with_two_levels_of_headings(result):
    text = FORMATS["latex"](result)
    code = [line for line in text.splitlines() if not line.startswith("%")]
    assert code[0] == r"\begin{table}[t]"
    assert code[-3:] == [r"\bottomrule", r"\end{tabular}}", r"\end{table}"]
    start = code.index(r"\begin{tabular}{lrrrrrr}")
    sets = (rf" & \multicolumn{{2}}{{c}}{{{name}}}" for name in ("SUN", r"my\_set", "average"))
    assert code[start + 1 : start + 6] == [
        r"\toprule",
        "".join(sets) + r" \\",
        r"\cmidrule(lr){2-3} \cmidrule(lr){4-5} \cmidrule(lr){6-7}",
        "Method" + r" & FPR95$\downarrow$ & AUROC$\uparrow$" * 3 + r" \\",
        r"\midrule",
    ]
    body = code[start + 6 : -3]
    assert [line for line in body if not line.endswith(r" \\")] == [r"\addlinespace"]
    assert all(line.count(" & ") == 6 for line in body if line.endswith(r" \\"))
    assert "".join(code).count("{") == "".join(code).count("}")
    assert "".join(code).count("$") % 2 == 0


def test_latex_caption_names_network_convention_and_sets(result):
    text = FORMATS["latex"](result)
    (caption,) = [line for line in text.splitlines() if line.startswith(r"\caption{")]
    assert (
        r"FPR95$\downarrow$ and AUROC$\uparrow$ in percent for resnet50 (IMAGENET1K\_V1) on "
        r"imagenet: ID 50,000 images, OOD SUN (10,000 images) and my\_set (7 images)." in caption
    )
    assert r"FPR95 is the share of OOD above the score that 95\,\% of ID exceed." in caption
    other = FORMATS["latex"](result, ["fpr95_ood_positive"])
    assert r"the share of ID below the score that catches 95\,\% of OOD" in other


def test_the_best_of_a_column_is_bold_as_it_is_shown(result):
    """Of two that look the same both are; the best of one method alone means nothing."""
    result["results"][3]["fpr95"] = 16.1234  # looks like lhact's 16.123456
    markdown = FORMATS["markdown"](result, ["fpr95", "auroc", "fpr95_ood_positive"])
    assert "| lhact | **16.12**/**97.99**/**44.44** | **7.65**/**88.11**/**44.44** |" in markdown
    assert "| msp | **16.12**/66.67/**44.44** | 100.00/0.00/**44.44** |" in markdown
    latex = FORMATS["latex"](result, ["auroc"])
    assert r"lhact & \textbf{97.99} & \textbf{88.11}" in latex
    assert "msp & $66.67$" in latex
    result["results"] = result["results"][:3]
    assert "**" not in FORMATS["markdown"](result, ["fpr95"])
    assert "textbf" not in FORMATS["latex"](result, ["fpr95"])


def test_latex_escapes_labels_and_names(result):
    other = {**LHACT, "high_percentile": 95}
    result["results"][3:3] = [{**line, "parameters": other} for line in result["results"][:3]]
    lines = FORMATS["latex"](result, ["fpr95"]).splitlines()
    code = "\n".join(line for line in lines if not line.startswith("%"))
    assert r"my\_set" in code
    assert r"lhact high\_percentile=95" in code
    texts = re.sub(r"\$[^$]*\$|\{%$", "", code, flags=re.MULTILINE)  # but for mathematics
    assert not re.search(r"(?<!\\)[_%#$^~]", texts)


@pytest.mark.parametrize("chosen", [["fpr95", "auroc"], ["fpr95_ood_positive"]], ids=" ".join)
def test_csv_reads_back_unrounded(result, chosen):
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"](result, chosen))))
    assert len(rows) == 6
    for found, expected in zip(rows, result["results"], strict=True):
        for key in ("method", "dataset"):
            assert found[key] == expected[key]
        for key in ("images", *METRICS):
            assert float(found[key]) == expected[key]
    for key, whole, average in (
        ("fpr95", "16.87", "21.85"),
        ("auroc", "96.18", "95.42"),
        ("source", SOURCE, SOURCE),
    ):
        assert [row[f"published_{key}"] for row in rows] == [whole, "", average, "", "", ""]
    parameters = dict(part.split("=") for part in rows[0]["parameters"].split())
    assert {key: float(value) for key, value in parameters.items()} == LHACT
    assert rows[3]["parameters"] == ""


def not_json(constant):
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.parametrize("chosen", [["fpr95", "auroc"], ["fpr95_ood_positive"]], ids=" ".join)
def test_json_is_the_result(result, chosen):
    origin = {"benchmark": "imagenet", "name": "resnet50"}
    origin |= {"network": "resnet50", "weights": "IMAGENET1K_V1"}
    read = json.loads(FORMATS["json"](result, chosen), parse_constant=not_json)
    rows = [{**row, **origin} for row in result["results"]]
    for line in rows:
        del line["tied"], line["uncertainty"]
    assert read == {**result, "results": rows}


def test_json_of_an_infinite_threshold_can_be_read_by_any_tool(result):
    """--set lhact.high=inf is accepted; Infinity is not JSON (RFC 8259)."""
    result["results"][0]["parameters"] = {**LHACT, "high": math.inf}
    json.loads(FORMATS["json"](result, ["fpr95"]), parse_constant=not_json)


# One method with several parameters


def varied(*parameters):
    return [
        row("lhact", dataset, 10.0 * number, 90.0, {**LHACT, **changed})
        for number, changed in enumerate(parameters, 1)
        for dataset in ("SUN", "average")
    ]


def labels(rows):
    text = FORMATS["markdown"](result_of(rows), ["fpr95"])
    return [cells[0] for cells in cells_of(text, "markdown")][1:]


@pytest.mark.parametrize(
    ("parameters", "shown"),
    [
        ([{"order": 2}], ["lhact"]),
        ([{"order": 2}, {"order": 3}], ["lhact order=2 *", "lhact order=3"]),
        # What was asked for, not what follows from it.
        (
            [{"high": 1.01, "high_percentile": 90}, {"high": 1.45, "high_percentile": 96}],
            ["lhact high_percentile=90 *", "lhact high_percentile=96"],
        ),
        # Two lines with one name could not be told apart.
        (
            [{"high": 1.3520756}, {"high": 1.3520757}],
            ["lhact high=1.3520756 *", "lhact high=1.3520757"],
        ),
    ],
)
def test_labels_tell_what_varies(parameters, shown):
    assert labels(varied(*parameters)) == shown


def test_the_star_is_the_lowest_average_fpr95_and_says_what_it_was_chosen_on():
    """The best cell of a sweep on the test sets is labelled as what it is."""
    rows = varied({"order": 2}, {"order": 3}, {"order": 4})
    for line, fpr95, auroc in zip(
        rows, (1, 50, 9, 40, 5, 45), (99, 99, 50, 50, 60, 60), strict=True
    ):
        line |= {"fpr95": fpr95, "auroc": auroc}
    assert labels(rows) == ["lhact order=2", "lhact order=3 *", "lhact order=4"]
    honest = "*: lowest average FPR95 of that method's settings, chosen on these very test sets"
    assert all(honest in FORMATS[kind](result_of(rows), ["auroc"]) for kind in TABLES)


def test_another_method_between_does_not_join_them():
    between = [row("msp", dataset, 1.0, 1.0) for dataset in ("SUN", "average")]
    rows = [*varied({"order": 2}), *between, *varied({"order": 3})]
    assert labels(rows) == ["lhact order=2 *", "msp", "lhact order=3"]


# The baseline


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ((20.0, 95.0), "FPR95 20.00 against 30.00 (better), AUROC 95.00 against 92.00 (better)"),
        ((40.0, 91.0), "FPR95 40.00 against 30.00 (worse), AUROC 91.00 against 92.00 (worse)"),
        ((30.0, 93.0), "FPR95 30.00 against 30.00 (the same), AUROC 93.00 against 92.00 (better)"),
    ],
)
@pytest.mark.parametrize("kind", TABLES)
def test_comparison_with_the_baseline_is_honest(kind, ours, words):
    rows = [row("lhact", "SUN", 99.0, 1.0, LHACT), row("lhact", "average", *ours, LHACT)]
    baseline = [row("energy", "SUN", 1.0, 99.0), row("energy", "average", 30.0, 92.0)]
    text = FORMATS[kind](result_of(rows, baseline), ["fpr95", "auroc"])
    assert f"lhact against plain energy on average: {words}" in text
    assert rows_by_label(text, kind)["energy"] == ["1.00/99.00", "30.00/92.00"]


# Ties, and texts from elsewhere


def tied(rows, percent):
    return [{**row, "tied": percent} for row in rows]


def test_tied_scores_get_a_remark_and_never_a_star_nor_bold_print():
    """All scores the same: FPR95 0.00, the best there is, and worth nothing."""
    constant = tied([row("react", d, 0.0, 50.0, {"high": 0}) for d in ("SUN", "average")], 100.0)
    honest = [row("react", d, 40.0, 80.0, {"high": 1}) for d in ("SUN", "average")]
    result = result_of([*constant, *honest])
    assert labels(result["results"]) == ["react high=0", "react high=1 *"]
    assert labels([*constant, *tied(honest, 2.0)]) == ["react high=0", "react high=1"]
    (remark,) = remarks(as_result(result))
    assert remark.startswith("react high=0: 100 % of the images of a set score just the threshold")
    text = FORMATS["markdown"](result, ["fpr95"])
    assert remark in text
    assert "| react high=0 | 0.00 | 0.00 |" in text
    assert "| react high=1 * | **40.00** | **40.00** |" in text


def test_tied_scores_are_never_called_better():
    rows = tied([row("react", "average", 0.0, 50.0)], 100.0)
    text = FORMATS["table"](result_of(rows, [row("energy", "average", 30.0, 92.0)]), ["fpr95"])
    assert "FPR95 0.00 against 30.00 (not to be compared)" in text
    assert "better" not in text


@pytest.mark.parametrize("kind", TABLES)
def test_texts_from_a_cache_reach_no_terminal_and_no_tex_as_they_are(result, kind):
    hostile = "\x1b[2J\\immediate\\write18{id}\n$x^2$"
    result["network"] |= {"weights": None, "checkpoint": hostile, "arch": hostile}
    result["precision"] = hostile
    text = FORMATS[kind](result, ["fpr95"])
    assert "\x1b" not in text
    code = [line for line in text.splitlines() if not line.startswith("%")]
    assert kind != "latex" or not any("write18{" in line for line in code)


def test_no_cell_of_a_csv_is_a_formula():
    names = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"]
    result = result_of([row("lhact", name, 1.0, 2.0) for name in names])
    cells = csv.DictReader(io.StringIO(FORMATS["csv"](result, ["fpr95"])))
    assert [line["dataset"] for line in cells] == [f"'{name}" for name in names]


# Intervals


def sure(row, fpr95, auroc, differences=None):
    """The row with the ends of its intervals and, by metric, (difference, low, high)."""
    gaps = (differences or {}).items()
    first, ends = {m: v[0] for m, v in gaps}, {m: v[1:] for m, v in gaps}
    return {**row, "uncertainty": Uncertainty({"fpr95": fpr95, "auroc": auroc}, first, ends)}


@pytest.fixture
def resampled():
    """lhact, and msp with a difference that is beyond the noise in FPR95 alone; my_set has no
    intervals."""
    on_sun = {"fpr95": (25.31, 12.96, 33.5), "auroc": (0.63, -1.22, 2.52)}
    average = {"fpr95": (51.8, 51.0, 52.0), "auroc": (-34.99, -35.5, -34.0)}
    rows = [
        sure(row("lhact", "SUN", 39.42, 89.89), (33.51, 47.7), (87.75, 91.73)),
        row("lhact", "my_set", 7.65, 88.11),
        sure(row("lhact", "average", 30.5, 80.25), (30.0, 31.25), (80.0, 81.0)),
        sure(row("msp", "SUN", 64.73, 90.52), (54.45, 72.26), (88.02, 92.75), on_sun),
        row("msp", "my_set", 100.0, 0.0),
        sure(row("msp", "average", 82.3, 45.26), (82.0, 83.0), (45.0, 46.0), average),
    ]
    return result_of(rows, bootstrap_of=Bootstrap(1000, 3))


def test_table_has_the_ends_below_each_number(resampled):
    rows = cells_of(FORMATS["table"](resampled), "table")
    assert rows[1:] == [
        ["lhact", "39.42 / 89.89", "7.65 / 88.11", "30.50 / 80.25"],
        ["95 % from", "33.51 / 87.75", "-", "30.00 / 80.00"],
        ["95 % to", "47.70 / 91.73", "-", "31.25 / 81.00"],
        ["msp", "64.73 / 90.52", "100.00 / 0.00", "82.30 / 45.26"],
        ["95 % from", "54.45 / 88.02", "-", "82.00 / 45.00"],
        ["95 % to", "72.26 / 92.75", "-", "83.00 / 46.00"],
        ["minus lhact", "+25.31† / +0.63", "-", "+51.80† / -34.99†"],
        ["95 % from", "+12.96 / -1.22", "-", "+51.00 / -35.50"],
        ["95 % to", "+33.50 / +2.52", "-", "+52.00 / -34.00"],
    ]


def test_markdown_has_the_intervals_in_lines_of_their_own(resampled):
    rows = cells_of(FORMATS["markdown"](resampled, ["auroc"]), "markdown")
    assert rows[2] == ["95 % interval", "[87.75, 91.73]", "-", "[80.00, 81.00]"]
    assert rows[5:] == [
        ["minus lhact", "+0.63", "-", "-34.99†"],
        ["95 % interval", "[-1.22, +2.52]", "-", "[-35.50, -34.00]"],
    ]


@pytest.mark.parametrize("kind", TABLES)
def test_a_mark_is_explained_whichever_name_it_stands_under(resampled, kind):
    unmarked = {**resampled, "results": [{**r, "uncertainty": None} for r in resampled["results"]]}
    both = [named(unmarked, "first"), named(resampled, "second")]
    text = formatted(kind, both)
    assert "†: the 95 % interval of the difference from lhact excludes 0" in text


@pytest.mark.parametrize("kind", TABLES)
def test_notes_say_how_the_intervals_came_about(resampled, kind):
    text = FORMATS[kind](resampled, ["fpr95"])
    assert "95 % intervals: 1,000 resamples of the images, the same for every method" in text
    assert "(percentile bootstrap, seed 3)" in text
    assert "†: the 95 % interval of the difference from lhact excludes 0" in text
    assert "too small for an interval, with fewer than 20 images: my_set" in text


@pytest.mark.parametrize("ends", [(-1.0, 0.0), (0.0, 2.0), (0.0, 0.0), (-1.0, 1.0)])
def test_no_mark_where_the_interval_holds_zero(resampled, ends):
    gap = {"fpr95": (0.5, *ends)}
    resampled["results"][3] = sure(resampled["results"][3], (54, 72), (88, 92), gap)
    lines = FORMATS["table"](resampled, ["fpr95"]).splitlines()
    (line,) = [line for line in lines if line.startswith("  minus")]
    assert line.count("†") == 1  # the average's
    assert line.split()[2] == "+0.50"


def test_metrics_without_intervals_have_none(resampled):
    text = FORMATS["table"](resampled, ["aupr_id"])
    assert "% from" not in text
    assert "minus" not in text
    rows = cells_of(FORMATS["table"](resampled, ["aupr_id", "auroc"]), "table")
    assert rows[2][:2] == ["95 % from", "- / 87.75"]
    assert rows[7][:2] == ["minus lhact", "- / +0.63"]


def test_a_difference_within_its_interval_is_not_called_better():
    ours = [sure(row("lhact", "average", 20.0, 95.0), (15.0, 25.0), (94.0, 96.0))]
    gaps = {"fpr95": (2.0, -1.0, 4.0), "auroc": (-3.0, -4.0, -2.0)}
    plain = [sure(row("energy", "average", 22.0, 92.0), (15.0, 25.0), (94.0, 96.0), gaps)]
    result = result_of(ours, plain, bootstrap_of=Bootstrap(100))
    text = FORMATS["table"](result)
    assert "FPR95 20.00 against 22.00 (within the noise)" in text
    assert "AUROC 95.00 against 92.00 (better)" in text


@pytest.mark.parametrize(
    ("half_width", "shown"),
    [(30, "39"), (1, "39"), (0.99, "39.5"), (0.1, "39.5"), (0.09, "39.46"), (0, "39.46")],
)
def test_automatic_digits_follow_the_interval(half_width, shown):
    """The last digit is worth no less than a tenth of the half-width, of which one of 10,000 images
    is 0.01; two decimals at most."""
    ends = (40 - half_width, 40 + half_width)
    rows = [sure(row("lhact", d, 39.456, 90.0), ends, (80.0, 99.0)) for d in ("SUN", "average")]
    text = FORMATS["table"](result_of(rows, bootstrap_of=Bootstrap(100)), ["fpr95"], None)
    assert cells_of(text, "table")[1] == ["lhact", shown, shown]


def test_automatic_digits_are_a_columns_and_a_metrics_own(resampled):
    """Those of the narrowest interval of the column; none for a set that is too small for one."""
    for line, half_width in zip(resampled["results"][:4:3], (5.0, 0.4), strict=True):
        line |= sure(line, (39.0 - half_width, 39.0 + half_width), (85.0, 95.0))
    text = FORMATS["table"](resampled, ["fpr95", "auroc", "aupr_id"], None)
    cells = ["39.4 / 90 / 91.12", "8 / 88 / 91.12", "30.5 / 80.2 / 91.12"]
    assert cells_of(text, "table")[1] == ["lhact", *cells]


def test_latex_has_the_ways_to_the_ends(resampled):
    """lhact on SUN: 39.42, from 33.51 to 47.70."""
    text = FORMATS["latex"](resampled, ["fpr95"])
    assert r"lhact & $\mathbf{39.42}^{+8.28}_{-5.91}$ & \textbf{7.65} & " in text
    assert r"msp & $64.73^{+7.53}_{-10.28}$ & $100.00$ & " in text
    assert r"\quad minus lhact & $+25.31^{+8.19}_{-12.35}{}^{\dagger}$ & -- & " in text
    assert r"Super- and subscripts lead to the ends of 95\,\% intervals (1,000 resamples" in text
    assert r"$\dagger$: the interval of the difference from lhact excludes 0." in text


# Several names


def named(result, name, **changes):
    return as_result({**result, "name": name, **changes})


def test_several_names_in_one_table_with_a_column_for_the_name(result):
    """A set that one of them lacks stands before the averages, as unknown."""
    fewer = [row("msp", "other", 1.0, 2.0), row("msp", "average", 3.0, 4.0)]
    both = [
        named(result, "first", results=result["results"][3:]),
        named(result, "b", results=fewer),
    ]
    for kind in ("table", "markdown"):
        assert cells_of(formatted(kind, both, ["fpr95"]), kind) == [
            ["name", "method", "SUN", "my_set", "other", "average"],
            ["first", "msp", "33.33", "100.00", "-", "66.67"],
            ["b", "msp", "-", "-", "1.00", "3.00"],
        ]
    latex = formatted("latex", both, ["fpr95"])
    assert r" & & \multicolumn{1}{c}{SUN} & " in latex
    assert r"b & msp & -- & -- & $1.00$ & $3.00$ \\" in latex
    assert r"\cmidrule(lr){3-3}" in latex
    assert r"\begin{tabular}{llrrrr}" in latex
    for kind in TABLES:
        text = formatted(kind, both, ["fpr95"])
        assert "first: imagenet, resnet50 IMAGENET1K_V1" in text
        assert "b: imagenet, resnet50 IMAGENET1K_V1" in text


def test_json_of_several_names_is_a_list(result):
    both = [named(result, "a"), named(result, "b")]
    alone = [json.loads(formatted("json", [one])) for one in both]
    assert json.loads(formatted("json", both)) == alone


def test_rows_of_a_csv_say_where_they_come_from(result):
    network = {**result["network"], "weights": None, "checkpoint": "=mine.pth"}
    both = [named(result, "a"), named(result, "b", network=network)]
    rows = list(csv.DictReader(io.StringIO(formatted("csv", both))))
    origins = [(r["benchmark"], r["name"], r["network"], r["weights"]) for r in rows]
    assert origins[:6] == [("imagenet", "a", "resnet50", "IMAGENET1K_V1")] * 6
    assert origins[6:] == [("imagenet", "b", "resnet50", "'=mine.pth")] * 6


def test_mean_and_standard_deviation_over_names(result):
    """Of 10, 12 and 20: 14 and the root of 28; nothing is the best standard deviation."""
    parts = []
    for name, fpr95 in (("a", 10.0), ("b", 12.0), ("c", 20.0)):
        rows = [
            row(method, dataset, value, auroc, parameters)
            for method, value, auroc, parameters in (
                ("lhact", fpr95, 90.0, {**LHACT, "low": fpr95}),
                ("msp", 50.0, 80.0, {}),
            )
            for dataset in ("SUN", "average")
        ]
        network = {**result["network"], "weights": None, "checkpoint": f"{name}.pth"}
        identity = {"images": 50_000, "accuracy": fpr95}
        parts.append(named(result, name, results=rows, network=network, id=identity))
    mean, std = mean_and_deviation(parts)
    assert mean.methods[0].average.metrics["fpr95"] == 14.0
    assert std.methods[0].average.metrics["fpr95"] == pytest.approx(28**0.5)
    assert std.methods[1].average.metrics["auroc"] == 0.0
    assert mean.methods[0].parameters == {"high": LHACT["high"], "order": 2}
    assert (mean.about.info.accuracy, mean.about.info.network.arch) == (14.0, "resnet50")
    assert mean.about.info.network.checkpoint is None
    assert mean.to_json()["over"] == ["a", "b", "c"]
    text = formatted("markdown", [*parts, mean, std])
    assert cells_of(text, "markdown")[-4:] == [
        ["mean", "lhact", "14.00/90.00", "14.00/90.00"],
        ["mean", "msp", "50.00/80.00", "50.00/80.00"],
        ["std", "lhact", "5.29/0.00", "5.29/0.00"],
        ["std", "msp", "0.00/0.00", "0.00/0.00"],
    ]
    assert "| mean | lhact | **14.00**/**90.00** |" in text
    assert "std: over a, b, c; n - 1" in text
    latex = formatted("latex", [*parts, mean, std])
    assert "std: standard deviation over the names." in latex


def test_no_mean_over_names_that_differ(result):
    other = named(result, "other", results=result["results"][:3])
    with pytest.raises(BadMethod, match=r"the same methods and sets .*; mine and other differ"):
        mean_and_deviation([named(result, "mine"), other])
