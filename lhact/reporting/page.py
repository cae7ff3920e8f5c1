"""A result and its scores in, one HTML page out that needs no other file: tables, pictures, and the
images that are most confidently wrong.

Nothing is loaded from elsewhere, every text from outside is escaped, and the page is complete
without its script, which only sorts tables.
"""

import base64
import hashlib
import html
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

import lhact
from lhact.evaluation.metrics import METRICS
from lhact.evaluation.predictions import Predictions
from lhact.evaluation.results import Result, Row
from lhact.evaluation.score import MethodScores
from lhact.evaluation.uncertainty import RESAMPLED, Bootstrap, Interval
from lhact.methods.compose import DEFAULT_SCORE
from lhact.records import SetInfo
from lhact.reporting.lines import (
    COMPARABLE,
    LOWER_IS_BETTER,
    TITLES,
    Table,
    View,
    id_text,
    labelled,
    labels,
    network_text,
    selection,
    uncertainty,
    values_text,
    warnings,
)
from lhact.reporting.markup import Cell, facts, image, list_of, table, text, words
from lhact.reporting.page_style import SCRIPT, STYLE
from lhact.reporting.thumbnails import NoThumbnail, Place, thumbnail

# Thumbnails of each set, and of the whole page; one takes some 8 kB.
MOST_PER_SET, MOST_THUMBNAILS = 8, 160
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Parts:
    """What stands on the page beside the result.

    command: the one that was given. metrics: of the first table. remarks: what a reader must know.
    sets: by name, as cached. places: of those that were scored, where their images lie.
    class_names: of the network's classes in order; empty where they are not known. pictures: (name,
    SVG or PNG).
    """

    command: str
    metrics: Sequence[str]
    remarks: Sequence[str]
    sets: Mapping[str, SetInfo]
    places: Mapping[str, Place]
    predictions: Predictions
    class_names: Sequence[str] = ()
    pictures: Sequence[tuple[str, bytes]] = ()


def page(result: Result, scored: Sequence[MethodScores], parts: Parts) -> str:
    """The page as HTML. scored: for each method in the order of the result."""
    about = result.about
    title = text(f"{about.benchmark} / {about.name}: out-of-distribution detection")
    subtitle = text(f"{network_text(result)}, {about.info.precision}. {id_text(result)}.")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(STYLE)}; "
        f"script-src {_hash(SCRIPT)}; base-uri 'none'; form-action 'none'"
    )
    sections = {
        "results": ("Results", _results(result, parts)),
        "pictures": ("Pictures", _pictures(parts.pictures)),
        "wrong": ("Most confidently wrong images", _wrong(result, scored, parts)),
        "made": ("How this page was made", _made(result, parts)),
    }
    remarks = [*parts.remarks, *selection(result)]
    links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, (name, _) in sections.items())
    body = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{name}</h2>\n{content}\n</section>\n'
        for key, (name, content) in sections.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="lead">{subtitle}</p>
{list_of(warnings(result), "findings")}{list_of(remarks, "remarks")}
<nav aria-label="On this page"><ul>{links}</ul></nav>
</header>
<main>
{body}</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _hash(content: str) -> str:
    """What lets exactly this inline script or style be used, and none that a name smuggled in."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


# ---- tables ----

Rows = Sequence[tuple[str, Row]]  # each with the label of its method


def _number(value: float, metric: str = "", form: str = ".2f") -> Cell:
    return Cell(f"{value:{form}}", value, lowest_first=metric in LOWER_IS_BETTER)


def _results(result: Result, parts: Parts) -> str:
    named = labelled(result)
    rows = [(label, row) for label, method in named for row in method.rows]
    sentences = ["The title of a column sorts by it."]
    if len(named) > 1:
        sentences.append("In bold the best of each column, without methods whose scores are tied.")
    if len({method.method for _, method in named}) < len(named):
        sentences.append("The best of a method's settings is chosen on these very test sets.")
    return "\n".join(
        (
            main_table(result, parts.metrics),
            _interval_table(rows, result.bootstrap) if result.bootstrap else "",
            f"<p>{' '.join(sentences)}</p>",
            _published_table(rows),
            f"<details><summary>All metrics and thresholds</summary>{_long_table(rows)}</details>",
        )
    )


def main_table(result: Result, metrics: Sequence[str]) -> str:
    """Methods by sets; the best of each column stands out."""
    content = Table([result], View(metrics))
    own = (line for line in content.lines if not line.indented)
    rows = []
    for label, line in zip(labels(result), own, strict=True):
        values = [(v, m) for cell in line.cells for v, m in zip(cell, metrics, strict=True) if v]
        cells = [Cell(v.text, v.number, v.best, m in LOWER_IS_BETTER) for v, m in values]
        rows.append((label, cells))
    sizes, titles = content.set_sizes, [TITLES[metric] for metric in metrics]
    groups = [f"{set} ({sizes[set]:,})" if set in sizes else set for set in content.columns]
    return table(
        f"{' and '.join(titles)} in %, by OOD set (images)",
        ["method", *titles * len(groups)],
        rows,
        [(group, len(metrics)) for group in groups],
    )


def _table_of_rows(caption: str, rows: Rows, cells: Callable[[Row], dict[str, Cell]]) -> str:
    """A table with a line for each method and set. cells: title of a column -> the row's cell."""
    columns = ["method", "set", *cells(rows[0][1])]
    lines = [(label, [words(row.dataset), *cells(row).values()]) for label, row in rows]
    return table(caption, columns, lines)


def _published_table(rows: Rows) -> str:
    def cells(row: Row) -> dict[str, Cell]:
        found, published = {}, vars(row.published)
        for metric in COMPARABLE:
            title, ours, theirs = TITLES[metric], row.metrics[metric], published[metric]
            found[title] = _number(ours, metric)
            found[f"{title} published"] = _number(theirs, metric)
            found[f"{title} difference"] = _number(ours - theirs, metric, "+.2f")
        return {**found, "source": words(published["source"])}

    known = [(label, row) for label, row in rows if row.published]
    if not known:
        return ""
    return "<h3>Beside the published numbers</h3>" + _table_of_rows(
        "Ours, the published numbers, and ours minus published, in % and points", known, cells
    )


def _long_table(rows: Rows) -> str:
    return _table_of_rows(
        "All metrics in %, and the threshold: the score that keeps 95 % of ID",
        rows,
        lambda row: {
            "images": _number(row.images, form=","),
            **{TITLES[metric]: _number(row.metrics[metric], metric) for metric in METRICS},
            "threshold": _number(row.threshold, form=".6g"),
        },
    )


def _interval_table(rows: Rows, bootstrap: Bootstrap) -> str:
    def cell(value: float, ends: Interval | None, metric: str) -> Cell:
        known = "{:.2f} ({:.2f} to {:.2f})".format(value, *ends) if ends else ""
        return Cell(known, value, lowest_first=metric in LOWER_IS_BETTER)

    def cells(row: Row) -> dict[str, Cell]:
        found, sure = {}, uncertainty(row)
        for metric in RESAMPLED:
            title, difference = TITLES[metric], sure.differences.get(metric, math.inf)
            found[title] = cell(row.metrics[metric], sure.intervals.get(metric), metric)
            found[f"{title}, less {rows[0][0]}"] = cell(
                difference, sure.difference_intervals.get(metric), metric
            )
        return found

    return _table_of_rows(
        f"95 % intervals of {bootstrap.resamples:,} resamples of the images, the same for every "
        "method",
        rows,
        cells,
    )


# ---- pictures ----


def _pictures(pictures: Sequence[tuple[str, bytes]]) -> str:
    if not pictures:
        return (
            "<p>None were made. They need matplotlib: <code>pip install 'lhact[plots]'</code></p>"
        )
    return "\n".join(
        f"<figure>{image(content, 'png' if content.startswith(PNG) else 'svg+xml', name)}"
        f"<figcaption>{text(name)}</figcaption></figure>"
        for name, content in pictures
    )


def most_wrong(scores: np.ndarray, dataset: str, count: int) -> list[int]:
    """The rows that are most confidently wrong: of the ID set those with the lowest scores, of any
    other set those with the highest; the first of equal ones first.

    scores: (images,), higher = more in-distribution.
    """
    order = np.argsort(scores if dataset == "id" else -scores, kind="stable")
    return order[:count].tolist()


def _wrong(result: Result, scored: Sequence[MethodScores], parts: Parts) -> str:
    """The images of the first method, and of plain energy where that is another."""
    named = list(zip(labels(result), result.all_methods, scored, strict=True))
    chosen = named[:1] + [part for part in named[1:] if part[1].method == DEFAULT_SCORE][:1]
    sets = list(scored[0].scores)
    sets = [*(name for name in sets if name != "id"), "id"]
    count = max(1, min(MOST_PER_SET, MOST_THUMBNAILS // (len(chosen) * len(sets))))
    blocks = [
        "<p>OOD images that look most in-distribution by their score, and ID images that look "
        "least so. Below each stand its score, the class that the network predicts without a "
        "rectifier, with its softmax probability, and its name in the cache. Thumbnails show whole "
        "images, not the crop that the network sees.</p>"
    ]
    notes = {_shown_name(name): parts.places[name].note for name in sets}
    blocks.append(list_of((f"{name}: {note}" for name, note in notes.items() if note), "remarks"))
    for position, (label, method, scores) in enumerate(chosen):
        threshold = method.average.threshold
        inner = "".join(_wrong_set(name, scores.scores[name], count, parts) for name in sets)
        opened = " open" if position == 0 else ""
        blocks.append(
            f"<details{opened}><summary><h3>By {text(label)}</h3></summary>"
            f"<p>The score that keeps 95 % of ID is {threshold:.6g}.</p>{inner}</details>"
        )
    return "\n".join(blocks)


def _wrong_set(dataset: str, scores: np.ndarray, count: int, parts: Parts) -> str:
    rows = most_wrong(scores, dataset, count)
    which = "lowest" if dataset == "id" else "highest"
    figures = "".join(_figure(dataset, row, float(scores[row]), parts) for row in rows)
    title = text(_shown_name(dataset))
    return f'<h4>{title}: {which} scores</h4><div class="wrong">{figures}</div>'


def _shown_name(dataset: str) -> str:
    return "ID" if dataset == "id" else dataset


def _figure(dataset: str, row: int, score: float, parts: Parts) -> str:
    info, predictions = parts.sets[dataset], parts.predictions
    path, folder = info.paths[row], parts.places[dataset].folder
    if folder is None:
        picture = ""
    else:
        try:
            picture = image(thumbnail(folder, path), "jpeg", f"{_shown_name(dataset)} image {path}")
        except NoThumbnail as error:
            picture = f'<p class="gone">{text(error)}</p>'
    predicted = _class(int(predictions.classes[dataset][row]), parts)
    label = f"<br>label: {_class(info.labels[row], parts)}" if info.labels else ""
    return (
        f"<figure>{picture}<figcaption><b>{score:#.4g}</b> {predicted} "
        f"({predictions.probability[dataset][row]:.0%}){label}<br>"
        f'<span class="path">{text(path)}</span></figcaption></figure>'
    )


def _class(number: int, parts: Parts) -> str:
    return text(parts.class_names[number] if parts.class_names else f"class {number}")


# ---- how it was made ----


def _made(result: Result, parts: Parts) -> str:
    info = result.about.info
    now = {
        "lhact": lhact.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    parameters = {
        label: values_text(method.parameters) or "-" for label, method in labelled(result)
    }
    network = {key: value for key, value in info.network.to_json().items() if value is not None}
    preprocessing = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in info.preprocessing.to_json().items()
    }
    sets = [
        (
            name,
            [
                _number(part.images, form=","),
                words("yes" if part.labels else "no"),
                Cell(part.fingerprint[:16], part.fingerprint),
            ],
        )
        for name, part in parts.sets.items()
    ]
    found = {"at the extraction": info.versions, "at the evaluation": now}
    versions = [
        (name, [Cell(str(v.get(name, "-")), str(v.get(name, ""))) for v in found.values()])
        for name in dict.fromkeys([*info.versions, *now])
    ]
    return "\n".join(
        (
            f"<pre><code>{text(parts.command)}</code></pre>",
            "<h3>Parameters</h3>",
            facts(parameters),
            "<h3>Network</h3>",
            facts({**network, "precision": info.precision, "device": info.device or "-"}),
            "<h3>Preprocessing</h3>",
            facts(preprocessing),
            "<h3>Image sets</h3>",
            table("Image sets of the cache", ["set", "images", "labels", "fingerprint"], sets),
            "<h3>Versions</h3>",
            table("Versions of libraries", ["library", *found], versions),
        )
    )
