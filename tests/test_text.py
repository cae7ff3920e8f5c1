"""Each format read back: what stands in it is the result, and nothing stands beside a number that
it cannot be compared with."""

import csv
import dataclasses
import io
import json
import math
import re
from types import MappingProxyType

import pytest
from helpers import set_info

from lhact.evaluation.metrics import METRICS
from lhact.evaluation.results import About, MethodResult, Result, Row, mean_and_deviation
from lhact.evaluation.uncertainty import Bootstrap, Uncertainty
from lhact.methods.compose import BadMethod
from lhact.published import Numbers
from lhact.records import NetworkInfo
from lhact.reporting.lines import TITLES, Table, View, remarks
from lhact.reporting.text import FORMATS

TABLES = ("table", "markdown", "latex")
NETWORK = NetworkInfo("resnet50", "IMAGENET1K_V1", None, "ab", classes=1000, channels=2048)
INFO = set_info(network=NETWORK, images=50_000, accuracy=76.13)
ORDER = {"low": 0.21940805315971373, "high": 1.3520756840705868, "order": 2}


def row(dataset, fpr95, auroc, published=None, **changes):
    metrics = dict(zip(METRICS, (fpr95, auroc, 91.125, 71.375, 44.4375), strict=True))
    images = {"SUN": 10_000, "my_set": 7}.get(dataset, 10_007)
    known = published and Numbers(*published, "LHAct, Table 6")
    return Row(dataset, images, metrics, 0.5, **{"tied": 0.0, "published": known, **changes})


def lhact(*rows, **parameters):
    return MethodResult("lhact", {**ORDER, **parameters}, rows)


def method(name, *rows, **parameters):
    return MethodResult(name, parameters, rows)


def result_of(*methods, baseline=None, bootstrap=None, **about):
    about = About(**{"benchmark": "imagenet", "name": "resnet50", "info": INFO, **about})
    return Result(about, methods, baseline, bootstrap)


def formatted(kind, *results, **view):
    return FORMATS[kind](Table(results, View(**view)))


# No value is one that rounding leaves alone.
LHACT = lhact(
    row("SUN", 16.123456, 97.987654, (16.87, 96.18)),
    row("my_set", 7.654321, 88.111111),
    row("average", 11.888888, 93.049382, (21.85, 95.42)),
)
MSP = method("msp", row("SUN", 100 / 3, 200 / 3), row("my_set", 100, 0), row("average", 66.67, 33))
RESULT = result_of(LHACT, MSP)


def cells(text):
    """The rows of a table or of Markdown, each a list of its cells' text."""
    if "| --- |" in text:
        lines = [line for line in text.splitlines() if line[:1] == "|" and "---" not in line]
        return [[c.strip() for c in line.replace("**", "").split("|")[1:-1]] for line in lines]
    # The second line has the numbers of images, the third is a rule.
    title, _, _, *body = text.split("\n\n")[1].splitlines()
    return [re.split(r" {2,}", line.strip()) for line in (title, *body)]


def rows_by_label(text):
    return {label: values for label, *values in cells(text)}


def test_formats_and_titles_are_the_command_lines():
    assert list(FORMATS) == ["table", "markdown", "latex", "csv", "json"]
    assert list(TITLES) == list(METRICS)


TABLE = """\
imagenet, resnet50 IMAGENET1K_V1, fp32; ID: 50,000 images, top-1 76.13 %
FPR95 / AUROC in %; a higher score means ID; FPR95 keeps 95 % of ID
not comparable with the published numbers: no resize: resize 0
not comparable with the published numbers: top-1 is 67.60 %

method                  SUN         my_set        average
                     10,000              7
---------------------------------------------------------
lhact         16.12 / 97.99   7.65 / 88.11  11.89 / 93.05
  published   16.87 / 96.18              -  21.85 / 95.42
  difference  -0.75 / +1.81              -  -9.96 / -2.37
msp           33.33 / 66.67  100.00 / 0.00  66.67 / 33.00

lhact: low 0.219408, high 1.35208, order 2
threshold, the score that keeps 95 % of ID: lhact 0.5, msp 0.5
settings chosen on gaussian, not on what is tested
published: LHAct, Table 6
"""
MARKDOWN = """\
| method | SUN | my_set | average |
| --- | ---: | ---: | ---: |
| lhact | **16.12**/**97.99** | **7.65**/**88.11** | **11.89**/**93.05** |
| published | 16.87/96.18 | - | 21.85/95.42 |
| difference | -0.75/+1.81 | - | -9.96/-2.37 |
| msp | 33.33/66.67 | 100.00/0.00 | 66.67/33.00 |
"""
LATEX = r"""% needs \usepackage{booktabs,graphicx}
\begin{table}[t]
\centering
\setlength{\belowcaptionskip}{5pt}
\caption{FPR95$\downarrow$ and AUROC$\uparrow$ in percent for resnet50 (IMAGENET1K\_V1) on imagenet:
 ID 50,000 images, OOD SUN (10,000 images) and my\_set (7 images).
 FPR95 is the share of OOD above the score that 95\,\% of ID exceed.
 The best of a column is bold.}
\label{tab:resnet50}
\footnotesize
\setlength{\tabcolsep}{3pt}
\renewcommand{\arraystretch}{1}
\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%
\begin{tabular}{lrrrrrr}
\toprule
 & \multicolumn{2}{c}{SUN} & \multicolumn{2}{c}{my\_set} & \multicolumn{2}{c}{average} \\
\cmidrule(lr){2-3} \cmidrule(lr){4-5} \cmidrule(lr){6-7}
Method & FPR95$\downarrow$ & AUROC$\uparrow$ & FPR95$\downarrow$ & AUROC$\uparrow$
 & FPR95$\downarrow$ & AUROC$\uparrow$ \\
\midrule
lhact & \textbf{16.12} & \textbf{97.99} & \textbf{7.65} & \textbf{88.11}
 & \textbf{11.89} & \textbf{93.05} \\
\quad published & $16.87$ & $96.18$ & -- & -- & $21.85$ & $95.42$ \\
\quad difference & $-0.75$ & $+1.81$ & -- & -- & $-9.96$ & $-2.37$ \\
\addlinespace
msp & $33.33$ & $66.67$ & $100.00$ & $0.00$ & $66.67$ & $33.00$ \\
\bottomrule
\end{tabular}}
\end{table}
"""


@pytest.mark.parametrize("kind", TABLES)
def test_the_whole_text(kind):
    """The difference is ours minus theirs, of numbers that are not rounded, with its sign; findings
    stand above the numbers, the values used below."""
    findings = ("no resize: resize 0", "top-1 is 67.60 %")
    text = formatted(kind, result_of(LHACT, MSP, findings=findings, selected_on="gaussian"))
    above, _, below = TABLE.split("\n\n")
    if kind == "table":
        assert text == TABLE
    elif kind == "markdown":
        notes = "".join(f"- {line}\n" for line in below.splitlines())
        assert text == f"{above}\n\n{MARKDOWN}\n{notes}"
    else:  # lines of this file that begin with a space go on
        notes = "".join(f"% {line}\n" for line in (above + "\n" + below).splitlines())
        assert text == notes + re.sub(r"\n (?!& \\mul)", " ", LATEX)


def test_no_published_lines_where_nothing_is_published():
    text = formatted("table", result_of(MSP))
    assert "published" not in text
    assert "difference" not in text


@pytest.mark.parametrize("metrics", [["fpr95"], ["auroc"], ["auroc", "fpr95"]], ids=" ".join)
def test_published_numbers_follow_the_choice_of_metrics(metrics):
    rows = rows_by_label(formatted("table", RESULT, metrics=metrics))
    numbers = {"fpr95": ("16.12", "16.87", "-0.75"), "auroc": ("97.99", "96.18", "+1.81")}
    for label, place in (("lhact", 0), ("published", 1), ("difference", 2)):
        assert rows[label][0] == " / ".join(numbers[metric][place] for metric in metrics)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("others", [[], ["auroc"], ["fpr95"]], ids=" ".join)
def test_no_published_number_beside_the_ood_positive_fpr95(kind, others):
    text = formatted(kind, RESULT, metrics=["fpr95_ood_positive", *others])
    assert "44.44" in text
    assert "FPR95 (OOD positive)" in text
    hidden = ("16.87", "96.18", "21.85", "95.42", "difference", "LHAct, Table 6")
    assert not [word for word in hidden if word in text]
    caption = r"FPR95 (OOD positive) is the share of ID below the score that catches 95\,\% of OOD."
    assert (caption in text) is (kind == "latex")


def test_the_heading_says_what_is_not_known_and_the_convention_of_the_metrics_alone():
    network = dataclasses.replace(NETWORK, weights=None, checkpoint="mine.pth")
    info = dataclasses.replace(INFO, network=network, accuracy=None)
    text = formatted("table", result_of(MSP, info=info), metrics=["auroc", "aupr_ood"])
    origin, metrics, _ = text.split("\n", 2)
    assert origin.endswith(
        ", resnet50 mine.pth, fp32; ID: 50,000 images, top-1 unknown (no labels)"
    )
    assert metrics == "AUROC / AUPR (OOD positive) in %; a higher score means ID"


def test_the_best_of_a_column_is_bold_as_it_is_shown():
    """Of two that look the same both are; the best of one method alone means nothing."""
    like = method("msp", row("SUN", 16.1234, 200 / 3), *MSP.rows[1:])
    metrics = ["fpr95", "auroc", "fpr95_ood_positive"]
    markdown = formatted("markdown", result_of(LHACT, like), metrics=metrics)
    assert "| lhact | **16.12**/**97.99**/**44.44** | **7.65**/**88.11**/**44.44** |" in markdown
    assert "| msp | **16.12**/66.67/**44.44** | 100.00/0.00/**44.44** |" in markdown
    assert "**" not in formatted("markdown", result_of(LHACT))
    assert "textbf" not in formatted("latex", result_of(LHACT))


@pytest.mark.parametrize("metrics", [["fpr95", "auroc"], ["fpr95_ood_positive"]], ids=" ".join)
def test_csv_reads_back_unrounded(metrics):
    rows = list(csv.DictReader(io.StringIO(formatted("csv", RESULT, metrics=metrics))))
    wanted = [(part, line) for part in RESULT.methods for line in part.rows]
    for found, (part, line) in zip(rows, wanted, strict=True):
        assert (found["method"], found["dataset"]) == (part.method, line.dataset)
        numbers = {"images": line.images, **line.metrics}
        assert {key: float(found[key]) for key in numbers} == numbers
        known = vars(line.published) if line.published else dict.fromkeys(("fpr95", "source"), "")
        assert {key: found[f"published_{key}"] for key in known} == {
            key: str(value) for key, value in known.items()
        }
        parameters = dict(part.split("=") for part in found["parameters"].split())
        assert {key: float(value) for key, value in parameters.items()} == part.parameters


def not_json(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_json_is_the_result_that_any_tool_can_read():
    """--set lhact.high=inf is accepted; Infinity is not JSON (RFC 8259)."""
    result = result_of(lhact(*LHACT.rows, high=math.inf), baseline=MSP, findings=("one",))
    text = formatted("json", result, metrics=["auroc"])
    read = json.loads(text, parse_constant=not_json)
    assert text == json.dumps(read, indent=2) + "\n"
    assert read["results"][0] == {
        "method": "lhact",
        "parameters": {**ORDER, "high": "inf"},
        "dataset": "SUN",
        "images": 10_000,
        "fpr95": 16.123456,
        "auroc": 97.987654,
        "aupr_id": 91.125,
        "aupr_ood": 71.375,
        "fpr95_ood_positive": 44.4375,
        "threshold": 0.5,
        "published": {"fpr95": 16.87, "auroc": 96.18, "source": "LHAct, Table 6"},
        "benchmark": "imagenet",
        "name": "resnet50",
        "network": "resnet50",
        "weights": "IMAGENET1K_V1",
    }
    assert [len(read[name]) for name in ("results", "baseline")] == [3, 3]
    assert read["id"] == {"images": 50_000, "accuracy": 76.13}
    assert read["network"]["sha256"] == "ab"
    assert (read["findings"], read["selected_on"]) == (["one"], None)


# One method with several parameters


def varied(*parameters):
    return [
        lhact(row("SUN", number, 90), row("average", number, 90), **changed)
        for number, changed in enumerate(parameters, 1)
    ]


def labels(*methods):
    text = formatted("markdown", result_of(*methods))
    return [label for label, *_ in cells(text)][1:]


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
    assert labels(*varied(*parameters)) == shown


def test_the_star_is_the_lowest_average_fpr95_and_says_what_it_was_chosen_on():
    """The best cell of a sweep on the test sets is labelled as what it is; another method between
    does not matter."""
    first, *others = (
        lhact(row("SUN", fpr95, auroc), row("average", mean, auroc), order=order)
        for order, fpr95, mean, auroc in ((2, 1, 50, 99), (3, 9, 40, 50), (4, 5, 45, 60))
    )
    between = method("msp", row("SUN", 1, 1), row("average", 1, 1))
    methods = (first, between, *others)
    assert labels(*methods) == ["lhact order=2", "msp", "lhact order=3 *", "lhact order=4"]
    honest = "*: lowest average FPR95 of that method's settings, chosen on these very test sets"
    assert honest in formatted("table", result_of(*methods), metrics=["auroc"])


# The baseline


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ((20, 95), "FPR95 20.00 against 30.00 (better), AUROC 95.00 against 92.00 (better)"),
        ((40, 91), "FPR95 40.00 against 30.00 (worse), AUROC 91.00 against 92.00 (worse)"),
        ((30, 93), "FPR95 30.00 against 30.00 (the same), AUROC 93.00 against 92.00 (better)"),
    ],
)
def test_comparison_with_the_baseline_is_honest(ours, words):
    plain = method("energy", row("SUN", 1, 99), row("average", 30, 92))
    ours = lhact(row("SUN", 99, 1), row("average", *ours))
    text = formatted("table", result_of(ours, baseline=plain))
    assert f"\nlhact against plain energy on average: {words}\n" in text
    assert rows_by_label(text)["energy"] == ["1.00 / 99.00", "30.00 / 92.00"]


# Ties, and texts from elsewhere


def test_tied_scores_get_a_remark_and_never_a_star_nor_bold_print():
    """All scores the same: FPR95 0.00, the best there is, and worth nothing."""

    def react(high, fpr95, auroc, tied):
        rows = (row(name, fpr95, auroc, tied=tied) for name in ("SUN", "average"))
        return method("react", *rows, high=high)

    constant, honest = react(0, 0, 50, 100.0), react(1, 40, 80, 0.0)
    assert labels(constant, react(1, 40, 80, 2.0)) == ["react high=0", "react high=1"]
    result = result_of(constant, honest)
    (remark,) = remarks(result)
    assert remark.startswith("react high=0: 100 % of the images of a set score just the threshold")
    text = formatted("markdown", result, metrics=["fpr95"])
    assert remark in text
    assert "| react high=0 | 0.00 | 0.00 |" in text
    assert "| react high=1 * | **40.00** | **40.00** |" in text
    plain = method("energy", row("SUN", 30, 92), row("average", 30, 92))
    text = formatted("table", result_of(constant, baseline=plain))
    assert "FPR95 0.00 against 30.00 (not to be compared)" in text
    assert "better" not in text


@pytest.mark.parametrize("kind", TABLES)
def test_texts_from_a_cache_reach_no_terminal_and_no_tex_as_they_are(kind):
    hostile = "\x1b[2J\\immediate\\write18{id}\n$x^2$~#%&_"
    network = dataclasses.replace(NETWORK, weights=None, checkpoint=hostile, arch=hostile)
    info = dataclasses.replace(INFO, network=network, precision=hostile)
    methods = varied({"high_percentile": 95}, {"high_percentile": 96})
    text = formatted(kind, result_of(*methods, info=info), metrics=["fpr95"])
    assert "\x1b" not in text
    if kind == "latex":
        code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
        assert "write18{" not in code
        assert r"lhact high\_percentile=95" in code
        texts = re.sub(r"\$\\\w+\$|\$[\d.]+\$|\{%$", "", code, flags=re.MULTILINE)
        assert not re.search(r"(?<!\\)[_%#$^~]", texts)  # but for the mathematics


def test_no_cell_of_a_csv_is_a_formula():
    names = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"]
    result = result_of(lhact(*(row(name, 1, 2) for name in names)))
    lines = csv.DictReader(io.StringIO(formatted("csv", result)))
    assert [line["dataset"] for line in lines] == [f"'{name}" for name in names]


# Intervals


def sure(dataset, numbers, fpr95, auroc, differences=MappingProxyType({})):
    """A row with the ends of its intervals and, by metric, (difference, low, high)."""
    first = {metric: values[0] for metric, values in differences.items()}
    ends = {metric: values[1:] for metric, values in differences.items()}
    known = Uncertainty({"fpr95": fpr95, "auroc": auroc}, first, ends)
    return row(dataset, *numbers, uncertainty=known)


# msp's difference is beyond the noise in FPR95 alone on SUN; my_set has no intervals.
FIRST = lhact(
    sure("SUN", (39.42, 89.89), (33.51, 47.7), (87.75, 91.73)),
    row("my_set", 7.65, 88.11),
    sure("average", (30.5, 80.25), (30, 31.25), (80, 81)),
)
ON_SUN = {"fpr95": (25.31, 12.96, 33.5), "auroc": (0.63, -1.22, 2.52)}
ON_ALL = {"fpr95": (51.8, 51.0, 52.0), "auroc": (-34.99, -35.5, -34.0)}
SECOND = method(
    "msp",
    sure("SUN", (64.73, 90.52), (54.45, 72.26), (88.02, 92.75), ON_SUN),
    row("my_set", 100, 0),
    sure("average", (82.3, 45.26), (82, 83), (45, 46), ON_ALL),
)
RESAMPLED = result_of(FIRST, SECOND, bootstrap=Bootstrap(1000, 3))


def test_table_has_the_ends_below_each_number():
    assert cells(formatted("table", RESAMPLED))[1:] == [
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


def test_markdown_has_the_intervals_in_lines_of_their_own():
    rows = cells(formatted("markdown", RESAMPLED, metrics=["auroc"]))
    assert rows[2] == ["95 % interval", "[87.75, 91.73]", "-", "[80.00, 81.00]"]
    assert rows[5:] == [
        ["minus lhact", "+0.63", "-", "-34.99†"],
        ["95 % interval", "[-1.22, +2.52]", "-", "[-35.50, -34.00]"],
    ]


def test_latex_has_the_ways_to_the_ends():
    """lhact on SUN: 39.42, from 33.51 to 47.70."""
    text = formatted("latex", RESAMPLED, metrics=["fpr95"])
    assert r"lhact & $\mathbf{39.42}^{+8.28}_{-5.91}$ & \textbf{7.65} & " in text
    assert r"msp & $64.73^{+7.53}_{-10.28}$ & $100.00$ & " in text
    assert r"\quad minus lhact & $+25.31^{+8.19}_{-12.35}{}^{\dagger}$ & -- & " in text
    assert r"Super- and subscripts lead to the ends of 95\,\% intervals (1,000 resamples" in text
    assert r"$\dagger$: the interval of the difference from lhact excludes 0." in text
    assert r"\renewcommand{\arraystretch}{1.4}" in text


def test_notes_say_how_the_intervals_came_about():
    """A mark is explained whichever name it stands under."""
    unmarked = dataclasses.replace(result_of(LHACT, name="first"), bootstrap=Bootstrap(1000, 3))
    for results in ([RESAMPLED], [unmarked, RESAMPLED]):
        text = formatted("table", *results, metrics=["fpr95"])
        assert "95 % intervals: 1,000 resamples of the images, the same for every method" in text
        assert "(percentile bootstrap, seed 3)" in text
        assert "†: the 95 % interval of the difference from lhact excludes 0" in text
        assert "too small for an interval, with fewer than 20 images: my_set" in text


@pytest.mark.parametrize("ends", [(-1.0, 0.0), (0.0, 2.0), (0.0, 0.0), (-1.0, 1.0)])
def test_no_mark_where_the_interval_holds_zero(ends):
    on_sun = sure("SUN", (64.73, 90.52), (54, 72), (88, 92), {"fpr95": (0.5, *ends)})
    second = method("msp", on_sun, *SECOND.rows[1:])
    result = result_of(FIRST, second, bootstrap=Bootstrap(1000))
    rows = rows_by_label(formatted("table", result, metrics=["fpr95"]))
    assert rows["minus lhact"] == ["+0.50", "-", "+51.80†"]


def test_metrics_without_intervals_have_none():
    text = formatted("table", RESAMPLED, metrics=["aupr_id"])
    assert "% from" not in text
    assert "minus" not in text
    rows = cells(formatted("table", RESAMPLED, metrics=["aupr_id", "auroc"]))
    assert rows[2][:2] == ["95 % from", "- / 87.75"]
    assert rows[7][:2] == ["minus lhact", "- / +0.63"]


def test_a_difference_within_its_interval_is_not_called_better():
    gaps = {"fpr95": (2.0, -1.0, 4.0), "auroc": (-3.0, -4.0, -2.0)}
    ours = lhact(sure("average", (20, 95), (15, 25), (94, 96)))
    plain = method("energy", sure("average", (22, 92), (15, 25), (94, 96), gaps))
    text = formatted("table", result_of(ours, baseline=plain, bootstrap=Bootstrap(100)))
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
    ours = lhact(sure("SUN", (39.456, 90), ends, (80, 99)))
    result = result_of(ours, bootstrap=Bootstrap(100))
    text = formatted("table", result, metrics=["fpr95"], decimals=None)
    assert rows_by_label(text)["lhact"] == [shown]


def test_automatic_digits_are_a_columns_and_a_metrics_own():
    """Those of the narrowest interval of the column; none for a set that is too small for one."""
    wide = lhact(sure("SUN", (39.42, 89.89), (34, 44), (85, 95)), *FIRST.rows[1:])
    on_sun = sure("SUN", (64.73, 90.52), (38.6, 39.4), (85, 95), ON_SUN)
    result = result_of(wide, method("msp", on_sun, *SECOND.rows[1:]), bootstrap=Bootstrap(1000))
    text = formatted("table", result, metrics=["fpr95", "auroc", "aupr_id"], decimals=None)
    shown = ["39.4 / 90 / 91.12", "8 / 88 / 91.12", "30.5 / 80.2 / 91.12"]
    assert rows_by_label(text)["lhact"] == shown


# Several names


def test_several_names_in_one_table_with_a_column_for_the_name():
    """A set that one of them lacks stands before the averages, as unknown."""
    fewer = method("msp", row("other", 1, 2), row("average", 3, 4))
    both = [result_of(MSP, name="first"), result_of(fewer, name="b")]
    for kind in ("table", "markdown"):
        assert cells(formatted(kind, *both, metrics=["fpr95"])) == [
            ["name", "method", "SUN", "my_set", "other", "average"],
            ["first", "msp", "33.33", "100.00", "-", "66.67"],
            ["b", "msp", "-", "-", "1.00", "3.00"],
        ]
    latex = formatted("latex", *both, metrics=["fpr95"])
    assert r" & & \multicolumn{1}{c}{SUN} & " in latex
    assert r"b & msp & -- & -- & $1.00$ & $3.00$ \\" in latex
    assert r"\cmidrule(lr){3-3}" in latex
    assert r"\begin{tabular}{llrrrr}" in latex
    assert "first: imagenet, resnet50 IMAGENET1K_V1" in latex
    assert "b: imagenet, resnet50 IMAGENET1K_V1" in latex


def test_json_and_csv_of_several_names():
    network = dataclasses.replace(NETWORK, weights=None, checkpoint="=mine.pth")
    other = dataclasses.replace(INFO, network=network)
    both = [result_of(LHACT, name="a"), result_of(MSP, name="b", info=other)]
    alone = [json.loads(formatted("json", one)) for one in both]
    assert json.loads(formatted("json", *both)) == alone
    rows = list(csv.DictReader(io.StringIO(formatted("csv", *both))))
    origins = [(r["benchmark"], r["name"], r["network"], r["weights"]) for r in rows]
    assert origins[:3] == [("imagenet", "a", "resnet50", "IMAGENET1K_V1")] * 3
    assert origins[3:] == [("imagenet", "b", "resnet50", "'=mine.pth")] * 3


def test_mean_and_standard_deviation_over_names():
    """Of 10, 12 and 20: 14 and the root of 28; nothing is the best standard deviation."""
    parts = []
    for name, fpr95 in (("a", 10.0), ("b", 12.0), ("c", 20.0)):
        network = dataclasses.replace(NETWORK, weights=None, checkpoint=f"{name}.pth")
        info = dataclasses.replace(INFO, network=network, accuracy=fpr95)
        ours = lhact(row("SUN", fpr95, 90.0), row("average", fpr95, 90.0), low=fpr95)
        other = method("msp", row("SUN", 50.0, 80.0), row("average", 50.0, 80.0))
        parts.append(result_of(ours, other, name=name, info=info))
    mean, std = mean_and_deviation(parts)
    assert mean.methods[0].average.metrics["fpr95"] == 14.0
    assert std.methods[0].average.metrics["fpr95"] == pytest.approx(28**0.5)
    assert std.methods[1].average.metrics["auroc"] == 0.0
    assert mean.methods[0].parameters == {"high": ORDER["high"], "order": 2}
    assert (mean.about.info.accuracy, mean.about.info.network.arch) == (14.0, "resnet50")
    assert mean.about.info.network.checkpoint is None
    assert mean.to_json()["over"] == ["a", "b", "c"]
    text = formatted("markdown", *parts, mean, std)
    assert cells(text)[-4:] == [
        ["mean", "lhact", "14.00/90.00", "14.00/90.00"],
        ["mean", "msp", "50.00/80.00", "50.00/80.00"],
        ["std", "lhact", "5.29/0.00", "5.29/0.00"],
        ["std", "msp", "0.00/0.00", "0.00/0.00"],
    ]
    assert "| mean | lhact | **14.00**/**90.00** |" in text
    assert "std: over a, b, c; n - 1" in text
    latex = formatted("latex", *parts, mean, std)
    assert "std: standard deviation over the names." in latex


def test_no_mean_over_names_that_differ():
    mine, other = result_of(LHACT, MSP, name="mine"), result_of(LHACT, name="other")
    with pytest.raises(BadMethod, match=r"the same methods and sets .*; mine and other differ"):
        mean_and_deviation([mine, other])
