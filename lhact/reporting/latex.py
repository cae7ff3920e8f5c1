"""Results in, a LaTeX table out, set as papers set it: each set over its metrics, the best of a
column bold. The document needs the packages booktabs and graphicx."""

import re
from collections.abc import Sequence

from lhact.evaluation.results import STD, Result
from lhact.evaluation.uncertainty import LEVEL
from lhact.messages import shown
from lhact.reporting.lines import (
    LOWER_IS_BETTER,
    TITLES,
    Value,
    View,
    blocks,
    columns,
    heading,
    labels,
    notes,
    set_sizes,
)

TEX = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: "\\" + character for character in "_%&#${}"},
}
# Narrower than TITLES, for a column of numbers.
SHORT = {
    "aupr_id": "AUPR-In",
    "aupr_ood": "AUPR-Out",
    "fpr95_ood_positive": "FPR95 (OOD)",
}


def _tex(text: str) -> str:
    return "".join(TEX.get(character, character) for character in shown(text))


def latex(results: Sequence[Result], view: View) -> str:
    """A table environment, no wider than the text."""
    names, count = columns(results), len(view.metrics)
    several = len(results) > 1
    spans = [(2 + several + i * count, 1 + several + (i + 1) * count) for i in range(len(names))]
    below = [rf"{SHORT.get(m, TITLES[m])}{_arrow(m)}" for m in view.metrics] * len(names)
    named = blocks(results, view)
    shown_lines = [line for _, line in named]
    # Super- and subscripts of neighbouring rows must not touch.
    stretch = 1.4 if any(line.has_intervals for line in shown_lines) else 1
    body: list[str] = []
    for number, line in enumerate(shown_lines):
        cells = [_number(value) for cell in line.cells for value in cell]
        if number and not line.indented and shown_lines[number - 1].indented:
            body.append(r"\addlinespace")
        elif number and named[number][0] != named[number - 1][0]:
            body.append(r"\midrule")
        label = r"\quad " * line.indented + _tex(line.label)
        body.append(" & ".join([*[_tex(named[number][0])] * several, label, *cells]) + r" \\")
    text = [
        *(f"% {line}" for line in (*heading(results, view), *notes(results, view))),
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table}[t]",
        r"\centering",
        r"\setlength{\belowcaptionskip}{5pt}",
        rf"\caption{{{_caption(results, view)}}}",
        rf"\label{{tab:{re.sub('[^A-Za-z0-9]+', '-', results[0].about.name)}}}",
        r"\footnotesize",
        r"\setlength{\tabcolsep}{3pt}",
        rf"\renewcommand{{\arraystretch}}{{{stretch}}}",
        # Shrinks what is too wide, and leaves the rest at its size.
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{'l' * several}l{'r' * (count * len(names))}}}",
        r"\toprule",
        " &" * several
        + "".join(rf" & \multicolumn{{{count}}}{{c}}{{{_tex(name)}}}" for name in names)
        + r" \\",
        " ".join(rf"\cmidrule(lr){{{first}-{last}}}" for first, last in spans),
        " & ".join([*["Name"] * several, "Method", *below]) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    return "\n".join(text) + "\n"


def _arrow(metric: str) -> str:
    return r"$\downarrow$" if metric in LOWER_IS_BETTER else r"$\uparrow$"


def _number(value: Value | None) -> str:
    """39.42, with the ways to the ends of its interval behind it."""
    if value is None:
        return "--"
    if value.interval is None:
        return rf"\textbf{{{value.text}}}" if value.best else f"${value.text}$"
    low, high = (f"{end - value.number:+.{value.decimals}f}" for end in value.interval)
    number = rf"\mathbf{{{value.text}}}" if value.best else value.text
    mark = r"{}^{\dagger}" * value.marked
    return f"${number}^{{{high}}}_{{{low}}}{mark}$"


def _network(result: Result) -> str:
    network = result.about.info.network
    weights = network.weights or network.checkpoint or "unknown weights"
    return f"{network.arch or 'an unknown network'} ({weights})"


def _caption(results: Sequence[Result], view: View) -> str:
    """Network, sets and convention, and what is to be known of the numbers."""
    result, about = results[0], results[0].about
    networks = dict.fromkeys(_network(part) for part in results if not part.about.over)
    sizes = set_sizes(results)
    sets = [f"{name} ({images:,} images)" if images else name for name, images in sizes.items()]
    metrics = [rf"{_tex(TITLES[metric])}{_arrow(metric)}" for metric in view.metrics]
    texts = [
        f"{_listed(metrics)} in percent for {_tex(_listed(list(networks)))} on "
        f"{_tex(about.benchmark)}: ID {about.info.images:,} images, "
        f"OOD {_tex(_listed(sets))}."
    ]
    if "fpr95" in view.metrics:
        texts.append(r"FPR95 is the share of OOD above the score that 95\,\% of ID exceed.")
    if "fpr95_ood_positive" in view.metrics:
        texts.append(
            r"FPR95 (OOD positive) is the share of ID below the score that catches 95\,\% of OOD."
        )
    values = [value for _, line in blocks(results, view) for cell in line.cells for value in cell]
    if any(value and value.best for value in values):
        texts.append("The best of a column" + " under each name" * (len(results) > 1) + " is bold.")
    if result.bootstrap and any(value and value.interval for value in values):
        texts.append(
            rf"Super- and subscripts lead to the ends of {LEVEL}\,\% intervals "
            f"({result.bootstrap.resamples:,} resamples of the images)."
        )
    if any(part.about.name == STD and part.about.over for part in results):
        texts.append("std: standard deviation over the names.")
    if any(value and value.marked for value in values):
        texts.append(
            rf"$\dagger$: the interval of the difference from {_tex(labels(result)[0])} excludes 0."
        )
    return " ".join(texts)


def _listed(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last
