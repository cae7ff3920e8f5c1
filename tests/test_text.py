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
from lhact.evaluation.results import About, MethodResult, Result, Row
from lhact.published import Numbers
from lhact.records import NetworkInfo, RecordedPreprocessing, SetInfo
from lhact.reporting import text as reporting
from lhact.reporting.text import TITLES

SOURCE = "LHAct, Table 6"
TABLES = ("table", "markdown", "latex")


def as_result(content):
    """The record whose JSON that is, read by its keys alone."""
    methods = {}
    for place in ("results", "baseline"):
        groups = itertools.groupby(
            content[place], key=lambda row: (row["method"], str(row["parameters"]))
        )
        methods[place] = [as_method_result(list(rows)) for _, rows in groups]
    info = SetInfo(
        network=NetworkInfo(**content["network"]),
        preprocessing=RecordedPreprocessing(**content["preprocessing"]),
        precision=content["precision"],
        images=content["id"]["images"],
        fingerprint="",
        paths=(),
        accuracy=content["id"]["accuracy"],
    )
    about = About(
        content["benchmark"],
        content["name"],
        info,
        tuple(content.get("findings", ())),
        selected_on=content.get("selected_on"),
    )
    return Result(about, tuple(methods["results"]), next(iter(methods["baseline"]), None))


def as_method_result(rows):
    return MethodResult(
        rows[0]["method"],
        rows[0]["parameters"],
        tuple(
            Row(
                row["dataset"],
                row["images"],
                {name: row[name] for name in METRICS},
                row.get("threshold", 0.5),
                row.get("tied", 0.0),
                row["published"] and Numbers(**row["published"]),
            )
            for row in rows
        ),
    )


FORMATS = {
    kind: lambda content, metrics, form=form: form(as_result(content), metrics)
    for kind, form in reporting.FORMATS.items()
}


def row(method, dataset, fpr95, auroc, parameters=(), published=None, **others):
    values = {"aupr_id": 91.125, "aupr_ood": 71.375, "fpr95_ood_positive": 44.4375, **others}
    return {
        "method": method,
        "parameters": dict(parameters),
        "dataset": dataset,
        "images": {"SUN": 10_000, "my_set": 7}.get(dataset, 10_007),
        "fpr95": fpr95,
        "auroc": auroc,
        **values,
        "threshold": 0.5,
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
        title, _, _, *body = text.split("\n\n")[
            1
        ].splitlines()  # the second line has the numbers of images, the third is a rule
        return [re.split(r" {2,}", line.strip()) for line in (title, *body)]
    if kind == "markdown":
        lines = [line for line in text.splitlines() if line.startswith("|")]
        return [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in lines
            if "---" not in line
        ]
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    return [[cell.strip() for cell in line.removesuffix(r"\\").split(" & ")] for line in lines]


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
    rows = rows_by_label(FORMATS[kind](result, ["fpr95", "auroc"]), kind)
    assert rows["method"] == ["SUN", r"my\_set" if kind == "latex" else "my_set", "average"]
    assert rows["lhact"] == ["16.12/97.99", "7.65/88.11", "11.89/93.05"]
    assert rows["published"] == ["16.87/96.18", "-", "21.85/95.42"]
    assert rows["difference"] == ["-0.75/+1.81", "-", "-9.96/-2.37"]
    assert rows["msp"] == ["33.33/66.67", "100.00/0.00", "66.67/33.33"]
    assert [label for label in rows if label] == [
        "method",
        "lhact",
        "published",
        "difference",
        "msp",
    ]


@pytest.mark.parametrize("kind", TABLES)
def test_no_published_lines_where_nothing_is_published(result, kind):
    result["results"] = result["results"][3:]
    text = FORMATS[kind](result, ["fpr95", "auroc"])
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
    assert not [number for number in ("16.87", "96.18", "21.85", "95.42") if number in text]
    assert "difference" not in text


@pytest.mark.parametrize("kind", TABLES)
def test_no_source_without_its_numbers(result, kind):
    assert SOURCE in FORMATS[kind](result, ["fpr95", "auroc"])
    assert SOURCE not in FORMATS[kind](result, ["fpr95_ood_positive"])


@pytest.mark.parametrize("kind", TABLES)
def test_heading_says_network_convention_and_metrics(result, kind):
    text = FORMATS[kind](result, ["fpr95", "aupr_ood"])
    for part in (
        "imagenet",
        "resnet50 IMAGENET1K_V1",
        "fp32",
        "50,000 images",
        "76.13",
        "FPR95 / AUPR (OOD positive)",
    ):
        assert part in text
    assert "a higher score means ID; FPR95 keeps 95 % of ID" in text


@pytest.mark.parametrize("kind", TABLES)
def test_heading_of_a_checkpoint_without_labels(result, kind):
    result["network"] |= {"weights": None, "checkpoint": "mine.pth"}
    result["id"]["accuracy"] = None
    text = FORMATS[kind](result, ["auroc"])
    assert "resnet50 mine.pth" in text
    assert "top-1 unknown (no labels)" in text
    assert "FPR95" not in text


@pytest.mark.parametrize("kind", TABLES)
def test_findings_stand_above_the_table(result, kind):
    plain = FORMATS[kind](result, ["auroc"])
    result["findings"] = ["no resize: resize 0", "top-1 is 67.60 %"]
    lines = FORMATS[kind](result, ["auroc"]).splitlines()
    comment = "% " if kind == "latex" else ""
    warnings = [
        f"{comment}not comparable with the published numbers: {finding}"
        for finding in ("no resize: resize 0", "top-1 is 67.60 %")
    ]
    assert lines[2:4] == warnings
    assert [*lines[:2], *lines[4:]] == plain.splitlines()
    result["findings"] = []
    assert FORMATS[kind](result, ["auroc"]) == plain


@pytest.mark.parametrize("kind", TABLES)
def test_parameters_are_always_told(result, kind):
    """The values used are always printed."""
    text = FORMATS[kind](result, ["fpr95"])
    assert "lhact: low 0.219408, high 1.35208, order 2" in text
    assert "msp:" not in text


@pytest.mark.parametrize("kind", FORMATS)
def test_ends_with_one_line_break(result, kind):
    text = FORMATS[kind](result, ["fpr95", "auroc"])
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert not re.search(r"[ \t]+$", text, re.MULTILINE)


def test_table_is_aligned(result):
    """Every cell ends where its column's title ends; the images of each set stand below its
    name."""
    body = FORMATS["table"](result, ["fpr95", "auroc"]).split("\n\n")[1].splitlines()
    title, images, rule, *rows = body
    ends = [match.end() for match in re.finditer(r"\S+", title)]
    assert re.split(r" {2,}", images.strip()) == ["10,000", "7"]
    assert [match.end() for match in re.finditer(r"\S+", images)] == ends[1:3]
    assert rule == "-" * len(title)
    assert len(rows) == 4
    for line in rows:
        assert [match.end() for match in re.finditer(r"(?:\S| (?! ))+", line.lstrip())][1:] == [
            end - (len(line) - len(line.lstrip())) for end in ends[1:]
        ]


def test_markdown_is_a_table(result):
    lines = FORMATS["markdown"](result, ["fpr95", "auroc"]).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    table = [line for line in lines if line.startswith("|")]
    assert lines[first : first + len(table)] == table
    assert lines[first - 1] == lines[first + len(table)] == ""
    assert {line.count("|") for line in table} == {5}
    assert table[1] == "| --- | ---: | ---: | ---: |"


def test_latex_is_a_tabular(result):
    lines = FORMATS["latex"](result, ["fpr95", "auroc"]).splitlines()
    code = [line for line in lines if not line.startswith("%")]
    assert code[0] == r"\begin{tabular}{lrrr}"
    assert code[-1] == r"\end{tabular}"
    assert [line for line in code if re.fullmatch(r"\\\w+rule", line)] == [
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
    ]
    body = [line for line in code if line.endswith(r" \\")]
    assert len(body) == 5
    assert all(len(re.findall(r"(?<!\\)&", line)) == 3 for line in body)


def test_latex_escapes_labels_and_names(result):
    for number, line in enumerate(result["results"][:3]):
        result["results"].insert(
            3 + number, {**line, "parameters": {**LHACT, "high_percentile": 95}}
        )
    text = FORMATS["latex"](result, ["fpr95"])
    code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert r"my\_set" in code
    assert r"lhact high\_percentile=95" in code
    assert not re.search(r"(?<!\\)[_%#$^~]", code)


@pytest.mark.parametrize("chosen", [["fpr95", "auroc"], ["fpr95_ood_positive"]], ids=" ".join)
def test_csv_reads_back_unrounded(result, chosen):
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"](result, chosen))))
    assert len(rows) == 6
    for found, expected in zip(rows, result["results"], strict=True):
        assert (found["method"], found["dataset"], int(found["images"])) == tuple(
            expected[key] for key in ("method", "dataset", "images")
        )
        assert {name: float(found[name]) for name in METRICS} == {
            name: expected[name] for name in METRICS
        }
    assert [row["published_fpr95"] for row in rows] == ["16.87", "", "21.85", "", "", ""]
    assert [row["published_auroc"] for row in rows] == ["96.18", "", "95.42", "", "", ""]
    assert [row["published_source"] for row in rows] == [SOURCE, "", SOURCE, "", "", ""]
    parameters = dict(part.split("=") for part in rows[0]["parameters"].split())
    assert {key: float(value) for key, value in parameters.items()} == LHACT
    assert rows[3]["parameters"] == ""


def not_json(constant):
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.parametrize("chosen", [["fpr95", "auroc"], ["fpr95_ood_positive"]], ids=" ".join)
def test_json_is_the_result(result, chosen):
    assert json.loads(FORMATS["json"](result, chosen), parse_constant=not_json) == result


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
    return [
        cells[0] for cells in cells_of(FORMATS["markdown"](result_of(rows), ["fpr95"]), "markdown")
    ][1:]


def test_labels_tell_what_varies():
    assert labels(varied({"order": 2}, {"order": 3})) == ["lhact order=2 *", "lhact order=3"]
    assert labels(varied({"order": 2})) == ["lhact"]


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


def test_no_star_where_nothing_was_swept(result):
    assert "*" not in FORMATS["table"](result, ["fpr95"])


def test_labels_of_percentiles_tell_what_was_asked_for():
    rows = varied({"high": 1.0123, "high_percentile": 90}, {"high": 1.4567, "high_percentile": 96})
    assert labels(rows) == ["lhact high_percentile=90 *", "lhact high_percentile=96"]


def test_labels_of_close_values_differ():
    """Two lines with one name cannot be told apart."""
    found = labels(varied({"high": 1.3520756}, {"high": 1.3520757}))
    assert len(set(found)) == 2, found


def test_another_method_between_does_not_join_them():
    rows = [
        *varied({"order": 2}),
        row("msp", "SUN", 1.0, 1.0),
        row("msp", "average", 1.0, 1.0),
        *varied({"order": 3}),
    ]
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


def test_tied_scores_get_a_remark_and_never_a_star():
    """All scores the same: FPR95 0.00, the best there is, and worth nothing."""
    constant = tied([row("react", d, 0.0, 50.0, {"high": 0}) for d in ("SUN", "average")], 100.0)
    honest = [row("react", d, 40.0, 80.0, {"high": 1}) for d in ("SUN", "average")]
    result = result_of([*constant, *honest])
    assert labels(result["results"]) == ["react high=0", "react high=1 *"]
    (remark,) = reporting.remarks(as_result(result))
    assert remark.startswith("react high=0: 100 % of the images of a set score just the threshold")
    assert remark in FORMATS["table"](result, ["fpr95"])


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


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_no_cell_of_a_csv_is_a_formula(name):
    rows = [row("lhact", name, 1.0, 2.0), row("lhact", "average", 1.0, 2.0)]
    cells = next(csv.DictReader(io.StringIO(FORMATS["csv"](result_of(rows), ["fpr95"]))))
    assert cells["dataset"] == f"'{name}"
