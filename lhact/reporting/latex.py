"""A result in, a LaTeX table out."""

from lhact.evaluation.results import Result
from lhact.messages import shown
from lhact.reporting.lines import View, columns, heading, lines, notes

TEX = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    **{character: "\\" + character for character in "_%&#${}"},
}


def _tex(text: str) -> str:
    return "".join(TEX.get(character, character) for character in shown(text))


def latex(result: Result, view: View) -> str:
    """A tabular of the booktabs package."""
    names = columns(result)
    body = []
    for line in lines(result, view):
        cells = [
            "/".join(v.text if v else "-" for v in cell) if any(cell) else "-"
            for cell in line.cells
        ]
        body.append(" & ".join([_tex(line.label), *cells]) + r" \\")
    text = [
        *(f"% {line}" for line in (*heading(result, view), *notes(result, view))),
        rf"\begin{{tabular}}{{l{'r' * len(names)}}}",
        r"\toprule",
        " & ".join(["method", *map(_tex, names)]) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(text) + "\n"
