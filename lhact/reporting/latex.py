"""Results in, a LaTeX table out, set as papers set it: each set over its metrics, the best of a
column bold. The document needs the packages booktabs and graphicx."""

import re
from collections.abc import Sequence

from lhact.evaluation.results import STD, Result
from lhact.evaluation.uncertainty import LEVEL
from lhact.messages import shown
from lhact.reporting.lines import LOWER_IS_BETTER, TITLES, Table, Value, labels

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


def latex(content: Table) -> str:
    """A table environment, no wider than the text."""
    names, metrics, several = content.columns, content.view.metrics, content.several
    count = len(metrics)
    spans = [(2 + several + i * count, 1 + several + (i + 1) * count) for i in range(len(names))]
    below = [rf"{SHORT.get(m, TITLES[m])}{_arrow(m)}" for m in metrics] * len(names)
    # Super- and subscripts of neighbouring rows must not touch.
    stretch = 1.4 if any(line.has_intervals for line in content.lines) else 1
    body: list[str] = []
    for line, above in zip(content.lines, [None, *content.lines], strict=False):
        if above and above.indented and not line.indented:
            body.append(r"\addlinespace")
        elif above and above.name != line.name:
            body.append(r"\midrule")
        label = r"\quad " * line.indented + _tex(line.label)
        cells = [_number(value) for cell in line.cells for value in cell]
        body.append(" & ".join([*[_tex(line.name)] * several, label, *cells]) + r" \\")
    text = [
        *(f"% {line}" for line in (*content.heading, *content.notes)),
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table}[t]",
        r"\centering",
        r"\setlength{\belowcaptionskip}{5pt}",
        rf"\caption{{{_caption(content)}}}",
        rf"\label{{tab:{re.sub('[^A-Za-z0-9]+', '-', content.results[0].about.name)}}}",
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
    origin = result.about.origin
    return f"{origin['network'] or 'an unknown network'} ({origin['weights'] or 'unknown weights'})"


def _caption(content: Table) -> str:
    """Network, sets and convention, and what is to be known of the numbers."""
    result, about = content.results[0], content.results[0].about
    networks = dict.fromkeys(_network(part) for part in content.results if not part.about.over)
    sizes = content.set_sizes.items()
    sets = [f"{name} ({images:,} images)" if images else name for name, images in sizes]
    metrics = [rf"{_tex(TITLES[metric])}{_arrow(metric)}" for metric in content.view.metrics]
    texts = [
        f"{_listed(metrics)} in percent for {_tex(_listed(list(networks)))} on "
        f"{_tex(about.benchmark)}: ID {about.info.images:,} images, "
        f"OOD {_tex(_listed(sets))}."
    ]
    if "fpr95" in content.view.metrics:
        texts.append(r"FPR95 is the share of OOD above the score that 95\,\% of ID exceed.")
    if "fpr95_ood_positive" in content.view.metrics:
        texts.append(
            r"FPR95 (OOD positive) is the share of ID below the score that catches 95\,\% of OOD."
        )
    if any(value.best for value in content.values):
        texts.append("The best of a column" + " under each name" * content.several + " is bold.")
    if result.bootstrap and any(value.interval for value in content.values):
        texts.append(
            rf"Super- and subscripts lead to the ends of {LEVEL}\,\% intervals "
            f"({result.bootstrap.resamples:,} resamples of the images)."
        )
    if any(part.about.name == STD and part.about.over for part in content.results):
        texts.append("std: standard deviation over the names.")
    if any(value.marked for value in content.values):
        texts.append(
            rf"$\dagger$: the interval of the difference from {_tex(labels(result)[0])} excludes 0."
        )
    return " ".join(texts)


def _listed(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last
